"""Appending, executed on the CPU; and planted bugs.

With sanitizers, too: ``python tests/emulator address`` and ``thread``.
"""

import emulator
import numpy as np
import pytest
from appends import Case as AppendCase
from appends import build as build_append
from appends import pairwise_cases, random_case, same_bits
from emulator.bugs import ADDRESS, PLAIN, Bug, each_of_this_mode, noticed_by_its_sanitizer
from emulator.checks import move

import cupy_fp8kv
from cupy_fp8kv import AppendCounters, append_padded_kv_cache, append_paged_kv_cache, arrays
from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import FP8_FORMATS, KV_FORMATS
from cupy_fp8kv.jit import spec as jit_spec

#: Sanitizers take longer, and see what they see in a few cases too.
STEP = 6 if emulator.toolchain.current().sanitized else 1
CASES = [*pairwise_cases()[::2], *(random_case(seed) for seed in range(0, 40, 4))][::STEP]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_append(emulate, case):
    problem = build_append(case).to(move)
    problem.call()
    problem.check()


@pytest.mark.parametrize("fmt", FP8_FORMATS)
@pytest.mark.parametrize("software", [False, True], ids=["hardware", "integer"])
def test_append_saturates_as_quantize_does(emulate, monkeypatch, fmt, software):
    """All 65536 fp16 values."""
    original = jit_spec.AppendSpec
    monkeypatch.setattr("cupy_fp8kv.append_checks.AppendSpec", lambda *a: original(*a, software_fp8=software))
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 1, 256)
    cache = move(np.zeros((256, 2, 1, 1, 256), np.uint8))
    tables = list(range(256)), list(range(257)), [1] * 256
    append_paged_kv_cache(move(halves), move(halves), list(range(257)), cache, *tables, kv_format=fmt)
    want = cupy_fp8kv.quantize(halves, fmt, 1.0)[0].view(np.uint8)
    assert (np.asarray(cache)[:, 0, 0] == want).all() and (np.asarray(cache)[:, 1, 0] == want).all()


@pytest.mark.parametrize("order", [0, 2])
def test_append_in_any_order(emulate, monkeypatch, order):
    monkeypatch.setattr(emulate, "seed", order)
    problem = build_append(
        AppendCase(values="bf16", scales="token", counters=True, num_kv_heads=3, tables="device")
    ).to(move)
    problem.call()
    problem.check()


def test_append_skips_what_device_tables_put_outside(emulate):
    """Every way in which a table can be wrong: nothing is written anywhere, and the tokens are counted."""
    int32 = lambda *values: move(np.array(values, np.int32))  # noqa: E731
    before = np.full((3, 2, 4, 2, 16), 9, np.uint8)
    x = move(np.ones((2, 2, 16), np.float16))
    good = {"kv_indices": int32(2), "kv_indptr": int32(0, 1), "kv_last_page_len": int32(2)}
    ranges = {"append_indptr": int32(0, 2)}
    places = {"batch_indices": int32(0, 0), "positions": int32(0, 1)}
    bad = [
        ranges | {"kv_indices": int32(3)}, ranges | {"kv_indices": int32(-1)}, ranges | {"kv_last_page_len": int32(-9)},
        ranges | {"kv_indptr": int32(1, 2)}, ranges | {"kv_indptr": int32(-1, 0)}, ranges | {"kv_indptr": int32(0, 0)},
        ranges | {"kv_last_page_len": int32(9)}, {"append_indptr": int32(2, 4)}, {"append_indptr": int32(0, 0)},
        places | {"batch_indices": int32(1, -1)}, places | {"positions": int32(-1, 4)},
        places | {"positions": int32(2**31 - 1, -(2**31))},
    ]  # fmt: skip
    for changes in bad:
        cache = move(before)
        counters = AppendCounters(2, cache)
        append_paged_kv_cache(append_key=x, append_value=x, paged_kv_cache=cache, counters=counters, **(good | changes))
        assert (np.asarray(cache) == before).all() and counters.skipped.tolist() == [2], changes
        assert not counters.amax.any()
    padded = move(before[:, 0]), move(before[:, 1])
    counters = AppendCounters(2, padded)
    append_padded_kv_cache(move(np.ones((3, 2, 16), np.float16)), move(np.ones((3, 2, 16), np.float16)), None, *padded,
                           int32(0, 5, 4), counters=counters)  # fmt: skip
    assert counters.skipped.tolist() == [2] and (np.asarray(padded[0])[:2] == 9).all()
    assert (np.asarray(padded[0])[2, 3] != 9).all() and (np.asarray(padded[0])[2, :3] == 9).all()


def test_append_divides_as_division_does(emulate):
    check_quotients(emulate)


@pytest.mark.parametrize("values", ["f16", "bf16", "f32", "codes"])
@pytest.mark.parametrize("head_dim", [16, 112, 320, 528, 1040])
def test_append_of_narrow_and_wide_rows(emulate, values, head_dim):
    """Shares of 16 bytes for some of a row's lanes, and several a lane; more rows than CTAs have at once."""
    k, v = ("e4m3", "e5m2") if values == "codes" else ("e4m3", "f16")
    shape = {"num_kv_heads": 3, "head_dim": head_dim, "before": (7, 0, 30), "new": (150, 1, 170)}
    for changes in ({}, {"scales": "token of k", "counters": True}, {"scales": "head", "form": "positions"}):
        given = {} if values == "codes" and changes else changes
        problem = build_append(AppendCase(values=values, k=k, v=v, together=False, **shape, **given)).to(move)
        problem.call()
        problem.check()


def test_append_skips_tokens_between_others(emulate):
    """Some rows of a thread go nowhere, others somewhere; neither is taken for the other."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 3, 48)).astype(np.float16)
    positions = rng.permutation(700)[:600].astype(np.int32)
    requests = rng.integers(-1, 2, 600).astype(np.int32)
    caches = [np.full((2, 650, 3, 48), 9, np.uint8) for _ in range(2)]
    moved = [move(cache.reshape(1300, 1, 3, 48)) for cache in caches]
    counters = AppendCounters(3, tuple(moved))
    pages = move(np.arange(1300, dtype=np.int32))
    append_paged_kv_cache(move(x), move(x), move(requests), move(positions), tuple(moved), pages,
                          move(np.array([0, 650, 1300], np.int32)), move(np.ones(2, np.int32)),
                          counters=counters)  # fmt: skip
    written = (requests >= 0) & (positions < 650)
    codes = reference.encode(x.astype(np.float32), KV_FORMATS["e4m3"])
    for got, want in zip(moved, caches, strict=True):
        want[requests[written], positions[written]] = codes[written]
        assert (np.asarray(got).reshape(want.shape) == want).all()
    assert counters.skipped.tolist() == [int((~written).sum())]
    want = np.abs(x[written].astype(np.float32)).max(axis=(0, 2))
    assert (np.asarray(counters.amax) == want).all()


def test_append_to_a_cache_that_lies_backwards(emulate):
    """Pages, rows and heads by negative strides."""
    x = np.random.default_rng(0).standard_normal((3, 50, 2, 32)).astype(np.float16)
    caches = [move(np.zeros((3, 64, 2, 32), np.uint8)) for _ in range(2)]
    lens = move(np.array([50, 64, 57], np.int32))
    append_padded_kv_cache(move(x), move(x), None, *(cache[::-1, ::-1, ::-1] for cache in caches), lens)
    codes = reference.encode(x.astype(np.float32), KV_FORMATS["e4m3"])
    for cache in caches:
        got = np.asarray(cache)[::-1, ::-1, ::-1]
        for request, end in enumerate((50, 64, 57)):
            assert (got[request, end - 50 : end] == codes[request]).all()
            assert not got[request, : end - 50].any() and not got[request, end:].any()


def test_one_launch_for_both_sides_and_two_if_they_differ(emulate):
    for v, launches in (("e4m3", 1), ("f16", 2)):
        before = len(emulate.launches)
        problem = build_append(AppendCase(v=v, together=False, counters=True)).to(move)
        problem.call()
        problem.check()
        assert len(emulate.launches) == before + launches


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_append_of_host_arrays(emulate, monkeypatch, case):
    monkeypatch.setattr(arrays, "cupy_library", lambda: emulator.library)
    problem = build_append(case)
    before = len(emulate.launches)
    problem.call(backend="cuda")
    assert len(emulate.launches) > before
    problem.check()


# Planted bugs


def check_append(**changes):
    def run_case(machine):
        problem = build_append(AppendCase(**changes)).to(move)
        problem.call()
        problem.check()

    return run_case


def check_quotients(machine):
    """Quotients in the middle between two values of a format, and their neighbours; zeros, infinities, NaN."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.4, 3.0, 16).astype(np.float32)
    scales[:4] = 2.0**-40, 2.0**40, 1.0, 0.7109375
    codes = rng.integers(0, 31744, (64, 16, 32)).astype(np.uint16)
    halves = codes.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        above = np.nextafter(codes.view(np.float16), np.float16(np.inf)).astype(np.float32)
        x = ((halves + above) / 2 * scales[:, None]).astype(np.float32)
        x[16:32], x[32:48] = np.nextafter(x[16:32], 0), np.nextafter(x[32:48], np.inf)
        x[:, ::2] *= -1
        x[48:, :, :4], x[:48:5, :, 7] = (0.0, -0.0, np.inf, np.nan), -0.0
        x[56:] = rng.standard_normal((8, 16, 32)) * 2.0 ** rng.integers(-140, 120, (8, 16, 32))
        # Kernels flush subnormals.
        x[(x != 0) & (np.minimum(np.abs(x), np.abs(x / scales[:, None])) < 2.0**-126)] = 0.0
        quotients = x / scales[:, None]
        wide = {name: quotients.astype(KV_FORMATS[name].dtype) for name in ("f16", "bf16")}
    for fmt in (*FP8_FORMATS, *wide):
        want = wide[fmt] if fmt in wide else reference.encode(quotients, KV_FORMATS[fmt])
        caches = [move(np.zeros((64, 1, 16, 32), want.dtype)) for _ in range(2)]
        append_padded_kv_cache(move(x), move(x), None, *caches, move(np.ones(64, np.int32)), k_scale=move(scales),
                               v_scale=move(scales), kv_format=fmt)  # fmt: skip
        for cache in caches:
            same_bits(np.asarray(cache)[:, 0], want, fmt)


BUGS = [
    Bug("the wrong slot", (PLAIN,), "append.cu", "p.page_size.remainder(row, nth)}",
        "(p.page_size.remainder(row, nth) + 1) % p.page_size.value}", check_append()),
    Bug("the wrong request", (PLAIN,), "append.cu", "<= token) low = middle;", "< token) low = middle;",
        check_append()),
    Bug("a scale of another head", (PLAIN,), "append.cu",
        "side.scales[static_cast<i64>(head) * side.scale_stride]", "side.scales[0]", check_append(scales="head")),
    Bug("a maximum of some lanes", (PLAIN,), "append.cu", "mask = p.lanes / 2; mask", "mask = p.lanes / 4; mask",
        check_append(scales="token")),
    Bug("a maximum that forgets its head", (PLAIN,), "append.cu", "if (other != head) flush();", "",
        check_append(counters=True, num_kv_heads=300, before=(0,), new=(20,), head_dim=16)),
    Bug("values too large that nobody counts", (PLAIN,), "append.cu", "magnitude <= 0x7f800000u;",
        "magnitude < 0x7f800000u;", check_append(counters=True)),
    Bug("values past the end of a row", (PLAIN, ADDRESS), "append.cu",
        "values + d * Writer::kBytes)", "values + d * Writer::kBytes + 16)", check_append()),
    Bug("a row that ends with other values than it begins with", (PLAIN,), "append.cu",
        "first < p.head_dim ? first : begin)", "first < p.head_dim ? first : begin + 8)",
        check_append(scales="token", head_dim=640)),
    Bug("a row whose place another lane knows", (PLAIN,), "append.cu", "row, team + i, lane", "row, team, lane",
        check_append(before=(0,), new=(2000,))),
    Bug("quotients that nothing corrects", (PLAIN,), "scale/quotients.cuh", "step < 2", "step < 0", check_quotients),
    Bug("zeros without a sign", (PLAIN,), "scale/quotients.cuh", "(bits & 0x80000000u)",
        "(ptx::float_bits(q) & 0x80000000u)", check_quotients),
    Bug("infinities divided like numbers", (PLAIN,), "scale/quotients.cuh", "if (poison == 0.0f && !tiny) return;",
        "return;", check_quotients),
]  # fmt: skip


@each_of_this_mode(BUGS)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, machine, bug):
    noticed_by_its_sanitizer(tmp_path, monkeypatch, machine, bug)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_checks_of_planted_bugs_pass_without_them(emulate, bug):
    bug.check(emulate)
