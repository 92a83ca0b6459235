"""The array boundary on the host: every library in, the same library out, the same bits, nothing heavy imported."""

import subprocess
import sys
import textwrap
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import oracle
import pytest

import cupy_fp8kv
from cupy_fp8kv.arrays import CupyLibrary
from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.jit import launch
from cupy_fp8kv.kept_workspaces import MOST_STREAMS, KeptWorkspaces

decode = cupy_fp8kv.batch_decode_with_padded_kv_cache
decode_lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse

BATCH, LENGTH, HQ, HKV, DIM = 3, 33, 6, 2, 64
SHAPE = (BATCH, LENGTH, HKV, DIM)
FORMATS = ("e4m3", "e5m2", "f16", "bf16")
Q_DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


class Foreign:
    """A library nobody knows: memory on the host that speaks DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def torch():
    return pytest.importorskip("torch")


def jnp():
    return pytest.importorskip("jax.numpy")


def to_numpy_library(array):
    return array


def to_torch(array):
    name = array.dtype.name
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        carrier = np.int16 if name == "bfloat16" else np.uint8
        return torch().from_numpy(array.view(carrier).copy()).view(getattr(torch(), name))
    return torch().from_numpy(array.copy())


def to_jax(array):
    return jnp().asarray(array)


TO = {"numpy": to_numpy_library, "torch": to_torch, "jax": to_jax}
LIBRARIES = pytest.mark.parametrize("library", TO)


def kind(array):
    return type(array).__module__.partition(".")[0].replace("jaxlib", "jax")


def bits(array):
    """Bytes of an array of any library."""
    if kind(array) == "torch":
        array = array.detach().contiguous().view(torch().uint8).numpy()
    return np.ascontiguousarray(np.asarray(array)).tobytes()


def dtype_name(array):
    return str(array.dtype).removeprefix("torch.")


def inputs(k="e4m3", v=None, q="f16", seed=0):
    """q, k, v on the host; FP8 typed by ml_dtypes."""
    rng = np.random.default_rng(seed)
    arrays = [oracle.random_query(rng, (BATCH, HQ, DIM), Q_DTYPES[q])]
    for name in (k, v or k):
        fmt = KV_FORMATS[name]
        arrays.append(oracle.random_cache(rng, SHAPE, fmt).view(fmt.dtype))
    return arrays


# Libraries


@LIBRARIES
@pytest.mark.parametrize("k", FORMATS)
@pytest.mark.parametrize("v", FORMATS)
@pytest.mark.parametrize("q", Q_DTYPES)
def test_every_library_and_format_gives_the_same_bits(library, k, v, q):
    host = inputs(k, v, q)
    want_out, want_lse = decode_lse(*host, backend="numpy")
    reference_out, reference_lse = reference.attention(
        *host, k_format=KV_FORMATS[k], v_format=KV_FORMATS[v], sm_scale=DIM**-0.5
    )
    assert bits(want_out) == bits(reference_out.astype(Q_DTYPES[q])) and bits(want_lse) == bits(reference_lse)
    given = [TO[library](array) for array in host]
    out, lse = decode_lse(*given, backend="numpy")
    for array in (out, lse):
        assert kind(array) == library
        assert library == "numpy" or str(getattr(array, "device", "cpu")).lower().startswith(("cpu", "tfrt_cpu"))
    assert dtype_name(out) == Q_DTYPES[q].name and dtype_name(lse) == "float32"
    assert tuple(out.shape) == (BATCH, HQ, DIM) and tuple(lse.shape) == (BATCH, HQ)
    assert bits(out) == bits(want_out) and bits(lse) == bits(want_lse)
    assert [bits(array) for array in given] == [bits(array) for array in host], "an input was written"


@LIBRARIES
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_codes_as_uint8(library, name):
    host = inputs(name)
    q, k, v = host[0], *(array.view(np.uint8) for array in host[1:])
    given = [TO[library](array) for array in (q, k, v)]
    out = decode(*given, kv_format=name, backend="numpy")
    assert kind(out) == library and bits(out) == bits(decode(*host, backend="numpy"))
    if name == "e4m3":
        assert bits(decode(*given, backend="numpy")) == bits(out), "uint8 is E4M3FN unless kv_format says otherwise"


@LIBRARIES
def test_single_decode_in_every_library(library):
    q, k, v = inputs()
    given = [TO[library](array) for array in (q[0], k[0], v[0])]
    out, lse = cupy_fp8kv.single_decode_with_kv_cache(*given, return_lse=True, backend="numpy")
    assert kind(out) == kind(lse) == library and tuple(out.shape) == (HQ, DIM) and tuple(lse.shape) == (HQ,)
    want_out, want_lse = decode_lse(q[:1], k[:1], v[:1], backend="numpy")
    assert bits(out) == bits(want_out[0]) and bits(lse) == bits(want_lse[0])


@LIBRARIES
def test_quantize_and_dequantize_in_every_library(library):
    values = np.random.default_rng(1).standard_normal(SHAPE, np.float32)
    for name in ("e4m3", "e5m2"):
        for dtype in (np.dtype(np.float32), *Q_DTYPES.values()):
            host = values.astype(dtype)
            want_codes, want_scale = cupy_fp8kv.quantize(host, name, granularity="head", backend="numpy")
            codes, scale = cupy_fp8kv.quantize(TO[library](host), name, granularity="head", backend="numpy")
            assert kind(codes) == kind(scale) == library
            assert dtype_name(codes) == KV_FORMATS[name].dtype.name and dtype_name(scale) == "float32"
            assert tuple(codes.shape) == SHAPE and tuple(scale.shape) == (HKV,)
            assert bits(codes) == bits(want_codes) and bits(scale) == bits(want_scale)
            for out_dtype in ("float16", "bfloat16", "float32"):
                back = cupy_fp8kv.dequantize(codes, scale, out_dtype, backend="numpy")
                assert kind(back) == library and dtype_name(back) == out_dtype
                assert bits(back) == bits(cupy_fp8kv.dequantize(want_codes, want_scale, out_dtype, backend="numpy"))


@pytest.mark.parametrize("typed", [False, True])
def test_an_unknown_library_comes_in_through_dlpack(typed):
    q, k, v = inputs("f16" if typed else "e4m3")
    if not typed:
        k, v = k.view(np.uint8), v.view(np.uint8)
    out, lse = decode_lse(Foreign(q), Foreign(k), Foreign(v), backend="numpy")
    want_out, want_lse = decode_lse(q, k, v, backend="numpy")
    assert type(out) is np.ndarray and bits(out) == bits(want_out) and bits(lse) == bits(want_lse)
    codes, scale = cupy_fp8kv.quantize(Foreign(q), backend="numpy")
    want_codes, want_scale = cupy_fp8kv.quantize(q, backend="numpy")
    assert bits(codes) == bits(want_codes) and bits(scale) == bits(want_scale)


def test_subclasses_of_arrays_are_arrays():
    class Mine(np.ndarray):
        pass

    host = inputs()
    out = decode(*(array.view(Mine) for array in host), backend="numpy")
    assert isinstance(out, np.ndarray) and bits(out) == bits(decode(*host, backend="numpy"))
    parameter = torch().nn.Parameter
    given = [parameter(to_torch(host[0])), *(parameter(to_torch(x), requires_grad=False) for x in host[1:])]
    out = decode(*given, backend="numpy")
    assert kind(out) == "torch" and bits(out) == bits(decode(*host, backend="numpy"))


# Views


def strided_views(array):
    """The same values as views: NHD as it is, HND, the inner part of something larger, every second row."""
    wide = np.full((BATCH + 2, LENGTH + 2, HKV + 1, DIM + 32), 0x7F, np.uint8)
    wide[1:-1, 1:-1, :-1, 16:-16] = array
    doubled = np.full((BATCH, 2 * LENGTH, HKV, DIM), 0x7F, np.uint8)
    doubled[:, ::2] = array
    hnd = np.ascontiguousarray(array.swapaxes(1, 2))
    return {
        "NHD": (array, lambda x: x, "NHD"),
        "HND": (hnd, lambda x: x, "HND"),
        "HND as NHD": (hnd, lambda x: x.swapaxes(1, 2), "NHD"),
        "inside": (wide, lambda x: x[1:-1, 1:-1, :-1, 16:-16], "NHD"),
        "every second row": (doubled, lambda x: x[:, ::2], "NHD"),
    }


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("which", strided_views(np.zeros(SHAPE, np.uint8)))
def test_strided_views(library, which):
    q, k, v = inputs()
    codes = [array.view(np.uint8) for array in (k, v)]
    want_out, want_lse = decode_lse(q, k, v, backend="numpy")
    wide_q = np.full((BATCH, HQ, DIM + 16), np.nan, np.float16)
    wide_q[..., 8:-8] = q
    given = [TO[library](wide_q)[..., 8:-8]]
    for array in codes:
        base, view, layout = strided_views(array)[which]
        given.append(view(TO[library](base)))
    out, lse = decode_lse(*given, layout, backend="numpy")
    # BLAS may take another path for other strides, so the last bit of an fp32 sum may differ.
    np.testing.assert_allclose(np.asarray(out), want_out, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.asarray(lse), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", TO)
def test_a_slice_of_the_batch(library):
    q, k, v = inputs()
    given = [TO[library](array)[1:3] for array in (q, k, v)]
    assert bits(decode(*given, backend="numpy")) == bits(decode(q[1:], k[1:], v[1:], backend="numpy"))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_strided_torch_fp8(name):
    q, k, v = inputs(name)
    interleaved = np.stack([k.view(np.uint8), v.view(np.uint8)], axis=2).view(k.dtype)
    both = to_torch(interleaved)
    out = decode(to_torch(q), both[:, :, 0], both[:, :, 1], backend="numpy")
    np.testing.assert_allclose(out.numpy(), decode(q, k, v, backend="numpy"), rtol=1e-3, atol=1e-4)


# Other arguments of every library


@LIBRARIES
def test_lengths_and_scales_of_every_library(library):
    host = inputs()
    given = [TO[library](array) for array in host]
    lens, k_scale = np.array([0, 33, 17], np.int32), np.array([0.5, 2.0], np.float32)
    q_scale, v_scale = np.array([0.75], np.float32), np.array(3.0, np.float32)
    want = decode_lse(*host, kv_lens=lens, q_scale=0.75, k_scale=k_scale, v_scale=3.0, backend="numpy")
    scales = {"q_scale": TO[library](q_scale), "k_scale": TO[library](k_scale), "v_scale": TO[library](v_scale)}
    for kv_lens in (TO[library](lens), lens, [0, 33, 17], (0, 33, 17), lens.astype(np.int64)):
        got = decode_lse(*given, kv_lens=kv_lens, **scales, backend="numpy")
        assert [bits(array) for array in got] == [bits(array) for array in want]
    out = np.asarray(got[0]) if library != "torch" else got[0].numpy()
    assert not out[0].any() and out[1:].any()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_out_of_every_library(library):
    host = inputs(q="bf16")
    given = [TO[library](array) for array in host]
    want = decode(*host, backend="numpy")
    buffer = TO[library](np.full((BATCH, HQ + 1, DIM + 16), 7, ml_dtypes.bfloat16))
    out = buffer[:, :-1, 8:-8]
    got = decode(*given, out=out, backend="numpy")
    assert got is out and bits(got) == bits(want)
    rest = np.ones((BATCH, HQ + 1, DIM + 16), bool)
    rest[:, :-1, 8:-8] = False
    values = buffer.float().numpy() if library == "torch" else buffer.astype(np.float32)
    assert (values[rest] == 7).all(), "something around out was written"


def test_tensors_that_require_grad():
    host = inputs()
    q = to_torch(host[0]).requires_grad_()
    k = to_torch(inputs("f16")[1]).requires_grad_()
    out = decode(q, k, k, backend="numpy")
    assert not out.requires_grad and q.grad is None
    assert bits(out) == bits(decode(host[0], *(inputs("f16")[1],) * 2, backend="numpy"))
    codes, scale = cupy_fp8kv.quantize(q, backend="numpy")
    assert not codes.requires_grad and not scale.requires_grad


def test_jax_inputs_stay_and_results_are_new():
    given = [to_jax(array) for array in inputs()]
    before = [bits(array) for array in given]
    first, second = decode(*given, backend="numpy"), decode(*given, backend="numpy")
    assert bits(first) == bits(second) and [bits(array) for array in given] == before
    with pytest.raises(TypeError, match=r"out: .*jax.*cannot be written"):
        decode(*given, out=given[0], backend="numpy")


def test_read_only_inputs():
    host = inputs()
    for array in host:
        array.flags.writeable = False
    assert decode(*host, backend="numpy").any()


# What is refused


def test_jax_tracers_are_refused():
    jax = pytest.importorskip("jax")
    q, k, v = (to_jax(array) for array in inputs())
    with pytest.raises(TypeError, match=r"q: .*tracer.*outside jit"):
        jax.jit(lambda x: decode(x, k, v, backend="numpy"))(q)
    with pytest.raises(TypeError, match=r"\bv\w*: .*tracer.*outside jit"):
        jax.jit(lambda x: decode(q, k, x, backend="numpy"))(v)
    with pytest.raises(TypeError, match=r"x: .*tracer.*outside jit"):
        jax.vmap(lambda x: cupy_fp8kv.quantize(x, backend="numpy"))(q)


def test_torch_meta_and_sparse_are_refused():
    q, k, v = (to_torch(array) for array in inputs("f16"))
    with pytest.raises(TypeError, match=r"q: expected a dense torch tensor on CUDA or CPU.*meta"):
        decode(q.to("meta"), k, v)
    with pytest.raises(TypeError, match=r"\bv\w*: expected a dense torch tensor.*sparse"):
        decode(q, k, v.to_sparse())


def test_what_is_wrong_with_an_out_of_torch_is_named():
    q, k, v = (to_torch(array) for array in inputs("f16"))
    with pytest.raises(TypeError, match=r"^out: expected a dense torch tensor on CUDA or CPU.*meta"):
        decode(q, k, v, out=q.to("meta"))
    with pytest.raises(TypeError, match=r"^out: expected a dense torch tensor.*sparse"):
        decode(q, k, v, out=q.to_sparse())
    with pytest.raises(TypeError, match=r"^out: expected an array of torch like q, got ndarray"):
        decode(q, k, v, out=inputs()[0])


@pytest.mark.parametrize("what", [np.float16(1.0), 1.0, [[1.0]], None, "q", object(), np.bool_(True)])
def test_what_is_no_array_is_refused(what):
    q, k, v = inputs()
    for name, arguments in (("q", (what, k, v)), ("k", (q, what, v)), ("v", (q, k, what))):
        with pytest.raises(TypeError, match=rf"\b{name}\w*: expected an array .*got {type(what).__name__}"):
            decode(*arguments, backend="numpy")
    with pytest.raises(TypeError, match=rf"x: expected an array .*got {type(what).__name__}"):
        cupy_fp8kv.quantize(what)
    with pytest.raises(TypeError, match=rf"codes: expected an array .*got {type(what).__name__}"):
        cupy_fp8kv.dequantize(what)


@pytest.mark.parametrize("first", TO)
@pytest.mark.parametrize("second", TO)
def test_mixed_libraries_are_refused(first, second):
    if first == second:
        return
    q, k, v = inputs()
    with pytest.raises(TypeError, match=rf"\bk\w*: expected an array of {first} like q, got one of {second}"):
        decode(TO[first](q), TO[second](k), TO[first](v), backend="numpy")
    with pytest.raises(TypeError, match=rf"\bv\w*: expected an array of {first} like q, got one of {second}"):
        decode(TO[first](q), TO[first](k), TO[second](v), backend="numpy")


def test_dlpack_devices_that_nobody_can_read_are_refused():
    class Elsewhere(Foreign):
        def __dlpack_device__(self):
            return 7, 0  # Vulkan

    q, k, v = inputs("f16")
    with pytest.raises(TypeError, match=r"\bk\w*: expected an array on the host or a CUDA device, got DLPack device 7"):
        decode(q, Elsewhere(k), v)


def test_jax_arrays_over_several_devices_are_refused():
    script = """
        import jax, numpy as np, cupy_fp8kv
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        mesh = Mesh(np.array(jax.devices("cpu")), ("batch",))
        sharded = jax.device_put(np.ones((2, 4, 64), np.float16), NamedSharding(mesh, PartitionSpec("batch")))
        cache = jax.numpy.zeros((2, 10, 4, 64), jax.numpy.uint8)
        assert len(sharded.devices()) == 2
        try:
            cupy_fp8kv.batch_decode_with_padded_kv_cache(sharded, cache, cache)
        except ValueError as error:
            print(error)
    """
    pytest.importorskip("jax")
    said = python(script, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    assert said.startswith("q: ") and "one device" in said and "2" in said


# The import


def python(script, *options, **environment):
    """What a script prints in a new interpreter; it must succeed."""
    import os

    root = Path(cupy_fp8kv.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), **environment}
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env=environment, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


#: Decode and quantize on the NumPy backend, as someone without a GPU would.
SMALL_CALL = """
    import numpy as np
    q, cache = np.ones((2, 4, 64), np.float16), np.full((2, 10, 4, 64), 0x38, np.uint8)
    out = cupy_fp8kv.batch_decode_with_padded_kv_cache(q, cache, cache)
    assert out.shape == (2, 4, 64) and (out == 1).all()
    codes, scale = cupy_fp8kv.quantize(q)
    assert (cupy_fp8kv.dequantize(codes, scale) == q).all()
"""


def test_the_import_is_light():
    script = """
        import sys
        import numpy, ml_dtypes
        import time
        started = time.perf_counter()
        import cupy_fp8kv
        seconds = time.perf_counter() - started
        heavy = {"torch", "jax", "jaxlib", "cupy", "cupy_backends", "rich", "triton", "pytest"} & set(sys.modules)
        print(seconds, *sorted(heavy))
    """
    runs = [python(script).split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), f"imported: {runs[0][1:]}"
    assert min(float(run[0]) for run in runs) < 0.5


def test_the_whole_import_takes_less_than_half_a_second():
    """With NumPy and ml_dtypes counted in; the best of five, because other work may run beside."""
    script = "import time; t = time.perf_counter(); import cupy_fp8kv; print(time.perf_counter() - t)"
    assert min(float(python(script)) for _ in range(5)) < 0.5


def test_the_import_reads_the_sources():
    said = python("import cupy_fp8kv, sys; print('cupy_fp8kv.jit.sources' in sys.modules, 'cupy' in sys.modules)")
    assert said == "True False"


def test_calls_on_numpy_arrays_import_no_other_library():
    script = f"""
        import sys
        import cupy_fp8kv
        {textwrap.indent(textwrap.dedent(SMALL_CALL), " " * 8).strip()}
        print(*sorted({{"torch", "jax", "rich"}} & set(sys.modules)))
    """
    assert python(script) == ""


#: Ways of having no CuPy: nothing finds it, it is marked as missing, whoever asks is refused.
MISSING = {
    "not found": """
        from importlib.machinery import PathFinder
        find = PathFinder.find_spec
        PathFinder.find_spec = lambda name, *a, **k: None if name.startswith("cupy") and "fp8kv" not in name else find(
            name, *a, **k)
    """,
    "None": """
        import sys
        sys.modules["cupy"] = None
    """,
    "blocked": """
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("cupy", "cupy_backends"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Blocker())
    """,
}


def without_gpu(setup):
    """A script that has no usable CuPy, runs a small call, and prints what the CUDA backend says."""
    call = textwrap.dedent(SMALL_CALL)
    return python(
        textwrap.dedent(setup) + "import cupy_fp8kv\n" + call + textwrap.dedent("""
        for ask in (
            lambda: cupy_fp8kv.batch_decode_with_padded_kv_cache(q, cache, cache, backend="cuda"),
            lambda: cupy_fp8kv.quantize(q, backend="cuda"),
            lambda: cupy_fp8kv.warmup(),
        ):
            try:
                ask()
            except RuntimeError as error:
                print(str(error).replace(chr(10), " "))
        """)
    ).splitlines()  # fmt: skip


@pytest.mark.parametrize("how", MISSING)
def test_without_cupy(how):
    said = without_gpu(MISSING[how])
    assert len(said) == 3
    for message in said:
        assert "CuPy is not installed" in message and "pip install" in message and "cuda12" in message


def test_with_a_broken_cupy(tmp_path):
    broken = tmp_path / "cupy"
    broken.mkdir()
    for error in ("ImportError('libcuda.so.1: cannot open')", "RuntimeError('odd')", "OSError('version mismatch')"):
        (broken / "__init__.py").write_text(f"raise {error}\n")
        said = without_gpu(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n")
        assert len(said) == 3
        for message in said:
            assert "CuPy cannot be imported" in message and error.partition("('")[0] in message
            assert error.partition("('")[2][:-2] in message


class Memory:
    """Something that is freed when nobody holds it."""


def workspaces(keeps=True):
    """Workspaces kept by ``get(nbytes, device, stream)``, and what is allocated for them."""
    made = []

    def allocate(nbytes, device):
        memory = Memory()
        made.append((nbytes, device, weakref.ref(memory)))
        return memory, 4096 * len(made)

    kept = KeptWorkspaces(allocate, lambda memory: keeps)
    return lambda nbytes, device, stream=0: kept.workspace(nbytes, device, stream), made


def test_workspaces_are_kept_for_each_thread_device_and_stream():
    get, made = workspaces()
    first = get(100, 0)
    assert get(60, 0) == first and get(100, 0) == first
    others = [get(60, 1), get(60, 0, 7), get(60, 0, 9)]
    assert len({address for _, address in (first, *others)}) == 4
    assert [get(60, 1), get(60, 0, 7), get(60, 0, 9), get(60, 0)] == [*others, first]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(get, 100, 0).result() != first
    assert [entry[:2] for entry in made] == [(100, 0), (60, 1), (60, 0), (60, 0), (100, 0)]


def test_a_workspace_that_is_too_small_goes_back_before_a_larger_one_is_made():
    freed = []

    def allocate(nbytes, device):
        assert nbytes == 100 or freed == [100]
        memory = Memory()
        weakref.finalize(memory, freed.append, nbytes)
        return memory, 4096

    kept = KeptWorkspaces(allocate, lambda memory: True)
    for nbytes in (100, 101, 100):
        kept.workspace(nbytes, 0, 7)
    assert freed == [100]


def test_workspaces_are_kept_for_some_streams():
    get, made = workspaces()
    for stream in range(MOST_STREAMS + 1):
        get(100, 0, stream)
        held = sum(memory() is not None for *_, memory in made)
        assert held == (stream + 1 if stream < MOST_STREAMS else 1)
    before = len(made)
    get(100, 0, MOST_STREAMS)
    assert len(made) == before


def test_memory_that_an_allocator_would_not_give_again_is_kept_for_the_default_stream_only():
    get, made = workspaces(keeps=False)
    for stream in (7, 0, 7, 0):
        assert get(100, 0, stream)
    assert [memory() is not None for *_, memory in made] == [False, True, False]


@pytest.fixture
def cupy_by_hand(monkeypatch):
    """CuPy's library over an allocator that counts. Stream 7 is captured if, and as what, ``number`` says."""
    made = SimpleNamespace(sizes=[], number=None)

    def alloc(nbytes):
        made.sizes.append(nbytes)
        return SimpleNamespace(mem=Memory(), ptr=4096 * len(made.sizes))

    cuda = SimpleNamespace(
        alloc=alloc, get_current_stream=None, memory=SimpleNamespace(PooledMemory=Memory),
        runtime=SimpleNamespace(streamIsCapturing=lambda stream: stream == 7 and made.number is not None),
    )  # fmt: skip
    monkeypatch.setattr(launch, "capture_id", lambda stream: made.number)
    made.library = CupyLibrary(SimpleNamespace(ndarray=None, cuda=cuda))
    return made


@pytest.mark.parametrize("tells", [True, False])
def test_inputs_are_read_at_once_as_one_by_one(cupy_by_hand, tells):
    """Addresses and facts are those of ``read``, and whatever one array says otherwise makes another signature."""
    library = cupy_by_hand.library
    library._tells_contiguous = tells
    usual = {"dtype": np.dtype(np.float16), "shape": (2, 3, 4), "strides": (24, 8, 2), "device_id": 0}
    others = [{"dtype": np.dtype(np.uint8)}, {"shape": (2, 3, 2)}, {"strides": (48, 8, 2)}, {"device_id": 1}]

    def array(address, **facts):
        facts = usual | facts
        data = SimpleNamespace(ptr=address, device_id=facts.pop("device_id"))
        return SimpleNamespace(data=data, _c_contiguous=facts["strides"] == (24, 8, 2), **facts)

    signatures = set()
    for place, facts in [(0, {}), *((place, facts) for place in range(3) for facts in others)]:
        inputs = [array(4096 * (1 + i), **(facts if i == place else {})) for i in range(3)]
        *addresses, signature = library.read_inputs(*inputs)
        assert addresses == [4096, 8192, 12288]
        assert library.input_facts(signature) == [library.facts(library.read(one)[1]) for one in inputs]
        signatures.add(signature)
    assert len(signatures) == 1 + 3 * len(others)


def test_captured_calls_and_eager_ones_share_no_workspace(cupy_by_hand):
    """On one stream: before, in, between and behind two captures."""
    made, addresses = cupy_by_hand, []
    for made.number in (None, 5, None, 6, None):
        # What eager calls had goes to the capture, which thus allocates nothing; later ones never see it.
        (address,) = {made.library.workspace(100, 0, 7)[1] for _ in range(2)}
        addresses.append(address)
        assert len(made.sizes) == {None: len(addresses) // 2 + 1, 5: 1, 6: 2}[made.number]
    before, first, between, second, behind = addresses
    assert before == first and between == second and len({first, second, behind}) == 3
    assert made.library.workspace(100, 0, 0)[1] not in addresses, "the default stream is another"


def test_a_capture_that_needs_more_than_there_was_allocates_and_holds_all_it_had(cupy_by_hand):
    made = cupy_by_hand
    made.library.workspace(100, 0, 7)
    made.number = 5
    got = [made.library.workspace(nbytes, 0, 7)[1] for nbytes in (100, 300, 200, 100)]
    assert made.sizes == [100, 300] and got[1:] == [got[1]] * 3 != [got[0]] * 3
    made.number = None
    assert made.library.workspace(100, 0, 7)[1] not in got
    ((*_, held),) = [[memory for _, (memory, _) in entries] for entries in made.library._captured.values()]
    assert held is not None and made.sizes == [100, 300, 100]
