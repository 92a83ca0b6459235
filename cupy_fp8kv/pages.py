"""Paged caches: what a cache argument and a page table may be, read and checked in one place.

A cache is one array ``[num_pages, 2, page_size, num_kv_heads, head_dim]`` (``"HND"``: heads before rows) with K and V
side by side, or a pair of arrays without the second axis. Which pages a request has, in order, is said by

- ``indptr [batch + 1]``, ``indices`` and ``last_page_len [batch]``: request b has the pages
  ``indices[indptr[b] : indptr[b + 1]]``, all of them full but the last, which has ``last_page_len[b]`` rows; or by
- ``block_tables [batch, max_pages]`` and ``kv_lens [batch]``: row b begins with the pages of request b.

Every array of these may be on the host, where it is checked and uploaded, or on the device, where only kernels read it.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from . import arrays
from .arrays import HOST, Library, Signature, device_name
from .jit.device import refuse_capture
from .layouts import KV_LAYOUTS, check_kv_layout, to_nhd
from .problem import MAX_KV_LEN, Facts, SizeBinder

# Caches

#: Signatures of the one array, or of both.
CacheSignature = tuple[Signature, ...]


class PagedSizes(NamedTuple):
    """Sizes of a paged cache, and strides in bytes of the axes (page, row, head) of K and V."""

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]


def adopt_cache(cache: Any, argument: str = "paged_kv_cache") -> Any:
    """The cache with arrays of unknown libraries as NumPy or CuPy arrays that share their memory."""
    if isinstance(cache, (tuple, list)):
        return tuple(arrays.adopt(array, argument) for array in cache)
    return arrays.adopt(cache, argument)


def cache_library(cache: Any, argument: str = "paged_kv_cache") -> Library:
    """The library that the arrays of an adopted cache belong to. TypeError if they belong to different ones."""
    parts = cache if isinstance(cache, (tuple, list)) else (cache,)
    if len(parts) not in (1, 2):
        raise ValueError(f"{argument}: expected one array or a pair (K, V), got {len(parts)} arrays")
    libraries = {arrays.library_of(part, argument) for part in parts}
    library = libraries.pop()
    if libraries or library is None:
        raise TypeError(f"{argument}: expected K and V as arrays of one library")
    return library


def read_cache(library: Library, cache: Any, argument: str = "paged_kv_cache") -> tuple[int, int, CacheSignature]:
    """Addresses of the first and the last array, and what decides how the cache is read."""
    if isinstance(cache, (tuple, list)):
        if len(cache) != 2:
            raise ValueError(f"{argument}: expected one array or a pair (K, V), got {len(cache)} arrays")
        k_address, k_signature = arrays.read(library, cache[0], argument)
        v_address, v_signature = arrays.read(library, cache[1], argument)
        return k_address, v_address, (k_signature, v_signature)
    address, signature = arrays.read(library, cache, argument)
    return address, address, (signature,)


def cache_facts(
    library: Library, signature: CacheSignature, argument: str = "paged_kv_cache"
) -> tuple[Facts, Facts, int]:
    """K and V as arrays of four axes, and how many bytes K's address is before V's in one array (0 for a pair)."""
    if len(signature) == 2:
        return library.facts(signature[0]), library.facts(signature[1]), 0
    facts = library.facts(signature[0])
    shape, strides = facts.shape, facts.strides
    if len(shape) != 5 or shape[1] != 2:
        raise ValueError(
            f"{argument}: expected one array of 5 axes, [num_pages, 2, ...] with K and V on the second, or a pair of "
            f"arrays of 4 axes, got one of shape {list(shape)}"
        )
    half = facts._replace(shape=(shape[0], *shape[2:]), strides=(strides[0], *strides[2:]))
    return half, half, strides[1]


def host_cache(library: Library, cache: Any) -> tuple[np.ndarray, np.ndarray]:
    """K and V of a cache as NumPy arrays: views if they are on the host, copies otherwise."""
    if isinstance(cache, (tuple, list)):
        return library.to_numpy(cache[0]), library.to_numpy(cache[1])
    both = library.to_numpy(cache)
    return both[:, 0], both[:, 1]


def bind_cache(
    sizes: SizeBinder, k: Facts, v: Facts, kv_layout: str, names: tuple[str, str] = ("paged_kv_cache",) * 2
) -> PagedSizes:
    """Bind ``num_pages``, ``page_size``, ``num_kv_heads`` and ``head_dim`` of K and V, in either layout."""
    check_kv_layout(kv_layout)
    rows = ("page_size", "num_kv_heads") if KV_LAYOUTS[kv_layout][0] == 0 else ("num_kv_heads", "page_size")
    strides: list[tuple[int, int, int]] = []
    for name, facts in zip(names, (k, v), strict=True):
        sizes.bind(name, facts.shape, ("num_pages", *rows, "head_dim"))
        # Axes of one element are never stepped along, and libraries give them any stride.
        moved = tuple(stride if size > 1 else 0 for size, stride in zip(facts.shape, facts.strides, strict=True))
        page, row, head, _ = to_nhd(moved, kv_layout)
        strides.append((page, row, head))
    if sizes["page_size"] < 1:
        raise ValueError(f"{names[0]}: expected pages of at least one row, got shape {list(k.shape)}")
    return PagedSizes(
        sizes["num_pages"], sizes["page_size"], sizes["num_kv_heads"], sizes["head_dim"], strides[0], strides[1]
    )


# Page tables


class Table(NamedTuple):
    """An int32 array of a page table: its values if they are on the host, otherwise where it lies."""

    shape: tuple[int, ...]
    values: np.ndarray | None
    library: Library
    device: int
    address: int
    stride: int  # from one row to the next of a block table, in elements
    owner: Any  # keeps the array alive


def read_table(value: Any, argument: str, ndim: int) -> Table:
    """An array of a page table: any integers on the host (or a list), int32 with a contiguous last axis on a device."""
    if isinstance(value, (tuple, list)):
        value = np.asarray(value, dtype=None if value else np.int32)
    value = arrays.adopt(value, argument)
    library = arrays.library_of(value, argument)
    assert library is not None  # adopt() leaves no other
    address, signature = arrays.read(library, value, argument)
    shape, device, stride = _table_geometry(library, signature, argument, ndim)
    if device == HOST:
        return _host_table(library.to_numpy(value), argument)
    return Table(shape, None, library, device, address, stride, value)


@functools.lru_cache(4096)
def _table_geometry(
    library: Library, signature: Signature, argument: str, ndim: int
) -> tuple[tuple[int, ...], int, int]:
    """Shape, device, and entries from one row to the next."""
    facts = library.facts(signature)
    if len(facts.shape) != ndim:
        raise ValueError(
            f"{argument}: expected {ndim} {'axis' if ndim == 1 else 'axes'}, got shape {list(facts.shape)}"
        )
    if facts.device == HOST:
        return facts.shape, HOST, 0
    if facts.dtype != "int32":
        raise TypeError(f"{argument}: expected int32, got {facts.dtype}")
    size, step = facts.shape[-1], facts.strides[-1]
    rows_apart = facts.strides[0] if ndim == 2 and facts.shape[0] > 1 else 0
    # Entries are counted in 32 bits.
    if (size > 1 and step != 4) or not 0 <= rows_apart * (facts.shape[0] if ndim == 2 else 1) + 4 * size < 2**33:
        raise ValueError(
            f"{argument}: expected a contiguous last axis, got shape {list(facts.shape)} with strides "
            f"{list(facts.strides)} in bytes"
        )
    return facts.shape, facts.device, rows_apart // 4


def _host_table(values: np.ndarray, argument: str) -> Table:
    if values.dtype.kind not in "iu":
        raise TypeError(f"{argument}: expected int32, got {values.dtype}")
    narrow = np.ascontiguousarray(values, dtype=np.int32)
    if values.dtype != np.int32 and not np.array_equal(narrow, values):
        raise ValueError(f"{argument}: expected values that int32 holds, got {values.min()} to {values.max()}")
    stride = narrow.shape[1] if narrow.ndim == 2 else 0
    return Table(narrow.shape, narrow, arrays.library("numpy"), HOST, 0, stride, narrow)


def place_table(table: Table, argument: str, library: Library, device: int) -> Table:
    """The table where kernels of ``library``'s call on ``device`` read it: as it is, or uploaded.

    TypeError or ValueError for one of another library or device, RuntimeError for an upload while a graph is captured.
    """
    if table.device == HOST:
        refuse_capture(library.stream(device), argument)
        owner, address = arrays.upload(library, table.owner, device)
        return table._replace(values=None, library=library, device=device, address=address, owner=owner)
    if table.library is not library:
        raise TypeError(f"{argument}: expected an array of {library.name} like q, got one of {table.library.name}")
    if table.device != device:
        raise ValueError(f"{argument}: expected device {device_name(device)} like q, got {device_name(table.device)}")
    return table


def download_table(table: Table, argument: str) -> Table:
    """The table with its values on the host, after a copy if it is on a device."""
    return table if table.device == HOST else _host_table(table.library.to_numpy(table.owner), argument)


CSR_NAMES = ("indptr", "indices", "last_page_len")
BLOCK_NAMES = ("block_tables", "kv_lens")


def check_csr(
    indptr: Table, indices: Table, last_page_len: Table, batch: int, page_size: int, names: tuple[str, ...] = CSR_NAMES
) -> np.ndarray | None:
    """Shapes, and of what is on the host everything but the pages' numbers; lengths if they can be known, or None."""
    indptr_name, indices_name, last_name = names
    if indptr.shape != (batch + 1,):
        raise ValueError(f"{indptr_name}: expected shape [batch + 1] = [{batch + 1}], got {list(indptr.shape)}")
    if last_page_len.shape != (batch,):
        raise ValueError(f"{last_name}: expected shape [batch] = [{batch}], got {list(last_page_len.shape)}")
    bounds, last = indptr.values, last_page_len.values
    counts = None
    if bounds is not None:
        counts = np.diff(bounds.astype(np.int64))
        if bounds[0] < 0:
            raise ValueError(f"{indptr_name}: expected numbers >= 0, got {bounds[0]} at 0")
        if (counts < 0).any():
            wrong = int(np.flatnonzero(counts < 0)[0])
            raise ValueError(
                f"{indptr_name}: expected numbers that do not decrease, got {bounds[wrong + 1]} after {bounds[wrong]} "
                f"for request {wrong}"
            )
        if bounds[-1] > indices.shape[0]:
            raise ValueError(
                f"{indptr_name}: expected at most the {indices.shape[0]} entries of {indices_name}, got {bounds[-1]} "
                f"at {batch}"
            )
    if last is None:
        return None
    # A request without pages has no last one.
    used = np.ones(batch, bool) if counts is None else counts > 0
    bad = used & ((last < (counts is not None)) | (last > page_size))
    if bad.any():
        wrong = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{last_name}: expected rows from 1 to page_size = {page_size}, got {last[wrong]} for request {wrong}"
        )
    if counts is None:
        return None
    return _checked_lens(np.where(used, (counts - 1) * page_size + last, 0), indptr_name)


def _checked_lens(lens: np.ndarray, argument: str) -> np.ndarray:
    if (lens > MAX_KV_LEN).any():
        wrong = int(np.flatnonzero(lens > MAX_KV_LEN)[0])
        raise ValueError(
            f"{argument}: expected at most {MAX_KV_LEN} rows a request, got {lens[wrong]} for request {wrong}"
        )
    return lens


def check_blocks(
    block_tables: Table, kv_lens: Table, batch: int, page_size: int, names: tuple[str, ...] = BLOCK_NAMES
) -> np.ndarray | None:
    """As :func:`check_csr`, for block tables."""
    tables_name, lens_name = names
    if block_tables.shape[0] != batch:
        raise ValueError(
            f"{tables_name}: expected shape [batch, max_pages] with batch = {batch}, got {list(block_tables.shape)}"
        )
    if kv_lens.shape != (batch,):
        raise ValueError(f"{lens_name}: expected shape [batch] = [{batch}], got {list(kv_lens.shape)}")
    lens = kv_lens.values
    if lens is None:
        return None
    lens = lens.astype(np.int64)
    most = block_tables.shape[1] * page_size
    if batch and (lens.min() < 0 or lens.max() > most):
        wrong = int(np.flatnonzero((lens < 0) | (lens > most))[0])
        raise ValueError(
            f"{lens_name}: expected lengths from 0 to max_pages * page_size = {most}, got {lens[wrong]} for request "
            f"{wrong}"
        )
    return _checked_lens(lens, lens_name)


def check_pages(pages: list[np.ndarray], num_pages: int, argument: str) -> None:
    """The pages of each request must exist; ValueError that names the request and the page otherwise."""
    for request, numbers in enumerate(pages):
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= num_pages):
            at = int(np.flatnonzero((numbers < 0) | (numbers >= num_pages))[0])
            raise ValueError(
                f"{argument}: expected pages from 0 to num_pages - 1 = {num_pages - 1}, got {numbers[at]} as page {at} "
                f"of request {request}"
            )


def csr_pages(indptr: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
    """The pages of each request, in order."""
    return [indices[begin:end] for begin, end in itertools.pairwise(indptr)]


def block_pages(block_tables: np.ndarray, kv_lens: np.ndarray, page_size: int) -> list[np.ndarray]:
    """The pages of each request, in order; what lies behind them in the table is not looked at."""
    return [row[: -(-int(n) // page_size)] for row, n in zip(block_tables, kv_lens, strict=True)]
