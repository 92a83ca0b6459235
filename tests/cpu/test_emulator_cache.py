"""Kernels beside decode, executed on the CPU: merging states, copying pages, gathering; and planted bugs.

With sanitizers, too: ``python tests/emulator address`` and ``thread``.
"""

import emulator
import numpy as np
import oracle
import pytest
from emulator.bugs import ADDRESS, PLAIN, THREAD, Bug, each_of_this_mode, noticed_by_its_sanitizer
from emulator.checks import move
from merges import check, merged, specials, states
from moves import CASES as MOVES
from moves import Case as MoveCase
from moves import build as build_pool
from test_arrays import bits
from test_merging import BASES, EACH_DTYPE, SHAPES
from test_page_moves import check_copy, check_gather, host_bits, pairs

import cupy_fp8kv
from cupy_fp8kv import (
    append_paged_kv_cache,
    arrays,
    copy_pages,
    gather,
    merge_state,
    merge_state_in_place,
    merge_states,
)
from cupy_fp8kv.formats import KV_FORMATS

EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
EACH_MOVE = pytest.mark.parametrize("case", MOVES, ids=str)


# Merging


@BASES
@EACH_DTYPE
@EACH_SHAPE
def test_merging(emulate, shape, dtype, base):
    v, s = states(shape, dtype)
    got = merge_states(move(v), move(s), lse_base=base)
    check(*got, *merged(v, s, base), dtype)


def test_merging_on_specials(emulate):
    v, s = specials()
    check(*merge_states(move(v), move(s)), *merged(v, s), "float32")
    given = [move(np.ascontiguousarray(part)) for i in range(2) for part in (v[:, i], s[:, i])]
    check(*merge_state(*given), *merged(v, s), "float32")


@pytest.mark.parametrize("order", [0, 1, 2])
def test_merging_gives_the_same_bits_in_any_order(emulate, monkeypatch, order):
    v, s = states((3, 50, 2, 64), "float16")
    first = merge_states(move(v), move(s))
    monkeypatch.setattr(emulate, "seed", order)
    again = merge_states(move(v), move(s))
    assert [bits(np.asarray(x)) for x in first] == [bits(np.asarray(x)) for x in again]


@EACH_DTYPE
def test_merging_on_views(emulate, dtype):
    """Strided v and s of both states; nothing around a result in place is written."""
    v, s = states((5, 2, 3, 48), dtype)
    wide_v, wide_s = np.full((2, 3, 7, 64), 7, v.dtype), np.full((2, 7, 5), 7, np.float32)
    wide_v[:, :, 1:6, 16:] = v.transpose(1, 2, 0, 3)
    wide_s[:, 1:6, :3] = s.transpose(1, 0, 2)
    moved_v, moved_s = move(wide_v), move(wide_s)
    a, b = (moved_v[i, :, 1:6, 16:].swapaxes(0, 1) for i in range(2))
    x, y = (moved_s[i, 1:6, :3] for i in range(2))
    want = merged(v, s)
    check(*merge_state(a, x, b, y), *want, dtype)
    assert bits(np.asarray(moved_v)) == bits(wide_v) and bits(np.asarray(moved_s)) == bits(wide_s)
    merge_state_in_place(a, x, b, y)
    check(a, x, *want, dtype)
    a[...], x[...] = v[:, 0], s[:, 0]
    assert bits(np.asarray(moved_v)) == bits(wide_v) and bits(np.asarray(moved_s)) == bits(wide_s)


@pytest.mark.parametrize("device", [False, True], ids=["host mask", "device mask"])
def test_merging_leaves_masked_tokens_alone(emulate, device):
    v, s = states((9, 2, 3, 64), "bfloat16")
    chosen = np.tile(np.array([True, False, False]), 3)
    mask = move(np.repeat(chosen, 2))[::2] if device else chosen
    given = [move(np.ascontiguousarray(part)) for i in range(2) for part in (v[:, i], s[:, i])]
    merge_state_in_place(*given, mask)
    want_v, want_s = merged(v, s)
    check(given[0][chosen], given[1][chosen], want_v[chosen], want_s[chosen], "bfloat16")
    for got, before in zip(given, (v, s), strict=False):
        assert bits(np.asarray(got)[~chosen]) == bits(before[~chosen, 0])


def test_merging_of_host_arrays(emulate, monkeypatch):
    monkeypatch.setattr(arrays, "cupy_library", lambda: emulator.library)
    v, s = states((5, 2, 3, 48), "float16")
    parts = [np.ascontiguousarray(part) for i in range(2) for part in (v[:, i], s[:, i])]
    before = len(emulate.launches)
    for results in (merge_states(v, s, backend="cuda"), merge_state(*parts, backend="cuda")):
        assert all(type(array) is np.ndarray for array in results)
        check(*results, *merged(v, s), "float16")
    merge_state_in_place(*parts, [True] * 4 + [False], backend="cuda")
    want = merged(v, s)
    check(parts[0][:4], parts[1][:4], want[0][:4], want[1][:4], "float16")
    assert bits(parts[0][4]) == bits(v[4, 0]) and len(emulate.launches) == before + 3


def test_merging_of_what_decode_gave(emulate):
    """The shared prefix and the rest of two requests, each attended to by the decode kernel."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 4, 64)).astype(np.float16)
    k, v = (oracle.random_cache(rng, (2, 90, 2, 64), KV_FORMATS["e4m3"]) for _ in range(2))
    decode = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse
    first = decode(move(q), move(k[:, :40].copy()), move(v[:, :40].copy()))
    rest = decode(move(q), move(k[:, 40:].copy()), move(v[:, 40:].copy()))
    out, lse = merge_state(*first, *rest)
    want = decode(q, k, v, backend="numpy")
    np.testing.assert_allclose(np.asarray(out).astype(float), want[0].astype(float), atol=2e-3)
    np.testing.assert_allclose(np.asarray(lse), want[1], atol=1e-4)


# Pages


@EACH_MOVE
@pytest.mark.parametrize("tables", ["host", "device"])
def test_moves(emulate, case, tables):
    pool = build_pool(case).to(move)
    place = move if tables == "device" else lambda table: table
    named = tuple(map(place, (pool.indptr, pool.indices, pool.last)))
    check_gather(pool, named, max(case.lens, default=0) + 3)
    check_copy(pool, *map(place, pairs(case)))


@pytest.mark.parametrize(
    "case", [MoveCase(), MoveCase(layout="HND", view="wide"), MoveCase("f16", "u8", together=False)], ids=str
)
def test_no_row_is_read_that_nobody_has(emulate, case):
    pool = build_pool(case).to(move)
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


def test_moves_leave_out_pages_that_are_not_there(emulate):
    pool = build_pool(MoveCase()).to(move)
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
        pool = build_pool(MoveCase(v=v, together=together)).to(move)
        before = len(emulate.launches)
        check_gather(pool, (pool.indptr, pool.indices, pool.last))
        check_copy(pool, *pairs(pool.case))
        assert len(emulate.launches) == before + launches


@pytest.mark.parametrize("case", [MoveCase(scales="k"), MoveCase("e5m2", "e5m2", layout="HND"), MoveCase("f16", "e5m2",
                         together=False)], ids=str)  # fmt: skip
def test_moves_of_host_arrays(emulate, monkeypatch, case):
    monkeypatch.setattr(arrays, "cupy_library", lambda: emulator.library)
    pool = build_pool(case)
    before = len(emulate.launches)
    got = check_gather(pool, (pool.indptr, pool.indices, pool.last), backend="cuda")
    assert all(type(array) is np.ndarray for array in got if array is not None)
    check_copy(pool, *pairs(case), backend="cuda")
    assert len(emulate.launches) > before + 1


def test_the_length_of_device_tables_must_be_given(emulate):
    pool = build_pool(MoveCase()).to(move)
    with pytest.raises(ValueError, match=r"^max_kv_len: expected a number, because the host does not know"):
        gather(pool.cache, *map(move, (pool.indptr, pool.indices, pool.last)))


# Planted bugs


def check_merge(machine):
    v, s = states((3, 9, 2, 64), "float16")
    check(*merge_states(move(v), move(s)), *merged(v, s), "float16")


def check_in_place(machine):
    """Rows of 1024: several warps read the sum that one of them writes."""
    v, s = states((2, 2, 2, 1024), "float16")
    given = [move(np.ascontiguousarray(part)) for i in range(2) for part in (v[:, i], s[:, i])]
    merge_state_in_place(*given)
    check(*given[:2], *merged(v, s), "float16")


def check_pages(machine):
    pool = build_pool(MoveCase(page_size=5, layout="HND")).to(move)
    check_gather(pool, (pool.indptr, pool.indices, pool.last), 53)
    check_copy(pool, *pairs(pool.case))


def check_last_request(machine):
    pool = build_pool(MoveCase(lens=(17,))).to(move)
    check_gather(pool, (pool.indptr, pool.indices, pool.last))


BUGS = [
    Bug("an empty state counts", (PLAIN,), "merge_states.cu", " && log2_sum != negative_infinity();", ";",
        check_merge),
    Bug("states of one group only", (PLAIN,), "merge_states.cu", "        p.parts, [&](int i)", "        1, [&](int i)",
        check_merge),
    Bug("a sum in the wrong base", (PLAIN,), "merge_states.cu", "log2_sum() * p.lse_unit", "log2_sum() * 2.0f",
        check_merge),
    Bug("no barrier before a merged state is written", (THREAD,), "merge_states.cu", "    ptx::sync_threads();\n", "",
        check_in_place),
    Bug("a share of a state twice", (PLAIN,), "merge_states.cu", "p.v_stride_head + 16 * share)",
        "p.v_stride_head + 16 * (share / 2))", check_merge),
    Bug("a row too many gathered", (PLAIN,), "pages.cu", "at.row < rows ?", "at.row <= rows ?", check_pages),
    Bug("strides of K for V", (PLAIN,), "pages.cu", "of_k ? p.k_out_stride_head : p.v_out_stride_head",
        "of_k ? p.v_out_stride_head : p.k_stride_head", check_pages),
    Bug("a result past its end", (ADDRESS,), "pages.cu", "i < out_rows * p.row_words", "i <= out_rows * p.row_words",
        check_last_request),
]  # fmt: skip


@each_of_this_mode(BUGS)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, machine, bug):
    noticed_by_its_sanitizer(tmp_path, monkeypatch, machine, bug)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_checks_of_planted_bugs_pass_without_them(emulate, bug):
    bug.check(emulate)


# What is refused of device arrays


def test_addresses_are_checked_in_later_calls_too(emulate, monkeypatch):
    """The first call of a kind is checked as a whole, later ones must not be less careful: alignment, and no memory."""
    v, s = (move(x) for x in states((4, 1, 2, 32), "float16"))
    v, s = v[:, 0], s[:, 0]
    raw = move(np.zeros(v.nbytes + 16, np.uint8))
    odd = raw[8:-8].view(np.float16).reshape(v.shape)
    x, cache = move(np.ones((2, 2, 32), np.float16)), move(np.zeros((2, 2, 4, 2, 32), np.uint8))
    raw_cache = move(np.zeros(cache.nbytes + 16, np.uint8))
    odd_cache = raw_cache[8:-8].reshape(cache.shape)
    tables = [0, 2], [0], [0, 1], [2]

    def append(keys, cache):
        append_paged_kv_cache(keys, keys, tables[0], cache, *tables[1:])

    merge_state(v, s, v, s)
    append(x, cache)
    odd_x = raw[8:264].view(np.float16).reshape(x.shape)
    for call, name in (
        (lambda: merge_state(v, s, odd, s), "v_b"),
        (lambda: append(odd_x, cache), "append_key"),
        (lambda: append(x, odd_cache), "paged_kv_cache"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected data that starts at a multiple of 16 bytes"):
            call()
    original = emulator.library.read
    monkeypatch.setattr(type(emulator.library), "read", lambda self, array: (0, original(array)[1]))
    for call, name in ((lambda: merge_state(v, s, v, s), "v_a"), (lambda: append(x, cache), "paged_kv_cache")):
        with pytest.raises(ValueError, match=rf"^{name}: expected an array with memory"):
            call()
