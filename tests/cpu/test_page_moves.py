"""Copying pages and gathering them: NumPy, every library and the kernels' text against definitions row by row."""

import emulator
import numpy as np
import pytest
from emulator.checks import move
from moves import CASES, Case, build
from test_append import read_only, to_host
from test_arrays import TO, bits, kind
from test_errors import Bad, each

import cupy_fp8kv
from cupy_fp8kv import arrays, copy_pages, gather

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


# The kernels' own text


@EACH_CASE
@pytest.mark.parametrize("tables", ["host", "device"])
def test_kernels(emulate, case, tables):
    pool = build(case).to(move)
    place = move if tables == "device" else lambda table: table
    named = tuple(map(place, (pool.indptr, pool.indices, pool.last)))
    check_gather(pool, named, max(case.lens, default=0) + 3)
    check_copy(pool, *map(place, pairs(case)))


@pytest.mark.parametrize("case", [Case(), Case(layout="HND", view="wide"), Case("f16", "u8", together=False)], ids=str)
def test_no_row_is_read_that_nobody_has(emulate, case):
    pool = build(case).to(move)
    masks = []
    for name in ("k", "v"):
        readable = np.zeros(pool.parts[name].shape, bool)
        for b, kv_len in enumerate(case.lens):
            for row in range(kv_len):
                readable[pool.indices[pool.indptr[b] + row // case.page_size], row % case.page_size] = True
        masks.append(readable if case.layout == "NHD" else readable.swapaxes(1, 2))
    if case.together:
        mask = np.zeros(np.asarray(pool.buffers["cache"]).shape, bool)
        pool.views["cache"](mask)[...] = np.stack(masks, axis=1)
        watched = [(np.asarray(pool.buffers["cache"]), mask)]
    else:
        watched = [(np.asarray(pool.buffers[name]), mask) for name, mask in zip("kv", masks, strict=True)]
    with emulate.watching(*watched):
        check_gather(pool, (pool.indptr, pool.indices, pool.last), 55)


def test_kernels_leave_out_pages_that_are_not_there(emulate):
    pool = build(Case()).to(move)
    before = host_bits(pool.buffers["cache"])
    int32 = lambda *values: move(np.array(values, np.int32))  # noqa: E731
    copy_pages(pool.cache, int32(0, -1, 23, 1), int32(23, 2, 3, -5))
    assert host_bits(pool.buffers["cache"]) == before
    tables = (int32(0, 1, 1), int32(99), int32(16, 0)), (int32(0, 1, 1), int32(-1), int32(16, 0)), (
        int32(-1, 0, 0), int32(1), int32(16, 16)), (int32(0, 1, 1), int32(3), int32(-4, 0))  # fmt: skip
    for given in tables:
        k, v = gather(pool.cache, *given, max_kv_len=20)
        assert k.shape == (2, 20, 2, 64) and not np.asarray(k).any() and not np.asarray(v).any()
    k, _ = gather(pool.cache, int32(0, 1), int32(3), int32(99), max_kv_len=20)
    assert (np.asarray(k)[0, :16] == pool.parts["k"][3]).all() and not np.asarray(k)[0, 16:].any()
    k, _ = gather(pool.cache, int32(0, 2), int32(3, 4), int32(16), max_kv_len=20)
    assert (np.asarray(k)[0, 16:] == pool.parts["k"][4][:4]).all(), "longer requests are cut"


def test_sides_of_one_size_share_a_launch(emulate):
    for v, together, launches in (("u8", True, 2), ("f16", False, 4)):
        pool = build(Case(v=v, together=together)).to(move)
        before = len(emulate.launches)
        check_gather(pool, (pool.indptr, pool.indices, pool.last))
        check_copy(pool, *pairs(pool.case))
        assert len(emulate.launches) == before + launches


@pytest.mark.parametrize("case", [Case(scales="k"), Case("e5m2", "e5m2", layout="HND"), Case("f16", "e5m2",
                         together=False)], ids=str)  # fmt: skip
def test_host_arrays_go_up_and_come_back(emulate, monkeypatch, case):
    monkeypatch.setattr(arrays, "cupy_library", lambda: emulator.library)
    pool = build(case)
    before = len(emulate.launches)
    got = check_gather(pool, (pool.indptr, pool.indices, pool.last), backend="cuda")
    assert all(type(array) is np.ndarray for array in got if array is not None)
    check_copy(pool, *pairs(case), backend="cuda")
    assert len(emulate.launches) > before + 1


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


def test_the_length_of_device_tables_must_be_given(emulate):
    pool = build(Case()).to(move)
    with pytest.raises(ValueError, match=r"^max_kv_len: expected a number, because the host does not know"):
        gather(pool.cache, *map(move, (pool.indptr, pool.indices, pool.last)))
