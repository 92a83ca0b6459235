"""Decode cases over pages: a padded case whose rows are dealt to pages, with NaN and wrong page numbers around them.

The oracle reads the padded arrays. What no query may see is NaN: rows behind a request's last, pages of nobody, rows
before a window. What no kernel may look up is a page that does not exist: entries before, behind and between requests.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cases
import numpy as np
import oracle
from cases import Arrays, Case, Placed
from pairwise import pairwise

import cupy_fp8kv
from cupy_fp8kv.formats import KV_FORMATS, KVFormat

#: In the place of pages that nobody may ask for.
NO_PAGE = 0x3FFFFFFF

FACTORS: dict[str, tuple[Any, ...]] = {
    "page_size": (1, 2, 3, 5, 16, 17, 64, 256),
    "group": (1, 3, 4, 5, 7, 8, 12, 33),
    "head_dim": (16, 32, 64, 80, 96, 128, 192, 256),
    "kv_len": (1, 15, 16, 17, 100, 333, 1000),
    "window_left": (-1, 0, 5, 100),
    "form": ("one", "pair"),
    "table": ("csr", "blocks"),
    "where": ("device", "host", "mixed"),
    "shared": (False, True),
    "view": ("contiguous", "padded", "transposed"),
    "layout": ("NHD", "HND"),
    "k": tuple(KV_FORMATS),
    "v": tuple(KV_FORMATS),
    "q": ("f16", "bf16"),
    "scales": ("none", "number", "scalar", "head"),
    "batch": (1, 2, 5),
    "num_kv_heads": (1, 2, 3),
    "soft_cap": (None, 30.0),
    "lse_base": ("2", "e"),
    "given_out": (False, True),
}  # fmt: skip
_OWN = ("page_size", "form", "table", "where", "shared")


@dataclass(frozen=True)
class PagedCase:
    """``base`` with its rows in pages. ``form``: K and V in ``"one"`` array or a ``"pair"``, which needs equal formats.

    ``where`` its tables are: ``"mixed"``, those with the numbers of pages on the device, the others on the host.
    ``shared``: neighbours share their first pages, as far as whole pages and no window allow it.
    """

    base: Case
    page_size: int = 16
    form: str = "one"
    table: str = "csr"
    where: str = "device"
    shared: bool = False

    def __str__(self) -> str:
        own = " ".join(f"{name}={getattr(self, name)}" for name in _OWN)
        return f"{own} {self.base}"


def paged(page_size: int = 16, form: str = "one", table: str = "csr", where: str = "device", shared: bool = False,
          **options: Any) -> PagedCase:  # fmt: skip
    """A case in which every request has a length of its own."""
    base = Case(**(options | {"kv_lens": "host"}))
    if base.k != base.v:
        form = "pair"
    return PagedCase(cases._fitted(base), page_size, form, table, where, shared)


@cache
def pairwise_paged() -> list[PagedCase]:
    return [paged(**chosen, seed=seed) for seed, chosen in enumerate(pairwise(FACTORS))]


#: What decides on the specialisation, few for many random cases.
_RANDOM_KINDS = (
    ("f16", "e4m3", "e4m3", 128, False), ("bf16", "e4m3", "e4m3", 128, True), ("f16", "e5m2", "e5m2", 64, False),
    ("bf16", "f16", "e4m3", 128, False), ("f16", "e4m3", "e4m3", 256, False), ("bf16", "bf16", "bf16", 80, False),
)  # fmt: skip


def random_paged(seed: int) -> PagedCase:
    """A problem nobody chose; its seed tells it again."""
    rng = random.Random(seed)
    q, k, v, head_dim, wide = rng.choice(_RANDOM_KINDS)
    chosen = {name: rng.choice(values) for name, values in FACTORS.items()}
    chosen |= {
        "q": q, "k": k, "v": v, "head_dim": head_dim, "soft_cap": None,
        "group": rng.randint(9, 20) if wide else rng.randint(1, 8), "num_kv_heads": rng.randint(1, 8),
        "batch": rng.randint(1, 12), "kv_len": rng.choice([rng.randint(1, 70), rng.randint(1, 2500)]),
        "page_size": rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 256, rng.randint(1, 300)]),
        "window_left": rng.choice([-1, -1, rng.randint(0, 300)]), "seed": seed,
    }  # fmt: skip
    return paged(**chosen)


@dataclass(frozen=True)
class PagedArrays:
    """The arrays of a case, to be moved to a library. ``readable``: like ``pools``, True where a call may read."""

    case: PagedCase
    padded: Arrays
    pools: tuple[Placed, ...]  # one, or K and V
    readable: tuple[Placed, ...]
    tables: dict[str, Any]
    readable_tables: dict[str, Any]

    def to(self, move: Callable[[Any], Any]) -> PagedArrays:
        tables = {name: move(value) if self.on_device(name) else value for name, value in self.tables.items()}
        pools = tuple(pool.to(move) for pool in self.pools)
        return dataclasses.replace(self, padded=self.padded.to(move), pools=pools, tables=tables)

    def on_device(self, name: str) -> bool:
        return self.case.where == "device" or (self.case.where == "mixed" and name in ("indices", "block_tables"))

    @property
    def cache(self) -> Any:
        """As wrappers take it."""
        return self.pools[0].view if len(self.pools) == 1 else tuple(pool.view for pool in self.pools)

    @property
    def options(self) -> dict[str, Any]:
        """What the call gets beside q, cache and tables."""
        base = self.case.base
        return {
            "window_left": base.window_left, "logits_soft_cap": base.soft_cap,
            "sm_scale": self.padded.options["sm_scale"] if base.sharpness or base.values == "codes" else None,
            **self.padded.scales,
        }  # fmt: skip

    def call(self, **changes: Any) -> tuple[Any, Any]:
        """The plain function: (out, lse)."""
        base = self.case.base
        views = [pool.view for pool in self.pools]
        arguments = {
            "kv_layout": base.layout, "kv_format": (base.k, base.v), "lse_base": base.lse_base,
            "out": self.padded.out.view if self.padded.out else None, **self.options, **self.tables, **changes,
        }  # fmt: skip
        v = views[1] if len(views) == 2 else None
        return cupy_fp8kv.batch_decode_with_paged_kv_cache(
            self.padded.q.view, views[0], v, **arguments, return_lse=True
        )  # fmt: skip

    def check(self, out: Any, lse: Any) -> None:
        self.padded.check(out, lse)


def _pool(values: Any, case: PagedCase, fmt: KVFormat) -> Placed:
    """``values[pages, page, H, D]`` or ``[pages, 2, page, H, D]`` in the layout and the view of the case."""
    if case.base.layout == "HND":
        values = values.swapaxes(-3, -2)
    if case.base.view != "transposed":
        return cases._place(values, case.base.view, fmt)
    # The pages between the last two axes but one: no stride is a multiple of the one after it.
    to = [*range(1, values.ndim - 1), 0, values.ndim - 1]
    return Placed(np.ascontiguousarray(values.transpose(to)), (), tuple(np.argsort(to)))


def _deal(case: PagedCase, lens: Any, rng: np.random.Generator) -> tuple[list[list[int]], int]:
    """The pages of each request in random order among pages of nobody, and how many pages there are in all."""
    counts = [-(-int(n) // case.page_size) for n in lens]
    numbers = iter(rng.permutation(sum(counts) + 3).tolist())
    return [[next(numbers) for _ in range(count)] for count in counts], sum(counts) + 3


def build_paged(case: PagedCase, lens: Any = None) -> PagedArrays:
    """``lens``: lengths, instead of the case's."""
    base = case.base if lens is None else dataclasses.replace(case.base, lens=tuple(lens))
    padded = cases.build(base)
    lens, page = padded.kv_lens, case.page_size
    _, k, v = padded.host
    rng = np.random.default_rng(base.seed + 77)
    pages, num_pages = _deal(case, lens, rng)
    if case.shared and base.window_left < 0:
        for b in range(1, base.batch, 2):
            same = int(min(lens[b - 1], lens[b])) // page
            pages[b][:same] = pages[b - 1][:same]
            for rows in (k, v):
                rows[b, : same * page] = rows[b - 1, : same * page]

    shape = (num_pages, page, base.num_kv_heads, base.head_dim)
    formats = KV_FORMATS[base.k], KV_FORMATS[base.v]
    pools = [oracle.poison(np.empty(shape, rows.dtype), fmt) for rows, fmt in zip((k, v), formats, strict=True)]
    seen = np.zeros(shape, bool)
    for b, kv_len in enumerate(lens):
        first = 0 if base.window_left < 0 else max(0, kv_len - 1 - base.window_left)
        for j, number in enumerate(pages[b]):
            here = slice(j * page, min((j + 1) * page, kv_len))
            for pool, rows in zip(pools, (k, v), strict=True):
                pool[number, : here.stop - here.start] = rows[b, here]
            seen[number, max(0, first - here.start) : here.stop - here.start] = True
    if case.form == "one":
        pools = [np.stack(pools, axis=1)]
        seen = np.stack([seen, seen], axis=1)
    placed = tuple(_pool(pool, case, fmt) for pool, fmt in zip(pools, formats, strict=False))
    readable = []
    for pool in placed:
        mask = dataclasses.replace(pool, base=np.zeros(pool.base.shape, bool))
        mask.view[...] = seen.swapaxes(-3, -2) if base.layout == "HND" else seen
        readable.append(mask)
    tables, readable_tables = (_csr if case.table == "csr" else _blocks)(pages, lens, page)
    return PagedArrays(case, padded, placed, tuple(readable), tables, readable_tables)


def _csr(pages: list[list[int]], lens: Any, page: int) -> tuple[dict[str, Any], dict[str, Any]]:
    counts = np.array([len(own) for own in pages], np.int32)
    indptr = (3 + np.concatenate([[0], np.cumsum(counts)])).astype(np.int32)
    indices = np.full(indptr[-1] + 5, NO_PAGE, np.int32)
    indices[3 : indptr[-1]] = [number for own in pages for number in own]
    last = np.where(counts > 0, (lens - 1) % page + 1, 0).astype(np.int32)
    tables = {"indptr": indptr, "indices": indices, "last_page_len": last}
    return tables, {"indices": indices != NO_PAGE}


def _blocks(pages: list[list[int]], lens: Any, page: int) -> tuple[dict[str, Any], dict[str, Any]]:
    table = np.full((len(pages), max((len(own) for own in pages), default=0) + 2), NO_PAGE, np.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    return {"block_tables": table, "kv_lens": lens.astype(np.int32)}, {"block_tables": table != NO_PAGE}
