"""What decode over pages means, in NumPy: the pages are put in order, then it is attention like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .reference import Array, attention


def gather_rows(cache: Array, pages: Array, rows: int) -> Array:
    """The first ``rows`` rows of a request, ``[rows, Hkv, D]``, out of ``cache[num_pages, page_size, Hkv, D]``."""
    used = pages[: -(-rows // cache.shape[1])]
    return cache[used].reshape(-1, *cache.shape[2:])[:rows]


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    pages: Sequence[Array],
    kv_lens: Sequence[int] | Array,
    queries: Sequence[int] | Array | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Decode attention of query tokens over the pages of their requests.

    Parameters
    ----------
    q : ``[rows, Hq, D]``.
    k, v : ``[num_pages, page_size, Hkv, D]``, in the types of :func:`reference.attention`.
    pages : for each request the numbers of its pages, in the order of its rows.
    kv_lens : ``[B]``, rows of each request. Other rows, and other pages, are never read.
    queries : ``[B]``, how many rows of q each request has, in this order; None: one each. All see all of its rows of K.
    options : those of :func:`reference.attention`, but ``kv_lens``.

    Returns
    -------
    out ``[rows, Hq, D]`` and lse ``[rows, Hq]``, as :func:`reference.attention` gives them.
    """
    dtype = options.get("compute_dtype", np.float32)
    out, lse = np.empty(q.shape, dtype), np.empty(q.shape[:2], dtype)
    ends = np.cumsum(np.ones(len(pages), int) if queries is None else queries)
    begin = 0
    for numbers, kv_len, end in zip(pages, kv_lens, ends, strict=True):
        k_rows, v_rows = (gather_rows(cache, np.asarray(numbers), int(kv_len))[None] for cache in (k, v))
        for row in range(begin, end):
            out[row : row + 1], lse[row : row + 1] = attention(q[row : row + 1], k_rows, v_rows, **options)
        begin = end
    return out, lse
