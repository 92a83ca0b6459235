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
    q: Array, k: Array, v: Array, pages: Sequence[Array], kv_lens: Sequence[int] | Array, **options: Any
) -> tuple[Array, Array]:
    """Decode attention of one query token a request over pages.

    Parameters
    ----------
    q : ``[B, Hq, D]``.
    k, v : ``[num_pages, page_size, Hkv, D]``, in the types of :func:`reference.attention`.
    pages : for each request the numbers of its pages, in the order of its rows.
    kv_lens : ``[B]``, rows of each request. Other rows, and other pages, are never read.
    options : those of :func:`reference.attention`, but ``kv_lens``.

    Returns
    -------
    out ``[B, Hq, D]`` and lse ``[B, Hq]``, as :func:`reference.attention` gives them.
    """
    dtype = options.get("compute_dtype", np.float32)
    out, lse = np.empty(q.shape, dtype), np.empty(q.shape[:2], dtype)
    for b, (numbers, kv_len) in enumerate(zip(pages, kv_lens, strict=True)):
        k_rows, v_rows = (gather_rows(cache, np.asarray(numbers), int(kv_len))[None] for cache in (k, v))
        out[b : b + 1], lse[b : b + 1] = attention(q[b : b + 1], k_rows, v_rows, **options)
    return out, lse
