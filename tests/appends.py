"""Cases of appending to caches, for every backend and library: arrays, the call, and what the cache must hold after it.

Everything is in buffers larger than what the call is given, and every byte of them is compared, so that a write out of
place shows. The definition goes token by token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from pairwise import pairwise

import cupy_fp8kv
from cupy_fp8kv.formats import KV_FORMATS, KVFormat

Array = np.ndarray[Any, Any]

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}

FACTORS: dict[str, tuple[Any, ...]] = {
    "values": ("f16", "bf16", "f32", "codes"),
    "k": tuple(KV_FORMATS),
    "v": tuple(KV_FORMATS),
    "form": ("indptr", "positions", "padded", "padded equally", "padded one"),
    "page_size": (1, 3, 16, 64),
    "num_kv_heads": (1, 2, 3, 8),
    "head_dim": (16, 48, 64, 80, 128, 256, 528),
    "scales": ("none", "number", "scalar", "head", "token", "token of k"),
    "layout": ("NHD", "HND"),
    "together": (False, True),
    "view": ("contiguous", "wide"),
    "tables": ("host", "device", "list"),
    "counters": (False, True),
}


@dataclass(frozen=True)
class Case:
    values: str = "f16"
    k: str = "e4m3"
    v: str = "e4m3"
    form: str = "indptr"
    page_size: int = 16
    num_kv_heads: int = 2
    head_dim: int = 64
    scales: str = "none"
    layout: str = "NHD"
    together: bool = True
    view: str = "contiguous"
    tables: str = "host"
    counters: bool = False
    #: Rows of each request before, and tokens that it appends.
    before: tuple[int, ...] = (0, 15, 5, 40, 16)
    new: tuple[int, ...] = (3, 2, 0, 7, 1)
    specials: bool = True
    seed: int = 0

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields if getattr(self, f.name) != f.default)

    @property
    def padded(self) -> bool:
        return self.form.startswith("padded")

    @property
    def formats(self) -> tuple[KVFormat, KVFormat]:
        return KV_FORMATS[self.k], KV_FORMATS[self.v]


def _fitted(case: Case) -> Case:
    """The nearest case that is not refused."""
    codes = case.values == "codes"
    changes: dict[str, Any] = {}
    fp8 = [KV_FORMATS[name].is_fp8 for name in (case.k, case.v)]
    if codes and not all(fp8):
        changes |= {"k": "e4m3", "v": "e5m2"}
    if codes or (case.scales.startswith("token") and not all(fp8)):
        changes |= {"scales": "none"}
    if codes:
        changes |= {"counters": False}
    if case.together and changes.get("k", case.k) != changes.get("v", case.v):
        changes |= {"together": all(fp8)}
    if case.padded:
        changes |= {"together": False}
    if case.form == "padded equally":
        changes |= {"new": (3,) * len(case.new)}
    if case.form == "padded one":
        changes |= {"new": (1,) * len(case.new)}
    return dataclasses.replace(case, **changes)


@cache
def pairwise_cases() -> list[Case]:
    return [_fitted(Case(**chosen, seed=seed)) for seed, chosen in enumerate(pairwise(FACTORS))]


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    chosen = {name: values[rng.integers(len(values))] for name, values in FACTORS.items()}
    batch = int(rng.integers(1, 9))
    before = tuple(int(x) for x in rng.integers(0, rng.choice([3, 50, 200]), batch))
    new = tuple(int(x) for x in rng.integers(0, rng.choice([2, 9, 70]), batch))
    return _fitted(Case(**chosen, before=before, new=new, seed=seed))


def _stored(x: Array, fmt: KVFormat, scale: float) -> Array:
    """One row in the cache's format, as bytes or as 16-bit floats."""
    with np.errstate(all="ignore"):
        y = x.astype(np.float32) / np.float32(scale)
        if not fmt.is_fp8:
            return y.astype(fmt.dtype)
        codes = np.clip(y, -fmt.max, fmt.max).astype(fmt.dtype).view(np.uint8)
        codes[np.isnan(y)] = 0x7F
        return codes


def _token_scale(x: Array, fmt: KVFormat) -> np.float32:
    magnitude = np.abs(x.astype(np.float32))
    scale = magnitude[np.isfinite(magnitude)].max(initial=0) / np.float32(fmt.max)
    return scale if scale >= np.finfo(np.float32).tiny else np.float32(1)


@dataclass
class Problem:
    """The arrays of a case: what the call gets are views of ``buffers``; ``expected`` are the buffers after it."""

    case: Case
    buffers: dict[str, Any]
    views: dict[str, Callable[[Any], Any]]
    tables: dict[str, Any]
    scales: dict[str, Any]
    expected: dict[str, Array]
    saturated: list[int]
    nan: list[int]
    amax: Array
    counters: Any = None

    def to(self, move: Callable[[Array], Any]) -> Problem:
        tables = self.tables
        if self.case.tables == "device":
            tables = {name: move(table) if table is not None else None for name, table in tables.items()}
        scales = {name: move(x) if isinstance(x, np.ndarray) else x for name, x in self.scales.items()}
        buffers = {name: move(buffer) for name, buffer in self.buffers.items()}
        return dataclasses.replace(self, buffers=buffers, tables=tables, scales=scales)

    def given(self, name: str) -> Any:
        return self.views[name](self.buffers[name])

    def call(self, **changes: Any) -> None:
        case = self.case
        cache = self.given("cache") if case.together else (self.given("k_cache"), self.given("v_cache"))
        options = {"kv_layout": case.layout, "kv_format": (case.k, case.v), **self.scales}
        options |= {
            f"{side}_token_scales": self.given(f"{side}_scales") for side in "kv" if f"{side}_scales" in self.buffers
        }
        if case.counters:
            self.counters = cupy_fp8kv.AppendCounters(case.num_kv_heads, cache)
            options["counters"] = self.counters
        options |= changes
        keys, values = self.given("append_key"), self.given("append_value")
        t = self.tables
        if case.padded:
            cupy_fp8kv.append_padded_kv_cache(keys, values, t["append_indptr"], *cache, t["kv_lens"], **options)
            return
        rest = (cache, t["kv_indices"], t["kv_indptr"], t["kv_last_page_len"])
        if case.form == "positions":
            cupy_fp8kv.append_paged_kv_cache(keys, values, t["batch_indices"], t["positions"], *rest, **options)
        else:
            cupy_fp8kv.append_paged_kv_cache(keys, values, t["append_indptr"], *rest, **options)

    def check(self, download: Callable[[Any], Array] = np.asarray) -> None:
        for name, want in self.expected.items():
            got = np.ascontiguousarray(download(self.buffers[name]))
            same_bits(got, want, name)
        if self.case.counters:
            assert download(self.counters.saturated).tolist() == self.saturated
            assert download(self.counters.nan).tolist() == self.nan
            assert download(self.counters.skipped).tolist() == [0]
            np.testing.assert_array_equal(download(self.counters.amax), self.amax)


def same_bits(got: Array, want: Array, name: str) -> None:
    """The same bits, except that a NaN of 16 bits or more may be any NaN."""
    assert got.shape == want.shape
    differ = got.view(np.uint8) != want.view(np.uint8)
    if want.itemsize > 1:
        nan = np.isnan(got.view(want.dtype)) & np.isnan(want)
        differ &= ~np.repeat(nan, want.itemsize, -1)
    at = np.argwhere(differ)
    assert not len(at), f"{name}: {len(at)} bytes differ, the first at {at[0].tolist()}"


def _wide(values: Array, fill: int) -> tuple[Array, Callable[[Any], Any]]:
    """A buffer around ``values`` on every axis, and the view of it that they are."""
    shape = (*(size + 2 for size in values.shape[:-1]), values.shape[-1] + 32)
    buffer = np.full((*shape[:-1], shape[-1] * values.itemsize), fill, np.uint8).view(values.dtype)
    index = (*(slice(1, 1 + size) for size in values.shape[:-1]), slice(16, 16 + values.shape[-1]))
    buffer[index] = values
    return buffer, lambda array: array[index]


def build(case: Case) -> Problem:
    rng = np.random.default_rng(case.seed)
    heads, head_dim, batch = case.num_kv_heads, case.head_dim, len(case.new)
    after = np.array(case.before, np.int64) + case.new
    num_tokens = sum(case.new)
    requests = np.repeat(np.arange(batch), case.new)
    indptr = np.concatenate([[0], np.cumsum(case.new)]).astype(np.int32)
    positions = np.arange(num_tokens) - indptr[requests] + np.array(case.before, np.int64)[requests]

    page_size = case.page_size
    if case.padded:
        page_size = int(after.max(initial=0)) + 2
        counts, num_pages = np.ones(batch, np.int64), batch
        pages = np.arange(batch)
    else:
        counts = -(-after // page_size)
        num_pages = int(counts.sum()) + 3
        pages = rng.permutation(num_pages)[: counts.sum()]
    page_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    problem = Problem(case, {}, {}, {}, {}, {}, [0, 0], [0, 0], np.zeros((2, heads), np.float32))
    last = after - (counts - 1) * page_size
    tables = {
        "append_indptr": indptr, "kv_indptr": page_indptr, "kv_indices": pages.astype(np.int32),
        "kv_last_page_len": np.where(counts > 0, last, 0).astype(np.int32), "kv_lens": after.astype(np.int32),
        "batch_indices": requests.astype(np.int32), "positions": positions.astype(np.int32),
    }  # fmt: skip
    problem.tables = {name: table.tolist() if case.tables == "list" else table for name, table in tables.items()}
    if case.form in ("padded equally", "padded one"):
        problem.tables["append_indptr"] = None

    caches, beside = {}, {}
    for side, fmt in zip("kv", case.formats, strict=True):
        x = _values(case, rng, fmt, (num_tokens, heads, head_dim))
        dtype = np.dtype(np.uint8) if fmt.is_fp8 else fmt.dtype
        rows = rng.integers(0, 256, (num_pages, page_size, heads, head_dim * dtype.itemsize), np.uint8).view(dtype)
        rows = rows if fmt.is_fp8 else np.nan_to_num(rows.astype(np.float32), posinf=0, neginf=0).astype(dtype)
        before = rows.copy()
        token = case.scales == "token" or (case.scales == "token of k" and side == "k")
        scales = np.full((num_pages, page_size, heads), 7, np.float32)
        if token:
            beside[side] = scales.copy()
        given = _given_scale(case, rng, side)
        if given is not None and not (token or case.scales.startswith("token")):
            problem.scales[f"{side}_scale"] = given
        for token_index in range(num_tokens):
            position = positions[token_index]
            page = pages[page_indptr[requests[token_index]] + position // page_size]
            slot = position % page_size
            for head in range(heads):
                row = x[token_index, head]
                _write(problem, side, fmt, row, rows[page, slot], scales[page, slot], head, given, token)
        caches[side] = before, rows, scales if token else None
        problem.buffers[f"append_{'key' if side == 'k' else 'value'}"] = _tokens(case, x)
    _place(problem, caches, beside)
    return problem


def _values(case: Case, rng: np.random.Generator, fmt: KVFormat, shape: tuple[int, ...]) -> Array:
    if case.values == "codes":
        return rng.integers(0, 256, shape, np.uint8)
    x = rng.standard_normal(shape) * np.exp(rng.normal(0, 2, (*shape[:-1], 1))) * 4
    x = np.where(np.abs(x) < 1e-3, 0.5, x).astype(np.float32)
    if case.specials and x.size:
        flat = x.reshape(-1)
        # Among them what just rounds to the largest value of a format, and what does not.
        ends = (464.0, -464.00003, 61439.996, 61440.0, 65519.996, 65520.0)
        for special in (np.nan, np.inf, -np.inf, 500.0, -60000.0, 3e38, 0.0, -0.0, *ends):
            flat[rng.integers(0, flat.size, 2)] = special
        x[0, 0] = 0.0
    with np.errstate(over="ignore"):
        return x.astype(DTYPES[case.values])


def _given_scale(case: Case, rng: np.random.Generator, side: str) -> Any:
    known = 0.37 if side == "k" else 2.5
    return {
        "number": known, "scalar": np.array([known], np.float32),
        "head": rng.uniform(0.1, 2.0, case.num_kv_heads).astype(np.float32),
    }.get(case.scales)  # fmt: skip


def _write(
    problem: Problem, side: str, fmt: KVFormat, x: Array, rows: Array, scales: Array, head: int, given: Any, token: bool
) -> None:
    """One row of one head: what is stored of it, and what counters see."""
    if problem.case.values == "codes":
        rows[head] = x
        return
    scale = np.float32(1)
    if token:
        scale = scales[head] = _token_scale(x, fmt)
    elif given is not None:
        scale = np.float32(np.broadcast_to(given, (problem.case.num_kv_heads,))[head])
    rows[head] = _stored(x, fmt, scale)
    at = "kv".index(side)
    with np.errstate(all="ignore"):
        y = x.astype(np.float32) / scale
        magnitude = np.abs(x.astype(np.float32))
        # ml_dtypes does not saturate: what does not fit becomes NaN or infinite.
        fits = np.isfinite(y.astype(fmt.dtype).astype(np.float32))
    problem.nan[at] += int(np.isnan(y).sum())
    problem.saturated[at] += int((~np.isnan(y) & ~fits).sum())
    problem.amax[at, head] = max(problem.amax[at, head], magnitude[np.isfinite(magnitude)].max(initial=0))


def _tokens(case: Case, x: Array) -> Array:
    if case.form == "padded equally":
        return x.reshape(len(case.new), -1, *x.shape[1:])
    return x


def _place(problem: Problem, caches: dict[str, Any], beside: dict[str, Array]) -> None:
    """Put everything into its layout and buffers, and note what those must hold afterwards."""
    case = problem.case

    def laid(rows: Array) -> Array:
        return rows if case.layout == "NHD" else np.ascontiguousarray(rows.swapaxes(1, 2))

    def add(name: str, before: Array, after: Array) -> None:
        if case.view == "wide":
            problem.buffers[name], problem.views[name] = _wide(before, 0x55)
            problem.expected[name], _ = _wide(after, 0x55)
        else:
            problem.buffers[name], problem.views[name] = before.copy(), lambda array: array
            problem.expected[name] = after.copy()

    k, v = caches["k"], caches["v"]
    if case.together:
        add("cache", *(np.stack([laid(k[i]), laid(v[i])], axis=1) for i in (0, 1)))
    else:
        add("k_cache", laid(k[0]), laid(k[1]))
        add("v_cache", laid(v[0]), laid(v[1]))
    for side, before in beside.items():
        add(f"{side}_scales", laid(before), laid(caches[side][2]))
    for name in ("append_key", "append_value"):
        add(name, problem.buffers[name], problem.buffers[name])
