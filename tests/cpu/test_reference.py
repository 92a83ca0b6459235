"""The NumPy backend against attention written out densely, and the algebra that it and the kernels share."""

import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_fp8kv.backends import reference
from cupy_fp8kv.backends.reference import SoftmaxState
from cupy_fp8kv.formats import BF16, E4M3, E5M2, F16, FP8_FORMATS, KV_FORMATS

pytestmark = pytest.mark.filterwarnings("error")

FORMATS = pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)


def values_of(array, fmt):
    return (array.view(fmt.dtype) if array.dtype == np.uint8 else array).astype(np.float64)


def dense(
    q, k, v, *, k_format, v_format, sm_scale, q_scale=1.0, k_scale=1.0, v_scale=1.0, logits_soft_cap=0.0,
    window_left=-1, kv_lens=None, lse_base="2",
):  # fmt: skip
    """One softmax per request and query head, over everything at once."""
    q, k, v = q.astype(np.float64), values_of(k, k_format), values_of(v, v_format)
    batch, num_qo_heads = q.shape[:2]
    max_len, num_kv_heads = k.shape[1:3]
    k_scale, v_scale = (np.broadcast_to(np.ravel(s), num_kv_heads) for s in (k_scale, v_scale))
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for b in range(batch):
        kv_len = max_len if kv_lens is None else kv_lens[b]
        kept = [i for i in range(kv_len) if window_left < 0 or i >= kv_len - 1 - window_left]
        for h in range(num_qo_heads) if kept else ():
            kv_head = h // (num_qo_heads // num_kv_heads)
            x = np.array([q[b, h] @ k[b, i, kv_head] for i in kept])
            x = x * sm_scale * np.ravel(q_scale)[0] * k_scale[kv_head]
            if logits_soft_cap:
                x = logits_soft_cap * np.tanh(x / logits_soft_cap)
            p = np.exp(x - x.max())
            lse[b, h] = x.max() + np.log(p.sum())
            out[b, h] = (p / p.sum()) @ v[b, kept, kv_head] * v_scale[kv_head]
    return out, lse / np.log(2) if lse_base == "2" else lse


def case(seed=0, batch=2, length=37, num_kv_heads=2, group=2, head_dim=16, k_format=E4M3, v_format=None, q=np.float16):
    rng = np.random.default_rng(seed)
    v_format = v_format or k_format
    shape = (batch, length, num_kv_heads, head_dim)
    arrays = (
        oracle.random_query(rng, (batch, num_kv_heads * group, head_dim), q),
        oracle.random_cache(rng, shape, k_format),
        oracle.random_cache(rng, shape, v_format),
    )
    return arrays, {"k_format": k_format, "v_format": v_format, "sm_scale": head_dim**-0.5}


def check(arrays, options, compute_dtype=np.float64, **tolerance):
    tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-12}
    out, lse = reference.attention(*arrays, **options, compute_dtype=compute_dtype)
    assert out.dtype == lse.dtype == compute_dtype
    options = {name: value for name, value in options.items() if name != "block_tokens"}
    for got, want in zip((out, lse), dense(*arrays, **options), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, **tolerance)
    return out, lse


# Against the dense definition


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 12])
def test_groups(group):
    arrays, options = case(group=group, num_kv_heads=3)
    check(arrays, options)


@pytest.mark.parametrize("v_format", KV_FORMATS.values(), ids=str)
@pytest.mark.parametrize("k_format", KV_FORMATS.values(), ids=str)
def test_formats_mix(k_format, v_format):
    arrays, options = case(k_format=k_format, v_format=v_format, q=ml_dtypes.bfloat16)
    check(arrays, options)


def test_codes_of_the_whole_range():
    (q, *_), options = case(k_format=E4M3, v_format=E5M2)
    rng = np.random.default_rng(1)
    k, v = (oracle.random_cache(rng, (2, 37, 2, 16), fmt, "codes") for fmt in (E4M3, E5M2))
    check((q, k, v), options | {"k_scale": 0.01}, rtol=1e-10, atol=1e-7)


@FORMATS
def test_typed_caches_equal_codes(fmt):
    (q, k, v), options = case(k_format=fmt)
    codes = reference.attention(q, k, v, **options)
    typed = reference.attention(q, k.view(fmt.dtype), v.view(fmt.dtype), **options)
    for a, b in zip(codes, typed, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("lse_base", ["2", "e"])
@pytest.mark.parametrize("logits_soft_cap", [0.0, None, 0.5, 30.0])
@pytest.mark.parametrize("window_left", [-1, 0, 1, 7, 36, 100])
def test_options(window_left, logits_soft_cap, lse_base):
    arrays, options = case(batch=5)
    lens = np.array([0, 1, 8, 36, 37], np.int32)
    options |= {"window_left": window_left, "logits_soft_cap": logits_soft_cap, "lse_base": lse_base}
    check(arrays, options | {"kv_lens": lens})
    check(arrays, options)


@pytest.mark.parametrize("k_scale", [0.25, np.array(0.3, np.float32), np.array([0.3]), np.array([0.2, 3.0, 0.7])])
@pytest.mark.parametrize("v_scale", [4.0, np.array([5.0], np.float32), np.array([0.1, 100.0, 1.0], np.float32)])
def test_scales(k_scale, v_scale):
    arrays, options = case(num_kv_heads=3)
    options |= {"q_scale": np.array([1.5], np.float32), "k_scale": k_scale, "v_scale": v_scale, "logits_soft_cap": 2.0}
    check(arrays, options)


@pytest.mark.parametrize("block_tokens", [1, 2, 7, 36, 37, 38, 1000])
def test_blocks_do_not_matter(block_tokens):
    arrays, options = case(batch=3)
    options |= {"kv_lens": np.array([37, 5, 0]), "window_left": 20, "block_tokens": block_tokens}
    check(arrays, options)
    check(arrays, options, np.float32, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fmt", KV_FORMATS.values(), ids=str)
def test_float32_is_close_to_float64(fmt):
    arrays, options = case(length=3000, batch=1, head_dim=64, k_format=fmt)
    ref_out, ref_lse = oracle.oracle(*arrays, **options)
    out, lse = reference.attention(*arrays, **options)
    assert out.dtype == lse.dtype == np.float32
    assert oracle.relative_l2(out, ref_out) < 2e-6
    assert np.abs(lse - ref_lse).max() < 2e-6
    for dtype in (np.float16, ml_dtypes.bfloat16):
        oracle.assert_close(out.astype(dtype), lse, ref_out, ref_lse, dtype)


def test_a_query_does_not_see_its_neighbours():
    (q, k, v), options = case(batch=4)
    lens = np.array([3, 37, 0, 20])
    out, lse = reference.attention(q, k, v, **options, kv_lens=lens)
    order = [2, 0, 3, 1]
    out_2, lse_2 = reference.attention(q[order], k[order], v[order], **options, kv_lens=lens[order])
    np.testing.assert_array_equal(out_2, out[order])
    np.testing.assert_array_equal(lse_2, lse[order])


# What is read, and what is not


@pytest.mark.parametrize("fmt", KV_FORMATS.values(), ids=str)
@pytest.mark.parametrize("window_left", [-1, 4])
def test_rows_outside_are_never_read(fmt, window_left):
    (q, k, v), options = case(batch=4, k_format=fmt)
    options |= {"kv_lens": np.array([0, 1, 20, 37], np.int32), "window_left": window_left, "block_tokens": 8}
    want = reference.attention(q, k, v, **options)
    for b, kv_len in enumerate(options["kv_lens"]):
        for cache in (k, v):
            oracle.poison(cache[b, kv_len:], fmt)
            if window_left >= 0:
                oracle.poison(cache[b, : max(0, kv_len - 1 - window_left)], fmt)
    assert np.isnan(values_of(k, fmt)).any()
    for got, expected in zip(reference.attention(q, k, v, **options), want, strict=True):
        assert not np.isnan(got).any()
        np.testing.assert_array_equal(got, expected)


def test_strided_views():
    (q, k, v), options = case()
    want = reference.attention(q, k, v, **options)
    hnd = [np.ascontiguousarray(cache.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for cache in (k, v)]
    both = oracle.poison(np.empty((2, 37, 2, 2, 20), np.uint8), E4M3)
    both[:, :, 0, :, :16], both[:, :, 1, :, :16] = k, v
    wide_q = np.full((2, 4, 40), np.nan, np.float16)
    wide_q[..., 8:24] = q
    reversed_q = np.ascontiguousarray(q[:, ::-1])[:, ::-1]
    views = [
        (q, *hnd),
        (wide_q[..., 8:24], both[:, :, 0, :, :16], both[:, :, 1, :, :16]),
        (reversed_q, k, v),
    ]
    for view in views:
        # BLAS may take another path for other strides.
        for got, expected in zip(reference.attention(*view, **options), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lens", [[0, 0], [0, 3]])
def test_empty_requests(lens):
    (q, k, v), options = case()
    out, lse = reference.attention(q, k, v, **options, kv_lens=np.array(lens))
    assert not out[0].any() and np.isneginf(lse[0]).all()
    assert np.isfinite(lse[1]).all() == bool(lens[1])


def test_a_cache_without_rows_and_a_batch_without_requests():
    (q, k, v), options = case()
    out, lse = reference.attention(q, k[:, :0], v[:, :0], **options)
    assert out.shape == q.shape and not out.any() and np.isneginf(lse).all()
    out, lse = reference.attention(q[:0], k[:0], v[:0], **options)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


# Infinities and NaN


def infinite_case(sign, rows):
    """K of request 0, head 0 gives logits of ``sign * inf`` in ``rows``."""
    (q, k, v), options = case(k_format=F16)
    q[0, :2, 0] = 1.0
    k[0, rows, 0, 0] = sign * np.inf
    return (q, k, v), options


@pytest.mark.parametrize("block_tokens", [5, None])
def test_logits_that_are_all_minus_infinity_count_as_empty(block_tokens):
    arrays, options = infinite_case(-1, slice(None))
    out, lse = reference.attention(*arrays, **options, block_tokens=block_tokens)
    assert not out[0, :2].any() and np.isneginf(lse[0, :2]).all()
    assert np.isfinite(out).all() and np.isfinite(lse[0, 2:]).all() and np.isfinite(lse[1]).all()


@pytest.mark.parametrize("block_tokens", [5, None])
@pytest.mark.parametrize("rows", [slice(0, 5), slice(20, 37), slice(3, 30)])
def test_some_logits_of_minus_infinity_drop_out(rows, block_tokens):
    arrays, options = infinite_case(-1, rows)
    check(arrays, options | {"block_tokens": block_tokens})


@pytest.mark.parametrize("block_tokens", [5, None])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(20, 22), slice(None)])
def test_a_logit_of_plus_infinity_gives_nan(rows, block_tokens):
    arrays, options = infinite_case(+1, rows)
    out, lse = reference.attention(*arrays, **options, block_tokens=block_tokens)
    assert np.isnan(out[0, :2]).all() and np.isnan(lse[0, :2]).all()
    assert np.isfinite(out[0, 2:]).all() and np.isfinite(out[1]).all()


@FORMATS
@pytest.mark.parametrize("row", [0, 19, 36])
@pytest.mark.parametrize("block_tokens", [5, None])
def test_nan_in_a_row_that_is_read_propagates(fmt, row, block_tokens):
    (q, k, v), options = case(k_format=fmt)
    options["block_tokens"] = block_tokens
    with_k, with_v = k.copy(), v.copy()
    with_k[0, row, 0, 3] = with_v[0, row, 1, 5] = 0xFF
    out, lse = reference.attention(q, with_k, v, **options)
    assert np.isnan(out[0, :2]).all() and np.isnan(lse[0, :2]).all()
    assert np.isnan(out).sum() == 2 * 16 and np.isnan(lse).sum() == 2
    out, lse = reference.attention(q, k, with_v, **options)
    assert np.isnan(out[0, 2:, 5]).all() and np.isnan(out).sum() == 2 and np.isfinite(lse).all()


def test_large_logits_do_not_overflow():
    (q, k, v), options = case(k_format=BF16)
    check((q * np.float16(1000), k, v), options, rtol=1e-8, atol=1e-8)
    out, lse = reference.attention(q * np.float16(1000), k, v, **options)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


# The softmax state as algebra


def state(rng, rows, spread=10.0):
    logits = rng.standard_normal((2, 3, rows)) * spread
    some = SoftmaxState.of(logits, rng.standard_normal((2, rows, 4)))
    assert some.o.shape == (2, 3, 4) and some.m.shape == some.d.shape == (2, 3)
    return some


def assert_equal(a, b, **tolerance):
    for x, y in zip(a.finish(), b.finish(), strict=True):
        np.testing.assert_allclose(x, y, **(tolerance or {"rtol": 1e-11, "atol": 1e-13}))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.tuples(*[st.integers(0, 6)] * 3), spread=st.sampled_from([0, 1, 300.0]))
def test_merge_is_associative_and_commutative(seed, rows, spread):
    rng = np.random.default_rng(seed)
    a, b, c = (state(rng, n, spread=spread) for n in rows)
    assert_equal(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_equal(a.merge(b), b.merge(a))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_empty_state_is_neutral(dtype):
    rng = np.random.default_rng(0)
    some = SoftmaxState.of(rng.standard_normal((2, 3, 5)).astype(dtype), rng.standard_normal((2, 5, 4)).astype(dtype))
    empty = SoftmaxState.empty((2, 3), 4, dtype)
    for merged in (some.merge(empty), empty.merge(some)):
        for field in ("o", "m", "d"):
            np.testing.assert_array_equal(getattr(merged, field), getattr(some, field))
            assert getattr(merged, field).dtype == dtype
    out, lse = empty.merge(empty).finish()
    assert not out.any() and np.isneginf(lse).all() and out.dtype == lse.dtype == dtype


def test_update_equals_one_softmax():
    rng = np.random.default_rng(0)
    logits, v = rng.standard_normal((2, 3, 50)) * 20, rng.standard_normal((2, 50, 4))
    one = SoftmaxState.of(logits, v)
    many = SoftmaxState.empty((2, 3), 4, np.float64)
    for first in range(0, 50, 7):
        many = many.update(logits[..., first : first + 7], v[:, first : first + 7])
    assert_equal(one, many)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(one.finish()[0], np.einsum("hgl,hld->hgd", p, v), rtol=1e-10)
    np.testing.assert_allclose(one.finish("e")[1], np.log(np.exp(logits).sum(-1)), rtol=1e-12)
    np.testing.assert_allclose(one.finish("2")[1], np.log2(np.exp(logits).sum(-1)), rtol=1e-12)


def test_splits_of_attention_merge_to_the_whole():
    (q, k, v), options = case(length=60)
    out, lse = oracle.oracle(q, k, v, **options, lse_base="e")
    parts = [oracle.oracle(q, k[:, rows], v[:, rows], **options, lse_base="e") for rows in (slice(0, 9), slice(9, 60))]
    a, b = (SoftmaxState(o, s, np.ones_like(s)) for o, s in parts)
    merged_out, merged_lse = a.merge(b).finish("e")
    np.testing.assert_allclose(merged_out, out, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-12)


# Memory


@pytest.mark.parametrize(
    ("batch", "length", "num_kv_heads", "group", "head_dim"),
    [(2, 512, 32, 1, 128), (1, 20_000, 1, 1, 64), (1, 20_000, 1, 128, 16)],
)
def test_temporaries_stay_small(batch, length, num_kv_heads, group, head_dim):
    (q, k, v), options = case(0, batch, length, num_kv_heads, group, head_dim)
    tracemalloc.start()
    try:
        reference.attention(q, k, v, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A block of K, of V, of logits and what follows; a whole request would take 10 MiB or more.
    assert peak < 6 << 20, f"{peak / 2**20:.1f} MiB"


# Quantisation

SCALE_SHAPES = {"tensor": (1,), "head": (3,), "token": (2, 5, 3)}
GRANULARITIES = pytest.mark.parametrize("granularity", SCALE_SHAPES)


def kv(seed=0, dtype=np.float32, spread=1.0):
    x = np.random.default_rng(seed).standard_normal((2, 5, 3, 8), np.float32) * spread
    return x.astype(dtype)


@FORMATS
@GRANULARITIES
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_amax_scale(fmt, granularity, dtype):
    x = kv(dtype=dtype)
    scale = reference.amax_scale(x, fmt, granularity)
    assert scale.shape == SCALE_SHAPES[granularity] and scale.dtype == np.float32
    axes = {"tensor": (0, 1, 2, 3), "head": (0, 1, 3), "token": 3}[granularity]
    amax = np.abs(x.astype(np.float32)).max(axis=axes)
    np.testing.assert_array_equal(scale, (amax / np.float32(fmt.max)).reshape(scale.shape))
    hnd = x.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(
        reference.amax_scale(hnd, fmt, granularity, head_axis=1),
        scale.transpose(0, 2, 1) if granularity == "token" else scale,
    )


@FORMATS
def test_amax_scale_of_degenerate_values(fmt):
    x = kv()
    x[0, 0, 0] = 0.0
    x[0, 0, 1] = np.nan
    x[0, 0, 2] = [np.inf, -np.inf, np.nan, 0, -3.0, 1, 2, 0]
    x[0, 1, 0] = 1e-45
    scale = reference.amax_scale(x, fmt, "token")
    assert scale[0, 0, 0] == scale[0, 0, 1] == scale[0, 1, 0] == 1.0
    assert scale[0, 0, 2] == np.float32(3.0) / np.float32(fmt.max)
    assert reference.amax_scale(np.zeros_like(x), fmt, "tensor").tolist() == [1.0]
    assert reference.amax_scale(x[:, :0], fmt, "head").tolist() == [1.0] * 3


@FORMATS
@GRANULARITIES
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_round_trip(fmt, granularity, spread):
    x = kv(spread=spread)
    scale = reference.amax_scale(x, fmt, granularity)
    codes = reference.quantize(x, fmt, scale)
    assert codes.dtype == np.uint8 and codes.shape == x.shape
    back = reference.dequantize(codes, fmt, scale)
    assert back.dtype == np.float32
    broadcast = np.broadcast_to(reference.broadcast_scale(scale, x.shape, -2), x.shape)
    step = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}[fmt.name]
    smallest = {"e4m3": 2.0**-10, "e5m2": 2.0**-17}[fmt.name]
    assert (np.abs(back - x) <= np.maximum(np.abs(x) * step, smallest * broadcast) * (1 + 1e-6)).all()
    # The largest element is stored as the largest value, and what was stored once is stored alike again.
    largest = np.abs(reference.decode_codes(codes, fmt)).max()
    assert largest == fmt.max
    np.testing.assert_array_equal(reference.quantize(back, fmt, scale), codes)


@FORMATS
def test_stored_is_x_over_scale(fmt):
    """A true division: multiplying by the reciprocal rounds some ties the other way."""
    table = reference.decode_codes(np.arange(0x7B, dtype=np.uint8), fmt)
    scale = np.linspace(0.1, 9.0, 50, dtype=np.float32)[:, None]
    x = (table[1:] + table[:-1]) / 2 * scale
    codes = reference.quantize(x, fmt, scale[:, 0])
    np.testing.assert_array_equal(codes, reference.encode(x / scale, fmt))
    assert (codes != reference.encode(x * (1 / scale), fmt)).any()
    half = kv(dtype=np.float16)
    np.testing.assert_array_equal(reference.quantize(half, fmt, 1.0), reference.encode(half, fmt))


@FORMATS
def test_quantize_specials(fmt):
    x = np.array([[np.nan, np.inf, -np.inf, 1e30, -0.0]], np.float32)
    codes = reference.quantize(x, fmt, np.float32(1e-20))
    largest = {"e4m3": 0x7E, "e5m2": 0x7B}[fmt.name]
    np.testing.assert_array_equal(codes, [[0x7F, largest, largest | 0x80, largest, 0x80]])


@FORMATS
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32", np.float16, ml_dtypes.bfloat16])
def test_dequantize_casts_after_scaling(fmt, out_dtype):
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    out = reference.dequantize(codes, fmt, 3.0, out_dtype)
    assert out.dtype == np.dtype(out_dtype)
    with warnings.catch_warnings(action="ignore"):
        want = (reference.decode_codes(codes, fmt) * np.float32(3.0)).astype(out_dtype)
    np.testing.assert_array_equal(out.astype(np.float32), want.astype(np.float32))
    if fmt is E5M2 and out.dtype == np.float16:
        assert np.isposinf(out[0, 0, 0x7B])  # 3 * 57344
    typed = reference.dequantize(codes.view(fmt.dtype), fmt, 3.0, out_dtype)
    np.testing.assert_array_equal(typed.view(np.uint8), out.view(np.uint8))


def test_broadcast_scale():
    shape = (2, 5, 3, 8)
    for scale in (2.0, np.float32(2.0), np.array([2.0])):
        assert reference.broadcast_scale(scale, shape, -2).shape == ()
    per_head = np.array([1.0, 2.0, 3.0])
    assert reference.broadcast_scale(per_head, shape, -2).shape == (1, 1, 3, 1)
    assert reference.broadcast_scale(per_head, (2, 3, 5, 8), 1).shape == (1, 3, 1, 1)
    assert reference.broadcast_scale(np.ones((2, 5, 3)), shape, -2).shape == (2, 5, 3, 1)
    assert reference.broadcast_scale(np.ones((1, 1, 1)), (1, 1, 1, 8), -2).shape == (1, 1, 1, 1)
    assert reference.broadcast_scale(per_head, shape, -2).dtype == np.float32


# The comparer itself


def test_assert_close_holds_its_tolerances():
    arrays, options = case(batch=3)
    ref_out, ref_lse = oracle.oracle(*arrays, **options, kv_lens=[37, 20, 0])
    good = ref_out.astype(np.float16), ref_lse.astype(np.float32)
    oracle.assert_close(*good, ref_out, ref_lse, np.float16)
    oracle.assert_close(good[0][0], good[1][0], ref_out[0], ref_lse[0], "float16")
    oracle.assert_close(ref_out.astype(ml_dtypes.bfloat16), None, ref_out, ref_lse, "bfloat16")
    assert np.abs(ref_out[1]).max(axis=-1).min() < 0.5 * np.abs(ref_out[1]).max()  # a head that L2 hides

    def fails(message, out=good[0], lse=good[1], q_dtype="float16"):
        with pytest.raises(AssertionError, match=message):
            oracle.assert_close(out, lse, ref_out, ref_lse, q_dtype)

    def with_one(array, index, value):
        array = array.astype(np.float64)
        array[index] = value
        return array

    head = np.abs(ref_out[1]).max(axis=-1).argmin()
    nudge = ref_out[1, head, 3] + 1.5e-3 * np.abs(ref_out[1, head]).max()
    fails("relative L2 .* in request 1", np.concatenate([good[0][:1], good[0][1:2] * np.float16(1.002), good[0][2:]]))
    fails(rf"request, head, channel\) \(1, {head}, 3\)", with_one(ref_out, (1, head, 3), nudge))
    fails("relative L2 .* in request 0", good[0] * np.float16(1.01), q_dtype="bfloat16")
    fails("NaN", with_one(good[0], (0, 1, 2), np.nan))
    fails(r"out: \+inf", with_one(good[0], (0, 1, 2), np.inf))
    fails("lse: -inf", lse=with_one(good[1], (2, 0), -100.0))
    fails("lse: off by", lse=with_one(good[1], (1, 0), ref_lse[1, 0] + 2e-4))
    fails("shape", good[0][:2])


def test_assert_close_looks_where_the_reference_is_not_finite():
    arrays, options = infinite_case(+1, slice(0, 1))
    ref_out, ref_lse = oracle.oracle(*arrays, **options)
    oracle.assert_close(ref_out.astype(np.float16), ref_lse, ref_out, ref_lse, "float16")
    with pytest.raises(AssertionError, match="NaN"):
        oracle.assert_close(np.nan_to_num(ref_out), ref_lse, ref_out, ref_lse, "float16")


def test_random_caches_are_finite_and_poison_is_not():
    rng = np.random.default_rng(0)
    for fmt in KV_FORMATS.values():
        for kind in ("normal", "codes") if fmt.is_fp8 else ("normal",):
            cache = oracle.random_cache(rng, (2, 300, 2, 16), fmt, kind)
            assert cache.dtype == (np.uint8 if fmt.is_fp8 else fmt.dtype)
            assert np.isfinite(values_of(cache, fmt)).all()
            assert np.isnan(values_of(oracle.poison(cache, fmt), fmt)).all()
        if fmt.is_fp8:
            assert np.isnan(oracle.poison(np.zeros(3, fmt.dtype), fmt).astype(np.float32)).all()
