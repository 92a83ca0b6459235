"""Decode cases that every backend and library runs: what they are made of, their arrays, their call, their oracle.

Arrays are built on the host as larger buffers, with NaN wherever nothing may be read: around a strided view, beyond a
request's length, before its window. A test moves the buffers to its library and takes the same views there.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import oracle
from pairwise import pairwise

import cupy_fp8kv
from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import KV_FORMATS, KVFormat
from cupy_fp8kv.plan import DeviceInfo, Plan, plan_decode
from cupy_fp8kv.problem import DecodeProblem

H100 = DeviceInfo("H100", 90, 132, 232448)
#: Elements of K that a case may have, so that its oracle takes a fraction of a second; more means one KV head.
MOST_ELEMENTS = 4 << 20

FACTORS: dict[str, tuple[Any, ...]] = {
    "head_dim": tuple(range(16, 257, 16)),
    "group": (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 128),
    "kv_len": (0, 1, 15, 16, 17, 127, 1000, 4097),
    "window_left": (-1, 0, 5, 100, 1000),
    "k": tuple(KV_FORMATS),
    "v": tuple(KV_FORMATS),
    "scales": ("none", "number", "scalar", "head"),
    "batch": (1, 2, 7),
    "num_kv_heads": (1, 2, 3),
    "kv_lens": ("none", "host", "device"),
    "view": ("contiguous", "padded", "transposed"),
    "q": ("f16", "bf16"),
    "layout": ("NHD", "HND"),
    "soft_cap": (None, 30.0),
    "sharpness": (None, 3.0),
    "lse_base": ("2", "e"),
    "values": ("normal", "codes"),
    "given_out": (False, True),
}


@dataclass(frozen=True)
class Case:
    """One decode call. ``sharpness`` is the spread of the logits, None: whatever the default ``sm_scale`` gives."""

    head_dim: int = 128
    group: int = 1
    kv_len: int = 100
    window_left: int = -1
    k: str = "e4m3"
    v: str = "e4m3"
    scales: str = "none"
    batch: int = 1
    num_kv_heads: int = 1
    kv_lens: str = "none"
    view: str = "contiguous"
    q: str = "f16"
    layout: str = "NHD"
    soft_cap: float | None = None
    sharpness: float | None = None
    lse_base: str = "2"
    values: str = "normal"
    given_out: bool = False
    seed: int = 0
    #: Lengths instead of random ones.
    lens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        shown = ("head_dim", "seed")
        return " ".join(f"{name}={x}" for name, (x, default) in values.items() if x != default or name in shown)

    @property
    def problem(self) -> DecodeProblem:
        """For the planner, with the strides of a contiguous NHD cache."""
        rows = [self.head_dim * KV_FORMATS[name].itemsize for name in (self.k, self.v)]
        k, v = ((self.kv_len * self.num_kv_heads * row, self.num_kv_heads * row, row) for row in rows)
        return DecodeProblem(
            self.batch, self.kv_len, self.group * self.num_kv_heads, self.num_kv_heads, self.head_dim, self.q, self.k,
            self.v, (0, 0), k, v, bool(self.soft_cap), self.window_left + 1 if self.window_left >= 0 else -1,
            ragged=self.kv_lens != "none",
        )  # fmt: skip

    def plan(self, device: DeviceInfo = H100) -> Plan:
        return plan_decode(self.problem, device)


def _fitted(case: Case) -> Case:
    elements = case.batch * case.kv_len * case.num_kv_heads * case.head_dim
    return case if elements <= MOST_ELEMENTS else dataclasses.replace(case, num_kv_heads=1)


@cache
def pairwise_cases() -> list[Case]:
    return [_fitted(Case(**chosen, seed=seed)) for seed, chosen in enumerate(pairwise(FACTORS))]


#: What decides on the specialisation, apart from the shape of its CTAs: (q, k, v, head_dim, wide group, soft cap).
#: Few for many random cases, because compiling takes longer than running.
_RANDOM_KINDS = (
    ("f16", "e4m3", "e4m3", 128, False, None), ("bf16", "e4m3", "e4m3", 128, True, None),
    ("f16", "e5m2", "e5m2", 64, False, 30.0), ("bf16", "f16", "e4m3", 128, False, None),
    ("f16", "f16", "e5m2", 256, True, None), ("bf16", "bf16", "bf16", 80, False, None),
    ("f16", "bf16", "e4m3", 64, True, None), ("f16", "e4m3", "f16", 16, True, 30.0),
    ("f16", "e4m3", "e4m3", 256, False, None),
)  # fmt: skip


@cache
def random_cases(count: int = 150, first_seed: int = 1000) -> list[Case]:
    """Shapes nobody chose; the seed of a failing one is in its name."""
    return [_random_case(seed) for seed in range(first_seed, first_seed + count)]


def _random_case(seed: int) -> Case:
    rng = random.Random(seed)
    q, k, v, head_dim, wide, soft_cap = rng.choice(_RANDOM_KINDS)
    chosen = {name: rng.choice(values) for name, values in FACTORS.items()}
    chosen |= {
        "q": q, "k": k, "v": v, "head_dim": head_dim, "soft_cap": soft_cap,
        "group": rng.randint(9, 40) if wide else rng.randint(1, 8), "num_kv_heads": rng.randint(1, 9),
        "batch": rng.randint(1, 12), "kv_len": rng.choice([rng.randint(1, 70), rng.randint(1, 3000)]),
        "window_left": rng.choice([-1, -1, rng.randint(0, 300)]), "seed": seed,
    }  # fmt: skip
    return _fitted(Case(**chosen))


#: Shapes by what the planner makes of them on an H100.
SPLIT_CASES: dict[str, tuple[Case, Callable[[Plan], bool]]] = {
    "one": (Case(batch=33, num_kv_heads=8, kv_len=15, seed=1), lambda plan: plan.splits == 1 and plan.grid == 264),
    "two": (
        Case(batch=11, num_kv_heads=6, kv_len=1000, group=3, k="f16", v="f16", head_dim=256, seed=2),
        lambda plan: plan.splits == 2,
    ),
    "many": (Case(kv_len=40_000, group=4, seed=3), lambda plan: plan.splits > 100),
    "many_for_wide_groups": (Case(kv_len=9000, group=128, v="f16", seed=4), lambda plan: plan.splits > 8),
    "waves": (
        Case(batch=70, num_kv_heads=9, kv_len=1536, head_dim=16, seed=5),
        lambda plan: plan.grid > 528 and plan.splits > 1,
    ),
    "empty": (
        Case(batch=7, kv_len=20_000, group=8, kv_lens="device", lens=(0, 1, 16, 17, 300, 19_999, 20_000), seed=6),
        lambda plan: (plan.bounds.parts if plan.bounds else plan.shares) > 100,
    ),
    "empty_of_all": (
        Case(batch=2, kv_len=10_000, kv_lens="device", lens=(0, 0), seed=7), lambda plan: plan.splits > 17,
    ),
    "windows": (
        Case(batch=3, kv_len=30_000, window_left=5000, kv_lens="device", lens=(30_000, 4000, 29_000), seed=8),
        lambda plan: plan.splits > 8,
    ),
}  # fmt: skip


def specialisations(cases: list[Case], device: DeviceInfo = H100) -> set[str]:
    return {str(case.plan(device).spec) for case in cases}


@dataclass(frozen=True)
class Placed:
    """A view of a buffer, to be taken in any library: ``base[index]`` with its axes reordered."""

    base: Any
    index: tuple[Any, ...] = ()
    axes: tuple[int, ...] | None = None

    def to(self, move: Callable[[Any], Any]) -> Placed:
        return dataclasses.replace(self, base=move(self.base))

    @property
    def view(self) -> Any:
        view = self.base[self.index] if self.index else self.base
        if self.axes is None:
            return view
        return view.permute(self.axes) if hasattr(view, "permute") else view.transpose(self.axes)

    @property
    def outside(self) -> Any:
        """A host copy of the buffer with zeros where the view is: what nobody may have written."""
        copy = self.base.copy()
        dataclasses.replace(self, base=copy).view[...] = 0
        return copy


def _place(values: Any, view: str, fmt: KVFormat) -> Placed:
    """``values`` as the view of a larger buffer of NaN, or with its two outer axes swapped in memory."""
    if view == "contiguous":
        return Placed(np.ascontiguousarray(values))
    if view == "transposed":
        axes = (1, 0, *range(2, values.ndim))
        return Placed(np.ascontiguousarray(values.transpose(axes)), (), axes)
    larger = (*(size + 2 for size in values.shape[:-1]), values.shape[-1] + 32)
    base = oracle.poison(np.empty(larger, values.dtype), fmt)
    placed = Placed(base, (*(slice(1, 1 + size) for size in values.shape[:-1]), slice(16, 16 + values.shape[-1])))
    placed.view[...] = values
    return placed


def poison_unread(rows: Any, lens: Any, window_left: int, fmt: KVFormat) -> None:
    """NaN in every row of ``rows[B, L, H, D]`` that no query sees."""
    for b, kv_len in enumerate(lens):
        oracle.poison(rows[b, kv_len:], fmt)
        if window_left >= 0:
            oracle.poison(rows[b, : max(0, kv_len - 1 - window_left)], fmt)


@dataclass(frozen=True)
class Arrays:
    """The arrays of a case. ``options`` are those of the oracle, ``scales`` what the call gets."""

    case: Case
    q: Placed
    k: Placed
    v: Placed
    out: Placed | None
    kv_lens: Any
    scales: dict[str, Any]
    host: tuple[Any, Any, Any]  # NHD, as the oracle takes them
    options: dict[str, Any]

    def to(self, move: Callable[[Any], Any]) -> Arrays:
        """The same in another library: buffers, device scales and device lengths go through ``move``."""
        scales = {name: move(value) if isinstance(value, np.ndarray) else value for name, value in self.scales.items()}
        lens = move(self.kv_lens) if self.case.kv_lens == "device" else self.kv_lens
        placed = {name: value.to(move) for name in ("q", "k", "v", "out") if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, scales=scales, kv_lens=lens, **placed)

    def call(self, **changes: Any) -> tuple[Any, Any]:
        """The decode call: (out, lse), both ``[B, ...]``."""
        case = self.case
        arguments = {
            "kv_layout": case.layout, "kv_format": (case.k, case.v), "window_left": case.window_left,
            "logits_soft_cap": case.soft_cap, "lse_base": case.lse_base, **self.scales,
            "sm_scale": self.options["sm_scale"] if case.sharpness or case.values == "codes" else None, **changes,
        }  # fmt: skip
        views = [self.q.view, self.k.view, self.v.view]
        out = self.out.view if self.out else None
        if case.batch == 1 and case.kv_lens == "none" and case.seed % 2:
            out = out if out is None else out[0]
            views = [view[0] for view in views]
            result, lse = cupy_fp8kv.single_decode_with_kv_cache(*views, **arguments, return_lse=True, out=out)
            return result[None], lse[None]
        arguments.setdefault("kv_lens", self.kv_lens)
        return cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(*views, **arguments, out=out)

    def oracle(self) -> tuple[Any, Any]:
        return oracle.oracle(*self.host, **self.options)

    def check(self, out: Any, lse: Any) -> None:
        """Hold host copies of what the call returned against the oracle."""
        oracle.assert_close(out, lse, *self.oracle(), KV_FORMATS[self.case.q].dtype)


@cache
def _code_spread(fmt: KVFormat) -> float:
    values = reference.decode_codes(np.arange(256, dtype=np.uint8), fmt).astype(np.float64)
    return float(values[np.isfinite(values)].std())


def _cache(rng: np.random.Generator, shape: tuple[int, ...], fmt: KVFormat, kind: str) -> Any:
    return oracle.random_cache(rng, shape, fmt, kind if fmt.is_fp8 else "normal")


def build(case: Case) -> Arrays:
    rng = np.random.default_rng(case.seed)
    k_format, v_format, q_dtype = KV_FORMATS[case.k], KV_FORMATS[case.v], KV_FORMATS[case.q].dtype
    heads, nhd = case.num_kv_heads, (case.batch, case.kv_len, case.num_kv_heads, case.head_dim)
    q = oracle.random_query(rng, (case.batch, heads * case.group, case.head_dim), q_dtype)
    k, v = (_cache(rng, nhd, fmt, case.values) for fmt in (k_format, v_format))

    lens = None
    if case.kv_lens != "none":
        lens = rng.integers(0, case.kv_len, case.batch, np.int32, endpoint=True)
        if case.lens is not None:
            lens[:] = case.lens
        elif case.batch > 2:
            lens[:2] = case.kv_len, 0
    for rows, fmt in ((k, k_format), (v, v_format)):
        poison_unread(rows, [case.kv_len] * case.batch if lens is None else lens, case.window_left, fmt)

    spread = case.sharpness or 1.0
    if case.values == "codes" and k_format.is_fp8:
        spread /= _code_spread(k_format)
    scales, options = _scales(case, rng)
    options |= {
        "k_format": k_format, "v_format": v_format, "sm_scale": spread / case.head_dim**0.5, "kv_lens": lens,
        "window_left": case.window_left, "logits_soft_cap": case.soft_cap, "lse_base": case.lse_base,
    }  # fmt: skip

    def placed(rows: Any, fmt: KVFormat) -> Placed:
        return _place(rows if case.layout == "NHD" else rows.swapaxes(1, 2), case.view, fmt)

    out = None
    if case.given_out:
        out = _place(np.full(q.shape, np.nan, q_dtype), case.view, KV_FORMATS[case.q])
    return Arrays(
        case, _place(q, case.view, KV_FORMATS[case.q]), placed(k, k_format), placed(v, v_format), out, lens, scales,
        (q, k, v), options,
    )  # fmt: skip


def _scales(case: Case, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the call gets, and what the oracle does. v_scale stays below 1: the largest codes then fit fp16."""
    if case.scales == "none":
        return {}, {}
    known: dict[str, Any] = {"q_scale": 1.25, "k_scale": 0.7, "v_scale": 0.3}
    if case.scales == "number":
        return known, dict(known)
    arrays = {name: np.array([value], np.float32) for name, value in known.items()}
    if case.scales == "head":
        arrays["k_scale"], arrays["v_scale"] = rng.uniform(0.2, 1.0, (2, case.num_kv_heads)).astype(np.float32)
    return dict(arrays), arrays
