"""Launching ``pages.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..arrays import Library
from ..jit import compiler
from ..jit import device as jit_device
from ..jit.launch import Launch
from ..jit.params import ParamBlock, divisors
from ..jit.spec import PagesSpec

#: Fields that change from call to call.
_COPY_LEADING, _GATHER_LEADING = 5, 8


class Rows(NamedTuple):
    """The rows of a page, K's or V's: their sizes, and strides in bytes of the axes (page, row, head)."""

    rows: int
    heads: int
    row_bytes: int  # of one head
    strides: tuple[int, int, int]

    def joined(self) -> Rows:
        """The same bytes with axes that lie side by side made one."""
        rows, heads, size, (page, row, head) = self
        if row < head:  # HND: nothing tells rows and heads apart here
            rows, row, heads, head = heads, head, rows, row
        if heads == 1 or head == size:
            heads, size, head = 1, heads * size, 0
        if heads == 1 and (rows == 1 or row == size):
            rows, size, row = 1, rows * size, 0
        return Rows(rows, heads, size, (page, row, head))


class Sides(NamedTuple):
    """K and V, or of them the one that is there: what ``copy_pages`` and ``gather`` move together."""

    addresses: tuple[int, int]
    rows: tuple[Rows | None, Rows | None]
    word_bytes: int

    def launches(self, rows: Sequence[Rows | None]) -> list[tuple[int, int, Rows]]:
        """First side, number of sides and rows of each launch: one where both sides have the same sizes."""
        k, v = rows
        if k is not None and v is not None and k[:3] == v[:3]:
            return [(0, 2, k)]
        return [(side, 1, part) for side, part in enumerate(rows) if part is not None]


def _strides(prefix: str, rows: Rows | None, axes: tuple[str, ...] = ("page", "row", "head")) -> dict[str, int]:
    strides = rows.strides if rows is not None else (0, 0, 0)
    return {f"{prefix}_stride_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}


def _grid(units: int, device: int) -> int:
    return max(1, min(units, 16 * jit_device.device_info(device).sm_count))


def _run(library: Library, device: int, spec: PagesSpec, grid: int, params: ParamBlock, *values: int) -> None:
    runtime = jit_device.require_cupy().cuda.runtime
    jit_device.ensure_context(runtime, device)
    with jit_device.on_device(runtime, device), params.lock:
        params.write(*values)
        Launch(compiler.load(spec, device), grid, params)(library.stream(device))


def copy_pages(
    library: Library, device: int, sides: Sides, num_pages: int, pairs: int, sources: int, targets: int
) -> None:
    """Copy page ``sources[i]`` to page ``targets[i]``; both are addresses of int32 ``[pairs]`` on the device."""
    joined = [rows.joined() if rows is not None else None for rows in sides.rows]
    for first, count, rows in sides.launches(joined):
        words = rows.row_bytes // sides.word_bytes
        params = ParamBlock(
            "CopyPagesParams", _COPY_LEADING, **_strides("k", joined[0]), **_strides("v", joined[1]),
            num_pages=num_pages, page_words=rows.rows * rows.heads * words, first_side=first, sides=count,
            **divisors(heads=rows.heads, words=words),
        )  # fmt: skip
        grid = _grid(pairs * count, device)
        spec = PagesSpec("copy_pages", sides.word_bytes)
        _run(library, device, spec, grid, params, *sides.addresses, sources, targets, pairs)


def gather(
    library: Library,
    device: int,
    sides: Sides,
    num_pages: int,
    out: Sides,
    tables: tuple[int, int, int],
    num_indices: int,
    batch: int,
    max_kv_len: int,
) -> None:
    """Rows of pages to ``out``, whose strides are (request, row, head); ``tables`` are addresses on the device."""
    axes = ("request", "row", "head")
    for first, count, rows in sides.launches(sides.rows):
        words, chunks = rows.row_bytes // sides.word_bytes, -(-max_kv_len // rows.rows)
        units = batch * chunks * count
        params = ParamBlock(
            "GatherParams", _GATHER_LEADING, **_strides("k", sides.rows[0]), **_strides("v", sides.rows[1]),
            **_strides("k_out", out.rows[0], axes), **_strides("v_out", out.rows[1], axes), num_pages=num_pages,
            page_size=rows.rows, max_kv_len=max_kv_len, row_words=rows.heads * words, units=units, first_side=first,
            sides=count, **divisors(chunks=chunks, heads=rows.heads, words=words),
        )  # fmt: skip
        spec = PagesSpec("gather", sides.word_bytes)
        _run(
            library, device, spec, _grid(units, device), params, *out.addresses, *sides.addresses, *tables, num_indices
        )
