"""Appending: the NumPy backend and every library against a definition token by token, the kernel's text against it."""

import dataclasses

import numpy as np
import pytest
from appends import DTYPES, Case, build, pairwise_cases, random_case
from test_arrays import TO, Foreign, bits, kind
from test_errors import Bad, each

import cupy_fp8kv
from cupy_fp8kv import AppendCounters, append_padded_kv_cache, append_paged_kv_cache, arrays
from cupy_fp8kv.formats import FP8_FORMATS, KV_FORMATS

CASES = pairwise_cases()
RANDOM = [random_case(seed) for seed in range(40)]


@pytest.mark.parametrize("case", [*CASES, *RANDOM], ids=str)
def test_numpy(case):
    problem = build(case)
    problem.call(backend="numpy")
    problem.check()


def to_host(tensor):
    return arrays.library("torch").to_numpy(tensor)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_torch(case):
    problem = build(dataclasses.replace(case, tables="device")).to(TO["torch"])
    problem.call(backend="numpy")
    problem.check(to_host)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
def test_typed_caches_carry_their_format(library, fmt):
    problem = build(Case(k=fmt.name, v=fmt.name))
    problem.buffers["cache"] = TO[library](problem.buffers["cache"].view(fmt.dtype))
    problem.buffers |= {name: TO[library](problem.buffers[name]) for name in ("append_key", "append_value")}
    problem.call(kv_format=None, backend="numpy")
    got = problem.buffers["cache"]
    assert bits(got) == problem.expected["cache"].tobytes()


@pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
def test_typed_codes_are_copied(fmt):
    """Every code comes out as it went in: NaN and infinities are not looked at."""
    codes = np.arange(256, dtype=np.uint8).reshape(4, 4, 16)
    cache = np.zeros((1, 2, 4, 4, 16), fmt.dtype)
    append_paged_kv_cache(codes.view(fmt.dtype), codes, [0, 4], cache, [0], [0, 1], [4])
    assert (cache.view(np.uint8) == codes).all()


def test_unknown_libraries():
    problem = build(Case(tables="host"))
    problem.buffers["append_key"] = Foreign(problem.buffers["append_key"])
    cache = problem.buffers["cache"]
    problem.buffers["cache"] = Foreign(cache)
    problem.call(backend="numpy")
    assert bits(cache) == problem.expected["cache"].tobytes()


def test_what_was_appended_is_what_decode_reads():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 3, 20, 2, 32)).astype(np.float32)
    q = rng.standard_normal((3, 4, 32)).astype(np.float16)
    caches = np.zeros((2, 3, 20, 2, 32), np.uint8)
    lens = np.array([0, 7, 12], np.int32)
    chosen = [rows[b, :n] for rows in (k, v) for b, n in enumerate(lens)]
    append_padded_kv_cache(np.concatenate(chosen[:3]), np.concatenate(chosen[3:]), [0, 0, 7, 19], *caches, lens)
    for step in range(5):
        new = lens + 1
        append_padded_kv_cache(
            *(np.stack([rows[b, n] for b, n in enumerate(lens)]) for rows in (k, v)), None, *caches, new
        )
        lens = new
        assert step < 5
    quantised = [cupy_fp8kv.quantize(x, scale=1.0)[0] for x in (k, v)]
    decode = cupy_fp8kv.batch_decode_with_padded_kv_cache
    got = decode(q, *caches, kv_lens=lens, backend="numpy")
    assert bits(got) == bits(decode(q, *quantised, kv_lens=lens, backend="numpy"))


def test_counters_add_up_and_can_be_reset():
    problem = build(Case(counters=True, k="e4m3", v="f16", together=False, values="f32", scales="number"))
    problem.call()
    counters = problem.counters
    assert problem.saturated[0] > 0 and problem.nan[0] > 0
    problem.call(counters=counters)
    assert counters.saturated.tolist() == [2 * n for n in problem.saturated]
    assert counters.nan.tolist() == [2 * n for n in problem.nan]
    assert f"K: {2 * problem.saturated[0]} saturated, {2 * problem.nan[0]} NaN" in repr(counters)
    np.testing.assert_array_equal(counters.amax, problem.amax)
    counters.reset()
    assert not counters.counts.any() and not counters.amax.any()


def test_a_token_of_request_minus_one_is_left_out():
    cache = np.zeros((2, 2, 4, 1, 16), np.uint8)
    x = np.ones((3, 1, 16), np.float16)
    append_paged_kv_cache(x, x, [0, -1, 1], [2, 3, 1], cache, [1, 0], [0, 1, 2], [3, 2])
    written = cache.any(axis=-1)[..., 0]
    assert np.argwhere(written[:, 0]).tolist() == [[0, 1], [1, 2]] == np.argwhere(written[:, 1]).tolist()


def test_both_forms_by_keyword():
    x = np.ones((1, 1, 16), np.float16)
    caches = np.zeros((3, 2, 2, 1, 1, 16), np.uint8)
    rest = {"kv_indices": [1], "kv_indptr": [0, 1], "kv_last_page_len": [1]}
    append_paged_kv_cache(append_key=x, append_value=x, append_indptr=[0, 1], paged_kv_cache=caches[0], **rest)
    append_paged_kv_cache(x, x, batch_indices=[0], positions=[0], paged_kv_cache=caches[1], **rest)
    append_paged_kv_cache(x, x, np.array([0]), np.array([0]), caches[2], *rest.values())
    assert caches[0].any() and bits(caches[0]) == bits(caches[1]) == bits(caches[2])
    with pytest.raises(TypeError, match=r"append_paged_kv_cache\(\) missing .* argument.* 'kv_indptr'"):
        append_paged_kv_cache(x, x, [0, 1], caches[0], [1])
    with pytest.raises(TypeError, match=r"append_paged_kv_cache\(\) got an unexpected keyword argument 'scale'"):
        append_paged_kv_cache(x, x, [0, 1], caches[0], *rest.values(), scale=1.0)


@pytest.mark.parametrize("library", [*TO, "list"])
def test_both_forms_write_the_same(library):
    """The second form's arguments, computed from the first one's."""
    place = TO.get(library, np.ndarray.tolist)
    problem = build(Case(page_size=3, before=(0, 2, 6, 0, 5), new=(3, 0, 1, 0, 9)))
    names = ("append_indptr", "kv_indptr", "kv_last_page_len")
    indptr, pages, last = (place(problem.tables[name]) for name in names)
    lens = cupy_fp8kv.get_seq_lens(pages, last, 3)
    assert np.asarray(lens).tolist() == [3, 2, 7, 0, 14] and "int32" in str(lens.dtype)
    requests, positions = cupy_fp8kv.get_batch_indices_positions(indptr, lens, 15)
    assert np.asarray(requests).tolist() == [0, 0, 0, 2, *[4] * 9, -1, -1]
    assert np.asarray(positions).tolist() == [0, 1, 2, 6, *range(5, 14), 0, 0]
    assert kind(requests) == kind(positions) == ("numpy" if library == "list" else library)
    assert "int32" in str(requests.dtype) and "int32" in str(positions.dtype)
    keys = [np.concatenate([problem.given(name), np.ones((2, 2, 64), np.float16)])
            for name in ("append_key", "append_value")]  # fmt: skip
    rest = [problem.tables[name] for name in ("kv_indices", "kv_indptr", "kv_last_page_len")]
    append_paged_kv_cache(*keys, np.asarray(requests), np.asarray(positions), problem.buffers["cache"], *rest)
    assert bits(problem.buffers["cache"]) == problem.expected["cache"].tobytes()


def test_errors_of_the_helpers():
    for call, error, message in (
        (lambda: cupy_fp8kv.get_seq_lens([0, 1], [1, 2], 4), ValueError, r"^kv_last_page_len: .*\[1\].*got \[2\]"),
        (lambda: cupy_fp8kv.get_seq_lens(np.zeros((1, 2), np.int32), [1], 4), ValueError, r"^kv_indptr: .*1 axis"),
        (lambda: cupy_fp8kv.get_seq_lens(np.zeros(2), [1], 4), TypeError, r"^kv_indptr: expected int32, got float64"),
        (lambda: cupy_fp8kv.get_batch_indices_positions([0, 1], [1, 2], 1), ValueError, r"^seq_lens: .*= \[1\]"),
    ):
        with pytest.raises(error, match=message):
            call()
    requests, positions = cupy_fp8kv.get_batch_indices_positions([0], [], 2)
    assert requests.tolist() == [-1, -1] and positions.shape == (2,)


# What is refused: named, and before anything is written

PAGES, R, H, D = 6, 4, 2, 32


def key(*shape, dtype=np.float16):
    return np.ones(shape or (5, H, D), dtype)


def cache_of(*shape, dtype=np.uint8):
    return np.zeros(shape or (PAGES, 2, R, H, D), dtype)


def rows_of(dtype=np.float32):
    return np.zeros((PAGES, R, H), dtype)


def call(**changes):
    good = {
        "append_key": key(), "append_value": key(), "append_indptr": [0, 3, 3, 5], "paged_kv_cache": cache_of(),
        "kv_indices": [5, 1, 0], "kv_indptr": [0, 1, 1, 3], "kv_last_page_len": [3, 0, 2],
    }  # fmt: skip
    arguments = good | changes
    try:
        append_paged_kv_cache(**arguments)
    finally:
        for name in ("paged_kv_cache", "k_token_scales"):
            part = arguments.get(name)
            if isinstance(part, np.ndarray) and changes:
                assert not part.astype(np.float32).any(), "something was written all the same"


def call_positions(**changes):
    good = {
        "append_key": key(), "append_value": key(), "batch_indices": [0, 0, 2, 2, 2], "positions": [0, 2, 5, 0, 4],
        "paged_kv_cache": cache_of(), "kv_indices": [5, 1, 0], "kv_indptr": [0, 1, 1, 3], "kv_last_page_len": [3, 0, 2],
    }  # fmt: skip
    append_paged_kv_cache(**(good | changes))


def call_padded(**changes):
    good = {
        "append_key": key(3, H, D), "append_value": key(3, H, D), "append_indptr": None,
        "k_padded": cache_of(3, 8, H, D), "v_padded": cache_of(3, 8, H, D), "kv_lens": [1, 8, 5],
    }  # fmt: skip
    append_padded_kv_cache(**(good | changes))


def read_only(array):
    array.flags.writeable = False
    return array


def test_the_good_calls_are_good():
    call()
    call_positions()
    call_padded()


@each({
    "rank of keys": Bad(ValueError, r"^append_key: ", r"3 axes \[nnz, num_kv_heads, head_dim\]", append_key=key(5, D)),
    "tokens of values": Bad(ValueError, r"^append_value: ", "nnz = 5", "got 4", append_value=key(4, H, D)),
    "heads": Bad(ValueError, r"^append_key: ", "num_kv_heads = 2 as in paged_kv_cache", append_key=key(5, 3, D)),
    "head_dim": Bad(ValueError, r"^append_value: ", "head_dim = 32", "got 16", append_value=key(5, H, 16)),
    "dtype": Bad(TypeError, r"^append_key: ", "float16, bfloat16, float32 or E4M3FN codes", "got float64",
                 append_key=key(dtype=np.float64)),
    "other codes": Bad(TypeError, r"^append_value: ", "E4M3FN codes", "got float8_e5m2",
                       append_value=key(dtype=KV_FORMATS["e5m2"].dtype)),
    "codes for fp16": Bad(TypeError, r"^append_key: ", "float16, bfloat16, float32 for a cache of FP16, got uint8",
                          append_key=key(dtype=np.uint8), paged_kv_cache=cache_of(dtype=np.float16)),
    "cache rank": Bad(ValueError, r"^paged_kv_cache: ", "5 axes", paged_kv_cache=cache_of(PAGES, R, H, D)),
    "cache dtype": Bad(TypeError, "float32", "expected a cache of", paged_kv_cache=cache_of(dtype=np.float32)),
    "three arrays": Bad(ValueError, r"^paged_kv_cache: ", "pair", "3", paged_kv_cache=(cache_of(),) * 3),
    "read-only": Bad(ValueError, r"^paged_kv_cache: ", "can be written", paged_kv_cache=read_only(cache_of())),
    "odd head_dim": Bad(ValueError, r"^paged_kv_cache: ", "multiple of 16", "got 24", append_key=key(5, H, 24),
                        append_value=key(5, H, 24), paged_kv_cache=cache_of(PAGES, 2, R, H, 24)),
    "layout": Bad(ValueError, r"^kv_layout: ", "'NHD' or 'HND'", kv_layout="HDN"),
    "format": Bad(ValueError, r"^kv_format: ", kv_format="f16"),
    "backend": Bad(ValueError, r"^backend: ", backend="gpu"),
    "strides": Bad(ValueError, r"^append_key: ", "contiguous last axis", append_key=key(5, H, 2 * D)[..., ::2]),
    # Tables
    "indptr's length": Bad(ValueError, r"^append_indptr: ", r"\[batch \+ 1\] = \[4\]", append_indptr=[0, 5]),
    "indptr's end": Bad(ValueError, r"^append_indptr: ", "from 0 to nnz = 5", append_indptr=[0, 3, 3, 4]),
    "indptr's start": Bad(ValueError, r"^append_indptr: ", "from 0 to nnz = 5", append_indptr=[1, 3, 3, 5]),
    "indptr decreases": Bad(ValueError, r"^append_indptr: ", "do not decrease", append_indptr=[0, 3, 2, 5]),
    "more than there is": Bad(ValueError, r"^append_indptr: ", "request 0 of 3 rows", append_indptr=[0, 4, 4, 5]),
    "for an empty one": Bad(ValueError, r"^append_indptr: ", "got 1 for request 1 of 0", append_indptr=[0, 3, 4, 5]),
    "float indptr": Bad(TypeError, r"^append_indptr: ", "int32", "float64", append_indptr=np.array([0.0, 3, 3, 5])),
    "pages decrease": Bad(ValueError, r"^kv_indptr: ", "do not decrease", kv_indptr=[0, 2, 1, 3]),
    "too few indices": Bad(ValueError, r"^kv_indptr: ", "3 entries of kv_indices", kv_indptr=[0, 1, 1, 4]),
    "last page": Bad(ValueError, r"^kv_last_page_len: ", "1 to page_size = 4", "got 5", kv_last_page_len=[3, 0, 5]),
    "empty last page": Bad(ValueError, r"^kv_last_page_len: ", "got 0 for request 2", kv_last_page_len=[3, 0, 0]),
    "a page too far": Bad(ValueError, r"^kv_indices: ", "0 to num_pages - 1 = 5", "got 6", "request 2",
                          kv_indices=[5, 1, 6]),
    "a negative page": Bad(ValueError, r"^kv_indices: ", "got -1", "request 0", kv_indices=[-1, 1, 0]),
    # Scales and counters
    "scale of codes": Bad(ValueError, r"^k_scale: ", "codes already", append_key=key(dtype=np.uint8), k_scale=1.0),
    "zero": Bad(ValueError, r"^v_scale: ", "positive", "got 0", v_scale=0),
    "infinite": Bad(ValueError, r"^v_scale: ", "finite", v_scale=np.inf),
    "scale's shape": Bad(ValueError, r"^k_scale: ", r"\[num_kv_heads\] = \[2\]", k_scale=np.ones(3, np.float32)),
    "scale's dtype": Bad(TypeError, r"^k_scale: ", "int32", k_scale=np.ones(2, np.int32)),
    "both": Bad(ValueError, r"^k_scale: ", "None beside k_token_scales", k_scale=1.0, k_token_scales=rows_of()),
    "token scales' shape": Bad(ValueError, r"^k_token_scales: ", r"num_kv_heads\] = \[6, 4, 2\]",
                               k_token_scales=np.zeros((PAGES, H, R), np.float32)),
    "token scales' dtype": Bad(TypeError, r"^v_token_scales: ", "float32",
                               v_token_scales=rows_of(np.float16)),
    "token scales of fp16": Bad(ValueError, r"^k_token_scales: ", "FP16", k_token_scales=rows_of(),
                                paged_kv_cache=cache_of(dtype=np.float16)),
    "counters' type": Bad(TypeError, r"^counters: ", "AppendCounters", "got dict", counters={}),
    "counters' heads": Bad(ValueError, r"^counters: ", "2 heads", "3", counters=AppendCounters(3, cache_of())),
    "counters of codes": Bad(ValueError, r"^counters: ", "append_key holds codes", append_key=key(dtype=np.uint8),
                             counters=AppendCounters(H, cache_of())),
})  # fmt: skip
def test_errors(bad):
    bad.check(call)


@each({
    "lengths": Bad(ValueError, r"^positions: ", r"\[nnz\] = \[5\]", positions=[0, 1, 2, 3]),
    "request": Bad(ValueError, r"^batch_indices: ", "0 to 2", "got 3 for token 4", batch_indices=[0, 0, 2, 2, 3]),
    "negative request": Bad(ValueError, r"^batch_indices: ", "got -2", batch_indices=[0, -2, 2, 2, 2]),
    "row": Bad(ValueError, r"^positions: ", "below the 3 rows of request 0", "got 3", positions=[0, 3, 5, 0, 4]),
    "negative row": Bad(ValueError, r"^positions: ", "got -1 for token 2", positions=[0, 2, -1, 0, 4]),
})  # fmt: skip
def test_errors_of_positions(bad):
    bad.check(call_positions)


@each({
    "too long": Bad(ValueError, r"^kv_lens: ", "from 0 to 8", "got 9 for request 1", kv_lens=[1, 9, 5]),
    "too short": Bad(ValueError, r"^kv_lens: ", "count the 1 appended", "got 0 for request 2", kv_lens=[1, 8, 0]),
    "shape": Bad(ValueError, r"^kv_lens: ", r"\[3\]", r"got \[2\]", kv_lens=[1, 8]),
    "batch": Bad(ValueError, r"^append_key: ", "batch = 3 as in k_padded", "got 4", append_key=key(4, H, D)),
    "v": Bad(ValueError, r"^v_padded: ", "got 7", v_padded=cache_of(3, 7, H, D)),
    "v's device or library": Bad(TypeError, r"^k_padded: ", "one library", v_padded=TO["torch"](cache_of(3, 8, H, D))),
    "read-only": Bad(ValueError, r"^v_padded: ", "read-only", v_padded=read_only(cache_of(3, 8, H, D))),
})  # fmt: skip
def test_errors_of_padded(bad):
    bad.check(call_padded)


def test_jax_is_not_written():
    pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"^paged_kv_cache: jax arrays cannot be written"):
        call(paged_kv_cache=TO["jax"](cache_of()))
    with pytest.raises(TypeError, match=r"^like: .*jax"):
        AppendCounters(2, TO["jax"](cache_of()))


def test_libraries_are_not_mixed():
    with pytest.raises(TypeError, match=r"^append_key: expected an array of numpy like the cache, got one of torch"):
        call(append_key=TO["torch"](key()), append_value=TO["torch"](key()))


def test_the_cases_reach_every_path():
    assert {case.form for case in CASES[::2]} == {"indptr", "positions", "padded", "padded equally", "padded one"}
    assert {case.scales for case in CASES[::2]} == {"none", "number", "scalar", "head", "token", "token of k"}
    assert {(case.values, case.k) for case in CASES} >= {(x, k) for x in DTYPES for k in KV_FORMATS}
