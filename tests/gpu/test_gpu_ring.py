"""The kernel with a ring in shared memory, which the copy engine fills, against the oracle and at full size."""

import cases
import numpy as np
import pytest
from cases import Case
from gpu_support import assert_same_bits, cp, device, to_cupy
from rings import ring_cases, ring_plan, take_ring
from test_gpu_decode import run

import cupy_fp8kv
from cupy_fp8kv import dispatch
from cupy_fp8kv.backends import cuda

pytestmark = pytest.mark.gpu

CASES = ring_cases(cases.H100)
LONG = Case(group=3, num_kv_heads=2, kv_len=30_000, kv_lens="device", lens=(29_900,), sharpness=3.0, seed=4)


@pytest.fixture(autouse=True)
def has_copy_engine():
    if device().arch < 90:
        pytest.skip(f"sm_{device().arch} has no copy engine")
    dispatch._prepared.clear()
    yield
    dispatch._prepared.clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ring(monkeypatch, case):
    take_ring(monkeypatch, case, device())
    run(case)


def test_many_turns_of_the_ring(monkeypatch):
    assert ring_plan(LONG, device()).spec.stages
    take_ring(monkeypatch, LONG, device())
    run(LONG)


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "group", "head_dim", "kv_len"),
    [
        (4, 32, 1, 128, 8192),
        (64, 8, 4, 64, 4096),
        (64, 8, 4, 128, 4096),
        (1, 32, 1, 128, 32768),
        (1, 8, 8, 128, 131072),
    ],
)
def test_as_planned_and_like_registers(monkeypatch, batch, num_kv_heads, group, head_dim, kv_len):
    rng = cp.random.default_rng(0)
    shape = (batch, kv_len, num_kv_heads, head_dim)
    q = rng.standard_normal((batch, group * num_kv_heads, head_dim), dtype=cp.float32).astype(cp.float16)
    k, v = (rng.integers(0, 0x58, shape, dtype=cp.uint8) | rng.integers(0, 2, shape, dtype=cp.uint8) << 7 for _ in "kv")
    if device().sm_count == cases.H100.sm_count:
        assert cupy_fp8kv.explain(q, k, v).plan.spec.stages
    out, lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(q, k, v)
    for _ in range(20):  # a race would show sooner or later
        assert_same_bits(cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, v), out)
    # Given lengths, however equal, the planner stays with registers.
    lens = cp.full(batch, kv_len, cp.int32)
    plain, plain_lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(q, k, v, kv_lens=lens)
    difference = cp.linalg.norm((out - plain).astype(cp.float32)) / cp.linalg.norm(plain.astype(cp.float32))
    assert float(difference) < 5e-4 and float(cp.abs(lse - plain_lse).max()) < 1e-4


def test_caches_take_turns_in_one_graph(monkeypatch):
    """The maps of a launch are those of its own caches, also where a captured graph keeps several launches."""
    case = Case(batch=2, num_kv_heads=2, kv_len=300, group=2)
    take_ring(monkeypatch, case, device())
    caches = [cases.build(Case(batch=2, num_kv_heads=2, kv_len=300, group=2, seed=seed)) for seed in range(3)]
    moved = [arrays.to(to_cupy) for arrays in caches]
    outs = [cp.full((2, 4, 128), cp.nan, cp.float16) for _ in caches]
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        for warm in (True, False):
            if not warm:
                stream.begin_capture()
            for one, out in zip(moved, outs, strict=True):
                cupy_fp8kv.batch_decode_with_padded_kv_cache(one.q.view, one.k.view, one.v.view, out=out)
            if not warm:
                graph = stream.end_capture()
        for out in outs:
            out.fill(cp.nan)
        graph.launch(stream)
        stream.synchronize()
    for one, out in zip(moved, outs, strict=True):
        assert_same_bits(cupy_fp8kv.batch_decode_with_padded_kv_cache(one.q.view, one.k.view, one.v.view), out)
    assert len({np.asarray(cp.asnumpy(out)).tobytes() for out in outs}) == 3
    assert cuda.plan_decode(case.problem, device()).spec.stages
