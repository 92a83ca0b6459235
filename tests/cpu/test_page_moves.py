"""Copying pages and gathering them: NumPy, every library and the kernels' text against definitions row by row."""

import numpy as np
import pytest
from moves import CASES, Case, build
from test_append import read_only, to_host
from test_arrays import TO, bits, kind
from test_errors import Bad, each

import cupy_fp8kv
from cupy_fp8kv import copy_pages, gather

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def pairs(case, seed=0):
    order = np.random.default_rng(seed).permutation(case.num_pages)
    half = case.num_pages // 2
    return np.resize(order[:half], half).astype(np.int32)[: max(0, half - 1)], order[half : 2 * half - 1].astype(
        np.int32
    )


def host_bits(array):
    return bits(to_host(array)) if kind(array) == "torch" else bits(np.asarray(array))


def check_copy(pool, source, target, **options):
    copy_pages(pool.cache, source, target, pool.case.layout, **pool.scales, **options)
    for name, want in pool.expected_buffers(np.asarray(source), np.asarray(target)).items():
        assert host_bits(pool.buffers[name]) == bits(want), name


def check_gather(pool, tables, max_kv_len=None, **options):
    got = gather(pool.cache, *tables, pool.case.layout, max_kv_len=max_kv_len, **pool.scales, **options)
    rows = max(pool.case.lens, default=0) if max_kv_len is None else max_kv_len
    names = ("k", "v", "k_scales", "v_scales") if pool.case.scales else ("k", "v")
    assert len(got) == len(names)
    for name, array in zip(names, got, strict=True):
        if name not in pool.parts:
            assert array is None
            continue
        want = pool.padded(name, rows)
        assert tuple(array.shape) == want.shape and host_bits(array) == bits(want), name
    return got


@EACH_CASE
def test_numpy(case):
    pool = build(case)
    check_gather(pool, (pool.indptr, pool.indices, pool.last))
    check_gather(pool, (pool.indptr.tolist(), pool.indices.tolist(), pool.last.tolist()), 61)
    check_copy(pool, *pairs(case))


@EACH_CASE
def test_torch(case):
    pool = build(case).to(TO["torch"])
    got = check_gather(pool, tuple(map(TO["torch"], (pool.indptr, pool.indices, pool.last))))
    assert {kind(array) for array in got if array is not None} == {"torch"}
    check_copy(pool, *map(TO["torch"], pairs(case)))


def test_jax_is_read_and_not_written():
    pytest.importorskip("jax")
    pool = build(Case(k="e5m2", v="e5m2")).to(TO["jax"])
    got = check_gather(pool, (pool.indptr, pool.indices, pool.last))
    assert {kind(array) for array in got} == {"jax"}
    with pytest.raises(TypeError, match=r"^paged_kv_cache: jax arrays cannot be written"):
        copy_pages(pool.cache, [0], [1])


def test_gathered_is_what_decode_reads():
    pool = build(Case(k="e5m2", v="e5m2"))
    pool.buffers["cache"].view(np.uint8)[...] &= 0x3F  # finite codes
    q = np.random.default_rng(0).standard_normal((len(pool.case.lens), 4, 64)).astype(np.float16)
    k, v = gather(pool.cache, pool.indptr, pool.indices, pool.last)
    out = cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, v, kv_lens=list(pool.case.lens), backend="numpy")
    assert np.isfinite(out).all() and not out[0].any() and out[1:].any()


# What is refused


def call_copy(**changes):
    good = {"paged_kv_cache": build(Case()).buffers["cache"], "source_pages": [0, 0], "target_pages": [1, 2]}
    copy_pages(**(good | changes))


def call_gather(**changes):
    pool = build(Case())
    good = {"paged_kv_cache": pool.cache, "kv_indptr": pool.indptr, "kv_indices": pool.indices,
            "kv_last_page_len": pool.last}  # fmt: skip
    return gather(**(good | changes))


def test_the_good_calls_are_good():
    call_copy()
    call_gather()


@each({
    "lengths": Bad(ValueError, r"^target_pages: ", r"\[2\] like source_pages", r"got \[1\]", target_pages=[1]),
    "a target twice": Bad(ValueError, r"^target_pages: ", "once", "page 1 twice", target_pages=[1, 1]),
    "a source too": Bad(ValueError, r"^target_pages: ", "also a source", "page 0", target_pages=[0, 1]),
    "too far": Bad(ValueError, r"^target_pages: ", "0 to num_pages - 1 = 22", "got 23 at 1", target_pages=[1, 23]),
    "negative": Bad(ValueError, r"^source_pages: ", "got -1 at 0", source_pages=[-1, 0]),
    "dtype": Bad(TypeError, r"^source_pages: ", "int32", source_pages=[0.5, 1.0]),
    "read-only": Bad(ValueError, r"^paged_kv_cache: ", "can be written",
                     paged_kv_cache=read_only(build(Case()).buffers["cache"])),
    "scales": Bad(ValueError, r"^v_token_scales: ", r"\[23, 16, 2\]", v_token_scales=np.zeros((23, 2, 16), np.float32)),
    "layout": Bad(ValueError, r"^kv_layout: ", kv_layout="DNH"),
    "backend": Bad(ValueError, r"^backend: ", backend="gpu"),
})  # fmt: skip
def test_errors_of_copy_pages(bad):
    bad.check(call_copy)


@each({
    "too short": Bad(ValueError, r"^max_kv_len: ", "at least the 50 rows of request 4, got 49", max_kv_len=49),
    "negative": Bad(ValueError, r"^max_kv_len: ", "from 0", "got -1", max_kv_len=-1),
    "no number": Bad(TypeError, r"^max_kv_len: ", "integer", "'60'", max_kv_len="60"),
    "last page": Bad(ValueError, r"^kv_last_page_len: ", "to page_size = 16", kv_last_page_len=[0, 1, 16, 17, 2, 3]),
    "batch": Bad(ValueError, r"^kv_indptr: ", r"\[batch \+ 1\] = \[3\]", kv_last_page_len=[1, 2]),
    "pages": Bad(ValueError, r"^kv_indices: ", "got 23", kv_indptr=[0, 1], kv_indices=[23], kv_last_page_len=[1]),
})  # fmt: skip
def test_errors_of_gather(bad):
    bad.check(call_gather)
