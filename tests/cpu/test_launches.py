"""What calls of a kind share on their way to a launch: an argument block that is written in parts, and a launch's own
arguments."""

import ctypes
from types import SimpleNamespace

import emulator
import numpy as np
import pytest
from cases import Case, build
from emulator.checks import SPLIT, move
from rings import take_ring

import cupy_fp8kv
from cupy_fp8kv import dispatch
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.jit import launch
from cupy_fp8kv.jit.params import STRUCTS, ParamBlock

decode = cupy_fp8kv.batch_decode_with_padded_kv_cache
WHOLE = Case(group=3, num_kv_heads=2, batch=2, kv_len=50)
RING = Case(group=2, num_kv_heads=2, batch=2, kv_len=300)


# Argument blocks


@pytest.mark.parametrize("cut", range(1, cuda._DECODE_LEADING))
def test_two_writers_write_what_one_pack_does(cut):
    names = [name for name, _ in STRUCTS["DecodeParams"]][2:]
    fixed = dict.fromkeys(names[cuda._DECODE_LEADING :], 7)
    whole, parts = (ParamBlock("DecodeParams", cuda._DECODE_LEADING, **fixed) for _ in range(2))
    values = range(1, cuda._DECODE_LEADING + 1)
    whole.write(*values)
    parts.writer(cut, cuda._DECODE_LEADING - cut)(*values[cut:])
    parts.writer(0, cut)(*values[:cut])
    assert bytes(whole._buffer) == bytes(parts._buffer)


def test_the_parts_of_a_call_are_what_params_declares():
    names = [name for name, _ in STRUCTS["DecodeParams"]][2:]
    assert names[cuda._DECODE_ARRAYS - 3 : cuda._DECODE_ARRAYS] == ["q", "k", "v"]
    rest = names[cuda._DECODE_ARRAYS : cuda._DECODE_LEADING]
    assert rest[cuda._KV_LENS_VALUE] == "kv_lens" and rest[cuda._WINDOW_VALUE] == "window_left"
    assert rest[-1] == "v_scale_stride" and len(rest) == cuda._DECODE_REST


#: Options of calls of one kind, which share a block. None comes first and last.
OPTIONS = [
    {}, {"k_scale": 0.5}, {}, {"sm_scale": 0.25}, {"sm_scale": 64**-0.5}, {}, {"v_scale": -0.0}, {"v_scale": 0.0}, {},
    {"q_scale": 2, "v_scale": np.float32(3.0)}, {"sm_scale": -0.125}, {},
]  # fmt: skip


@pytest.mark.parametrize("case", [WHOLE, SPLIT, RING], ids=["whole", "split", "ring"])
def test_nothing_of_a_call_stays_for_the_next(emulate, monkeypatch, case):
    """Scales, caches and out take turns; each call gives what it gives as the first of its kind."""
    if case is RING:
        take_ring(monkeypatch, case, emulator.HOPPER)
    sets = [build(Case(**{**vars(case), "seed": seed})).to(move) for seed in (1, 2)]
    k_scales = move(np.linspace(0.5, 2.0, case.num_kv_heads).astype(np.float32))
    some = [*OPTIONS, {"k_scale": k_scales}, {}]

    def call(i, options):
        given = sets[i % 2]
        return np.array(decode(given.q.view, given.k.view, given.v.view, **options)).tobytes()

    got = [call(i, options) for i, options in enumerate(some)]
    (prepared,) = dispatch._prepared.values()
    assert bool(prepared.kernels.plan.spec.stages) is (case is RING)
    want = []
    for i, options in enumerate(some):
        dispatch._prepared.clear()
        want.append(call(i, options))
    assert got == want
    assert len(set(got)) > 8, "the options make a difference"


def test_a_plan_runs_between_schedules_and_calls_with_scales(emulate):
    arrays = build(Case(group=3, num_kv_heads=2, batch=2, kv_len=50)).to(move)
    q, k, v = arrays.q.view, arrays.k.view, arrays.v.view
    plan = cupy_fp8kv.DecodePlan(q, k, v, ragged=True)
    out = move(np.zeros(q.shape, np.float16))
    for lens in ([50, 3], [0, 17], [50, 3]):
        plan.schedule(lens)
        want = np.array(decode(q, k, v, kv_lens=lens))
        for _ in range(2):
            assert np.array_equal(plan.run(q, k, v, out=out), want)
            assert np.array_equal(plan.run(q, k, v), want)
            scaled = np.array(plan.run(q, k, v, v_scale=2.0))
            assert np.array_equal(scaled, np.array(decode(q, k, v, kv_lens=lens, v_scale=2.0)))


def test_values_that_cannot_be_packed_are_not_taken_for_those_in_the_block(emulate):
    arrays = build(WHOLE).to(move)
    views = arrays.q.view, arrays.k.view, arrays.v.view
    want = np.array(decode(*views))
    (prepared,) = dispatch._prepared.values()
    rest = prepared.default_rest
    assert rest[8] == prepared.default_scale
    addresses = [0, 0, 1.0, *(view.ctypes.data for view in views)]
    with pytest.raises(Exception, match="required argument is not"):
        prepared.kernels.run(emulator.library, *addresses, (*rest[:8], 9.0, *rest[9:-1], "not a number"))
    assert not prepared.kernels._idle, "a call that failed half written is not made again"
    assert np.array_equal(decode(*views), want)


@pytest.mark.parametrize("case", [WHOLE, RING], ids=["whole", "ring"])
def test_a_call_between_the_writing_and_the_launch_of_another(emulate, monkeypatch, case):
    """As another thread may make it: of the same kind, with other arrays and scales."""
    if case is RING:
        take_ring(monkeypatch, case, emulator.HOPPER)
    sets = [build(Case(**{**vars(case), "seed": seed})).to(move) for seed in (1, 2)]
    first, second = ((given.q.view, given.k.view, given.v.view) for given in sets)
    want, want_between = np.array(decode(*first)), np.array(decode(*second, v_scale=2.0))
    (prepared,) = dispatch._prepared.values()
    (call,) = prepared.kernels._idle
    real, between = call.decode, []

    def start(stream):
        call.decode = real
        between.append(np.array(decode(*second, v_scale=2.0)))
        real.start(stream)

    call.decode = SimpleNamespace(start=start)
    assert np.array_equal(decode(*first), want)
    assert np.array_equal(between, [want_between])
    assert len(prepared.kernels._idle) == 2
    for _ in range(3):  # whichever call is taken
        assert np.array_equal(decode(*first), want)
        assert np.array_equal(decode(*second, v_scale=2.0), want_between)
    assert len(prepared.kernels._idle) == 2


# Launches


@pytest.fixture
def driver(monkeypatch):
    """A driver that notes what it is asked to launch, and answers with ``status``."""
    noted = SimpleNamespace(calls=[], plain=[], status=0)
    address = ctypes.c_void_p

    @ctypes.CFUNCTYPE(ctypes.c_int, address, address, address, address)
    def launch_ex(config, function, params, extra):
        found = launch._Config.from_address(config)
        names = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared", "stream", "attribute_count")
        noted.calls.append((*(getattr(found, name) for name in names), function, params, extra))
        noted.attribute = found.attributes[0].id, found.attributes[0].value
        return noted.status

    monkeypatch.setattr(launch, "driver_function", lambda name, arguments: {"cuLaunchKernelEx": launch_ex}[name])
    monkeypatch.setattr(launch, "launch_kernel", lambda: lambda *arguments: noted.plain.append(arguments))
    monkeypatch.setattr(launch, "device_info", lambda index: SimpleNamespace(arch=90))
    return noted


def test_launches_on_one_stream_and_another(driver):
    params = ParamBlock("ReadParams", len(STRUCTS["ReadParams"]))
    kernel = SimpleNamespace(spec="a kernel", device=0, handle=2**45 + 8, threads=96, shared_bytes=5000)
    early, plain = (launch.Launch(kernel, 17, params, dependent) for dependent in (True, False))
    streams = (0, 2**46, 2**46, 0, 2, 2**46)
    for stream in streams:
        early(stream)
        plain(stream)
    sizes = (17, 1, 1, 96, 1, 1, 5000)
    assert driver.calls == [(*sizes, stream or None, 1, kernel.handle, params.address, None) for stream in streams]
    assert driver.attribute == (6, 1)
    assert driver.plain == [(kernel.handle, *sizes, stream, params.address, 0) for stream in streams]


def test_a_launch_that_fails_says_what_it_was(driver):
    kernel = SimpleNamespace(spec="a kernel", device=0, handle=8, threads=96, shared_bytes=0)
    early = launch.Launch(kernel, 1, ParamBlock("ReadParams", len(STRUCTS["ReadParams"])), True)
    driver.status = 719
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed on a kernel with CUDA driver error 719"):
        early(0)
