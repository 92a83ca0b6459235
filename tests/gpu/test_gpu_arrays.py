"""The array boundary on a GPU: every library in and out, streams, capture and replay, threads."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracle
import pytest
from cases import Case, build
from gpu_support import assert_same_bits, cp, device, poison_pool, spin, to_cupy, to_host, warm_spin

import cupy_fp8kv
from cupy_fp8kv import dispatch
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.jit import compiler

pytestmark = pytest.mark.gpu

decode = cupy_fp8kv.batch_decode_with_padded_kv_cache
decode_lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse

#: One that is not split, one that is and so needs workspace and a second kernel.
WHOLE, SPLIT = Case(group=4, num_kv_heads=2, batch=2, kv_len=60), Case(group=4, num_kv_heads=2, batch=2, kv_len=5000)
BOTH = pytest.mark.parametrize("case", [WHOLE, SPLIT], ids=["whole", "split"])
#: How long a stream is kept busy ahead of the work under test; a call must return in a part of it.
BUSY_MS = 200.0


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return module


@pytest.fixture
def jax():
    module = pytest.importorskip("jax")
    try:
        devices = module.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"this JAX has no GPU backend: {error}")
    return module if devices else pytest.skip("this JAX sees no GPU")


def to_torch(torch, array, typed=None):
    """A host array as a CUDA tensor; uint8 codes as ``typed``, if it is given."""
    if array.dtype == KV_FORMATS["bf16"].dtype:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
    tensor = torch.from_numpy(np.ascontiguousarray(array)).cuda()
    return tensor if typed is None else tensor.view(typed)


def test_the_cases_are_what_they_are_called():
    assert WHOLE.plan(device()).splits == 1 < SPLIT.plan(device()).splits


# Every library, the same bits


@BOTH
@pytest.mark.parametrize(("name", "q"), [("e4m3", "f16"), ("e5m2", "bf16"), ("f16", "f16"), ("bf16", "bf16")])
def test_torch_gives_cupys_bits(torch, case, name, q):
    case = dataclasses.replace(case, k=name, v=name, q=q)
    arrays = build(case)
    want = decode_lse(*map(to_cupy, arrays.host), kv_format=name)
    arrays.check(*map(to_host, want))
    fp8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(name)
    query = to_torch(torch, arrays.host[0])
    native = [to_torch(torch, array, fp8) for array in arrays.host[1:]]
    for caches, options in ((native, {}), ([to_torch(torch, x) for x in arrays.host[1:]], {"kv_format": name})):
        out, lse = decode_lse(query, *caches, **options)
        assert out.is_cuda and out.device == query.device and out.dtype == query.dtype and lse.dtype == torch.float32
        assert_same_bits(out, want[0], "out")
        assert_same_bits(lse, want[1], "lse")


def test_the_documented_example(torch):
    """The issue's first lines, on smaller sizes: torch's own FP8 in, torch's fp16 out."""
    torch.manual_seed(0)
    q = torch.randn(4, 32, 128, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(4, 256, 32, 128, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    out = decode(q, k, v, "NHD", "NONE")
    assert out.shape == (4, 32, 128) and out.dtype == torch.float16 and out.device == q.device
    logits = torch.einsum("bhd,blhd->bhl", q.double(), k.double()) / 128**0.5
    want = torch.einsum("bhl,blhd->bhd", logits.softmax(-1), v.double())
    assert ((out.double() - want).norm() / want.norm()).item() < 5e-4


def test_torch_views_and_gradients(torch):
    case = Case(group=3, num_kv_heads=2, batch=2, kv_len=300, layout="HND", view="padded", given_out=True)
    arrays = build(case)
    want = arrays.to(to_cupy).call()
    moved = arrays.to(lambda array: to_torch(torch, array))
    query = dataclasses.replace(moved, q=dataclasses.replace(moved.q, base=moved.q.base.requires_grad_()))
    got = query.call()
    assert not got[0].requires_grad
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a.contiguous(), b)


@BOTH
def test_jax_gives_cupys_bits(jax, case):
    for name, q in (("e4m3", "f16"), ("e5m2", "bf16"), ("f16", "f16"), ("bf16", "bf16")):
        arrays = build(dataclasses.replace(case, k=name, v=name, q=q))
        want = decode_lse(*map(to_cupy, arrays.host), kv_format=name)
        fmt = KV_FORMATS[name]
        given = [jax.numpy.asarray(array) for array in (arrays.host[0], *(x.view(fmt.dtype) for x in arrays.host[1:]))]
        assert all(next(iter(array.devices())).platform == "gpu" for array in given)
        out, lse = decode_lse(*given)
        assert isinstance(out, jax.Array) and out.devices() == given[0].devices() and out.dtype == given[0].dtype
        assert_same_bits(np.asarray(out), want[0], "out")
        assert_same_bits(np.asarray(lse), want[1], "lse")
        scaled = decode(*given, k_scale=jax.numpy.asarray([0.5, 2.0]), kv_lens=jax.numpy.asarray([7, 50]))
        other = decode(*map(to_cupy, arrays.host), k_scale=cp.asarray([0.5, 2.0], dtype=np.float32),
                       kv_lens=cp.asarray([7, 50], dtype=np.int32), kv_format=name)  # fmt: skip
        assert_same_bits(np.asarray(scaled), other)


def test_jax_quantizes(jax):
    x = np.random.default_rng(0).standard_normal((20, 3, 32), np.float32)
    want_codes, want_scale = cupy_fp8kv.quantize(x, granularity="head", backend="numpy")
    codes, scale = cupy_fp8kv.quantize(jax.numpy.asarray(x), granularity="head")
    assert isinstance(codes, jax.Array) and codes.dtype == KV_FORMATS["e4m3"].dtype
    assert_same_bits(np.asarray(codes).view(np.uint8), want_codes.view(np.uint8))
    assert_same_bits(np.asarray(scale), want_scale)
    back = cupy_fp8kv.dequantize(codes, scale, "bfloat16")
    assert isinstance(back, jax.Array)
    assert_same_bits(np.asarray(back), cupy_fp8kv.dequantize(want_codes, want_scale, "bfloat16", backend="numpy"))


@BOTH
def test_host_arrays_run_on_the_gpu_and_come_back(case):
    arrays = build(case)
    want = decode_lse(*map(to_cupy, arrays.host))
    got = decode_lse(*arrays.host)
    assert all(isinstance(array, np.ndarray) for array in got)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert cupy_fp8kv.explain(*arrays.host).backend == "cuda"
    assert cupy_fp8kv.explain(*arrays.host, backend="numpy").backend == "numpy"
    typed = decode_lse(arrays.host[0], *(array.view(KV_FORMATS["e4m3"].dtype) for array in arrays.host[1:]))
    assert_same_bits(typed[0], want[0])


def test_host_tensors_of_torch_come_back_as_such():
    torch = pytest.importorskip("torch")
    arrays = build(WHOLE)
    want = decode(*map(to_cupy, arrays.host))
    given = [torch.from_numpy(array) for array in arrays.host]
    out = torch.full_like(given[0], float("nan"))
    assert decode(*given, out=out) is out and out.device.type == "cpu"
    assert_same_bits(out, want)


def test_host_views_with_all_options_on_the_gpu():
    for view in ("padded", "transposed"):
        case = Case(group=3, num_kv_heads=2, batch=3, kv_len=200, window_left=50, soft_cap=30.0, scales="head",
                    kv_lens="host", layout="HND", view=view, q="bf16", lse_base="e", given_out=True)  # fmt: skip
        arrays = build(case)
        out, lse = arrays.call()
        arrays.check(out, lse)
        assert isinstance(out, np.ndarray) and np.shares_memory(out, arrays.out.base)


def test_the_numpy_backend_takes_device_arrays(torch):
    arrays = build(WHOLE)
    want = decode_lse(*arrays.host, backend="numpy")
    for move in (to_cupy, lambda array: to_torch(torch, array)):
        given = [move(array) for array in arrays.host]
        got = decode_lse(*given, backend="numpy")
        assert type(got[0]) is type(given[0])
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)
        codes, scale = cupy_fp8kv.quantize(given[0], granularity="head", backend="numpy")
        want_codes, want_scale = cupy_fp8kv.quantize(arrays.host[0], granularity="head", backend="numpy")
        assert type(codes) is type(given[0])
        assert_same_bits(to_host(codes), want_codes.view(np.uint8))
        assert_same_bits(scale, want_scale)


def test_dlpack_arrays_of_unknown_libraries():
    class Foreign:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    arrays = build(WHOLE)
    given = [to_cupy(array) for array in arrays.host]
    out = decode(*map(Foreign, given))
    assert isinstance(out, cp.ndarray)
    assert_same_bits(out, decode(*given))


def test_inputs_are_never_written(torch):
    arrays = build(SPLIT)
    for move in (to_cupy, lambda array: to_torch(torch, array)):
        given = [move(array) for array in arrays.host]
        before = [to_host(array).copy() for array in given]
        decode(*given)
        for a, b in zip(given, before, strict=True):
            assert_same_bits(a, b)


# What is refused on a device


def test_mixed_devices_and_libraries_are_refused(torch):
    q, k, v = build(WHOLE).host
    gpu = [to_cupy(array) for array in (q, k, v)]
    with pytest.raises(TypeError, match=r"\bk\w*: expected an array of cupy like q, got one of numpy"):
        decode(gpu[0], k, gpu[2])
    with pytest.raises(TypeError, match=r"\bv\w*: expected an array of cupy like q, got one of torch"):
        decode(gpu[0], gpu[1], to_torch(torch, v))
    with pytest.raises(ValueError, match=r"\bk\w*: expected device cuda:0 like q, got host"):
        decode(to_torch(torch, q), torch.from_numpy(k), to_torch(torch, v))
    with pytest.raises(ValueError, match=r"out: expected device cuda:0 like q, got host"):
        decode(*(to_torch(torch, x) for x in (q, k, v)), out=torch.empty(q.shape, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"out: expected an array of cupy like q"):
        decode(*gpu, out=np.empty(q.shape, np.float16))
    with pytest.raises(TypeError, match=r"kv_lens: expected an array of cupy like q, got one of torch"):
        decode(*gpu, kv_lens=torch.zeros(2, dtype=torch.int32, device="cuda"))
    with pytest.raises(TypeError, match=r"kv_lens: expected int32, got int64"):
        decode(*gpu, kv_lens=cp.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"kv_lens: expected a contiguous array \[2\], got shape \[2\] with strides"):
        decode(*gpu, kv_lens=cp.zeros(4, np.int32)[::2])
    with pytest.raises(ValueError, match=r"kv_lens: expected lengths from 0 to 60, got 61 for request 1"):
        decode(*gpu, kv_lens=np.array([3, 61], np.int32))
    with pytest.raises(TypeError, match=r"k_scale: expected an array of cupy like q, got one of torch"):
        decode(*gpu, k_scale=torch.ones(1, device="cuda"))
    with pytest.raises(ValueError, match=r"k_scale: .*\[num_kv_heads\] = \[2\], got shape \[3\]"):
        decode(*gpu, k_scale=cp.ones(3, np.float32))
    shifted = cp.zeros(gpu[1].size + 16, np.uint8)[4 : 4 + gpu[1].size].reshape(gpu[1].shape)
    with pytest.raises(ValueError, match=r"\bk\w*: expected data that starts at a multiple of 16 bytes, got address"):
        decode(gpu[0], shifted, gpu[2])
    decode(*gpu)
    with pytest.raises(ValueError, match=r"\bv\w*: expected data that starts at a multiple of 16 bytes, got address"):
        decode(gpu[0], gpu[1], shifted)  # the same kind of call as the one before
    assert_same_bits(decode(*gpu), decode(*gpu))


def test_out_on_the_device(torch):
    """Strided, filled in place, nothing around it written; and the results of one call are no other's memory."""
    arrays = build(SPLIT)
    given = [to_cupy(array) for array in arrays.host]
    want = decode(*given)
    buffer = cp.full((2, 9, 160), 7, np.float16)
    out = buffer[:, :8, 16:144]
    assert decode(*given, out=out) is out
    assert_same_bits(out, want)
    out[...] = 7
    assert (buffer == 7).all()
    first, second = decode(*given), decode(*given)
    assert first.data.ptr != second.data.ptr
    tensors = [to_torch(torch, array) for array in arrays.host]
    buffer = torch.full((2, 9, 160), 7, dtype=torch.float16, device="cuda")
    out = buffer[:, :8, 16:144]
    assert decode(*tensors, out=out) is out
    assert_same_bits(out.contiguous(), want)
    out[...] = 7
    assert (buffer == 7).all()


# Streams


@BOTH
def test_cupy_streams(case):
    """The caches are written on a busy side stream, so work that went to any other stream would read NaN."""
    warm_spin()
    arrays = build(case)
    source = [to_cupy(array) for array in arrays.host]
    want = decode(*source)
    target = [cp.full_like(array, 0xFF if array.dtype == np.uint8 else np.nan) for array in source]
    cp.cuda.runtime.deviceSynchronize()
    side, main = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    with side:
        spin(BUSY_MS / 4)
        for a, b in zip(target, source, strict=True):
            cp.cuda.runtime.memcpyAsync(a.data.ptr, b.data.ptr, a.nbytes, 3, side.ptr)
        out = decode(*target)
        done = side.record()
    with main:
        main.wait_event(done)
        copy = out.copy()
    main.synchronize()
    assert_same_bits(copy, want)
    # And on the null stream, after it.
    assert_same_bits(decode(*target), want)


@BOTH
def test_torch_streams(torch, case):
    arrays = build(case)
    source = [to_torch(torch, array) for array in arrays.host]
    want = decode(*source)
    target = [torch.full_like(array, 255 if array.dtype == torch.uint8 else float("nan")) for array in source]
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    side, main = torch.cuda.Stream(), torch.cuda.Stream()
    done = torch.cuda.Event()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for a, b in zip(target, source, strict=True):
            a.copy_(b)
        out = decode(*target)
        done.record(side)
    with torch.cuda.stream(main):
        main.wait_event(done)
        copy = out.clone()
    main.synchronize()
    assert_same_bits(copy, want)


def test_a_call_never_waits_for_the_device():
    """Device scalars, device lengths and numbers alike: the call returns while work ahead of it still runs."""
    warm_spin()
    arrays = build(dataclasses.replace(SPLIT, scales="head", kv_lens="device", given_out=True))
    moved = arrays.to(to_cupy)
    moved.call()
    cp.cuda.runtime.deviceSynchronize()
    spin(BUSY_MS)
    ahead = cp.cuda.get_current_stream().record()
    started = time.perf_counter()
    result = moved.call()
    seconds = time.perf_counter() - started
    assert not ahead.done, "the call waited for the stream"
    assert seconds < BUSY_MS / 1000 / 4
    arrays.check(*(to_host(array) for array in result))


def test_a_call_with_tensors_never_waits_for_the_device(torch):
    arrays = build(dataclasses.replace(SPLIT, scales="head", kv_lens="device"))
    moved = arrays.to(lambda array: to_torch(torch, array))
    moved.call()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # cycles: some 200 ms
    ahead = torch.cuda.Event()
    ahead.record()
    started = time.perf_counter()
    result = moved.call()
    seconds = time.perf_counter() - started
    assert not ahead.query(), "the call waited for the stream"
    assert seconds < BUSY_MS / 1000 / 4
    arrays.check(*(to_host(array) for array in result))


# Capture and replay


def change(arrays, seed):
    """Other values for the same case."""
    return build(dataclasses.replace(arrays.case, seed=seed))


@BOTH
def test_torch_graphs_replay_with_other_contents(torch, case):
    case = dataclasses.replace(case, scales="head", kv_lens="device")
    arrays = build(case)
    moved = arrays.to(lambda array: to_torch(torch, array))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        moved.call()
    torch.cuda.current_stream().wait_stream(side)
    kernels = len(compiler._kernels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = moved.call()
    for seed in (11, 12, 0):
        other = change(arrays, seed)
        there = other.to(lambda array: to_torch(torch, array))
        for name in ("q", "k", "v"):
            getattr(moved, name).base.copy_(getattr(there, name).base)
        moved.kv_lens.copy_(there.kv_lens)
        for name, scale in there.scales.items():
            moved.scales[name].copy_(scale)
        graph.replay()
        torch.cuda.synchronize()
        other.check(to_host(out), to_host(lse))
        eager = there.call()
        assert_same_bits(out, eager[0], "out")
        assert_same_bits(lse, eager[1], "lse")
    assert len(compiler._kernels) == kernels, "new contents compiled something"


@BOTH
def test_cupy_graphs_replay_with_other_contents(case):
    case = dataclasses.replace(case, scales="head", kv_lens="device", given_out=True)
    arrays = build(case)
    moved = arrays.to(to_cupy)
    cp.cuda.runtime.deviceSynchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        moved.call()  # fills the stream's pool: an allocation that misses it would break the capture
        stream.synchronize()
        stream.begin_capture()
        out, lse = moved.call()
        graph = stream.end_capture()
    for seed in (11, 12, 0):
        other = change(arrays, seed)
        there = other.to(to_cupy)
        cp.cuda.runtime.deviceSynchronize()
        for name in ("q", "k", "v"):
            getattr(moved, name).base[...] = getattr(there, name).base
        moved.kv_lens[...] = there.kv_lens
        for name, scale in there.scales.items():
            moved.scales[name][...] = scale
        cp.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        other.check(to_host(out), to_host(lse))
        eager = there.call()
        assert_same_bits(out, eager[0], "out")
        assert_same_bits(lse, eager[1], "lse")


def test_a_replayed_graph_writes_to_nobody_elses_memory():
    """The workspace of a captured call belongs to the graph: what is allocated later must survive a replay."""
    moved = build(dataclasses.replace(SPLIT, given_out=True)).to(to_cupy)
    workspace = SPLIT.plan(device()).workspace
    cp.cuda.runtime.deviceSynchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        decode(moved.q.view, moved.k.view, moved.v.view, out=moved.out.view)
        stream.synchronize()
        stream.begin_capture()
        decode(moved.q.view, moved.k.view, moved.v.view, out=moved.out.view)
        graph = stream.end_capture()
        others = [cp.full(workspace, 77, np.uint8) for _ in range(4)]
        graph.launch(stream)
        stream.synchronize()
        written = sum(int((other != 77).sum()) for other in others)
    assert not written, f"a replay overwrote {written} bytes of arrays that were allocated after the capture"


@pytest.mark.parametrize(
    ("argument", "value"), [("kv_lens", np.array([60, 3], np.int32)), ("k_scale", np.ones(2, np.float32))]
)
def test_host_arrays_are_refused_while_capturing(argument, value):
    """A graph would copy from host memory that is gone by then. Numbers are fine: they become part of the graph."""
    moved = build(WHOLE).to(to_cupy)
    views = (moved.q.view, moved.k.view, moved.v.view)
    out = decode(*views)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.runtime.deviceSynchronize()
    with stream:
        decode(*views, **{argument: value}, out=out)
        stream.synchronize()
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match=rf"^{argument}: expected a device array, not one on the host"):
                decode(*views, **{argument: value}, out=out)
            decode(*views, v_scale=0.5, out=out)
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    assert_same_bits(out, decode(*views, v_scale=0.5))


def test_scalars_and_lengths_change_between_calls_without_compiling():
    arrays = build(dataclasses.replace(SPLIT, scales="scalar", kv_lens="device"))
    moved = arrays.to(to_cupy)
    moved.call()
    kernels = len(compiler._kernels)
    for k_scale, lens in ((0.3, (5000, 1)), (2.0, (0, 4999)), (0.01, (17, 16))):
        moved.scales["k_scale"][...] = k_scale
        moved.kv_lens[...] = cp.asarray(lens, dtype=np.int32)
        arrays.options["k_scale"] = np.array([k_scale], np.float32)
        arrays.options["kv_lens"] = np.array(lens, np.int32)
        clean = build(SPLIT)  # the same bytes, without NaN beyond the first lengths
        want = dataclasses.replace(arrays, host=clean.host)
        for name, values in zip(("k", "v"), clean.host[1:], strict=True):
            getattr(moved, name).base[...] = to_cupy(values)
        out, lse = moved.call()
        want.check(to_host(out), to_host(lse))
    assert len(compiler._kernels) == kernels


# Threads and repetition


def test_two_threads_with_their_own_streams():
    """Distinct data of one kind of call: argument blocks and workspaces must not get mixed up."""
    per_thread = []
    for seed in range(2):
        moved = build(dataclasses.replace(SPLIT, seed=seed)).to(to_cupy)
        per_thread.append((moved, moved.call()))
    cp.cuda.runtime.deviceSynchronize()
    failures, barrier = [], threading.Barrier(2)

    def work(moved, want):
        try:
            stream = cp.cuda.Stream(non_blocking=True)
            with stream:
                barrier.wait()
                results = [moved.call() for _ in range(200)]
                stream.synchronize()
                for out, lse in results:
                    assert_same_bits(out, want[0], "out")
                    assert_same_bits(lse, want[1], "lse")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in per_thread]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_threads_that_compile_the_same_kernel_compile_it_once(monkeypatch):
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_modules", {})
    loads, original = [], compiler._load
    monkeypatch.setattr(compiler, "_load", lambda *arguments: loads.append(arguments) or original(*arguments))
    spec = WHOLE.plan(device()).spec
    kernels, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        kernels.append(compiler.load(spec, 0))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 8 and len(set(map(id, kernels))) == 1 and len(loads) == 1


@BOTH
def test_a_hundred_runs_give_the_same_bits(case):
    moved = build(dataclasses.replace(case, kv_lens="device")).to(to_cupy)
    want = moved.call()
    for _ in range(100):
        poison_pool(want[0].nbytes, want[1].nbytes, case.plan(device()).workspace)
        for a, b in zip(moved.call(), want, strict=True):
            assert bool((a.view(np.uint8) == b.view(np.uint8)).all())


def test_memory_does_not_grow():
    moved = build(SPLIT).to(to_cupy)
    pool = cp.get_default_memory_pool()
    moved.call()
    before = pool.used_bytes()
    for _ in range(50):
        moved.call()
    assert pool.used_bytes() == before


def test_more_kinds_of_calls_than_are_remembered(monkeypatch):
    monkeypatch.setattr(dispatch, "_MOST_PREPARED", 3)
    monkeypatch.setattr(dispatch, "_prepared", {})
    for window_left in (1, 2, 3, 4, 5, 1, 2):
        case = dataclasses.replace(WHOLE, window_left=window_left)
        arrays = build(case)
        out, lse = arrays.to(to_cupy).call()
        arrays.check(to_host(out), to_host(lse))
        assert len(dispatch._prepared) <= 3


# What a review asked for


@BOTH
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_a_call_may_be_the_first_thing_a_thread_does(library, case):
    """Launches go to the driver, which makes no context for a thread by itself."""
    host = build(case).host
    if library == "torch":
        torch = pytest.importorskip("torch")
        q, k, v = (to_torch(torch, array) for array in host)
    else:
        q, k, v = (to_cupy(array) for array in host)
    want = to_host(decode(q, k, v))
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(decode, q, k, v).result()
    cp.cuda.Device().synchronize()
    assert_same_bits(to_host(got), want)


def test_jax_takes_lengths_and_scales_of_the_host(jax):
    q, k, v = build(WHOLE).host
    lens, scale = np.array([3, 60], np.int32), np.array([0.5, 2.0], np.float32)
    want = decode(q, k, v, kv_lens=lens, v_scale=scale, backend="cuda")
    put = [jax.device_put(array, jax.devices("gpu")[0]) for array in (q, k, v)]
    got = decode(*put, kv_lens=lens, v_scale=scale)
    assert_same_bits(np.asarray(got), want)


def test_scales_that_would_be_converted_are_refused_while_capturing():
    q, k, v = (to_cupy(array) for array in build(WHOLE).host)
    out, scale = cp.empty_like(q), cp.ones(1, cp.float64)
    decode(q, k, v, v_scale=scale, out=out)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match=r"^v_scale: expected contiguous float32"):
            decode(q, k, v, v_scale=scale, out=out)
        stream.end_capture()


@pytest.mark.parametrize("cap", [0.5, 30.0, 1000.0, 1e5])
def test_soft_caps_of_any_size(cap):
    q, k, v = build(SPLIT).host
    got, lse = decode_lse(q, k, v, logits_soft_cap=cap, backend="cuda")
    formats = {"k_format": KV_FORMATS["e4m3"], "v_format": KV_FORMATS["e4m3"]}
    want = oracle.oracle(q, k, v, **formats, sm_scale=q.shape[-1] ** -0.5, logits_soft_cap=cap)
    oracle.assert_close(got, lse, *want, "float16")
