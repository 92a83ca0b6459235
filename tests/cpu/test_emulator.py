"""The kernels themselves, executed on the CPU: the text that NVRTC gets, through the product's own way of a call.

``tests/emulator`` has the runtime. Decode, merge, quantise and the read limit are held against their definitions here
on every run, and with sanitizers by ``python tests/emulator address`` and ``thread``.
"""

import dataclasses

import emulator
import numpy as np
import pytest
from cases import Case, build, pairwise_cases
from emulator.checks import SPLIT, TAIL, move, run

import cupy_fp8kv
from cupy_fp8kv import arrays as boundary
from cupy_fp8kv.backends import cuda, reference
from cupy_fp8kv.bench.limit import ReadSpec
from cupy_fp8kv.formats import FP8_FORMATS, KV_FORMATS
from cupy_fp8kv.jit.params import divisors
from cupy_fp8kv.plan import plan_decode

#: A second or less each, and together every format, layout, view, option, tile and number of splits.
SMALL = [
    case
    for case in pairwise_cases()
    if case.kv_len * case.batch * case.num_kv_heads <= 2100 and case.group <= 32 and case.kv_len <= 1000
]

CHOSEN = SMALL[:: max(1, len(SMALL) // 36)]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_decode(emulate, case):
    run(emulate, case)


def test_the_cases_reach_every_path(emulate):
    plans = [plan_decode(case.problem, emulator.DEVICE) for case in (*CHOSEN, SPLIT)]
    assert {plan.spec.ctas_per_sm for plan in plans} == {1, 2, 4}
    assert {plan.spec.column_tiles for plan in plans} == {1, 2} and max(plan.splits for plan in plans) > 2
    assert {plan.spec.k for plan in plans} == set(KV_FORMATS) == {plan.spec.v for plan in plans}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_any_order_of_threads_gives_the_same_bits(emulate, monkeypatch, seed):
    first = run(emulate, SPLIT)
    monkeypatch.setattr(emulate, "seed", seed)
    again = run(emulate, SPLIT)
    assert "merge" in emulate.launches[-1][0]
    assert all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
def test_any_number_of_splits(emulate, monkeypatch, splits):
    def plan(problem, device):
        found = plan_decode(problem, device)
        heads = problem.batch * problem.num_qo_heads * splits
        return dataclasses.replace(
            found, splits=splits, grid=found.grid // found.splits * splits,
            workspace_out=heads * problem.head_dim * 4, workspace_state=heads * 8,
        )  # fmt: skip

    monkeypatch.setattr(cuda, "plan_decode", plan)
    run(emulate, dataclasses.replace(TAIL, kv_len=300, lens=(300, 0)))


def test_infinities_beside_masked_rows(emulate):
    """A masked row of a tile has weight 0, which must not meet an infinity."""
    case = Case(v="e5m2", group=2, num_kv_heads=1, batch=1, kv_len=37, seed=2)
    arrays = build(case)
    arrays.v.view[0, 36, 0, 5] = arrays.host[2][0, 36, 0, 5] = 0x7C
    out, _ = run(emulate, case, arrays)
    assert np.isposinf(out[..., 5]).all() and np.isfinite(np.delete(out, 5, -1)).all()


@pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "head", "token"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_quantize_and_back(emulate, fmt, granularity, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 9, 3, 48)) * np.exp(rng.normal(0, 3, (2, 9, 3, 1)))).astype(np.float32)
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    x = x.astype(cupy_fp8kv.arrays.numpy_dtype(dtype))
    codes, scale = cupy_fp8kv.quantize(move(x), fmt, granularity=granularity)
    want = reference.amax_scale(x, fmt, granularity)
    assert np.array_equal(scale, want)
    assert np.array_equal(np.asarray(codes).view(np.uint8), reference.quantize(x, fmt, want))
    back = cupy_fp8kv.dequantize(move(np.asarray(codes).view(np.uint8)), move(want), dtype, kv_format=fmt)
    np.testing.assert_array_equal(
        np.asarray(back).astype(np.float32),
        reference.dequantize(np.asarray(codes).view(np.uint8), fmt, want, x.dtype).astype(np.float32),
    )


@pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
@pytest.mark.parametrize("software", [False, True], ids=["hardware", "integer"])
def test_every_code_and_every_half(emulate, monkeypatch, fmt, software):
    """All 65536 fp16 values to codes and all 256 codes back, as the definition has them."""
    original = cuda.Quantizer.__init__
    monkeypatch.setattr(cuda.Quantizer, "__init__", lambda self, *a: original(self, *a, software_fp8=software))
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(1, 512, 128)
    codes, _ = cupy_fp8kv.quantize(move(halves), fmt, scale=1.0)
    assert np.array_equal(np.asarray(codes).view(np.uint8), reference.encode(halves, fmt))
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    floats = cupy_fp8kv.dequantize(move(every), 1.0, "float32", kv_format=fmt)
    np.testing.assert_array_equal(np.asarray(floats), reference.decode_codes(every, fmt))


# Nothing is touched that may not be: rows beyond a length or before a window, gaps between rows, other memory


WATCHED = [
    dataclasses.replace(TAIL, view=view, layout=layout, window_left=window, k=k, head_dim=head_dim)
    for view, layout, window, k, head_dim in (
        ("contiguous", "NHD", -1, "e4m3", 128), ("padded", "HND", 5, "e4m3", 128), ("padded", "NHD", 0, "f16", 96),
        ("transposed", "NHD", 17, "e5m2", 80), ("padded", "HND", -1, "bf16", 256), ("padded", "NHD", -1, "e4m3", 16),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", WATCHED, ids=str)
def test_no_byte_is_read_that_may_not_be(emulate, case):
    run(emulate, case)


# Arrays on the host that the GPU is asked for


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "single"])
def test_host_arrays_go_up_and_come_back(emulate, monkeypatch, batched):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 4, 64)).astype(np.float16)
    k, v = rng.integers(0, 120, (2, 2, 37, 2, 64)).astype(np.uint8)
    options = {
        "k_scale": np.array([0.01, 0.02], np.float32), "v_scale": 0.5, "window_left": 20, "logits_soft_cap": 30.0,
        "return_lse": True,
    }  # fmt: skip
    if batched:
        decode, options["kv_lens"] = cupy_fp8kv.batch_decode_with_padded_kv_cache, [37, 5]
    else:
        decode, q, k, v = cupy_fp8kv.single_decode_with_kv_cache, q[0], k[0], v[0]
    monkeypatch.setattr(boundary, "cupy_library", lambda: emulator.library)
    before = len(emulate.launches)
    got = decode(q, k, v, "NHD", "NONE", backend="cuda", **options)
    assert len(emulate.launches) > before
    want = decode(q, k, v, "NHD", "NONE", backend="numpy", **options)
    for ours, theirs in zip(got, want, strict=True):
        assert type(ours) is np.ndarray and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=2e-3, atol=2e-3)


#: What it would store is the exclusive or of all words; to see it, the kernel must find it unlikely.
UNLIKELY = np.uint32(0x5BD1E995)


def read(emulate, k, v, nbytes, indices=None):
    """What the read kernel would store. Of pages as ``indices`` puts them in order: their first ``nbytes``."""
    sink = move(np.zeros(1, np.uint32))
    value, multiplier, shift = divisors(page_words=1 if indices is None else k[0].nbytes // 16).values()
    words = value | multiplier << 32, shift | value << 32, multiplier | shift << 32
    pages = 0 if indices is None else indices
    emulate.call(ReadSpec(4, 128, indices is not None), 3, k, v, sink, nbytes, nbytes, pages, *words)
    return sink[0]


@pytest.mark.parametrize("rows", [1, 511, 512, 1300])
def test_the_read_limit_reads_every_byte_once(emulate, rows):
    """Every thread folds its own words: with one word in all that is not 0, one thread has it."""
    k, v = (move(np.zeros((rows, 4), np.uint32)) for _ in range(2))
    k[-1, 3] = UNLIKELY
    assert read(emulate, k, v, k.nbytes) == UNLIKELY
    k[-1, 3], v[-1, 0] = 0, UNLIKELY
    assert read(emulate, k, v, k.nbytes) == UNLIKELY


@pytest.mark.parametrize("page_words", [1, 5, 192, 512])
def test_the_read_limit_goes_through_pages_as_they_are_listed(emulate, page_words):
    """Listed are some pages of many, and of the last one only a part is read."""
    rng = np.random.default_rng(page_words)
    listed = move(rng.permutation(1500 // page_words + 3)[: 1300 // page_words + 1].astype(np.int32))
    k, v = (move(np.zeros((1500 // page_words + 3, page_words, 4), np.uint32)) for _ in range(2))
    count = (len(listed) - 1) * page_words + (page_words + 1) // 2
    may = np.zeros(k.shape, bool)
    may.reshape(len(k), -1)[listed[:-1]] = True
    may[listed[-1], : (page_words + 1) // 2] = True
    for array in (k, v):
        for word in (0, page_words, count // 2, count - 1):
            if word < count:
                place = array[listed[word // page_words], word % page_words]
                place[2] = UNLIKELY
                with emulate.watching((k, may), (v, may)):
                    assert read(emulate, k, v, 16 * count, listed) == UNLIKELY
                place[2] = 0
    assert read(emulate, k, v, 16 * count, listed) == 0
