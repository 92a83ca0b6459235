"""The kernel with a ring in shared memory, executed on the CPU: what an H100 runs for long requests."""

import ctypes
import dataclasses

import emulator
import numpy as np
import pytest
from cases import Case
from emulator.checks import run
from rings import ring_cases, ring_plan, take_ring

from cupy_fp8kv.jit import tensor_map

CASES = ring_cases(emulator.HOPPER)
FEW = CASES[:: max(1, len(CASES) // 20)]
LONG = Case(group=3, num_kv_heads=2, kv_len=900, window_left=850, kv_lens="device", lens=(880,), sharpness=3.0, seed=4)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_decode(emulate, monkeypatch, case):
    take_ring(monkeypatch, case, emulator.HOPPER)
    run(emulate, case)


def test_the_cases_reach_every_ring():
    plans = [ring_plan(case, emulator.HOPPER) for case in (*FEW, LONG)]
    for what, values in (("heads", {1, 2}), ("ctas_per_sm", {1, 2}), ("warps", {4, 8}), ("subtiles", {1, 2, 4})):
        assert {getattr(one.spec, what) for one in plans} >= values, what
    assert {one.spec.stages for one in plans} >= {3, 4, 5} and {one.splits for one in plans} >= {1, 2, 3}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_any_order_of_threads_gives_the_same_bits(emulate, monkeypatch, seed):
    take_ring(monkeypatch, LONG, emulator.HOPPER)
    first = run(emulate, LONG)
    monkeypatch.setattr(emulate, "seed", seed)
    again = run(emulate, LONG)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_maps_follow_the_addresses_of_a_call(monkeypatch):
    calls = []

    def encode(to, address, *geometry):
        calls.append((address, geometry))
        ctypes.memset(to, address, 128)

    monkeypatch.setattr(tensor_map, "encode_tiled", encode)
    case = Case(batch=3, num_kv_heads=2, kv_len=9)
    spec = ring_plan(case, emulator.HOPPER).spec
    maps = tensor_map.TensorMaps(case.problem, spec)
    to = bytearray(256)
    for k, v in ((16, 32), (16, 32), (48, 64), (16, 32)):
        maps.write(k, v, memoryview(to))
        assert to == bytes([k] * 128 + [v] * 128)
    assert [address for address, _ in calls] == [16, 32, 48, 64]  # encoded once each
    sizes, strides, box, swizzle = calls[0][1]
    assert sizes == (32, 1, 2, 9, 3) and strides == (128, 128, 256, 256 * 9)
    assert box == (32, 1, spec.heads, spec.turn_rows, 1) and swizzle == 3


@pytest.mark.parametrize(
    ("strides", "describable"),
    [
        ((9 * 256, 256, 128), True), ((9 * 256, -256, 128), False), ((0, 256, 128), False), ((2**40, 256, 128), False),
    ],
)  # fmt: skip
def test_a_ring_is_only_taken_for_strides_that_the_copy_engine_knows(strides, describable):
    problem = dataclasses.replace(Case(batch=3, num_kv_heads=2, kv_len=9).problem, k_strides=strides)
    assert problem.can_copy_boxes is describable
