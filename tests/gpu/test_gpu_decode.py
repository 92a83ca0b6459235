"""The decode kernels against the float64 oracle on the same bytes.

The kernel always runs before the oracle, on memory that was NaN, and twice, for the same bits.
"""

import dataclasses
import math

import cases
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import Case, build, pairwise_cases, random_cases
from gpu_support import assert_same_bits, cp, device, planned, poison_pool, to_cupy, to_host

import cupy_fp8kv
from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import E4M3, FP8_FORMATS, KV_FORMATS
from cupy_fp8kv.plan import plan_decode, specs

pytestmark = pytest.mark.gpu

FORMATS = pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)


def run(case, arrays=None):
    """Check a case on the GPU and return its result; ``arrays`` as built, if a test changed them."""
    arrays = arrays or build(case)
    moved = arrays.to(to_cupy)
    heads, plan = case.batch * case.group * case.num_kv_heads, case.plan(device())
    poison_pool(heads * case.head_dim * 2, heads * 4, plan.workspace)
    out, lse = moved.call()
    again = arrays.to(to_cupy).call()
    assert isinstance(out, cp.ndarray) and out.dtype == KV_FORMATS[case.q].dtype and lse.dtype == np.float32
    result, lse = to_host(out), to_host(lse)
    if case.given_out:
        assert_same_bits(out, moved.out.view.reshape(out.shape), "out")
        written = dataclasses.replace(moved.out, base=to_host(moved.out.base))
        assert_same_bits(written.outside, arrays.out.outside, "memory around out")
    arrays.check(result, lse)
    assert_same_bits(again[0], result, "second out")
    assert_same_bits(again[1], lse, "second lse")
    return result, lse


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_pairwise(case):
    run(case)


@pytest.mark.parametrize("case", random_cases(), ids=str)
def test_random(case):
    print(f"seed {case.seed}")
    run(case)


# Splits


@pytest.mark.parametrize("name", cases.SPLIT_CASES)
def test_splits(name):
    case, _ = cases.SPLIT_CASES[name]
    arrays = build(case)
    run(case, arrays)
    moved = arrays.to(to_cupy)
    told = cupy_fp8kv.explain(
        moved.q.view, moved.k.view, moved.v.view, case.layout, window_left=case.window_left,
        kv_format=(case.k, case.v), kv_lens=moved.kv_lens,
    )  # fmt: skip
    assert told.backend == "cuda" and told.plan == case.plan(device())


@pytest.mark.parametrize("name", cases.SPLIT_CASES)
def test_split_cases_take_the_path_they_are_named_for(name):
    case, holds = cases.SPLIT_CASES[name]
    if device().sm_count != cases.H100.sm_count:
        pytest.skip(f"chosen for {cases.H100.sm_count} SMs, this device has {device().sm_count}")
    assert holds(case.plan(device())), case.plan(device())


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 17, 64, 257, 1000])
@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_any_number_of_splits(monkeypatch, splits, head_dim):
    """More splits than tiles included; the merge kernel has another number of parts for every head_dim."""
    case = Case(head_dim=head_dim, group=5, num_kv_heads=2, batch=4, kv_len=700, kv_lens="device",
                lens=(700, 0, 1, 333), view="padded", given_out=True)  # fmt: skip
    arrays = build(case)

    def change(plan):
        heads = case.batch * case.group * case.num_kv_heads * splits if splits > 1 else 0
        return dataclasses.replace(
            plan, splits=splits, grid=plan.grid // plan.splits * splits,
            workspace_out=heads * case.head_dim * 4, workspace_state=heads * 8,
        )  # fmt: skip

    with planned(monkeypatch, change) as plans:
        poison_pool(case.batch * 10 * (head_dim + 2) * 4 * splits)
        out, lse = arrays.to(to_cupy).call()
    assert [plan.splits for plan in plans] == [splits]
    arrays.check(to_host(out), to_host(lse))


def test_every_cta_shape_that_a_plan_may_choose(monkeypatch):
    """The planner's choice changes speed, never what comes out."""
    case = Case(group=8, num_kv_heads=2, batch=3, kv_len=1000)
    arrays = build(case)
    from cupy_fp8kv.plan import specs

    for spec in specs(case.problem, device().arch, device().shared_per_block):
        if case.num_kv_heads % spec.heads:
            continue
        pieces = case.batch * case.num_kv_heads // spec.heads

        def chosen(plan, spec=spec, pieces=pieces):
            return dataclasses.replace(plan, spec=spec, grid=pieces * plan.splits)

        with planned(monkeypatch, chosen) as plans:
            out, lse = arrays.to(to_cupy).call()
        assert plans[0].spec == spec
        arrays.check(to_host(out), to_host(lse))


# NaN and infinities in rows that are read

NAN_CODES = {"e4m3": (0x7F, 0xFF), "e5m2": (0x7D, 0x7E, 0x7F, 0xFD, 0xFF), "f16": (0x7E00, 0xFC01), "bf16": (0xFFC0,)}
INF_CODES = {"e5m2": (0x7C, 0xFC), "f16": (0x7C00, 0xFC00)}
#: (kv_len, rows): first, middle and last row of whole and of cut tiles, of one split and of many.
PLACES = [(16, 0), (16, 15), (37, 20), (37, 36), (1, 0), (5000, 0), (5000, 2500), (5000, 4999)]


def special(case, cache, row, code, channel=5):
    """The case with ``code`` in one element: request 0, the last cache head."""
    arrays = build(case)
    target = arrays.host[1 if cache == "k" else 2]
    bits = target.view(np.uint8 if target.dtype.itemsize == 1 else np.uint16)
    bits[0, row, -1, channel] = code
    placed = dataclasses.replace(getattr(arrays, cache), base=target)
    return dataclasses.replace(arrays, **{cache: placed})


@pytest.mark.parametrize(("kv_len", "row"), PLACES)
@pytest.mark.parametrize("fmt", NAN_CODES)
@pytest.mark.parametrize("cache", ["k", "v"])
def test_nan_that_is_read(cache, fmt, kv_len, row):
    for code in NAN_CODES[fmt]:
        case = Case(k=fmt, v=fmt, group=3, num_kv_heads=2, batch=2, kv_len=kv_len)
        out, lse = run(case, special(case, cache, row, code))
        if cache == "k":
            assert np.isnan(out[0, 3:]).all() and np.isnan(lse[0, 3:]).all()
            assert np.isnan(out).sum() == 3 * 128 and np.isnan(lse).sum() == 3
        else:
            assert np.isnan(out[0, 3:, 5]).all() and np.isnan(out).sum() == 3 and np.isfinite(lse).all()


@pytest.mark.parametrize(("kv_len", "row"), PLACES)
@pytest.mark.parametrize("fmt", INF_CODES)
@pytest.mark.parametrize("cache", ["k", "v"])
def test_infinities_that_are_read(cache, fmt, kv_len, row):
    """In K: a logit of +inf gives NaN, one of -inf drops out. In V: the result is infinite, not NaN."""
    for code in INF_CODES[fmt]:
        case = Case(k=fmt, v=fmt, group=3, num_kv_heads=2, batch=2, kv_len=kv_len)
        out, _ = run(case, special(case, cache, row, code))
        if cache == "v":
            assert np.isinf(out[0, 3:, 5]).all() and np.isfinite(out).sum() == out.size - 3


@pytest.mark.parametrize(("kv_len", "row"), PLACES)
@pytest.mark.parametrize("cache", ["k", "v"])
def test_infinities_in_bf16_never_look_finite(cache, kv_len, row):
    """Operands in two terms turn some of them into NaN (inf - inf), but only where they are."""
    for code in (0x7F80, 0xFF80):
        arrays = special(Case(k="bf16", v="bf16", group=3, num_kv_heads=2, batch=2, kv_len=kv_len), cache, row, code)
        out, lse = (to_host(array) for array in arrays.to(to_cupy).call())
        ref_out, ref_lse = arrays.oracle()
        if cache == "v":
            assert (np.isfinite(out) == np.isfinite(ref_out)).all() and np.isfinite(lse).all()
        else:  # a logit that should be -inf may be NaN; +inf is NaN in any case
            assert np.isnan(out[np.isnan(ref_out)]).all() and np.isnan(lse[np.isnan(ref_lse)]).all()
            assert np.isfinite(out[0, :3]).all() and np.isfinite(out[1]).all()


@FORMATS
def test_logits_that_are_all_minus_infinity_count_as_empty(fmt):
    case = Case(k="e5m2", v=fmt.name, group=2, kv_len=70, batch=1, seed=2)
    arrays = build(case)
    arrays.host[0][..., 0] = 1.0
    arrays.host[1][..., 0] = 0xFC
    arrays = dataclasses.replace(
        arrays, q=dataclasses.replace(arrays.q, base=arrays.host[0]),
        k=dataclasses.replace(arrays.k, base=arrays.host[1]),
    )  # fmt: skip
    out, lse = run(case, arrays)
    assert not out.any() and np.isneginf(lse).all()


@FORMATS
def test_every_finite_code_is_read_exactly(fmt):
    """One row: the result is V itself, so every code and its sign show, on both sides of the head dimension."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    values = reference.decode_codes(codes, fmt)[0]
    finite = np.isfinite(values)
    q = cp.ones((4, 256), np.float16)
    v = cp.asarray(codes)
    out = to_host(cupy_fp8kv.single_decode_with_kv_cache(q, cp.zeros_like(v), v, kv_format=fmt.name))
    for head in range(4):
        np.testing.assert_array_equal(out[head][finite[0]], values[finite].astype(np.float16))
    assert np.isnan(out[0][np.isnan(values[0])]).all()
    # And K: q picks one channel at a time, so the logit, and with it the LSE of one row, is the code's value.
    clean = np.where(finite, codes[0], 0).astype(np.uint8)[None]
    wanted = reference.decode_codes(clean, fmt)[0, 0].astype(np.float64)
    for first in range(0, 256, 128):
        q = to_cupy(np.eye(256, dtype=np.float16)[first : first + 128])
        for power in (0, 10):  # the smallest codes of E5M2 only show when they are multiplied
            _, lse = cupy_fp8kv.single_decode_with_kv_cache(
                q, cp.asarray(clean.reshape(1, 1, 256)), v, kv_format=fmt.name, sm_scale=2**power * math.log(2),
                return_lse=True,
            )  # fmt: skip
            want = wanted[first : first + 128] * 2**power
            np.testing.assert_allclose(to_host(lse), want, rtol=5e-7, atol=2e-6)
        _, lse = cupy_fp8kv.single_decode_with_kv_cache(q, v, v, kv_format=fmt.name, return_lse=True)
        assert np.isnan(to_host(lse)).all()  # 0 * NaN


# Conversions of q


@pytest.mark.parametrize("k", ["e4m3", "f16", "bf16"])
@pytest.mark.parametrize("exponent", [-60, -20, -10, 0, 10, 20, 60])
def test_bf16_queries_of_any_size(k, exponent):
    """Where K multiplies in fp16, bf16 queries outside its range are scaled, not cut."""
    case = Case(q="bf16", k=k, group=4, kv_len=100, seed=exponent % 7)
    arrays = build(case)
    arrays.host[0][...] = (arrays.host[0].astype(np.float32) * 2.0**exponent).astype(ml_dtypes.bfloat16)
    arrays.host[0][0, 1] = 0
    arrays.host[0][0, 2, ::3] *= ml_dtypes.bfloat16(2.0**-9)
    arrays = dataclasses.replace(arrays, q=dataclasses.replace(arrays.q, base=arrays.host[0]))
    arrays.options["sm_scale"] = 2.0**-exponent / 128**0.5
    out, lse = arrays.to(to_cupy).call(sm_scale=arrays.options["sm_scale"])
    arrays.check(to_host(out), to_host(lse))


@pytest.mark.parametrize("k", ["e4m3", "bf16"])
@pytest.mark.parametrize("special_value", [np.nan, np.inf, -np.inf])
def test_special_queries_stay_with_their_head(k, special_value):
    for q in ("f16", "bf16"):
        case = Case(q=q, k=k, group=4, kv_len=40, batch=2)
        arrays = build(case)
        arrays.host[0][1, 2, 7] = special_value
        arrays = dataclasses.replace(arrays, q=dataclasses.replace(arrays.q, base=arrays.host[0]))
        out, lse = run(case, arrays)
        touched = np.arange(8).reshape(2, 4) == 6
        assert np.isnan(out[touched]).all() and np.isnan(lse[touched]).all()
        assert np.isfinite(out[~touched]).all() and np.isfinite(lse[~touched]).all()


def test_large_logits():
    """Softmax moves its reference when a logit exceeds it by far: ascending, descending and equal logits."""
    for order in (1, -1, 0):
        case = Case(group=8, kv_len=3000, k="bf16", seed=3)
        arrays = build(case)
        ramp = order * np.linspace(-15, 15, case.kv_len)
        arrays.host[0][...] = 0
        arrays.host[0][..., 0] = np.linspace(1, 8, 8)
        arrays.host[1][...] = 0
        arrays.host[1][0, :, 0, 0] = ramp.astype(ml_dtypes.bfloat16)
        arrays = dataclasses.replace(
            arrays, q=dataclasses.replace(arrays.q, base=arrays.host[0]),
            k=dataclasses.replace(arrays.k, base=arrays.host[1]),
        )  # fmt: skip
        arrays.options["sm_scale"] = 1.0
        out, lse = arrays.to(to_cupy).call(sm_scale=1.0)
        arrays.check(to_host(out), to_host(lse))


# What surrounds a call


def test_a_request_does_not_see_its_neighbours():
    """The batch in another order: the same bits, in that order."""
    case = Case(group=4, num_kv_heads=2, batch=6, kv_len=900, kv_lens="device", lens=(900, 0, 17, 450, 1, 899))
    moved = build(case).to(to_cupy)
    out, lse = moved.call()
    order = cp.asarray([3, 0, 5, 1, 2, 4])
    permuted = dataclasses.replace(
        moved, q=cases.Placed(moved.q.view[order]), k=cases.Placed(moved.k.view[order]),
        v=cases.Placed(moved.v.view[order]), kv_lens=moved.kv_lens[order],
    )  # fmt: skip
    got_out, got_lse = permuted.call()
    assert_same_bits(got_out, out[order], "out")
    assert_same_bits(got_lse, lse[order], "lse")


def test_bits_do_not_depend_on_how_inputs_lie():
    """Layouts and strides say where rows are, not what is computed of them."""
    results = []
    for layout in ("NHD", "HND"):
        for view in ("contiguous", "padded", "transposed"):
            case = Case(group=3, num_kv_heads=2, batch=2, kv_len=600, layout=layout, view=view, seed=9)
            results.append(build(case).to(to_cupy).call())
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


def test_out_is_the_same_with_and_without_lse():
    for kv_len in (50, 5000):
        case = Case(group=2, batch=2, kv_len=kv_len)
        moved = build(case).to(to_cupy)
        both, _ = moved.call()
        only = cupy_fp8kv.batch_decode_with_padded_kv_cache(moved.q.view, moved.k.view, moved.v.view)
        assert_same_bits(only, both)


def test_lengths_on_the_device_are_cut_to_the_cache():
    case = Case(group=2, batch=4, kv_len=333, kv_lens="device", lens=(333, 0, 333, 0))
    moved = build(case).to(to_cupy)
    want = moved.call()
    wild = cp.asarray([2**31 - 1, -(2**31), 334, -1], dtype=np.int32)
    got = moved.call(kv_lens=wild)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("window_left", [0, 1, 332, 333, 334, 2**31 - 1])
def test_windows_at_their_ends(window_left):
    run(Case(group=2, batch=3, kv_len=333, kv_lens="device", lens=(333, 0, 1), window_left=window_left))


def test_empty_batches_and_caches():
    q = cp.ones((0, 8, 64), np.float16)
    cache = cp.zeros((0, 10, 2, 64), np.uint8)
    out, lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(q, cache, cache)
    assert out.shape == (0, 8, 64) and lse.shape == (0, 8)
    q = cp.ones((3, 8, 64), np.float16)
    cache = cp.zeros((3, 0, 2, 64), np.uint8)
    poison_pool(q.nbytes, 3 * 8 * 4)
    out, lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(q, cache, cache)
    assert out.shape == q.shape and not out.any() and cp.isneginf(lse).all()


def test_scales_apply_in_float32():
    """A large V with a small scale: in fp16 the unscaled result would overflow, or the scale vanish."""
    case = Case(group=2, kv_len=200, v="bf16", seed=5)
    arrays = build(case)
    big = (arrays.host[2].astype(np.float32) * 1e20).astype(ml_dtypes.bfloat16)
    arrays.host[2][...] = big
    arrays = dataclasses.replace(arrays, v=dataclasses.replace(arrays.v, base=big))
    for scale in (1e-20, np.array([1e-20], np.float32)):
        arrays.options["v_scale"] = scale
        out, lse = arrays.to(to_cupy).call(v_scale=scale if isinstance(scale, float) else to_cupy(scale))
        arrays.check(to_host(out), to_host(lse))


def test_scalars_of_any_float_type_and_host_arrays():
    case = Case(group=2, num_kv_heads=3, batch=2, kv_len=100)
    moved = build(case).to(to_cupy)
    per_head = np.array([0.5, 0.25, 2.0])
    want = moved.call(q_scale=0.5, k_scale=per_head.astype(np.float32), v_scale=0.25)
    for q_scale in (np.float32(0.5), np.array(0.5), cp.asarray(0.5), cp.asarray([0.5], dtype=np.float16)):
        for k_scale in (per_head, cp.asarray(per_head), cp.asarray(np.repeat(per_head, 2))[::2]):
            got = moved.call(q_scale=q_scale, k_scale=k_scale, v_scale=cp.asarray([0.25], dtype=np.float32))
            for a, b in zip(got, want, strict=True):
                assert_same_bits(a, b)


# Beyond 2^31 elements

LARGE_ROWS = (1 << 21) + 77
LARGE_HEADS, LARGE_DIM = 8, 128


def free_memory():
    cp.get_default_memory_pool().free_all_blocks()
    return cp.cuda.runtime.memGetInfo()[0]


def hashed_codes(xp, x):
    """Codes of E4M3 of either sign and any magnitude up to 0x77, after MurmurHash3's finaliser."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    x ^= x >> 16
    return ((x & 0x80) | ((x >> 8) % 0x78)).astype(xp.uint8)


@pytest.fixture
def large_v():
    """Random finite codes, [1, 2^21 + 77, 8, 128]: more than 2^31 elements."""
    if free_memory() < 9 << 30:
        pytest.skip("needs 9 GiB of free device memory")
    codes = cp.empty((LARGE_ROWS * LARGE_HEADS * LARGE_DIM // 8, 8), np.uint8)
    for byte in range(8):
        codes[:, byte] = hashed_codes(cp, cp.arange(byte, codes.size, 8, dtype=np.uint32))
    yield codes.reshape(1, LARGE_ROWS, LARGE_HEADS, LARGE_DIM)
    del codes
    free_memory()


def test_large_cache_last_rows(large_v):
    """K and V beyond 2^31 elements: only the last rows may be read, the rest of K is NaN."""
    assert large_v.size > 2**31
    window, kv_len = 999, LARGE_ROWS - 5
    rows = slice(kv_len - 1 - window, kv_len)
    rng = np.random.default_rng(0)
    q = oracle.random_query(rng, (1, 16, LARGE_DIM), np.float16)
    keys = oracle.random_cache(rng, (1, window + 1, LARGE_HEADS, LARGE_DIM), E4M3)
    k = cp.full(large_v.shape, 0xFF, np.uint8)
    k[:, rows] = cp.asarray(keys)
    for layout in ("NHD", "HND"):
        views = (k, large_v) if layout == "NHD" else (k.swapaxes(1, 2), large_v.swapaxes(1, 2))
        out, lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(
            cp.asarray(q), *views, layout, kv_lens=cp.asarray([kv_len], dtype=np.int32), window_left=window
        )
        ref = oracle.oracle(q, keys, to_host(large_v[:, rows]), k_format=E4M3, v_format=E4M3, sm_scale=LARGE_DIM**-0.5)
        oracle.assert_close(to_host(out), to_host(lse), *ref, np.float16)


def test_large_cache_every_row_counts(large_v):
    """All keys equal: the result is the mean of V, which CuPy takes in float64."""
    q = cp.asarray(np.random.default_rng(1).standard_normal((1, LARGE_HEADS, LARGE_DIM)).astype(np.float16))
    k = cp.full(large_v.shape, 0x38, np.uint8)  # 1.0
    out, lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(q, k, large_v)
    del k
    table = cp.asarray(reference.decode_codes(np.arange(256, dtype=np.uint8), E4M3).astype(np.float64))
    total = cp.zeros((LARGE_HEADS, LARGE_DIM))
    for first in range(0, LARGE_ROWS, 1 << 17):
        total += table[large_v[0, first : first + (1 << 17)]].sum(axis=0)
    want = to_host(total / LARGE_ROWS)
    # Rows that are missed or read twice would show: beyond 2^31 elements there are only 77 of them.
    last = to_host(table[large_v[0, 1 << 21 :]].sum(axis=0) / LARGE_ROWS)
    assert np.linalg.norm(last) > 5 * oracle.TOLERANCES["float16"][0] * np.linalg.norm(want)
    logits = to_host(q)[0].astype(np.float64).sum(axis=-1) / math.sqrt(LARGE_DIM)
    want_lse = (logits + math.log(LARGE_ROWS)) / math.log(2)
    oracle.assert_close(to_host(out), to_host(lse), want[None], want_lse[None], np.float16)


def test_large_strides_between_requests():
    """Few rows, far apart: the offset of the second request does not fit 32 bits."""
    if free_memory() < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    case = Case(batch=2, group=4, kv_len=100, k="f16", v="f16", seed=4)
    arrays = build(case)
    base = cp.empty((2, (1 << 31) // 128 + 100, 1, 128), np.float16)
    base[:, :200] = np.nan
    k, v = base[:, :100], base[:, 100:200]
    k[...], v[...] = cp.asarray(arrays.host[1]), cp.asarray(arrays.host[2])
    assert base.strides[0] > 2**32
    out, lse = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(cp.asarray(arrays.host[0]), k, v)
    arrays.check(to_host(out), to_host(lse))
    del base, k, v
    free_memory()


# Explaining and warming up


def test_explain_and_warmup():
    from cupy_fp8kv.jit import compiler

    case = Case(head_dim=64, group=2, batch=2, kv_len=128)
    compiled = cupy_fp8kv.warmup(head_dim=64, group_size=2)
    kernels = specs(case.problem, device().arch, device().shared_per_block)
    assert compiled[:-1] == [str(spec) for spec in kernels] and compiled[-1].startswith("merge")

    def known():
        # How many stages a ring has is not part of the kernel.
        return {str(spec).split(" stages=")[0] for spec, _ in compiler._kernels}

    before = known()
    moved = build(case).to(to_cupy)
    moved.call()
    assert known() == before, "a call compiled what warmup had promised"
    told = cupy_fp8kv.explain(moved.q.view, moved.k.view, moved.v.view)
    spec = dataclasses.replace(told.plan.spec, stages=min(told.plan.spec.stages, 3))
    assert str(spec) in compiled and str(told.plan.spec) in str(told)
    assert told.plan == plan_decode(case.problem, device())
