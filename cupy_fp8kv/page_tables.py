"""Which pages, and which rows of q, the requests of a batch have: one value for all forms, wherever its arrays lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .arrays import Library
from .pages import (
    BLOCK_NAMES,
    CSR_NAMES,
    Table,
    block_pages,
    check_blocks,
    check_csr,
    check_pages,
    csr_pages,
    download_table,
    place_table,
    read_table,
)
from .problem import MAX_KV_LEN


@dataclass(frozen=True, eq=False)
class PageTables:
    """The page tables of a call, checked as far as the host can see them.

    With ``indptr``, ``pages`` are indices and ``lens`` the rows of the last pages; without, ``pages`` is a block table
    and ``lens`` the rows of the requests.
    """

    names: tuple[str, ...]
    page_size: int
    batch: int
    indptr: Table | None
    pages: Table
    lens: Table
    #: Pages of the longest request, as far as the host knows; what comes out does not depend on it.
    planned_pages: int
    #: The least and the largest page in use, if the host knows.
    page_range: tuple[int, int] | None
    #: Request b has the rows ``q_indptr[b]`` to ``q_indptr[b + 1]`` of q, one at least; None: row b.
    q_indptr: Table | None = None
    #: The most rows of q that a request has, and all of them.
    queries: int = 1
    q_rows: int = 0
    #: These tables where kernels read them, by library and device.
    _placed: dict[tuple[str, int], PageTables] = field(default_factory=dict, init=False, repr=False)

    @property
    def max_rows(self) -> int:
        """Rows that a request has at most; lengths on a device are cut to it."""
        return MAX_KV_LEN if self.indptr else min(self.pages.shape[1] * self.page_size, MAX_KV_LEN)

    @functools.cached_property
    def kind(self) -> tuple[int, int, int]:
        """What calls are planned by. Lengths count roughly: a batch that grows by a row is not another kind."""
        planned = 1 << (self.planned_pages - 1).bit_length() if self.planned_pages else 0
        return min(planned * self.page_size, self.max_rows), self.max_rows, self.pages.stride

    @property
    def _all(self) -> tuple[tuple[str, Table | None], ...]:
        tables = (self.names[-1], self.lens), (self.names[0], self.indptr), (self.names[-2], self.pages)
        return *tables, ("q_indptr", self.q_indptr)

    def with_queries(self, q_indptr: np.ndarray) -> PageTables:
        """The same, with the rows of q that each request has, which are known to be right."""
        table = read_table(q_indptr, "q_indptr", 1)
        return replace(self, q_indptr=table, queries=int(np.diff(q_indptr).max(initial=1)), q_rows=int(q_indptr[-1]))

    def placed(self, library: Library, device: int) -> PageTables:
        """The same where kernels read it. Raises what :func:`pages.place_table` does."""
        found = self._placed.get((library.name, device))
        if found is None:
            lens, indptr, pages, q = (table and place_table(table, name, library, device) for name, table in self._all)
            assert lens and pages
            there = lens is self.lens and indptr is self.indptr and pages is self.pages and q is self.q_indptr
            found = self if there else replace(self, lens=lens, indptr=indptr, pages=pages, q_indptr=q)
            self._placed[library.name, device] = found
        return found

    def snapshot(self) -> PageTables:
        """The same with copies of what is on the host."""
        lens, indptr, pages, q_indptr = (table and _copied(table) for _, table in self._all)
        assert lens and pages
        return replace(self, lens=lens, indptr=indptr, pages=pages, q_indptr=q_indptr)

    def downloaded(self) -> PageTables:
        """The same with everything on the host, and checked there."""
        lens, indptr, pages, q_indptr = (table and download_table(table, name) for name, table in self._all)
        assert lens and pages
        checked = _checked(self.names, self.page_size, indptr, pages, lens)
        return replace(checked, q_indptr=q_indptr, queries=self.queries, q_rows=self.q_rows)

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Of ``lens``, ``indptr``, ``pages``, how many of these there are, and of ``q_indptr``: as in DecodeParams."""
        indptr, q_indptr = (table.address if table else 0 for table in (self.indptr, self.q_indptr))
        pages = self.pages.shape[0] if self.indptr else (self.batch - 1) * self.pages.stride + self.pages.shape[1]
        return self.lens.address, indptr, self.pages.address, max(0, min(pages, 2**31 - 1)), q_indptr

    def check_pages(self, num_pages: int) -> None:
        """ValueError if the host knows of a page that a cache of ``num_pages`` does not have."""
        if self.page_range is None or 0 <= self.page_range[0] <= self.page_range[1] < num_pages:
            return
        if self.pages.values is not None:
            check_pages(self.pages_of_requests(), num_pages, self.names[-2])
        raise ValueError(
            f"{self.names[-2]}: expected pages from 0 to num_pages - 1 = {num_pages - 1}, got pages from "
            f"{self.page_range[0]} to {self.page_range[1]}"
        )

    def pages_of_requests(self) -> list[np.ndarray]:
        """The pages of each request; for tables on the host."""
        pages = self.pages.values
        assert pages is not None and self.lens.values is not None
        if self.indptr is None:
            return block_pages(pages, self.lens.values, self.page_size)
        assert self.indptr.values is not None
        return csr_pages(self.indptr.values, pages)

    def queries_of_requests(self) -> np.ndarray:
        """How many rows of q each request has; for tables on the host."""
        if self.q_indptr is None:
            return np.ones(self.batch, np.int64)
        assert self.q_indptr.values is not None
        return np.diff(self.q_indptr.values)

    def kv_lens(self) -> np.ndarray:
        """The rows of each request; for tables on the host."""
        lens = self.lens.values
        assert lens is not None
        if self.indptr is None:
            return lens
        assert self.indptr.values is not None
        counts = np.diff(self.indptr.values)
        return np.where(counts > 0, (counts - 1) * self.page_size + lens, 0)


def read_page_tables(
    page_size: int,
    indptr: Any,
    indices: Any,
    last_page_len: Any,
    block_tables: Any = None,
    kv_lens: Any = None,
) -> PageTables:
    """The page tables of a call's arguments, in either form. TypeError or ValueError for what is wrong."""
    csr = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
    blocks = {"block_tables": block_tables, "kv_lens": kv_lens}
    given = [name for name, value in (csr | blocks).items() if value is not None]
    if given not in (list(csr), list(blocks)):
        raise TypeError(
            f"page table: expected indptr, indices and last_page_len, or block_tables and kv_lens, got "
            f"{', '.join(given) or 'nothing'}"
        )
    if given == list(csr):
        bounds, pages, last = (read_table(value, name, 1) for name, value in csr.items())
        return _checked(CSR_NAMES, page_size, bounds, pages, last)
    pages, lens = read_table(block_tables, "block_tables", 2), read_table(kv_lens, "kv_lens", 1)
    return _checked(BLOCK_NAMES, page_size, None, pages, lens)


def _copied(table: Table) -> Table:
    if table.values is None:
        return table
    copy = table.values.copy()
    return table._replace(values=copy, owner=copy)


def _checked(names: tuple[str, ...], page_size: int, indptr: Table | None, pages: Table, lens: Table) -> PageTables:
    batch = lens.shape[0]
    used = None
    if indptr is not None:
        check_csr(indptr, pages, lens, batch, page_size, names)
        longest = -(-pages.shape[0] // max(batch, 1))
        if indptr.values is not None:
            longest = int(np.diff(indptr.values).max(initial=0))
            if pages.values is not None:
                used = pages.values[indptr.values[0] : indptr.values[-1]]
    else:
        check_blocks(pages, lens, batch, page_size, names)
        longest = pages.shape[1]
        if lens.values is not None:
            longest = -(-int(lens.values.max(initial=0)) // page_size)
            if pages.values is not None:
                used = pages.values[np.arange(pages.shape[1]) * page_size < lens.values[:, None]]
    page_range = (int(used.min()), int(used.max())) if used is not None and len(used) else None
    return PageTables(names, page_size, batch, indptr, pages, lens, longest, page_range)
