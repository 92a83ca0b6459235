"""Cases of copying pages and of gathering them, for every backend and library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from appends import _wide

Array = np.ndarray[Any, Any]

DTYPES = {"u8": np.dtype(np.uint8), "e5m2": np.dtype(ml_dtypes.float8_e5m2), "f16": np.dtype(np.float16),
          "bf16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    k: str = "u8"
    v: str = "u8"
    page_size: int = 16
    num_kv_heads: int = 2
    head_dim: int = 64
    layout: str = "NHD"
    together: bool = True
    view: str = "contiguous"
    scales: str = ""  # which of "k" and "v" have scales beside them
    lens: tuple[int, ...] = (0, 1, 16, 17, 50, 15)
    num_pages: int = 23
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.k}/{self.v} page={self.page_size} {self.num_kv_heads}x{self.head_dim} {self.layout} {self.view}"
            f"{' together' * self.together}{' scales of ' * bool(self.scales)}{self.scales}"
        )


CASES = [
    Case(), Case(layout="HND", view="wide"), Case(view="wide", num_kv_heads=3, head_dim=80), Case(page_size=1),
    Case("f16", "f16", page_size=5, together=False, layout="HND"), Case("bf16", "u8", together=False, view="wide"),
    Case(scales="kv", num_kv_heads=5), Case(scales="k", layout="HND", view="wide"), Case(scales="v", together=False),
    Case("e5m2", "e5m2", head_dim=256, page_size=3, num_kv_heads=1), Case("f16", "u8", together=False, num_kv_heads=8),
    Case(lens=(), num_pages=2), Case(lens=(0, 0), num_pages=1), Case(head_dim=16, num_kv_heads=1, page_size=64),
]  # fmt: skip


@dataclass
class Pool:
    """NHD values of K and V (and scales), and buffers and views of them as a call takes them."""

    case: Case
    parts: dict[str, Array]
    buffers: dict[str, Any]
    views: dict[str, Callable[[Any], Any]]
    indptr: Array
    indices: Array
    last: Array

    def to(self, move: Callable[[Array], Any]) -> Pool:
        buffers = {name: move(buffer) for name, buffer in self.buffers.items()}
        return Pool(self.case, self.parts, buffers, self.views, self.indptr, self.indices, self.last)

    def given(self, name: str) -> Any:
        return self.views[name](self.buffers[name])

    @property
    def cache(self) -> Any:
        return self.given("cache") if self.case.together else (self.given("k"), self.given("v"))

    @property
    def scales(self) -> dict[str, Any]:
        return {f"{side}_token_scales": self.given(f"{side}_scales") for side in self.case.scales}

    def expected_buffers(self, source: Array, target: Array) -> dict[str, Array]:
        """The buffers after copying pages, page by page."""
        changed = {name: part.copy() for name, part in self.parts.items()}
        for name, part in changed.items():
            for i, j in zip(source, target, strict=True):
                part[j] = self.parts[name][i]
        return build(self.case, changed).buffers

    def padded(self, name: str, max_kv_len: int) -> Array:
        """What gathering gives, row by row."""
        part, case = self.parts[name], self.case
        out = np.zeros((len(case.lens), max_kv_len, *part.shape[2:]), part.dtype)
        for b, kv_len in enumerate(case.lens):
            for row in range(kv_len):
                page = self.indices[self.indptr[b] + row // case.page_size]
                out[b, row] = part[page, row % case.page_size]
        return out if case.layout == "NHD" else out.swapaxes(1, 2)


def build(case: Case, parts: dict[str, Array] | None = None) -> Pool:
    rng = np.random.default_rng(case.seed)
    lead = (case.num_pages, case.page_size, case.num_kv_heads)
    if parts is None:
        parts = {}
        for name, dtype in (("k", DTYPES[case.k]), ("v", DTYPES[case.v])):
            parts[name] = rng.integers(0, 256, (*lead, case.head_dim * dtype.itemsize), np.uint8).view(dtype)
        for side in case.scales:
            parts[f"{side}_scales"] = rng.random(lead, np.float32)
    counts = [-(-n // case.page_size) for n in case.lens]
    order = np.random.default_rng(case.seed + 1).permutation(case.num_pages)
    needed = sum(counts)
    indices = np.resize(order, needed).astype(np.int32)  # shared by requests where there are too few
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = np.array(
        [n - (c - 1) * case.page_size if c else 0 for n, c in zip(case.lens, counts, strict=True)], np.int32
    )
    pool = Pool(case, parts, {}, {}, indptr, indices, last)

    def add(name: str, values: Array) -> None:
        if case.view == "wide" and name not in ("k_scales", "v_scales"):
            pool.buffers[name], pool.views[name] = _wide(values, 0x55)
        elif case.view == "wide":
            wide = np.full((*values.shape, 2), 0.5, np.float32)
            wide[..., 1] = values
            pool.buffers[name], pool.views[name] = wide, lambda array: array[..., 1]
        else:
            pool.buffers[name], pool.views[name] = values, lambda array: array

    laid = {
        name: np.ascontiguousarray(part if case.layout == "NHD" else part.swapaxes(1, 2))
        for name, part in parts.items()
    }
    if case.together:
        add("cache", np.stack([laid.pop("k"), laid.pop("v")], axis=1))
    for name, part in laid.items():
        add(name, part)
    return pool
