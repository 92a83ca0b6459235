"""Writing keys and values of new tokens into caches: the public operations."""

from __future__ import annotations

import importlib
import sys
from typing import Any, overload

import numpy as np

from . import arrays
from .append_checks import Options
from .append_tables import Padded, Paged, Tokens
from .appending import append
from .formats import dtype_name


@overload
def append_paged_kv_cache(
    append_key: Any,
    append_value: Any,
    append_indptr: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
    **options: Any,
) -> None: ...
@overload
def append_paged_kv_cache(
    append_key: Any,
    append_value: Any,
    batch_indices: Any,
    positions: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
    **options: Any,
) -> None: ...
def append_paged_kv_cache(*arguments: Any, **named: Any) -> None:
    """Write the keys and values of new tokens into a paged cache, in place; quantised on the way if the cache is FP8.

    Two forms, told apart by the fourth argument, as in FlashInfer's older and newer versions::

        append_paged_kv_cache(append_key, append_value, append_indptr,
                              paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, kv_layout="NHD", **options)
        append_paged_kv_cache(append_key, append_value, batch_indices, positions,
                              paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, kv_layout="NHD", **options)

    The page tables are those *after* appending: they count the new tokens, which in the first form are the last ones of
    their requests. See :func:`get_seq_lens` and :func:`get_batch_indices_positions` for the second.

    Parameters
    ----------
    append_key, append_value : arrays ``[nnz, num_kv_heads, head_dim]``, float16, bfloat16 or float32: stored is
        ``x / scale``, to nearest even; FP8 saturates (infinities too) and keeps NaN. Or codes of the cache's own FP8
        format, as uint8 or typed: copied byte by byte. Strides are free, with a contiguous last axis and rows at
        multiples of 16 bytes; head_dim is a multiple of 16.
    append_indptr : int32 ``[batch + 1]``: request b appends ``append_key[append_indptr[b] : append_indptr[b + 1]]``.
    batch_indices, positions : int32 ``[nnz]``: the request of each token and its row there. A request of -1 leaves the
        token out.
    paged_kv_cache : one array ``[num_pages, 2, page_size, num_kv_heads, head_dim]`` (``"HND"``: heads before rows), or
        a pair (K, V) of arrays without the second axis. **It is written.** JAX arrays cannot be, and raise TypeError.
    kv_indices, kv_indptr, kv_last_page_len : int32: the pages of request b are ``kv_indices[kv_indptr[b] :
        kv_indptr[b + 1]]``, all full but the last, which has ``kv_last_page_len[b]`` rows.
    kv_layout : ``"NHD"`` or ``"HND"``, of the cache alone.

    Options, by keyword
    -------------------
    k_scale, v_scale : numbers, or float arrays ``[1]`` or ``[num_kv_heads]``, host or device; default 1.
    k_token_scales, v_token_scales : float32 arrays shaped like K (or V) of the cache without its last axis. **They are
        written**: each row of an FP8 cache gets a scale of its own, its largest finite magnitude / the format's largest
        value (1 where that is not a normal float).
    kv_format : what uint8 caches hold, ``"e4m3"`` (default) or ``"e5m2"``, or a pair (K, V).
    counters : :class:`AppendCounters`, added to on the device.
    backend : None writes where the cache is; ``"cuda"`` or ``"numpy"`` forces one.

    Tables may be on the host, where they are checked, or on the device of the cache, where they are used as they are
    and never copied to the host: tokens that they put outside the cache are not written, and counted as skipped.

    Raises
    ------
    ValueError, TypeError
        Before anything is written, for what does not fit; the message names the argument, what was expected and came.
    """
    form = _with_positions if _has_positions(arguments, named) else _with_indptr
    try:
        form(*arguments, **named)
    except TypeError as error:
        # Arguments that are not those of the form: said by Python about the call above, not from inside it.
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise
        raise TypeError(str(error).replace(form.__name__, "append_paged_kv_cache")) from None


def _has_positions(arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    if "positions" in named or "batch_indices" in named:
        return True
    if len(arguments) < 4:
        return False
    fourth = arguments[3]
    if isinstance(fourth, (list, tuple)):
        return all(isinstance(x, (int, np.integer)) for x in fourth)
    return len(getattr(fourth, "shape", ())) == 1


def _with_indptr(
    append_key: Any,
    append_value: Any,
    append_indptr: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    k_token_scales: Any = None,
    v_token_scales: Any = None,
    kv_format: Any = None,
    counters: Any = None,
    backend: str | None = None,
) -> None:
    append(
        append_key, append_value, paged_kv_cache, kv_layout, Tokens(indptr=append_indptr),
        Paged(kv_indptr, kv_indices, kv_last_page_len),
        Options(k_scale, v_scale, k_token_scales, v_token_scales, kv_format, counters, backend),
    )  # fmt: skip


def _with_positions(
    append_key: Any,
    append_value: Any,
    batch_indices: Any,
    positions: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    k_token_scales: Any = None,
    v_token_scales: Any = None,
    kv_format: Any = None,
    counters: Any = None,
    backend: str | None = None,
) -> None:
    append(
        append_key, append_value, paged_kv_cache, kv_layout, Tokens(batch_indices=batch_indices, positions=positions),
        Paged(kv_indptr, kv_indices, kv_last_page_len),
        Options(k_scale, v_scale, k_token_scales, v_token_scales, kv_format, counters, backend),
    )  # fmt: skip


def append_padded_kv_cache(
    append_key: Any,
    append_value: Any,
    append_indptr: Any,
    k_padded: Any,
    v_padded: Any,
    kv_lens: Any,
    kv_layout: str = "NHD",
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    k_token_scales: Any = None,
    v_token_scales: Any = None,
    kv_format: Any = None,
    counters: Any = None,
    backend: str | None = None,
) -> None:
    """:func:`append_paged_kv_cache` for padded caches, as ``batch_decode_with_padded_kv_cache`` reads them.

    Parameters
    ----------
    append_key, append_value : ``[nnz, num_kv_heads, head_dim]``, request b appending ``append_indptr[b] :
        append_indptr[b + 1]``; or, with ``append_indptr=None``, equally many for every request:
        ``[batch, num_kv_heads, head_dim]`` for one token each, ``[batch, n, num_kv_heads, head_dim]`` for n.
    append_indptr : int32 ``[batch + 1]`` or None.
    k_padded, v_padded : arrays ``[batch, max_len, num_kv_heads, head_dim]`` (``"HND"``: heads before rows). **They are
        written.**
    kv_lens : int32 ``[batch]``: rows of each request *after* appending; the new tokens are the last of them.

    The options and everything else are as for :func:`append_paged_kv_cache`; ``k_token_scales`` and ``v_token_scales``
    are ``[batch, max_len, num_kv_heads]``, or heads before rows.
    """
    append(
        append_key, append_value, (k_padded, v_padded), kv_layout, Tokens(indptr=append_indptr), Padded(kv_lens),
        Options(k_scale, v_scale, k_token_scales, v_token_scales, kv_format, counters, backend),
    )  # fmt: skip


def get_seq_lens(kv_indptr: Any, kv_last_page_len: Any, page_size: int) -> Any:
    """Rows of each request of a page table: int32 ``[batch]``, where the tables are, without waiting for them."""
    tables = {"kv_indptr": kv_indptr, "kv_last_page_len": kv_last_page_len}
    indptr, last = (_vector(table, name) for name, table in tables.items())
    pages = indptr[1:] - indptr[:-1]
    if pages.shape != last.shape:
        raise ValueError(f"kv_last_page_len: expected shape {list(pages.shape)}, got {list(last.shape)}")
    return ((pages - 1) * page_size + last) * (pages > 0)


def get_batch_indices_positions(append_indptr: Any, seq_lens: Any, nnz: int) -> tuple[Any, Any]:
    """The request of each appended token and its row there, for the second form of :func:`append_paged_kv_cache`.

    Parameters
    ----------
    append_indptr : int32 ``[batch + 1]``, host or device.
    seq_lens : int32 ``[batch]``: rows of each request after appending (:func:`get_seq_lens`).
    nnz : tokens that the result is for. Those from ``append_indptr[-1]`` on belong to request -1 and are left out.

    Returns
    -------
    batch_indices, positions : int32 ``[nnz]``, where the tables are, without waiting for them.
    """
    indptr, lens = _vector(append_indptr, "append_indptr"), _vector(seq_lens, "seq_lens")
    batch = indptr.shape[0] - 1
    if tuple(lens.shape) != (batch,):
        raise ValueError(f"seq_lens: expected shape [batch] = [{batch}], got {list(lens.shape)}")
    library = arrays.library_of(indptr, "append_indptr")
    assert library is not None  # adopt() leaves no other
    if library.name == "torch":
        xp = sys.modules["torch"]
        tokens = xp.arange(nnz, dtype=xp.int32, device=indptr.device)
        requests = xp.searchsorted(indptr[1:].contiguous(), tokens, right=True, out_int32=True)
    else:
        xp = importlib.import_module("jax.numpy") if library.name == "jax" else sys.modules[library.name]
        tokens = xp.arange(nnz, dtype="int32")
        requests = xp.searchsorted(indptr[1:], tokens, side="right").astype("int32")
    if not batch:
        return requests - 1, tokens
    known = requests.clip(None, batch - 1)
    positions = tokens + lens[known] - indptr[1:][known]
    outside = requests >= batch
    return xp.where(outside, requests * 0 - 1, requests), xp.where(outside, tokens * 0, positions)


def _vector(value: Any, argument: str) -> Any:
    """A table of int32 with one axis: an array of any library, or integers."""
    if isinstance(value, (list, tuple)):
        value = np.asarray(value, np.int32)
    value = arrays.adopt(value, argument)
    name = dtype_name(value.dtype)
    if name != "int32":
        raise TypeError(f"{argument}: expected int32, got {name}")
    if len(value.shape) != 1:
        raise ValueError(f"{argument}: expected 1 axis, got shape {list(value.shape)}")
    return value
