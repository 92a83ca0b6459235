"""What writing into caches and moving their rows mean, in NumPy. Arguments are taken as valid.

Caches, and scales stored beside them, come as ``[num_pages, page_size, ...]`` (NHD) views; a padded cache is one of
``batch`` pages, of which request b has page b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..formats import KVFormat
from .reference import Array, amax_scale, broadcast_scale, encode


def requests_and_positions(append_indptr: Array, kv_lens: Array) -> tuple[Array, Array]:
    """The request of each appended token, and its row there: a request's appended tokens are its last ones."""
    begin, end = append_indptr[:-1].astype(np.int64), append_indptr[1:].astype(np.int64)
    requests = np.repeat(np.arange(len(begin)), end - begin)
    return requests, kv_lens[requests] - end[requests] + np.arange(len(requests))


def places(requests: Array, positions: Array, pages: Sequence[Array], page_size: int) -> tuple[Array, Array]:
    """The page and the slot in it of each token, by the pages of each request; page -1 for a token of request -1."""
    page = np.full(len(requests), -1, np.int64)
    for token, (request, position) in enumerate(zip(requests, positions, strict=True)):
        if request >= 0:
            page[token] = pages[request][position // page_size]
    return page, np.asarray(positions, np.int64) % page_size


class Written(NamedTuple):
    """``saturated``: values beyond what rounds to the largest finite one of the cache's format, infinities included;
    ``nan``: values stored as NaN; ``amax``: the largest finite magnitude of each head, unscaled, float32 ``[H]``.
    """

    saturated: int
    nan: int
    amax: Array


def write_rows(
    cache: Array, x: Array, page: Array, slot: Array, fmt: KVFormat, scale: Any = 1.0, token_scales: Array | None = None
) -> Written:
    """Write ``x[n, H, D] / scale`` to ``cache[page, slot]``, in the format of the cache.

    FP8 saturates and keeps NaN (:func:`reference.encode`); 16-bit formats round to nearest even, and what is too large
    for them becomes infinite. ``token_scales[num_pages, page_size, H]`` gets ``amax / fmt.max`` of each row, which is
    then what the row is divided by.
    """
    kept = page >= 0
    x, page, slot = x[kept].astype(np.float32), page[kept], slot[kept]
    if token_scales is not None:
        scale = amax_scale(x, fmt, "token")
        token_scales[page, slot] = scale
    with np.errstate(all="ignore"):
        stored = x / broadcast_scale(scale, x.shape, -2)
        magnitude = np.abs(x)
        amax = np.max(magnitude, axis=(0, 2), where=np.isfinite(magnitude), initial=0.0)
        if fmt.is_fp8:
            cache.view(np.uint8)[page, slot] = encode(stored, fmt)
        else:
            cache[page, slot] = stored.astype(fmt.dtype)
        return Written(int((np.abs(stored) > fmt.largest_rounded).sum()), int(np.isnan(stored).sum()), amax)


def copy_rows(cache: Array, x: Array, page: Array, slot: Array) -> None:
    """Write the elements of ``x[n, H, D]`` as they are."""
    kept = page >= 0
    cache.view(x.dtype)[page[kept], slot[kept]] = x[kept]


def copy_pages(cache: Array, source: Array, target: Array) -> None:
    """``cache[target[i]] = cache[source[i]]``, all of them read before any is written."""
    cache[target] = cache[source]


def gather(cache: Array, pages: Sequence[Array], kv_lens: Array, max_kv_len: int) -> Array:
    """The rows of each request in order, ``[batch, max_kv_len, ...]``, and zeros behind them."""
    page_size = cache.shape[1]
    out = np.zeros((len(pages), max_kv_len, *cache.shape[2:]), cache.dtype)
    for request, (numbers, kv_len) in enumerate(zip(pages, kv_lens, strict=True)):
        used = numbers[: -(-int(kv_len) // page_size)]
        out[request, :kv_len] = cache[used].reshape(-1, *cache.shape[2:])[:kv_len]
    return out
