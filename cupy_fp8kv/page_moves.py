"""Moving rows of paged caches as they are: pages to other pages, and the pages of requests to padded arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays
from .append_tables import Paged, paged_tables, table_of
from .arrays import HOST
from .backends import cuda_pages
from .backends import reference_cache as reference
from .backends.cuda_pages import Rows, Sides
from .operands import Operand, runs_on_cuda, store
from .pages import Table, place_table
from .stored_cache import StoredCache


def copy_pages(
    paged_kv_cache: Any,
    source_pages: Any,
    target_pages: Any,
    kv_layout: str = "NHD",
    *,
    k_token_scales: Any = None,
    v_token_scales: Any = None,
    backend: str | None = None,
) -> None:
    """Copy pages of a cache to other pages of it, in place: for a fork that writes, or to move pages together.

    Parameters
    ----------
    paged_kv_cache : as for :func:`append_paged_kv_cache`. Page ``target_pages[i]`` is written, K and V.
    source_pages, target_pages : int32 ``[n]``, host or device. A page may be the source of several. No page may be the
        target of two, or a source and a target: on the host that raises ValueError; on the device the outcome would
        depend on the order of the copies. Pages on the device that the cache does not have are left out.
    k_token_scales, v_token_scales : scales beside the cache, copied along.
    backend : None copies where the cache is; ``"cuda"`` or ``"numpy"`` forces one.
    """
    cache = StoredCache.of(paged_kv_cache, kv_layout)
    cuda = runs_on_cuda(backend, cache.device)
    beside = _beside(cache, k_token_scales, v_token_scales, written=True)
    download = not cuda or cache.device == HOST
    tables = [
        table_of(pages, name, cache, download)
        for pages, name in ((source_pages, "source_pages"), (target_pages, "target_pages"))
    ]
    _check_pairs(tables[0], tables[1], cache.sizes.num_pages)
    pairs = tables[0].shape[0]
    if not pairs:
        return
    if not cuda:
        source, target = (table.values for table in tables)
        assert source is not None and target is not None

        def write(*parts: np.ndarray) -> None:
            for part in parts:
                reference.copy_pages(part, source, target)

        cache.written_back(write)
        for operand in filter(None, beside):
            whole = cache.library.to_numpy(operand.array)
            reference.copy_pages(whole, source, target)
            store(cache.library, operand, whole)
        return
    if cache.device == HOST:
        _copy_uploaded(cache, beside, source_pages, target_pages)
        return
    names = ("source_pages", "target_pages")
    placed = [place_table(table, name, cache.library, cache.device) for table, name in zip(tables, names, strict=True)]
    for sides in (_sides_of(cache), _sides_beside(cache, beside)):
        if sides is not None:
            cuda_pages.copy_pages(
                cache.library, cache.device, sides, cache.sizes.num_pages, pairs, placed[0].address, placed[1].address
            )


def gather(
    paged_kv_cache: Any,
    kv_indptr: Any,
    kv_indices: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
    *,
    max_kv_len: int | None = None,
    k_token_scales: Any = None,
    v_token_scales: Any = None,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """The rows of each request, in order, as padded arrays: pages to what ``batch_decode_with_padded_kv_cache`` takes.

    Parameters
    ----------
    paged_kv_cache : as for :func:`append_paged_kv_cache`; it is only read.
    kv_indptr, kv_indices, kv_last_page_len : the pages of each request, host or device.
    max_kv_len : rows of the result. By default those of the longest request, which the host must know for that: with
        tables on the device it has to be given, and longer requests are cut there.
    k_token_scales, v_token_scales : scales beside the cache, gathered along.
    backend : None gathers where the cache is; ``"cuda"`` or ``"numpy"`` forces one.

    Returns
    -------
    k, v : ``[batch, max_kv_len, num_kv_heads, head_dim]`` (``"HND"``: heads before rows), of the cache's own type and
        library, the same bytes; zeros behind the rows of a request.
    k_scales, v_scales : only with scales beside the cache, for those that were given (None otherwise): float32
        ``[batch, max_kv_len, num_kv_heads]`` or heads before rows.
    """
    cache = StoredCache.of(paged_kv_cache, kv_layout, written=False)
    cuda = runs_on_cuda(backend, cache.device)
    beside = _beside(cache, k_token_scales, v_token_scales, written=False)
    download = not cuda or cache.device == HOST
    tables, lens, pages = paged_tables(Paged(kv_indptr, kv_indices, kv_last_page_len), cache, download)
    batch = tables[2].shape[0]
    rows = _rows_of_result(max_kv_len, lens)
    if cuda and cache.device == HOST:
        return _gather_uploaded(cache, beside, (kv_indptr, kv_indices, kv_last_page_len), rows)
    library, device = cache.library, cache.device
    if not cuda:
        assert pages is not None and lens is not None
        parts = [*cache.host(), *(cache.beside_host(operand) if operand else None for operand in beside)]
        moved = [None if part is None else reference.gather(part, pages, lens, rows) for part in parts]
        moved = [x if x is None or kv_layout == "NHD" else np.ascontiguousarray(x.swapaxes(1, 2)) for x in moved]
        results = [None if x is None else library.from_numpy(x, device) for x in moved]
        return tuple(results if any(beside) else results[:2])

    names = ("kv_indptr", "kv_indices", "kv_last_page_len")
    placed = [place_table(table, name, library, device) for table, name in zip(tables, names, strict=True)]
    found: list[Any] = []
    for sides, dtypes in (
        (_sides_of(cache), [part.facts.dtype for part in (cache.parts * 2)[:2]]),
        (_sides_beside(cache, beside), ["float32" if operand else "" for operand in beside]),
    ):
        if sides is None:
            continue
        made = [
            _padded(cache, part, dtype, batch, rows, kv_layout) for part, dtype in zip(sides.rows, dtypes, strict=True)
        ]
        out = Sides((made[0][1], made[1][1]), (made[0][2], made[1][2]), sides.word_bytes)
        if batch * rows * cache.sizes.num_kv_heads:
            addresses = placed[0].address, placed[1].address, placed[2].address
            cuda_pages.gather(
                library, device, sides, cache.sizes.num_pages, out, addresses, placed[1].shape[0], batch, rows
            )
        found += [None if array is None else library.wrap(array) for array, *_ in made]
    return tuple(found)


def _beside(cache: StoredCache, k: Any, v: Any, written: bool) -> list[Operand | None]:
    return [cache.beside(k, "k_token_scales", written), cache.beside(v, "v_token_scales", written)]


def _check_pairs(source: Table, target: Table, num_pages: int) -> None:
    if source.shape != target.shape:
        raise ValueError(
            f"target_pages: expected shape {list(source.shape)} like source_pages, got {list(target.shape)}"
        )
    for name, table in (("source_pages", source), ("target_pages", target)):
        pages = table.values
        if pages is not None and len(pages) and (pages.min() < 0 or pages.max() >= num_pages):
            wrong = int(np.flatnonzero((pages < 0) | (pages >= num_pages))[0])
            raise ValueError(
                f"{name}: expected pages from 0 to num_pages - 1 = {num_pages - 1}, got {pages[wrong]} at {wrong}"
            )
    if target.values is None:
        return
    numbers, counts = np.unique(target.values, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"target_pages: expected every page once, got page {numbers[counts > 1][0]} twice")
    if source.values is not None and (both := np.intersect1d(source.values, numbers)).size:
        raise ValueError(f"target_pages: expected no page that is also a source, got page {both[0]}")


def _rows_of_result(max_kv_len: int | None, lens: np.ndarray | None) -> int:
    if max_kv_len is None:
        if lens is None:
            raise ValueError("max_kv_len: expected a number, because the host does not know tables on the device")
        return int(lens.max(initial=0))
    if isinstance(max_kv_len, bool) or not isinstance(max_kv_len, (int, np.integer)):
        raise TypeError(f"max_kv_len: expected an integer, got {max_kv_len!r}")
    if not 0 <= max_kv_len < 2**31 - 2**24:
        raise ValueError(f"max_kv_len: expected a number of rows from 0 to {2**31 - 2**24 - 1}, got {max_kv_len}")
    if lens is not None and (lens > max_kv_len).any():
        wrong = int(np.flatnonzero(lens > max_kv_len)[0])
        raise ValueError(f"max_kv_len: expected at least the {lens[wrong]} rows of request {wrong}, got {max_kv_len}")
    return int(max_kv_len)


def _sides_of(cache: StoredCache) -> Sides:
    sizes = cache.sizes
    k, v = (
        Rows(sizes.page_size, sizes.num_kv_heads, sizes.head_dim * fmt.itemsize, strides)
        for fmt, strides in zip(cache.formats, (sizes.k_strides, sizes.v_strides), strict=True)
    )
    return Sides(cache.addresses, (k, v), 16)


def _sides_beside(cache: StoredCache, beside: list[Operand | None]) -> Sides | None:
    if not any(beside):
        return None
    rows: list[Rows | None] = []
    for operand in beside:
        page, row, head = (4 * stride for stride in cache.beside_strides(operand))
        rows.append(Rows(cache.sizes.page_size, cache.sizes.num_kv_heads, 4, (page, row, head)) if operand else None)
    k, v = (operand.address if operand else 0 for operand in beside)
    return Sides((k, v), (rows[0], rows[1]), 4)


def _padded(
    cache: StoredCache, part: Rows | None, dtype: str, batch: int, rows: int, kv_layout: str
) -> tuple[Any, int, Rows | None]:
    """An array for the result: it, its address, and how its rows lie."""
    if part is None:
        return None, 0, None
    heads, size = part.heads, part.row_bytes
    per_row = size // arrays.numpy_dtype(dtype).itemsize
    last = (per_row,) if dtype != "float32" else ()
    nhd = kv_layout == "NHD"
    shape = (batch, rows, heads, *last) if nhd else (batch, heads, rows, *last)
    array, address = cache.library.empty(shape, dtype, cache.device)
    strides = (rows * heads * size, heads * size, size) if nhd else (rows * heads * size, size, rows * size)
    return array, address, Rows(part.rows, heads, size, strides)


def _up(cache: StoredCache, beside: list[Operand | None]) -> tuple[list[Any], list[Any], Any]:
    """Host arrays on the GPU: the cache's, and those of scales; and the cache as an argument."""
    gpu = arrays.cupy_library()
    parts = [gpu.from_numpy(cache.library.to_numpy(part.array), 0) for part in cache.parts]
    scales = [gpu.from_numpy(cache.library.to_numpy(part.array), 0) if part else None for part in beside]
    return parts, scales, parts[0] if len(parts) == 1 else tuple(parts)


def _copy_uploaded(cache: StoredCache, beside: list[Operand | None], source: Any, target: Any) -> None:
    gpu = arrays.cupy_library()
    parts, scales, there = _up(cache, beside)
    copy_pages(there, source, target, cache.kv_layout, k_token_scales=scales[0], v_token_scales=scales[1])
    for operand, array in zip((*cache.parts, *beside), (*parts, *scales), strict=True):
        if operand is not None:
            store(cache.library, operand, gpu.to_numpy(array))


def _gather_uploaded(
    cache: StoredCache, beside: list[Operand | None], tables: tuple[Any, Any, Any], rows: int
) -> tuple[Any, ...]:
    gpu, library = arrays.cupy_library(), cache.library
    _, scales, there = _up(cache, beside)
    results = gather(
        there, *tables, cache.kv_layout, max_kv_len=rows, k_token_scales=scales[0], v_token_scales=scales[1]
    )
    found = [None if array is None else library.from_numpy(gpu.to_numpy(array), HOST) for array in results]
    for i, fmt in enumerate(cache.formats):
        # CuPy has no FP8 types: a typed cache comes back as bytes.
        if fmt.is_fp8 and cache.parts[min(i, len(cache.parts) - 1)].facts.dtype != "uint8":
            found[i] = library.view_fp8(found[i], fmt.dtype.name)
    return tuple(found)
