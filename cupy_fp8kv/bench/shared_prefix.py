"""Decode of requests that begin alike, in three ways, as the benchmark times it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from ..backends import reference
from ..cascade import BatchDecodeWithSharedPrefixPagedKVCacheWrapper
from ..paged import batch_decode_with_paged_kv_cache
from .inputs import Filler, PageTable, relative_l2
from .operation import E4M3, USUAL_PAGES, PageSizes, Prepared, to_device, to_host
from .report import TOLERANCES

WAYS = {
    "copies": "decode, the prefix in pages of each request's own",
    "tables": "decode, the prefix in the same pages for all",
    "wrapper": "shared-prefix wrapper",
}


@dataclass(frozen=True)
class SharedPrefix:
    """``way``: how the prefix is stored and read. It has whole pages."""

    name: str
    way: str
    against: str = ""
    requests: int = 64
    prefix: int = 8192
    own: int = 256
    group_size: int = 4
    cache: PageSizes = USUAL_PAGES

    written_bytes = 0
    #: fp16 is rounded to twice: what the parts give, and their sum.
    tolerance = 2 * TOLERANCES["f16"]

    @property
    def what(self) -> str:
        return f"{WAYS[self.way]}; {self.requests} × ({self.prefix} + {self.own}) rows, pages of {self.cache.page_size}"

    @property
    def read_bytes(self) -> int:
        """Each byte of a cache once, however often it is read."""
        prefixes = self.requests if self.way == "copies" else 1
        return 2 * (prefixes * self.prefix + self.requests * self.own) * self.cache.row_bytes

    def _pages(self, rng: np.random.Generator) -> np.ndarray:
        """[requests, pages]: those that the table of each request has."""
        in_prefix, in_own = self.prefix // self.cache.page_size, -(-self.own // self.cache.page_size)
        if self.way == "copies":
            return rng.permutation(self.requests * (in_prefix + in_own)).reshape(self.requests, -1)
        own = self.requests * in_own
        order = rng.permutation(own + (in_prefix if self.way == "tables" else 0))
        return np.concatenate([np.tile(order[own:], (self.requests, 1)), order[:own].reshape(-1, in_own)], axis=1)

    def prepare(self, filler: Filler, sets: int) -> Prepared:
        rng, wrapped = np.random.default_rng(0), self.way == "wrapper"
        heads, dim, page = self.cache.num_kv_heads, self.cache.head_dim, self.cache.page_size
        pages = self._pages(rng)
        length = self.own if wrapped else self.prefix + self.own
        tables = PageTable.of((length,) * self.requests, page, pages.ravel()).on_device()
        pools = [self.cache.pool(filler, int(pages.max()) + 1, 3 * s) for s in range(sets)]
        shared = [
            [filler.cache((self.prefix, heads, dim), E4M3, 3 * s + side + 1) for side in range(2)]
            for s in range(sets if wrapped else 0)
        ]
        q_shape = (self.requests, heads * self.group_size, dim)
        qs = to_device(*(rng.standard_normal(q_shape, np.float32).astype(np.float16) for _ in range(sets)))
        if wrapped:
            wrapper = BatchDecodeWithSharedPrefixPagedKVCacheWrapper()
            wrapper.plan(*tables, heads * self.group_size, heads, dim, page)
            calls = [partial(wrapper.run, q, k, v, pool) for q, (k, v), pool in zip(qs, shared, pools, strict=True)]
        else:
            indptr, indices, last = tables
            calls = [
                partial(batch_decode_with_paged_kv_cache, q, pool, None, indptr, indices, last)
                for q, pool in zip(qs, pools, strict=True)
            ]

        def error() -> float:
            """Of the first and the last cache head of the last request."""
            chosen = [0, heads - 1]
            rows = np.stack([to_host(pools[-1][int(i)])[:, :, chosen] for i in pages[-1]])
            sides = [rows[:, side].reshape(-1, 2, dim)[:length] for side in range(2)]
            if wrapped:
                before = [to_host(kv)[:, chosen] for kv in shared[-1]]
                sides = [np.concatenate(pair) for pair in zip(before, sides, strict=True)]

            def of_chosen(x: np.ndarray) -> np.ndarray:
                return x[-1].reshape(heads, self.group_size, dim)[chosen].reshape(1, -1, dim)

            want, _ = reference.attention(
                of_chosen(to_host(qs[-1])), sides[0][None], sides[1][None], k_format=E4M3, v_format=E4M3,
                sm_scale=dim**-0.5, compute_dtype=np.float64,
            )  # fmt: skip
            return relative_l2(of_chosen(to_host(calls[-1]())), want)

        return Prepared(lambda s: calls[s](), error)
