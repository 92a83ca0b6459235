"""Bad input, kind by kind: the exception's type, and a message that names the argument, what was expected, what came.

And on the way what the public functions mean on the NumPy backend, where that is not the oracle's business.
"""

import inspect
import re

import ml_dtypes
import numpy as np
import oracle
import pytest

import cupy_fp8kv
from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import E4M3, E5M2, F16, FP8_FORMATS, KV_FORMATS, kv_format
from cupy_fp8kv.jit.device import has_gpu

single = cupy_fp8kv.single_decode_with_kv_cache
batch = cupy_fp8kv.batch_decode_with_padded_kv_cache
batch_lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse

B, L, HQ, HKV, D = 2, 20, 6, 3, 32
without_gpu = pytest.mark.skipif(has_gpu(), reason="says what happens without a GPU")
BF16_TYPE = np.dtype(ml_dtypes.bfloat16)


def q_of(*shape, dtype=np.float16):
    return np.ones(shape or (B, HQ, D), dtype)


def cache_of(*shape, dtype=np.uint8):
    return np.zeros(shape or (B, L, HKV, D), dtype)


def aligned(shape, dtype, strides, offset=0):
    """A view with these strides in bytes whose data begin ``offset`` bytes after a multiple of 64."""
    nbytes = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + offset + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64 + offset
    return np.ndarray(shape, dtype, raw, start, strides)


class Bad:
    """One bad call: the arguments that differ from a good one, and what must come of it."""

    def __init__(self, error, *said, **arguments):
        self.error, self.said, self.arguments = error, said, arguments

    def check(self, function):
        with pytest.raises(self.error) as caught:
            function(**self.arguments)
        assert type(caught.value) is self.error
        for text in self.said:
            assert re.search(text, str(caught.value)), f"{text!r} is not in {str(caught.value)!r}"


def call(**arguments):
    good = {"q": q_of(), "k_padded": cache_of(), "v_padded": cache_of(), "backend": "numpy"}
    return batch(**(good | arguments))


def call_single(**arguments):
    good = {"q": q_of(HQ, D), "k": cache_of(L, HKV, D), "v": cache_of(L, HKV, D), "backend": "numpy"}
    return single(**(good | arguments))


def each(cases):
    return pytest.mark.parametrize("bad", cases.values(), ids=cases.keys())


def test_the_good_calls_are_good():
    assert call().shape == (B, HQ, D) and call_single().shape == (HQ, D)


# Shapes. K and V of the batch call are known to users as k_padded and v_padded.
K, V = r"^k(_padded)?: ", r"^v(_padded)?: "


@each({
    "q rank": Bad(ValueError, r"^q: ", "3 axes", r"\[batch, num_qo_heads, head_dim\]", "got 2", r"\[6, 32\]",
                  q=q_of(HQ, D)),
    "q rank 4": Bad(ValueError, r"^q: ", "3 axes", "got 4", q=q_of(1, B, HQ, D)),
    "k rank": Bad(ValueError, K, "4 axes", r"\[batch, kv_len, num_kv_heads, head_dim\]", "got 3",
                  k_padded=cache_of(L, HKV, D)),
    "v rank": Bad(ValueError, V, "4 axes", "got 5", v_padded=cache_of(B, L, HKV, D, 1)),
    "k scalar": Bad(ValueError, K, "4 axes", "got 0", k_padded=np.array(1, np.uint8)),
    "batch of k": Bad(ValueError, K, "batch = 2", "as in q", "got 3", k_padded=cache_of(3, L, HKV, D)),
    "batch of v": Bad(ValueError, V, "batch = 2", "got 1", v_padded=cache_of(1, L, HKV, D)),
    "kv_len of v": Bad(ValueError, V, "kv_len = 20", "got 21", v_padded=cache_of(B, 21, HKV, D)),
    "heads of v": Bad(ValueError, V, "num_kv_heads = 3", "got 2", v_padded=cache_of(B, L, 2, D)),
    "head_dim of k": Bad(ValueError, K, "head_dim = 32", "as in q", "got 48", k_padded=cache_of(B, L, HKV, 48)),
    "head_dim of v": Bad(ValueError, V, "head_dim = 32", "got 16", v_padded=cache_of(B, L, HKV, 16)),
    "NHD given as HND": Bad(ValueError, V, "kv_len", "num_kv_heads", "got", kv_layout="HND",
                            v_padded=cache_of(B, HKV, L, D)),
    "group": Bad(ValueError, r"^q: ", "num_qo_heads", "multiple of num_kv_heads = 3", "got 7", q=q_of(B, 7, D)),
    "fewer query heads": Bad(ValueError, r"^q: ", "multiple of num_kv_heads = 3", "got 2", q=q_of(B, 2, D)),
    "no query heads": Bad(ValueError, r"^q: ", "positive multiple", "got 0", q=q_of(B, 0, D)),
    "no cache heads": Bad(ValueError, "num_kv_heads = 0", k_padded=cache_of(B, L, 0, D), v_padded=cache_of(B, L, 0, D)),
    "group too large": Bad(ValueError, r"^q: ", "at most 128", "got 129", q=q_of(B, 129 * HKV, D)),
})  # fmt: skip
def test_shapes(bad):
    bad.check(call)


@pytest.mark.parametrize("head_dim", [0, 8, 24, 72, 264, 272, 512])
def test_head_dim(head_dim):
    cache = cache_of(B, L, HKV, head_dim)
    Bad(ValueError, r"^q: ", "head_dim", "multiple of 16 up to 256", f"got {head_dim}$", q=q_of(B, HQ, head_dim),
        k_padded=cache, v_padded=cache).check(call)  # fmt: skip


@each({
    "q": Bad(ValueError, r"^q: ", "2 axes", "got 3", q=q_of(1, HQ, D)),
    "k": Bad(ValueError, r"^k: ", "3 axes", r"\[kv_len, num_kv_heads, head_dim\]", "got 4", k=cache_of(1, L, HKV, D)),
    "v, HND": Bad(ValueError, r"^v: ", r"num_kv_heads = 3", "got 20", kv_layout="HND", k=cache_of(HKV, L, D)),
    "kv_len": Bad(ValueError, r"^v: ", "kv_len = 20", "as in k", "got 19", v=cache_of(19, HKV, D)),
})  # fmt: skip
def test_shapes_of_a_single_request(bad):
    bad.check(call_single)


# Types


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int8, np.complex64, ml_dtypes.float8_e4m3fn])
def test_dtype_of_q(dtype):
    name = np.dtype(dtype).name
    Bad(TypeError, r"^q: ", "float16 or bfloat16", f"got {name}$", q=q_of(dtype=dtype)).check(call)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint16, np.bool_, ml_dtypes.float8_e4m3fnuz,
                                   ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3,
                                   ml_dtypes.float8_e4m3b11fnuz])  # fmt: skip
def test_dtype_of_caches(dtype):
    name = np.dtype(dtype).name
    expected = "uint8, float8_e4m3fn, float8_e5m2, float16 or bfloat16"
    hint = {"float8_e4m3fnuz": "another bias", "float8_e8m0fnu": "its codes are not"}.get(name, "got")
    Bad(TypeError, K, expected, f"got {name}", hint, k_padded=cache_of(dtype=dtype)).check(call)
    Bad(TypeError, V, expected, f"got {name}", hint, v_padded=cache_of(dtype=dtype)).check(call)


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"])
def test_torch_fp8_flavours_that_are_not_supported(name):
    torch = pytest.importorskip("torch")
    cache = torch.zeros((B, L, HKV, D), dtype=torch.uint8).view(getattr(torch, name))
    good = torch.zeros((B, L, HKV, D), dtype=torch.uint8)
    arguments = {"q": torch.ones((B, HQ, D), dtype=torch.float16), "k_padded": good}
    Bad(TypeError, V, f"got {name}", v_padded=cache, **arguments).check(call)


# Strings


@each({
    "layout": Bad(ValueError, "^kv_layout: ", "'NHD' or 'HND'", "got 'NDH'", kv_layout="NDH"),
    "layout in lower case": Bad(ValueError, "^kv_layout: ", "got 'nhd'", kv_layout="nhd"),
    "no layout": Bad(ValueError, "^kv_layout: ", "got None", kv_layout=None),
    "mode": Bad(ValueError, "^pos_encoding_mode: ", "'NONE', 'ROPE_LLAMA', 'ALIBI'", "got 'ROPE'",
                pos_encoding_mode="ROPE"),
    "no mode": Bad(ValueError, "^pos_encoding_mode: ", "got None", pos_encoding_mode=None),
    "RoPE": Bad(NotImplementedError, "^pos_encoding_mode: ", "'ROPE_LLAMA' is not implemented", "'NONE'",
                pos_encoding_mode="ROPE_LLAMA"),
    "ALiBi": Bad(NotImplementedError, "^pos_encoding_mode: ", "'ALIBI' is not implemented", pos_encoding_mode="ALIBI"),
    "lse base": Bad(ValueError, "^lse_base: ", "'2' or 'e'", "got '10'", lse_base="10", return_lse=True),
    "lse base as a number": Bad(ValueError, "^lse_base: ", "'2' or 'e'", "got 2", lse_base=2),
    "backend": Bad(ValueError, "^backend: ", "'cuda', 'numpy' or None", "got 'gpu'", backend="gpu"),
    "format": Bad(ValueError, "^kv_format: ", "e4m3, e5m2, f16, bf16", "got e3m4", kv_format="e3m4"),
    "formats": Bad(ValueError, "^kv_format: ", "pair", "e4m3", kv_format=("e4m3",)),
    "format and dtype": Bad(ValueError, "^kv_format: ", "f16 asked for", "uint8", kv_format="f16"),
    "format of v": Bad(ValueError, "^kv_format: ", "e5m2 asked for", r"v(_padded)? is an array of float16",
                       kv_format=("e4m3", "e5m2"), v_padded=cache_of(dtype=np.float16)),
    "format of typed": Bad(ValueError, "^kv_format: ", "e5m2 asked for", r"k(_padded)? is an array of float8_e4m3fn",
                           kv_format="e5m2", k_padded=cache_of(dtype=E4M3.dtype)),
})  # fmt: skip
def test_strings(bad):
    bad.check(call)


# Strides


@each({
    "q": Bad(ValueError, r"^q: ", "contiguous last axis", "stride of 2 bytes", "got strides",
             q=q_of(B, D, HQ).swapaxes(1, 2)),
    "q every second": Bad(ValueError, r"^q: ", "contiguous last axis", r"4\] in bytes", q=q_of(B, HQ, 2 * D)[..., ::2]),
    "q reversed": Bad(ValueError, r"^q: ", "contiguous last axis", r"-2\] in bytes", q=q_of()[..., ::-1]),
    "k": Bad(ValueError, K, "contiguous last axis", "stride of 1 byte", k_padded=cache_of(B, L, HKV, 2 * D)[..., ::2]),
    "v": Bad(ValueError, V, "contiguous last axis", v_padded=cache_of(B, L, D, HKV).swapaxes(2, 3)),
    "rows of q": Bad(ValueError, r"^q: ", "multiples of 16 bytes", r"\[432, 72, 2\] in bytes",
                     q=aligned((B, HQ, D), np.float16, (432, 72, 2))),
    "rows of k": Bad(ValueError, K, "multiples of 16 bytes", "120, 40, 1",
                     k_padded=aligned((B, L, HKV, D), np.uint8, (2400, 120, 40, 1))),
    "heads of v": Bad(ValueError, V, "multiples of 16 bytes",
                      v_padded=aligned((B, L, HKV, D), np.uint8, (2400, 120, 40, 1))),
    "requests of k": Bad(ValueError, K, "multiples of 16 bytes", "1928",
                         k_padded=aligned((B, L, HKV, D), np.uint8, (1928, 96, 32, 1))),
})  # fmt: skip
def test_strides(bad):
    bad.check(call)


def test_rows_too_far_apart():
    """The kernels keep the distance of neighbouring rows in 32 bits."""
    far = np.lib.stride_tricks.as_strided(cache_of(), (B, L, HKV, D), (2**36, 2**31, 32, 1))
    Bad(ValueError, K, "rows at most 2147483632 bytes apart", "got 2147483648", k_padded=far).check(call)


def test_host_arrays_may_begin_anywhere():
    """Rows must be multiples of 16 bytes apart, but where the data begin only matters on a device."""
    q, k, v = data()
    moved = []
    for array in (q, k, v):
        moved.append(aligned(array.shape, array.dtype, array.strides, offset=6))
        moved[-1][...] = array
        assert moved[-1].__array_interface__["data"][0] % 16 == 6
    assert_same(batch_lse(*moved, backend="numpy"), batch_lse(q, k, v, backend="numpy"))


def test_axes_of_size_one_may_have_any_stride():
    q = aligned((1, HKV, D), np.float16, (6, 64, 2))
    cache = aligned((1, 1, HKV, D), np.uint8, (3, 5, 32, 1))
    assert call(q=q, k_padded=cache, v_padded=cache).shape == (1, HKV, D)


# Lengths


@each({
    "too long": Bad(ValueError, "^kv_lens: ", "from 0 to 20", "got 21", "request 1",
                    kv_lens=np.array([3, 21], np.int32)),
    "negative": Bad(ValueError, "^kv_lens: ", "from 0 to 20", "got -1", "request 0",
                    kv_lens=np.array([-1, 2], np.int32)),
    "list": Bad(ValueError, "^kv_lens: ", "from 0 to 20", "got 99", kv_lens=[99, 2]),
    "beyond int32": Bad(ValueError, "^kv_lens: ", "from 0 to 20", "got 4294967297", kv_lens=np.array([1, 2**32 + 1])),
    "too many": Bad(ValueError, "^kv_lens: ", r"shape \[2\]", r"got \[3\]", kv_lens=np.array([1, 2, 3], np.int32)),
    "too few": Bad(ValueError, "^kv_lens: ", r"shape \[2\]", r"got \[1\]", kv_lens=[4]),
    "rank": Bad(ValueError, "^kv_lens: ", r"shape \[2\]", r"got \[2, 1\]", kv_lens=np.ones((2, 1), np.int32)),
    "floats": Bad(TypeError, "^kv_lens: ", "int32", "got float64", kv_lens=np.array([1.0, 2.0])),
    "booleans": Bad(TypeError, "^kv_lens: ", "int32", "got bool", kv_lens=np.array([True, False])),
    "number": Bad(TypeError, "^kv_lens: ", "array", "got int", kv_lens=5),
    "text": Bad(TypeError, "^kv_lens: ", "array", "got str", kv_lens="20"),
})  # fmt: skip
def test_lengths(bad):
    bad.check(call)


# Scales


@each({
    "q per head": Bad(ValueError, "^q_scale: ", r"\[1\]", r"got shape \[3\]", q_scale=np.ones(HKV, np.float32)),
    "k of another size": Bad(ValueError, "^k_scale: ", r"\[1\] or \[num_kv_heads\] = \[3\]", r"got shape \[6\]",
                             k_scale=np.ones(HQ, np.float32)),
    "v of another rank": Bad(ValueError, "^v_scale: ", r"\[num_kv_heads\] = \[3\]", r"got shape \[1, 3\]",
                             v_scale=np.ones((1, HKV), np.float32)),
    "k empty": Bad(ValueError, "^k_scale: ", r"got shape \[0\]", k_scale=np.ones(0, np.float32)),
    "q as text": Bad(TypeError, "^q_scale: ", "expected", "got str", q_scale="1.0"),
    "k as a list": Bad(TypeError, "^k_scale: ", "expected", "got list", k_scale=[1.0, 2.0, 3.0]),
    "v as a bool": Bad(TypeError, "^v_scale: ", "expected", "got bool", v_scale=True),
    "sm_scale as text": Bad(TypeError, "^sm_scale: ", "expected", "got", sm_scale="0.1"),
})  # fmt: skip
def test_scales(bad):
    bad.check(call)


# The result


@each({
    "shape": Bad(ValueError, "^out: ", r"shape \[2, 6, 32\] like q", r"got \[2, 6, 16\]", out=q_of(B, HQ, 16)),
    "rank": Bad(ValueError, "^out: ", r"shape \[2, 6, 32\] like q", r"got \[12, 32\]", out=q_of(B * HQ, D)),
    "dtype": Bad(TypeError, "^out: ", "dtype float16 like q", "got float32", out=q_of(dtype=np.float32)),
    "other 16 bits": Bad(TypeError, "^out: ", "dtype float16 like q", "got bfloat16", out=q_of(dtype=BF16_TYPE)),
    "last axis": Bad(ValueError, "^out: ", "contiguous last axis", out=q_of(B, HQ, 2 * D)[..., ::2]),
    "list": Bad(TypeError, "^out: ", "expected an array", "got list", out=[1.0]),
})  # fmt: skip
def test_out(bad):
    bad.check(call)


def test_out_of_another_library():
    torch = pytest.importorskip("torch")
    out = torch.zeros((B, HQ, D), dtype=torch.float16)
    Bad(TypeError, "^out: ", "array of numpy like q", "got (one of torch|Tensor)", out=out).check(call)


def test_out_that_is_read_only():
    out = q_of()
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: expected an array that can be written, got a read-only one"):
        call(out=out)


@pytest.mark.parametrize("strides", [(0, 64), (384, 0), (128, 64), (32, 64)])
def test_out_whose_rows_overlap(strides):
    out = aligned((B, HQ, D), np.float16, (*strides, 2))
    with pytest.raises(ValueError, match=r"^out: expected rows that do not overlap, got strides"):
        call(out=out)


@pytest.mark.parametrize("argument", ["q_scale", "k_scale", "v_scale"])
@pytest.mark.parametrize("value", [np.array([True]), np.array(["1.5"]), np.array([1 + 2j]), np.array([None])])
def test_scale_arrays_that_are_no_floats(argument, value):
    with pytest.raises(
        TypeError, match=rf"^{argument}: expected a number or an array of float16.*got {value.dtype.name}"
    ):
        call(**{argument: value})
    with pytest.raises(TypeError, match=rf"^scale: .*got {value.dtype.name}"):
        cupy_fp8kv.quantize(np.ones((4, 2, 16), np.float32), scale=value)


@pytest.mark.parametrize("argument", ["q_scale", "v_scale", "sm_scale", "logits_soft_cap"])
def test_numbers_too_large_for_a_float(argument):
    with pytest.raises(ValueError, match=rf"^{argument}: expected a number that a float holds"):
        call(**{argument: 10**400})


def test_windows_beyond_any_length():
    q, k = q_of(), cache_of()
    assert np.array_equal(batch(q, k, k, window_left=10**12, backend="numpy"), batch(q, k, k, backend="numpy"))
    assert np.array_equal(batch(q, k, k, window_left=-(10**12), backend="numpy"), batch(q, k, k, backend="numpy"))


def test_strides_of_axes_with_one_element_do_not_matter():
    k = aligned((1, 1, 1, D), np.uint8, (7, 2**40, 3, 1))
    assert not batch(q_of(1, 2, D), k, k, backend="numpy").any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"head_dim": 512}, "head_dim that is a multiple of 16 up to 256, got 512"),
        ({"head_dim": 100}, "got 100"),
        ({"group_size": 0}, "num_qo_heads"),
        ({"group_size": 500}, "at most 128 query heads per cache head, got 500"),
    ],
)
def test_warmup_of_what_no_kernel_has(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        cupy_fp8kv.warmup(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"backend": "nonsense"}, ValueError),
        ({"kv_layout": "DNH"}, ValueError),
        ({"logits_soft_cap": -1.0}, ValueError),
    ],
)
def test_explain_refuses_what_a_call_refuses(arguments, error):
    name = next(iter(arguments))
    with pytest.raises(error, match=rf"^{name}: "):
        cupy_fp8kv.explain(q_of(), cache_of(), cache_of(), **arguments)


# Numbers


@each({
    "negative cap": Bad(ValueError, "^logits_soft_cap: ", "finite number >= 0 or None", "got -1", logits_soft_cap=-1.0),
    "NaN": Bad(ValueError, "^logits_soft_cap: ", "finite number", "got nan", logits_soft_cap=float("nan")),
    "infinity": Bad(ValueError, "^logits_soft_cap: ", "finite number", "got inf", logits_soft_cap=float("inf")),
    "cap as text": Bad(TypeError, "^logits_soft_cap: ", "number", "got", logits_soft_cap="30"),
    "float window": Bad(TypeError, "^window_left: ", "integer", "got 5.0", window_left=5.0),
    "text window": Bad(TypeError, "^window_left: ", "integer", "got 'all'", window_left="all"),
    "no window": Bad(TypeError, "^window_left: ", "integer", "got None", window_left=None),
    "bool window": Bad(TypeError, "^window_left: ", "integer", "got True", window_left=True),
})  # fmt: skip
def test_numbers(bad):
    bad.check(call)


def test_types_are_checked_in_every_call_of_a_kind():
    """5.0 and 5, True and 1 are equal, and still no two kinds of call may be taken for one another."""
    call(window_left=5), call(window_left=1)
    Bad(TypeError, "^window_left: ", "got 5.0", window_left=5.0).check(call)
    Bad(TypeError, "^window_left: ", "got True", window_left=True).check(call)


@pytest.mark.parametrize("argument", ["kv_layout", "pos_encoding_mode", "lse_base", "backend", "kv_format"])
def test_what_cannot_be_hashed_is_named_too(argument):
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: "):
        call(**{argument: {"a": 1}})


def test_unknown_arguments_are_refused():
    for name in ("scale", "causal", "workspace"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call(**{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'kv_lens'"):
        call_single(kv_lens=[3])


# Without a GPU


@without_gpu
def test_cuda_without_a_gpu():
    for ask in (call, call_single):
        Bad(RuntimeError, "cuda was asked for", "CUDA|CuPy", backend="cuda").check(ask)
    with pytest.raises(RuntimeError, match=r"cuda was asked for.*(CUDA|CuPy)"):
        cupy_fp8kv.quantize(q_of(), backend="cuda")
    with pytest.raises(RuntimeError, match=r"cuda was asked for.*(CUDA|CuPy)"):
        cupy_fp8kv.dequantize(cache_of(), backend="cuda")
    with pytest.raises(RuntimeError, match=r"cannot run.*(CUDA|CuPy)"):
        cupy_fp8kv.warmup()


def test_warmup_checks_its_arguments():
    with pytest.raises(TypeError, match=r"^q_dtype: expected float16 or bfloat16, got float32"):
        cupy_fp8kv.warmup(q_dtype="float32")
    with pytest.raises(ValueError, match=r"^kv_format: expected one of e4m3, .*got e1m6"):
        cupy_fp8kv.warmup(kv_format="e1m6")


# Quantising


def quantize(**arguments):
    return cupy_fp8kv.quantize(**({"x": q_of(B, L, HKV, D), "backend": "numpy"} | arguments))


def dequantize(**arguments):
    return cupy_fp8kv.dequantize(**({"codes": cache_of(), "backend": "numpy"} | arguments))


@each({
    "dtype": Bad(TypeError, "^x: ", "float16, bfloat16, float32", "got float64", x=q_of(B, D, dtype=np.float64)),
    "codes": Bad(TypeError, "^x: ", "got uint8", x=cache_of()),
    "rank": Bad(ValueError, "^x: ", "1 to 4 axes", r"got shape \[1, 1, 1, 1, 16\]", x=q_of(1, 1, 1, 1, 16)),
    "number": Bad(ValueError, "^x: ", "1 to 4 axes", r"got shape \[\]", x=np.array(1, np.float16)),
    "last axis": Bad(ValueError, "^x: ", "multiple of 16", "got 24", x=q_of(4, 24)),
    "empty last axis": Bad(ValueError, "^x: ", "multiple of 16", "got 0", x=q_of(4, 0)),
    "format": Bad(ValueError, "^kv_format: ", "e4m3, e5m2", "got f16", kv_format="f16"),
    "unknown format": Bad(ValueError, "^kv_format: ", "got int4", kv_format="int4"),
    "granularity": Bad(ValueError, "^granularity: ", "tensor, head, token", "got 'channel'", granularity="channel"),
    "heads of a matrix": Bad(ValueError, "^granularity: ", "'head' needs x", r"got shape \[4, 32\]", x=q_of(4, D),
                             granularity="head"),
    "layout": Bad(ValueError, "^kv_layout: ", "'NHD' or 'HND'", "got 'HDN'", kv_layout="HDN"),
    "backend": Bad(ValueError, "^backend: ", "'cuda', 'numpy' or None", "got 'cpu'", backend="cpu"),
    "scale": Bad(ValueError, "^scale: ", r"\[1\], \[3\] or \[2, 20, 3\]", r"got shape \[20\]",
                 scale=np.ones(L, np.float32)),
    "scale in HND": Bad(ValueError, "^scale: ", r"\[20\]", r"got shape \[3\]",
                         scale=np.ones(3, np.float32), kv_layout="HND"),
    "scale as text": Bad(TypeError, "^scale: ", "expected", "got str", scale="1"),
    "scale as a list": Bad(TypeError, "^scale: ", "expected", "got list", scale=[1.0]),
})  # fmt: skip
def test_quantize(bad):
    bad.check(quantize)


@each({
    "dtype": Bad(TypeError, "^codes: ", "uint8, float8_e4m3fn, float8_e5m2", "got float16", codes=q_of()),
    "flavour": Bad(TypeError, "^codes: ", "got float8_e4m3fnuz", codes=cache_of(dtype=ml_dtypes.float8_e4m3fnuz)),
    "last axis": Bad(ValueError, "^codes: ", "multiple of 16", "got 20", codes=cache_of(3, 20)),
    "format": Bad(ValueError, "^kv_format: ", "e5m2 asked for", "float8_e4m3fn", kv_format="e5m2",
                  codes=cache_of(dtype=E4M3.dtype)),
    "wide format": Bad(ValueError, "^kv_format: ", "f16 asked for", "uint8", kv_format="f16"),
    "out dtype": Bad(TypeError, "^dtype: ", "float16, bfloat16 or float32", "got int8", dtype="int8"),
    "fp8 out": Bad(TypeError, "^dtype: ", "got float8_e4m3fn", dtype=E4M3.dtype),
    "no dtype": Bad(TypeError, "expected a dtype|float16, bfloat16 or float32", dtype=object()),
    "scale": Bad(ValueError, "^scale: ", r"\[1\], \[3\] or \[2, 20, 3\]", r"got shape \[2, 20\]",
                 scale=np.ones((B, L), np.float32)),
})  # fmt: skip
def test_dequantize(bad):
    bad.check(dequantize)


# What the public functions mean


PUBLIC = {
    single: "q, k, v, kv_layout='NHD', pos_encoding_mode='NONE', use_tensor_cores=False, q_scale=None, k_scale=None, "
    "v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None",
    batch: "q, k_padded, v_padded, kv_layout='NHD', pos_encoding_mode='NONE', q_scale=None, k_scale=None, "
    "v_scale=None, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None",
}
PUBLIC[batch_lse] = PUBLIC[batch]
KEYWORDS = {
    single: {"kv_format", "return_lse", "lse_base", "out", "backend"},
    batch: {"kv_lens", "kv_format", "window_left", "return_lse", "lse_base", "out", "backend"},
    batch_lse: {"kv_lens", "kv_format", "window_left", "lse_base", "out", "backend"},
}


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_positional_order_is_flashinfers(function):
    """API.md: the order is the public contract; what we add is keyword-only."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    told = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional)
    assert told == PUBLIC[function]
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == KEYWORDS[function] and len(keywords) + len(positional) == len(parameters)


def data(k="e4m3", v=None, q=np.float16, length=L, seed=0):
    rng = np.random.default_rng(seed)
    shape = (B, length, HKV, D)
    caches = [oracle.random_cache(rng, shape, KV_FORMATS[name]) for name in (k, v or k)]
    return oracle.random_query(rng, (B, HQ, D), q), *caches


def assert_same(got, want):
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_single_is_batch_of_one():
    q, k, v = data()
    options = {"logits_soft_cap": 5.0, "sm_scale": 0.3, "window_left": 7, "backend": "numpy", "lse_base": "e"}
    for b in range(B):
        out, lse = single(q[b], k[b], v[b], return_lse=True, **options)
        want = batch_lse(q[b : b + 1], k[b : b + 1], v[b : b + 1], **options)
        assert_same((out, lse), tuple(array[0] for array in want))
        assert_same(single(q[b], k[b], v[b], **options), out)


def test_positional_calls():
    q, k, v = data()
    want = batch(q, k, v, q_scale=0.5, k_scale=2.0, v_scale=3.0, logits_soft_cap=9.0, sm_scale=0.2, backend="numpy")
    assert_same(batch(q, k, v, "NHD", "NONE", 0.5, 2.0, 3.0, 9.0, 0.2, None, None, backend="numpy"), want)
    got = batch_lse(q, k, v, "NHD", "NONE", 0.5, 2.0, 3.0, 9.0, 0.2, backend="numpy")
    assert_same(got[0], want)
    one = single(q[0], k[0], v[0], "NHD", "NONE", True, 0.5, 2.0, 3.0, 4, 9.0, 0.2, None, None, backend="numpy")
    want = single(
        q[0], k[0], v[0], q_scale=0.5, k_scale=2.0, v_scale=3.0, window_left=4, logits_soft_cap=9.0, sm_scale=0.2,
        backend="numpy",
    )  # fmt: skip
    assert_same(one, want)


def test_ways_to_ask_for_the_lse():
    q, k, v = data()
    out, lse = batch(q, k, v, return_lse=True, backend="numpy")
    assert_same(batch_lse(q, k, v, backend="numpy"), (out, lse))
    assert_same(batch(q, k, v, backend="numpy"), out)
    _, natural = batch_lse(q, k, v, lse_base="e", backend="numpy")
    np.testing.assert_allclose(natural, lse * np.log(2), rtol=1e-6)
    logits = np.einsum("bhgd,blhd->bhgl", q.astype(np.float64).reshape(B, HKV, 2, D),
                       reference.decode_codes(k, E4M3).astype(np.float64)) / np.sqrt(D)  # fmt: skip
    np.testing.assert_allclose(natural, np.log(np.exp(logits).sum(-1)).reshape(B, HQ), rtol=1e-5)


def test_out_is_filled_and_returned():
    q, k, v = data()
    want_out, want_lse = batch_lse(q, k, v, backend="numpy")
    out = np.full_like(q, np.nan)
    got, lse = batch_lse(q, k, v, out=out, backend="numpy")
    assert got is out
    assert_same((out, lse), (want_out, want_lse))
    other = np.full((HQ, D + 8), np.nan, np.float16)[:, :D]
    assert single(q[0], k[0], v[0], out=other, backend="numpy") is other
    np.testing.assert_array_equal(other, want_out[0])


def test_layouts():
    q, k, v = data()
    hnd = [np.ascontiguousarray(cache.swapaxes(1, 2)) for cache in (k, v)]
    want, got = batch(q, k, v, backend="numpy"), batch(q, *hnd, "HND", backend="numpy")
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(
        single(q[1], hnd[0][1], hnd[1][1], "HND", backend="numpy"), want[1], rtol=2e-3, atol=1e-5
    )


def test_lengths_are_what_a_shorter_cache_is():
    q, k, v = data()
    for length in (0, 1, 19, 20):
        lens = np.array([length, L - length], np.int32)
        out, lse = batch_lse(q, k, v, kv_lens=lens, backend="numpy")
        for b, n in enumerate(lens):
            want = single(q[b], k[b, :n], v[b, :n], return_lse=True, backend="numpy")
            assert_same((out[b], lse[b]), want)


def test_formats_of_k_and_v():
    for k_name in KV_FORMATS:
        for v_name in KV_FORMATS:
            q, k, v = data(k_name, v_name)
            want = reference.attention(
                q, k, v, k_format=KV_FORMATS[k_name], v_format=KV_FORMATS[v_name], sm_scale=D**-0.5
            )[0].astype(np.float16)
            for pair in ((k_name, v_name), [k_name, v_name], (KV_FORMATS[k_name], KV_FORMATS[v_name].dtype)):
                assert_same(batch(q, k, v, kv_format=pair, backend="numpy"), want)
            typed = (array.view(KV_FORMATS[name].dtype) for array, name in ((k, k_name), (v, v_name)))
            assert_same(batch(q, *typed, backend="numpy"), want)


def test_names_of_formats():
    for name in ("e4m3", "E4M3", "fp8", "fp8_e4m3", "e4m3fn", "float8_e4m3fn", "torch.float8_e4m3fn", E4M3,
                 ml_dtypes.float8_e4m3fn, np.dtype(ml_dtypes.float8_e4m3fn)):  # fmt: skip
        assert kv_format(name) is E4M3
    for name in ("e5m2", "fp8_e5m2", ml_dtypes.float8_e5m2):
        assert kv_format(name) is E5M2
    assert kv_format("half") is kv_format(np.float16) is kv_format("float16") is F16
    torch = pytest.importorskip("torch")
    assert kv_format(torch.float8_e5m2) is E5M2 and kv_format(torch.float16) is F16


def test_scales_are_what_scaled_values_give():
    q, k, v = data("f16")
    scale = np.array([0.5, 2.0, 0.25], np.float32)
    scaled_k, scaled_v = (cache * scale.astype(np.float16)[:, None] for cache in (k, v))
    want = batch_lse(q * np.float16(4), scaled_k, scaled_v, backend="numpy")
    for form in (scale, scale.astype(np.float64), scale.astype(np.float16), np.repeat(scale, 2)[::2]):
        out, lse = batch_lse(q, k, v, q_scale=4, k_scale=form, v_scale=form, backend="numpy")
        np.testing.assert_allclose(out, want[0], rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(lse, want[1], rtol=1e-5, atol=1e-5)
    numbers = batch_lse(q, k, v, q_scale=0.5, k_scale=3.0, v_scale=0.125, backend="numpy")
    for one in (np.float32, lambda x: np.array(x, np.float32), lambda x: np.array([x])):
        assert_same(
            batch_lse(q, k, v, q_scale=one(0.5), k_scale=one(3.0), v_scale=one(0.125), backend="numpy"), numbers
        )
    assert_same(batch_lse(q, k, v, sm_scale=1.5 / np.sqrt(D), v_scale=0.125, backend="numpy"), numbers)


def test_soft_cap_of_zero_is_none():
    q, k, v = data()
    want = batch(q, k, v, backend="numpy")
    for cap in (0, 0.0, None):
        assert_same(batch(q, k, v, logits_soft_cap=cap, backend="numpy"), want)
    assert (batch(q, k, v, logits_soft_cap=0.1, backend="numpy") != want).any()


def test_options_that_change_nothing():
    q, k, v = data()
    want = single(q[0], k[0], v[0], backend="numpy")
    for options in ({"use_tensor_cores": True}, {"rope_scale": 2.0}, {"rope_theta": 1e5}, {"window_left": L - 1}):
        assert_same(single(q[0], k[0], v[0], **options, backend="numpy"), want)


@pytest.mark.parametrize("fmt", FP8_FORMATS)
@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_quantized_caches_decode_to_nearly_the_same(fmt, granularity, layout):
    """What users do: quantise K and V, pass the scales, compare with the cache in fp16."""
    rng = np.random.default_rng(3)
    shape = (B, L, HKV, D) if layout == "NHD" else (B, HKV, L, D)
    q = oracle.random_query(rng, (B, HQ, D), np.float16)
    k, v = ((rng.standard_normal(shape) * size).astype(np.float16) for size in (0.7, 40))
    (k8, k_scale), (v8, v_scale) = (
        cupy_fp8kv.quantize(x, fmt, granularity=granularity, kv_layout=layout, backend="numpy") for x in (k, v)
    )
    assert k8.dtype == KV_FORMATS[fmt].dtype and k_scale.shape == ((HKV,) if granularity == "head" else (1,))
    out = batch(q, k8, v8, layout, k_scale=k_scale, v_scale=v_scale, backend="numpy")
    exact = batch(q, k, v, layout, backend="numpy")
    error = oracle.relative_l2(out, exact)
    assert 0.005 < error < {"e4m3": 0.06, "e5m2": 0.12}[fmt]
    # And exactly what the dequantised cache gives, up to fp32 rounding.
    back = [
        cupy_fp8kv.dequantize(x, scale, "float32", kv_layout=layout, backend="numpy").astype(np.float64)
        for x, scale in ((k8, k_scale), (v8, v_scale))
    ]
    if layout == "HND":
        back = [x.swapaxes(1, 2) for x in back]
    logits = np.einsum("bhgd,blhd->bhgl", q.astype(np.float64).reshape(B, HKV, 2, D), back[0]) / np.sqrt(D)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("bhgl,blhd->bhgd", p / p.sum(-1, keepdims=True), back[1]).reshape(B, HQ, D)
    oracle.assert_close(out, None, want, None, np.float16)


@pytest.mark.parametrize(("layout", "shape"), [("NHD", (B, L, HKV, D)), ("HND", (B, HKV, L, D)), ("NHD", (L, HKV, D))])
def test_computed_scales(layout, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    head = len(shape) - 2 if layout == "NHD" else len(shape) - 3
    amax = {
        "tensor": np.abs(x).max().reshape(1),
        "head": np.abs(x).max(axis=tuple(axis for axis in range(len(shape)) if axis != head)),
        "token": np.abs(x).max(axis=-1),
    }
    for fmt in FP8_FORMATS.values():
        for granularity, largest in amax.items():
            codes, scale = cupy_fp8kv.quantize(x, fmt, granularity=granularity, kv_layout=layout, backend="numpy")
            np.testing.assert_array_equal(scale, largest / np.float32(fmt.max))
            again, same = cupy_fp8kv.quantize(x, fmt, scale, kv_layout=layout, backend="numpy")
            assert same is scale
            assert_same(again, codes)
            back = cupy_fp8kv.dequantize(codes, scale, np.float32, kv_layout=layout, backend="numpy")
            assert np.abs(back - x).max() <= np.abs(x).max() * 2.0 ** (-4 if fmt is E4M3 else -3)


def test_arrays_of_one_and_two_axes_are_quantised():
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    for shape in ((64,), (2, 32), (4, 1, 16)):
        codes, scale = cupy_fp8kv.quantize(x.reshape(shape), backend="numpy")
        assert codes.shape == shape and scale.shape == (1,)
        np.testing.assert_allclose(
            cupy_fp8kv.dequantize(codes, scale, "float32", backend="numpy").ravel(), x, atol=0.04
        )
    _, scale = cupy_fp8kv.quantize(x.reshape(2, 32), granularity="token", backend="numpy")
    assert scale.shape == (2,)
    empty, scale = cupy_fp8kv.quantize(np.zeros((0, 4, 16), np.float16), granularity="head", backend="numpy")
    assert empty.shape == (0, 4, 16) and scale.tolist() == [1.0] * 4


def test_empty_batches():
    arrays = q_of(0, HQ, D), cache_of(0, L, HKV, D), cache_of(0, L, HKV, D)
    for kv_lens in (None, np.zeros(0, np.int32)):
        out, lse = batch_lse(*arrays, kv_lens=kv_lens, backend="numpy")
        assert out.shape == (0, HQ, D) and out.dtype == np.float16 and lse.shape == (0, HQ)


def test_lengths_of_an_empty_batch_may_be_an_empty_list():
    assert (
        call(q=q_of(0, HQ, D), k_padded=cache_of(0, L, HKV, D), v_padded=cache_of(0, L, HKV, D), kv_lens=[]).size == 0
    )


def test_caches_without_rows_and_with_one():
    q, k, v = data(length=1)
    out, lse = batch_lse(q, k[:, :0], v[:, :0], backend="numpy")
    assert out.shape == q.shape and not out.any() and np.isneginf(lse).all()
    out, lse = single(q[0], k[0, :0], v[0, :0], return_lse=True, backend="numpy")
    assert not out.any() and np.isneginf(lse).all()
    out, _ = batch_lse(q, k, v, backend="numpy")
    want = np.repeat(reference.decode_codes(v[:, 0], E4M3), HQ // HKV, axis=1).astype(np.float16)
    np.testing.assert_array_equal(out, want)
