"""A validated call over a paged cache, and what its kernel is told of the pages."""

from __future__ import annotations

import math
from typing import NamedTuple

from .formats import KV_FORMATS, Q_DTYPES, kv_format
from .pages import PagedSizes, bind_cache
from .problem import (
    MAX_KV_LEN,
    MAX_ROW_STRIDE,
    ROW_ALIGNMENT,
    DecodeProblem,
    Facts,
    Paging,
    SizeBinder,
    check_heads,
    formats_of,
)

#: Rows of a pool are told apart by 32 bits, in steps of a unit of bytes. Larger units are not needed.
_MOST_UNIT = 1 << 20


def row_units(strides: tuple[int, int, int], sizes: PagedSizes, argument: str) -> tuple[int, int, int]:
    """(unit, units from page to page, units from row to row): row r of page p is ``p * second + r * third`` units away.

    The unit is the largest number of bytes that divides both steps, which mostly is the smaller of them. ValueError for
    a pool of 2^31 units or more: 256 GiB where rows of 128 bytes follow each other.
    """
    page, row, _ = strides
    unit = math.gcd(page, row) or ROW_ALIGNMENT
    if unit > _MOST_UNIT:
        unit = math.gcd(unit, _MOST_UNIT)
    page, row = page // unit, row // unit
    farthest = (sizes.num_pages - 1) * abs(page) + (sizes.page_size - 1) * abs(row)
    if max(farthest, abs(page), abs(row)) >= 2**31:
        raise ValueError(
            f"{argument}: expected a pool whose rows are less than 2^31 steps of {unit} bytes apart, got {farthest}; "
            f"strides of pages and rows in bytes are {strides[0]} and {strides[1]}"
        )
    return unit, page, row


def paging_fields(problem: DecodeProblem) -> dict[str, int]:
    """The fields of DecodeParams that only a paged cache has, but ``page_size``."""
    fields = {"block_table_stride": problem.paging.block_table_stride if problem.paging else 0}
    for name, strides in (("k", problem.k_strides), ("v", problem.v_strides)):
        units = (0, 0, 0)
        if problem.paging:
            sizes = PagedSizes(problem.paging.num_pages, problem.paging.page_size, 0, 0, strides, strides)
            units = row_units(strides, sizes, name)
        fields |= dict(zip((f"{name}_unit", f"{name}_units_page", f"{name}_units_row"), units, strict=True))
    return fields


def bind_paged(
    q: Facts,
    k: Facts,
    v: Facts,
    *,
    batch: tuple[int, str],
    kind: tuple[int, int, int],
    names: tuple[str, str],
    kv_layout: str,
    requested_format: object,
    soft_cap: bool,
    window_left: int,
    position: str,
    queries: tuple[int, int] = (1, 0),
) -> DecodeProblem:
    """Check that the arrays of a call over pages fit together; TypeError or ValueError naming what does not.

    ``batch``: requests of the page table, and the argument that says so; ``kind``: :attr:`PageTables.kind`; ``names``:
    those of K and V; ``queries``: rows of q that a request has at most, and all of them, if they are not one each.
    """
    if q.dtype not in Q_DTYPES:
        raise TypeError(f"q: expected {' or '.join(Q_DTYPES)}, got {q.dtype}")
    k_format, v_format = formats_of(k, v, requested_format, names)
    sizes = SizeBinder()
    sizes.bind(batch[1], (batch[0],), ("batch",))
    if queries[0] > 1:
        sizes.bind("q_indptr", (queries[1],), ("rows of q",))
    sizes.bind("q", q.shape, ("rows of q" if queries[0] > 1 else "batch", "num_qo_heads", "head_dim"))
    found = bind_cache(sizes, k, v, kv_layout, names)
    hq, hkv = sizes["num_qo_heads"], found.num_kv_heads
    check_heads(hq, hkv, found.head_dim)
    for name, strides in zip(names, (found.k_strides, found.v_strides), strict=True):
        if abs(strides[1]) > MAX_ROW_STRIDE:
            raise ValueError(f"{name}: expected rows at most {MAX_ROW_STRIDE} bytes apart, got {strides[1]}")
        row_units(strides, found, name)
    planned_rows, max_rows, block_table_stride = kind
    if not found.num_pages:  # then no table has anything to name
        planned_rows = max_rows = 0
    q_request, q_head = (stride if size > 1 else 0 for size, stride in zip(q.shape[:2], q.strides[:2], strict=True))
    return DecodeProblem(
        batch=batch[0], kv_len=min(planned_rows, MAX_KV_LEN), num_qo_heads=hq, num_kv_heads=hkv,
        head_dim=found.head_dim, q_format=kv_format(q.dtype).name, k_format=k_format, v_format=v_format,
        q_strides=(q_request, q_head), k_strides=found.k_strides, v_strides=found.v_strides, soft_cap=soft_cap,
        window=window_left + 1 if window_left >= 0 else -1, position=position, ragged=True,
        paging=Paging(found.page_size, found.num_pages, max_rows, block_table_stride), queries=queries[0],
    )  # fmt: skip


class Planned(NamedTuple):
    """What a wrapper's plan() was told, and run() is held to. ``q_format`` None: any."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    q_format: str | None
    k_format: str
    v_format: str

    def check(self, q: Facts, k: Facts, v: Facts, kv_layout: str, names: tuple[str, str]) -> None:
        """ValueError or TypeError for arrays of other sizes or types than planned."""
        rows = (self.page_size, self.num_kv_heads) if kv_layout == "NHD" else (self.num_kv_heads, self.page_size)
        for name, facts, planned, fmt in (
            ("q", q, (self.num_qo_heads, self.head_dim), self.q_format),
            (names[0], k, (*rows, self.head_dim), self.k_format),
            (names[1], v, (*rows, self.head_dim), self.v_format),
        ):
            if facts.shape[1:] != planned:
                raise ValueError(
                    f"{name}: expected shape [..., {str(list(planned))[1:]} as planned, got {list(facts.shape)}"
                )
            codes = facts.dtype == "uint8" and fmt is not None and KV_FORMATS[fmt].is_fp8
            if fmt is not None and not codes and facts.dtype != KV_FORMATS[fmt].dtype.name:
                raise TypeError(
                    f"{name}: expected {KV_FORMATS[fmt].dtype.name} as planned "
                    f"({'q_data_type' if name == 'q' else 'data_type'}), got {facts.dtype}"
                )

    def problem(self, batch: int, kind: tuple[int, int, int], window_left: int, soft_cap: bool) -> DecodeProblem:
        """For the planner, with strides of 0 for those not known. ``kind``: :attr:`PageTables.kind`."""
        return DecodeProblem(
            batch, kind[0], self.num_qo_heads, self.num_kv_heads, self.head_dim, self.q_format or "f16", self.k_format,
            self.v_format, (0, 0), (0, 0, 0), (0, 0, 0), soft_cap, window_left + 1 if window_left >= 0 else -1,
            ragged=True, paging=Paging(self.page_size, 1, kind[1], kind[2]),
        )  # fmt: skip
