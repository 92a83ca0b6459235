"""Page tables at addresses that a captured graph keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from . import arrays
from .arrays import HOST, device_name
from .jit.device import refuse_capture
from .page_tables import PageTables
from .pages import CSR_NAMES, Table, read_table

BUFFER_NAMES = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")


def read_buffers(values: tuple[Any, Any, Any]) -> tuple[Table, ...]:
    """The arrays for ``indptr``, ``indices`` and ``last_page_len``. ValueError or TypeError for what cannot be them."""
    buffers = tuple(_read_buffer(value, name) for value, name in zip(values, BUFFER_NAMES, strict=True))
    indptr, _, last = buffers
    if indptr.shape[0] != last.shape[0] + 1:
        raise ValueError(
            f"{BUFFER_NAMES[0]}: expected [batch + 1] = [{last.shape[0] + 1}] with {BUFFER_NAMES[2]} [batch], got "
            f"{list(indptr.shape)}"
        )
    return buffers


def _read_buffer(value: Any, argument: str) -> Table:
    if value is None:
        raise ValueError(f"{argument}: expected an int32 array, which use_cuda_graph needs, got None")
    table = read_table(value, argument, 1)
    library = arrays.library_of(value, argument)
    if library is not None and not library.mutable:
        raise TypeError(f"{argument}: {library.name} arrays cannot be written")
    values = table.values
    if values is not None and library is not None:
        in_place = values.size == 0 or np.shares_memory(values, library.to_numpy(value))
        if not in_place or not values.flags.writeable:
            raise TypeError(f"{argument}: expected a contiguous int32 array that plan() can write")
    return table


def in_buffers(tables: PageTables, buffers: tuple[Table, ...]) -> PageTables:
    """Tables that lie in the buffers, planned by the room there. ValueError if these tables do not fit."""
    indptr, indices, last = buffers
    if tables.indptr is None:
        raise ValueError(
            "block_tables: expected indptr, indices and last_page_len, which use_cuda_graph has buffers for"
        )
    if tables.batch != last.shape[0]:
        raise ValueError(f"last_page_len: expected batch = {last.shape[0]} as in {BUFFER_NAMES[2]}, got {tables.batch}")
    if tables.pages.shape[0] > indices.shape[0]:
        raise ValueError(
            f"indices: expected at most the {indices.shape[0]} entries of {BUFFER_NAMES[1]}, got "
            f"{tables.pages.shape[0]}"
        )
    room = -(-indices.shape[0] // max(last.shape[0], 1))
    return replace(tables, indptr=indptr, pages=indices, lens=last, planned_pages=room)


def fill_buffers(tables: PageTables, buffers: tuple[Table, ...]) -> None:
    """Copy tables into the buffers, on the current stream; all of them, or none and an error."""
    assert tables.indptr is not None
    sources = (tables.indptr, tables.pages, tables.lens)
    for name, source, buffer in zip(CSR_NAMES, sources, buffers, strict=True):
        if source.device == HOST and buffer.device != HOST:
            refuse_capture(buffer.library.stream(buffer.device), name)
        elif source.device != HOST and (source.library is not buffer.library or source.device != buffer.device):
            raise ValueError(
                f"{name}: expected an array of {buffer.library.name} on {device_name(buffer.device)} like the buffers, "
                f"or one on the host, got one of {source.library.name} on {device_name(source.device)}"
            )
    for source, buffer in zip(sources, buffers, strict=True):
        values = source.owner
        if source.device == HOST:
            values = buffer.library.from_numpy(values, buffer.device)
        buffer.owner[: source.shape[0]] = values
