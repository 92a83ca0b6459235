"""Appending, copying pages and gathering on the GPU: every byte of every buffer, against definitions row by row."""

import dataclasses

import ml_dtypes
import moves
import numpy as np
import pytest
from appends import Case, build, pairwise_cases, random_case
from gpu_support import assert_same_bits, cp, poison_pool, spin, to_cupy, to_host, warm_spin

import cupy_fp8kv
from cupy_fp8kv import AppendCounters, append_padded_kv_cache, append_paged_kv_cache, copy_pages, gather
from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import FP8_FORMATS
from cupy_fp8kv.jit import spec as jit_spec

pytestmark = pytest.mark.gpu


def move(values):
    """A copy of its own in CuPy, of any type but FP8."""
    return to_cupy(np.ascontiguousarray(values))


def download(array):
    return np.ascontiguousarray(to_host(array))


@pytest.mark.parametrize("case", [*pairwise_cases(), *(random_case(seed) for seed in range(100, 200))], ids=str)
def test_append(case):
    problem = build(case).to(move)
    problem.call()
    problem.check(download)


@pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
@pytest.mark.parametrize("software", [False, True], ids=["hardware", "integer"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["f16", "bf16"])
def test_it_saturates_as_quantize_does(monkeypatch, fmt, software, dtype):
    """All 65536 values of 16 bits, by instructions and by integer arithmetic."""
    original = jit_spec.AppendSpec
    monkeypatch.setattr("cupy_fp8kv.append_checks.AppendSpec", lambda *a: original(*a, software_fp8=software))
    values = np.arange(65536, dtype=np.uint16).view(dtype).reshape(256, 1, 256)
    cache = cp.zeros((256, 2, 1, 1, 256), np.uint8)
    given = to_cupy(values)
    append_paged_kv_cache(given, given, list(range(257)), cache, list(range(256)), list(range(257)), [1] * 256,
                          kv_format=fmt)  # fmt: skip
    want = reference.encode(values, fmt)
    for side in range(2):
        assert_same_bits(cache[:, side, 0], want)


@pytest.mark.parametrize("case", [
    Case(before=(1000, 0, 5), new=(3000, 4097, 1), num_kv_heads=8, head_dim=128, values="bf16", counters=True),
    Case(before=(0,), new=(5000,), page_size=1, num_kv_heads=3, values="f32", scales="token", counters=True),
    Case(before=(70,) * 256, new=(1,) * 256, num_kv_heads=300, head_dim=16, counters=True, scales="head"),
    Case(before=tuple(range(200)), new=(2,) * 200, form="positions", tables="device", layout="HND", k="f16", v="f16"),
], ids=str)  # fmt: skip
def test_many_tokens(case):
    """More rows than threads in flight, more heads than a CTA has threads."""
    problem = build(case).to(move)
    problem.call()
    problem.check(download)


def test_device_tables_are_never_read_by_the_host():
    """Tables that arrive late on the stream, while the host has long returned."""
    warm_spin()
    case = Case(tables="device", counters=True, scales="token")
    problem = build(case).to(move)
    problem.call()
    problem.check(download)
    problem = build(case).to(move)
    late = {name: cp.full_like(table, -1) for name, table in problem.tables.items()}
    right = problem.tables
    problem.tables = late
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.get_current_stream().synchronize()
    with stream:
        spin(30)
        for name, table in right.items():
            late[name][...] = table
        problem.call()
        assert not stream.done, "the call waited for the device"
    stream.synchronize()
    problem.check(download)


def test_a_captured_append_follows_its_tables():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 64)).astype(np.float16)
    caches = [cp.zeros((3, 20, 2, 64), np.uint8) for _ in range(2)]
    given, lens = to_cupy(x), cp.array([1, 1, 1], np.int32)
    counters = AppendCounters(2, caches)
    append_padded_kv_cache(given, given, None, *caches, lens, counters=counters)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        append_padded_kv_cache(given, given, None, *caches, lens, counters=counters)
        graph = stream.end_capture()
    want = np.zeros((3, 20, 2, 64), np.uint8)
    want[:, 0] = reference.encode(x, FP8_FORMATS["e4m3"])
    for step in range(2, 12):
        new = rng.standard_normal((3, 2, 64)).astype(np.float16)
        rows = np.array([step, step + 5, 21 if step == 7 else 1], np.int32)
        with stream:
            given[...], lens[...] = to_cupy(new), cp.asarray(rows)
            graph.launch()
        stream.synchronize()
        for b, row in enumerate(rows):
            if row <= 20:
                want[b, row - 1] = reference.encode(new[b], FP8_FORMATS["e4m3"])
        assert_same_bits(caches[0], want)
        assert_same_bits(caches[1], want)
    assert counters.skipped.tolist() == [1]


def test_what_device_tables_put_outside_is_skipped():
    int32 = lambda *values: cp.array(values, np.int32)  # noqa: E731
    before = np.full((3, 2, 4, 2, 16), 9, np.uint8)
    x = cp.ones((2, 2, 16), np.float16)
    good = {"kv_indices": int32(2), "kv_indptr": int32(0, 1), "kv_last_page_len": int32(2)}
    for changes in (
        {"append_indptr": int32(0, 2), "kv_indices": int32(3)}, {"append_indptr": int32(0, 2), "kv_indices": int32(-1)},
        {"append_indptr": int32(0, 2), "kv_indptr": int32(-1, 0)}, {"append_indptr": int32(5, 9)},
        {"batch_indices": int32(1, -1), "positions": int32(0, 1)},
        {"batch_indices": int32(0, 0), "positions": int32(2**31 - 1, -(2**31))},
    ):  # fmt: skip
        cache = cp.asarray(before)
        counters = AppendCounters(2, cache)
        append_paged_kv_cache(append_key=x, append_value=x, paged_kv_cache=cache, counters=counters, **(good | changes))
        assert_same_bits(cache, before)
        assert counters.skipped.tolist() == [2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
def test_torch(dtype, fmt):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    values = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[dtype]
    problem = build(Case(values=values, k=fmt.name, v=fmt.name, tables="device", scales="head"))

    def to_torch(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(array)).cuda()

    problem = problem.to(to_torch)
    codes = problem.buffers["cache"]
    problem.buffers["cache"] = codes.view(getattr(torch, fmt.dtype.name))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.call(kv_format=None)
        indptr, last = problem.tables["kv_indptr"], problem.tables["kv_last_page_len"]
        lens = cupy_fp8kv.get_seq_lens(indptr, last, 16)
        places = cupy_fp8kv.get_batch_indices_positions(problem.tables["append_indptr"], lens, 13)
    side.synchronize()
    assert_same_bits(codes, problem.expected["cache"])
    assert [x.tolist() for x in places] == [problem.tables[name].tolist() for name in ("batch_indices", "positions")]


def test_more_than_two_to_the_31_elements():
    """Pages beyond 4 GB of one pool: written, copied and gathered."""
    needed = 5 * 2**30
    if cp.cuda.runtime.memGetInfo()[0] < needed + 2**30:
        pytest.skip("needs 6 GB of free device memory")
    num_pages = needed // (2 * 16 * 8 * 128)
    cache = cp.empty((num_pages, 2, 16, 8, 128), np.uint8)
    pages = [num_pages - 1, 0, num_pages - 2]
    cache[pages] = 0
    x = np.random.default_rng(0).standard_normal((40, 8, 128)).astype(np.float16)
    given = to_cupy(x)
    append_paged_kv_cache(given, given, [0, 40], cache, pages, [0, 3], [8])
    k, v = gather(cache, [0, 3], pages, [8])
    want = reference.encode(x, FP8_FORMATS["e4m3"])
    assert_same_bits(k[0], want)
    assert_same_bits(v[0], want)
    copy_pages(cache, [num_pages - 1], [num_pages // 2])
    assert_same_bits(cache[num_pages // 2, 0], want[:16])
    del cache
    cp.get_default_memory_pool().free_all_blocks()


# Pages


CASES = [*moves.CASES, moves.Case(num_kv_heads=8, head_dim=128, lens=(5000, 3, 999), num_pages=600),
         moves.Case(page_size=1, num_kv_heads=1, head_dim=16, lens=(4000,), num_pages=5000)]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tables", ["host", "device"])
def test_pages(case, tables):
    if "e5m2" in (case.k, case.v):
        case = dataclasses.replace(case, k="u8", v="u8")  # CuPy has no FP8 types
    pool = moves.build(case).to(move)
    place = cp.asarray if tables == "device" else lambda table: table
    longest = max(case.lens, default=0) + 3
    poison_pool(len(case.lens) * longest * case.num_kv_heads * case.head_dim)
    named = map(place, (pool.indptr, pool.indices, pool.last))
    got = gather(pool.cache, *named, case.layout, max_kv_len=longest, **pool.scales)
    names = ("k", "v", "k_scales", "v_scales")
    for name, array in zip(names, got, strict=False):
        if array is None:
            assert name not in pool.parts
            continue
        assert isinstance(array, cp.ndarray)
        assert_same_bits(array, pool.padded(name, longest), name)
    half = case.num_pages // 2
    order = np.random.default_rng(0).permutation(case.num_pages).astype(np.int32)
    source, target = order[:half], order[half : 2 * half]
    copy_pages(pool.cache, place(source), place(target), case.layout, **pool.scales)
    for name, want in pool.expected_buffers(source, target).items():
        assert_same_bits(pool.buffers[name], want, name)


def test_gathered_and_paged_decode_agree():
    pool = moves.build(moves.Case(num_kv_heads=2, head_dim=128, lens=(0, 1, 700, 33), num_pages=60))
    codes = pool.buffers["cache"] & 0x37
    cache, q = cp.asarray(codes), cp.asarray(np.random.default_rng(0).standard_normal((4, 8, 128)), np.float16)
    k, v = gather(cache, pool.indptr, pool.indices, pool.last)
    lens = cp.array(pool.case.lens, np.int32)
    padded = cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, v, kv_lens=lens)
    paged = cupy_fp8kv.batch_decode_with_paged_kv_cache(q, cache, None, pool.indptr, pool.indices, pool.last)
    np.testing.assert_allclose(to_host(padded).astype(float), to_host(paged).astype(float), atol=2e-3, rtol=2e-3)
