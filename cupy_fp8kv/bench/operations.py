"""What is timed beside decode: operations that write, move, merge and share parts of caches.

Pages lie in random order, and page tables are on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..append import append_paged_kv_cache
from ..backends import reference
from ..merging import merge_state, merge_states
from ..page_moves import copy_pages, gather
from .inputs import Filler, PageTable, relative_l2
from .operation import E4M3, F16, USUAL_PAGES, Operation, PageSizes, Prepared, differing, some, to_device, to_host
from .report import TOLERANCES
from .shared_prefix import SharedPrefix

#: What comes into an append, and how it is stored.
SOURCES = {"f16": "fp16, a scale a head", "codes": "FP8 bytes copied", "token": "fp16, a scale a row"}


@dataclass(frozen=True)
class Append:
    """``tokens`` new tokens for each of some requests, from one of ``SOURCES``."""

    name: str
    requests: int
    tokens: int
    source: str
    cache: PageSizes = USUAL_PAGES

    against = ""
    tolerance = 0.0

    @property
    def what(self) -> str:
        return f"append: {SOURCES[self.source]}; {self.requests} × {self.tokens}, pages of {self.cache.page_size}"

    @property
    def _count(self) -> int:
        return self.requests * self.tokens

    @property
    def read_bytes(self) -> int:
        return 2 * self._count * self.cache.row_bytes * (1 if self.source == "codes" else 2)

    @property
    def written_bytes(self) -> int:
        scales = 4 * self.cache.num_kv_heads if self.source == "token" else 0
        return 2 * self._count * (self.cache.row_bytes + scales)

    def prepare(self, filler: Filler, sets: int) -> Prepared:
        page_size, heads = self.cache.page_size, self.cache.num_kv_heads
        # Sets of few tokens share pages, in which each has rows of its own.
        sharing = max(1, page_size // self.tokens)
        each, groups = -(-self.tokens // page_size), -(-sets // sharing)
        order = np.random.default_rng(0).permutation(groups * self.requests * each).reshape(groups, self.requests, each)
        pool = self.cache.pool(filler, order.size)
        tokens = self._count, heads, self.cache.head_dim
        fmt = E4M3 if self.source == "codes" else F16
        values = [[filler.cache(tokens, fmt, 2 * s + side + 1) for side in range(2)] for s in range(sets)]
        ends = [(s % sharing + 1) * self.tokens for s in range(sets)]
        tables = [
            PageTable.of((end,) * self.requests, page_size, order[s // sharing].ravel()).on_device()
            for s, end in enumerate(ends)
        ]
        (indptr,) = to_device(np.arange(0, self._count + 1, self.tokens).astype(np.int32))
        options: dict[str, Any] = {}
        if self.source == "f16":
            scales = np.random.default_rng(1).uniform(0.5, 1.5, (2, heads)).astype(np.float32)
            options = dict(zip(("k_scale", "v_scale"), to_device(*scales), strict=True))
        elif self.source == "token":
            beside = np.zeros((2, order.size, page_size, heads), np.float32)
            options = dict(zip(("k_token_scales", "v_token_scales"), to_device(*beside), strict=True))

        def call(s: int) -> None:
            k, v = values[s]
            kv_indptr, kv_indices, last = tables[s]
            append_paged_kv_cache(k, v, indptr, pool, kv_indices, kv_indptr, last, **options)

        def error() -> float:
            got, want = [], []
            pages = order[(sets - 1) // sharing]
            for token in some(self._count):
                row = ends[-1] - self.tokens + token % self.tokens
                page, slot = int(pages[token // self.tokens, row // page_size]), row % page_size
                for side, scale in enumerate(options.values() or (None, None)):
                    x = to_host(values[-1][side][token])
                    got.append(to_host(pool[page, side, slot]))
                    if self.source == "token":
                        known = reference.amax_scale(x, E4M3, "token")
                        got.append(to_host(scale[page, slot]))
                        want += [reference.quantize(x, E4M3, known), known]
                    else:
                        want.append(x if scale is None else reference.quantize(x, E4M3, to_host(scale)))
            return differing(got, want)

        return Prepared(call, error)


@dataclass(frozen=True)
class CopyPages:
    """Pages to other pages of the same cache."""

    name: str
    pages: int
    cache: PageSizes = USUAL_PAGES

    against = ""
    tolerance = 0.0

    @property
    def what(self) -> str:
        return f"copy_pages: {self.pages} pages of {self.cache.page_size}"

    @property
    def read_bytes(self) -> int:
        return 2 * self.pages * self.cache.page_size * self.cache.row_bytes

    written_bytes = read_bytes

    def prepare(self, filler: Filler, sets: int) -> Prepared:
        order = np.random.default_rng(0).permutation(sets * 2 * self.pages).astype(np.int32)
        order = order.reshape(sets, 2, self.pages)
        pool = self.cache.pool(filler, order.size)
        tables = [to_device(*pair) for pair in order]

        def error() -> float:
            pairs = [[to_host(pool[int(order[-1, side, i])]) for i in some(self.pages)] for side in range(2)]
            return differing(*pairs)

        return Prepared(lambda s: copy_pages(pool, *tables[s]), error)


@dataclass(frozen=True)
class Gather:
    """The pages of requests to padded K and V, which each call allocates."""

    name: str
    requests: int
    rows: int
    cache: PageSizes = USUAL_PAGES

    against = ""
    tolerance = 0.0

    @property
    def what(self) -> str:
        return f"gather: {self.requests} × {self.rows} rows from pages of {self.cache.page_size}"

    @property
    def read_bytes(self) -> int:
        return 2 * self.requests * self.rows * self.cache.row_bytes

    written_bytes = read_bytes

    def prepare(self, filler: Filler, sets: int) -> Prepared:
        each = -(-self.rows // self.cache.page_size)
        order = np.random.default_rng(0).permutation(self.requests * each)
        table = PageTable.of((self.rows,) * self.requests, self.cache.page_size, order)
        pools = [self.cache.pool(filler, order.size, s) for s in range(sets)]
        tables = table.on_device()

        def call(s: int) -> Any:
            return gather(pools[s], *tables, max_kv_len=self.rows)

        def error() -> float:
            got, want = [], []
            for side, padded in enumerate(call(sets - 1)):
                for row in some(self.requests * self.rows):
                    request, at = divmod(row, self.rows)
                    page, slot = divmod(at, self.cache.page_size)
                    got.append(to_host(padded[request, at]))
                    want.append(to_host(pools[-1][int(order[request * each + page]), side, slot]))
            return differing(got, want)

        return Prepared(call, error)


@dataclass(frozen=True)
class Merge:
    """States of attention of fp16: two by ``merge_state``, more by ``merge_states``. Each call allocates the result."""

    name: str
    tokens: int
    states: int = 2
    num_heads: int = 32
    head_dim: int = 128

    against = ""
    tolerance = TOLERANCES["f16"]

    @property
    def what(self) -> str:
        function = "merge_state" if self.states == 2 else f"merge_states: {self.states} states"
        return f"{function} of {self.tokens} tokens × {self.num_heads} heads × {self.head_dim}, fp16"

    @property
    def written_bytes(self) -> int:
        return self.tokens * self.num_heads * (2 * self.head_dim + 4)

    @property
    def read_bytes(self) -> int:
        return self.states * self.written_bytes

    def prepare(self, filler: Filler, sets: int) -> Prepared:
        rng = np.random.default_rng(0)
        together = self.states > 2
        shape = (self.tokens, *([self.states] if together else []), self.num_heads)
        count = 1 if together else 2

        def state(s: int, i: int) -> tuple[Any, Any]:
            v = filler.cache((*shape, self.head_dim), F16, count * s + i)
            return v, to_device(4 * rng.standard_normal(shape, np.float32))[0]

        given = [[array for i in range(count) for array in state(s, i)] for s in range(sets)]
        merge = merge_states if together else merge_state

        def error() -> float:
            chosen = some(self.tokens)
            parts = [np.stack([to_host(array[i]) for i in chosen]) for array in given[-1]]
            v, s = parts if together else (np.stack(pair, axis=1) for pair in (parts[::2], parts[1::2]))
            want = reference.merge_states(v, s, compute_dtype=np.float64)
            got = merge(*given[-1])
            return max(
                relative_l2(np.stack([to_host(a[i]) for i in chosen]), b.astype(np.float64))
                for a, b in zip(got, want, strict=True)
            )

        return Prepared(lambda s: merge(*given[s]), error)


def _operations() -> tuple[Operation, ...]:
    sizes = (("b64", 64, 1), ("b256", 256, 1), ("l8k", 1, 8192))
    appends = [
        Append(f"append.{source}.{name}", requests, tokens, source)
        for source in SOURCES
        for name, requests, tokens in sizes
    ]
    copies = "shared_prefix.copies"
    return (
        *appends,
        CopyPages("copy_pages.n64", 64),
        CopyPages("copy_pages.n4k", 4096),
        Gather("gather.b64.l1k", 64, 1024),
        Merge("merge_state.n64", 64),
        Merge("merge_state.n8k", 8192),
        Merge("merge_states.n64.s8", 64, 8),
        Merge("merge_states.n8k.s4", 8192, 4),
        SharedPrefix(copies, "copies"),
        SharedPrefix("shared_prefix.tables", "tables", copies),
        SharedPrefix("shared_prefix.wrapper", "wrapper", copies),
    )


OPERATIONS = _operations()
