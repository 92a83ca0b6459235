"""Requests that share parts of their context: caches, tables, and the same contexts without sharing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import KV_FORMATS

D = 64


class Tree:
    """A batch whose contexts are a path of segments each, one a level; pages of all are in one pool."""

    def __init__(
        self, shares: list[list[int]], lens: list[list[int]], heads: int, group: int, page_size: int = 16,
        layout: str = "NHD", seed: int = 0,
    ):  # fmt: skip
        """``shares[level]``: how many requests share each segment; ``lens[level]``: rows of each segment."""
        rng = np.random.default_rng(seed)
        self.batch, self.heads, self.group, self.layout, self.page_size = (
            sum(shares[0]),
            heads,
            group,
            layout,
            page_size,
        )
        self.q = rng.standard_normal((self.batch, heads * group, D)).astype(np.float16)
        counts = [[-(-n // page_size) for n in level] for level in lens]
        num_pages = sum(map(sum, counts)) + 2
        rows = rng.integers(0, 120, (num_pages, 2, page_size, heads, D), np.uint8)
        rows |= rng.integers(0, 2, rows.shape, np.uint8) << 7
        self.cache = rows if layout == "NHD" else np.ascontiguousarray(rows.swapaxes(2, 3))
        order, at = rng.permutation(num_pages).astype(np.int32), 0
        self.tables: list[tuple[Any, Any, Any, Any]] = []
        contexts: list[list[Any]] = [[] for _ in range(self.batch)]
        for shared, level_lens, level_counts in zip(shares, lens, counts, strict=True):
            qo, indptr = np.cumsum([0, *shared]), np.cumsum([0, *level_counts])
            indices = order[at : at + sum(level_counts)]
            at += sum(level_counts)
            last = [n - (c - 1) * page_size if c else 0 for n, c in zip(level_lens, level_counts, strict=True)]
            self.tables.append(tuple(np.array(x, np.int32) for x in (qo, indptr, indices, last)))
            for segment, n in enumerate(level_lens):
                pages = indices[indptr[segment] : indptr[segment + 1]]
                kv = rows[pages].swapaxes(0, 1).reshape(2, -1, heads, D)[:, :n]
                for request in range(qo[segment], qo[segment + 1]):
                    contexts[request].append(kv)
        self.contexts = [np.concatenate(parts, axis=1) for parts in contexts]

    def plan(self, wrapper: Any, move: Callable[[Any], Any] = lambda x: x, **options: Any) -> None:
        levels = [[move(x) for x in column] for column in zip(*self.tables, strict=True)]
        wrapper.plan(*levels, self.heads * self.group, self.heads, D, self.page_size, **options)

    def check(self, out: Any, lse: Any, **options: Any) -> None:
        """Against attention over each context on its own, in float64."""
        e4m3 = KV_FORMATS["e4m3"]
        options = {"sm_scale": D**-0.5, "k_format": e4m3, "v_format": e4m3, "compute_dtype": np.float64} | options
        for b, (k, v) in enumerate(self.contexts):
            want, want_lse = reference.attention(self.q[b : b + 1], k[None], v[None], **options)
            scale = np.abs(want).max(initial=1e-6)
            np.testing.assert_allclose(np.asarray(out[b], np.float64), want[0], atol=3e-3 * scale)
            np.testing.assert_allclose(np.asarray(lse[b]), want_lse[0], atol=1e-3, rtol=1e-4)


#: Small scales: codes are up to 448.
SCALES = {"k_scale": 0.01, "v_scale": 0.02}

TREES = {
    "a prefix": ([[5], [1] * 5], [[70], [3, 0, 16, 17, 40]]),
    "three levels": ([[6], [4, 2], [1] * 6], [[33], [0, 20], [1, 2, 3, 0, 5, 48]]),
    "no prefix": ([[3], [1] * 3], [[0], [5, 0, 9]]),
    "segments nobody has": ([[0, 4, 0], [1] * 4], [[9, 18, 0], [1, 1, 1, 1]]),
    "one level": ([[1, 1]], [[12, 3]]),
    "alone everywhere": ([[1, 1, 1], [1, 1, 1]], [[4, 20, 0], [0, 1, 17]]),
    "many": ([[40, 30], [1] * 70], [[50, 10], [2] * 70]),
}


def prefix_of(tree: Tree) -> tuple[Any, Any]:
    """The only segment of the first level as plain arrays of K and V, in the tree's layout."""
    _, indptr, indices, last = tree.tables[0]
    n = (indptr[1] - 1) * tree.page_size + last[0] if indptr[1] else 0
    rows = tree.cache if tree.layout == "NHD" else tree.cache.swapaxes(2, 3)
    k, v = rows[indices].swapaxes(0, 1).reshape(2, -1, tree.heads, D)[:, :n]
    if tree.layout == "HND":
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
    return np.ascontiguousarray(k), np.ascontiguousarray(v)
