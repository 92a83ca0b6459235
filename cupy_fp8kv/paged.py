"""Decode attention over paged caches as one plain function."""

from __future__ import annotations

from typing import Any

from .page_tables import read_page_tables
from .paged_dispatch import PagedOptions, decode_paged, page_size_of


def batch_decode_with_paged_kv_cache(
    q: Any,
    k_cache: Any,
    v_cache: Any = None,
    indptr: Any = None,
    indices: Any = None,
    last_page_len: Any = None,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    *,
    block_tables: Any = None,
    kv_lens: Any = None,
    kv_format: Any = None,
    window_left: int = -1,
    return_lse: bool = False,
    lse_base: str = "2",
    out: Any = None,
    backend: str | None = None,
    validate: bool = False,
) -> Any:
    """Attention of one query token per request over a paged KV cache, ``softmax(q kᵀ · sm_scale) v``.

    The pages of a request are named by ``indptr``, ``indices`` and ``last_page_len``, as in FlashInfer, or by
    ``block_tables`` and ``kv_lens``, as in vLLM. Pages may come in any order and belong to several requests.

    Parameters
    ----------
    q : array ``[batch, num_qo_heads, head_dim]``, float16 or bfloat16, of NumPy, CuPy, torch, JAX or with DLPack.
    k_cache, v_cache : arrays of the same library and device, ``[num_pages, page_size, num_kv_heads, head_dim]`` for
        ``kv_layout="NHD"``, ``[num_pages, num_kv_heads, page_size, head_dim]`` for ``"HND"``; or one array with K and
        V on its second axis, ``[num_pages, 2, ...]``, as ``k_cache``, and None. Types, strides and ``head_dim`` as in
        :func:`batch_decode_with_padded_kv_cache`; ``page_size`` is 1 or more, a power of two or not.
    indptr : int32 ``[batch + 1]``: request b has the pages ``indices[indptr[b] : indptr[b + 1]]``, in this order.
    indices : int32 ``[indptr[-1]]`` or longer: numbers of pages.
    last_page_len : int32 ``[batch]``: rows of each request's last page, from 1 to ``page_size``; the others are full.
        A request without pages has no rows, and its ``last_page_len`` does not count.
    block_tables, kv_lens : in place of these three, int32 ``[batch, max_pages]`` and ``[batch]``: request b has
        ``kv_lens[b]`` rows, in the pages that row b of the table begins with. What lies behind them is never read.
    validate : also check page tables on a device, which waits for it. Each array of a page table may be on the host,
        where it is checked and uploaded, or on the device, where only the kernel reads it: there a page that does not
        exist is the caller's error, unless ``validate`` reports it.

    Everything else is as in :func:`batch_decode_with_padded_kv_cache`.

    Returns
    -------
    out : ``[batch, num_qo_heads, head_dim]``, q's dtype, library and device, written on the caller's current stream;
        with ``return_lse`` a pair with lse, float32 ``[batch, num_qo_heads]``. A request without rows gives 0 and -inf.

    Raises
    ------
    ValueError, TypeError
        Arrays that do not fit together, and page tables that are wrong, as far as the host sees them; the message
        names the argument, what was expected and what came.
    RuntimeError
        ``backend="cuda"`` without a usable GPU, a kernel that does not compile, or a page table on the host while a
        graph is captured.
    """
    one = v_cache is None
    names = ("k_cache", "k_cache") if one else ("k_cache", "v_cache")
    cache = k_cache if one else (k_cache, v_cache)
    page_size = page_size_of(cache, kv_layout, names)
    tables = read_page_tables(page_size, indptr, indices, last_page_len, block_tables, kv_lens)
    options = PagedOptions(
        kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, logits_soft_cap, sm_scale, window_left, kv_format,
        return_lse, lse_base, out, backend, validate, names,
    )  # fmt: skip
    return decode_paged(q, cache, tables, options)
