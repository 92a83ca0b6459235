"""Where the tokens of an append go: requests, rows and pages, checked as far as the host knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .arrays import HOST, Library, device_name
from .backends import reference_cache as reference
from .pages import Table, check_csr, check_pages, csr_pages, download_table, place_table, read_table
from .stored_cache import StoredCache

PAGED_NAMES = ("kv_indptr", "kv_indices", "kv_last_page_len")


class Tokens(NamedTuple):
    """Which tokens are whose: ranges, or a request and a row for each; neither: equally many for every request."""

    indptr: Any = None
    batch_indices: Any = None
    positions: Any = None


class Paged(NamedTuple):
    indptr: Any
    indices: Any
    last_page_len: Any


class Padded(NamedTuple):
    kv_lens: Any


def table_of(value: Any, argument: str, cache: StoredCache, download: bool) -> Table:
    """An array of integers for an operation on a cache: on the host (``download``: in any case), or where the cache is.

    TypeError or ValueError for one on another device, or of another library there.
    """
    table = read_table(value, argument, 1)
    if download:
        return download_table(table, argument)
    if table.device != HOST and table.library is not cache.library:
        ours, theirs = cache.library.name, table.library.name
        raise TypeError(f"{argument}: expected an array of {ours} like the cache, got one of {theirs}")
    if table.device not in (HOST, cache.device):
        ours, theirs = device_name(cache.device), device_name(table.device)
        raise ValueError(f"{argument}: expected device {ours} like the cache, got {theirs}")
    return table


def paged_tables(
    table: Paged, cache: StoredCache, download: bool
) -> tuple[tuple[Table, Table, Table], np.ndarray | None, list[np.ndarray] | None]:
    """The tables of pages; the lengths and the pages of the requests, if the host knows them."""
    sizes = cache.sizes
    indptr, indices, last = (
        table_of(value, name, cache, download) for value, name in zip(table, PAGED_NAMES, strict=True)
    )
    lens = check_csr(indptr, indices, last, last.shape[0], sizes.page_size, PAGED_NAMES)
    pages = None
    if indptr.values is not None and indices.values is not None:
        pages = csr_pages(indptr.values, indices.values)
        check_pages(pages, sizes.num_pages, "kv_indices")
    return (indptr, indices, last), lens, pages


@dataclass(frozen=True)
class AppendTables:
    """Tables in the order of AppendParams, None where there is none; ``tokens_each`` is 0 unless requests get equally
    many tokens. ``lens`` and ``pages``: of the requests, after appending, if the host knows them."""

    append_indptr: Table | None
    batch_indices: Table | None
    positions: Table | None
    kv_indptr: Table | None
    kv_indices: Table | None
    kv_lens: Table
    batch: int
    num_tokens: int
    tokens_each: int
    lens: np.ndarray | None
    pages: list[np.ndarray] | None

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        table: Paged | Padded,
        num_tokens: int,
        tokens_each: int,
        cache: StoredCache,
        download: bool,
    ) -> AppendTables:
        """``download``: everything is wanted on the host, wherever it is."""

        def read(value: Any, name: str) -> Table | None:
            return None if value is None else table_of(value, name, cache, download)

        indptr = indices = None
        if isinstance(table, Paged):
            (indptr, indices, last), lens, pages = paged_tables(table, cache, download)
            batch = last.shape[0]
        else:
            batch = cache.sizes.num_pages
            last = table_of(table.kv_lens, "kv_lens", cache, download)
            lens = _check_padded(last, batch, cache.sizes.page_size)
            pages = [np.array([b]) for b in range(batch)]
        found = cls(
            read(tokens.indptr, "append_indptr"), read(tokens.batch_indices, "batch_indices"),
            read(tokens.positions, "positions"), indptr, indices, last, batch, num_tokens, tokens_each, lens, pages,
        )  # fmt: skip
        found._check()
        return found

    @property
    def num_indices(self) -> int:
        return self.kv_indices.shape[0] if self.kv_indices else 0

    def placed(self, library: Library, device: int) -> list[Table | None]:
        """The tables on ``device``; to be held until the launch."""
        names = ("append_indptr", "batch_indices", "positions", "kv_indptr", "kv_indices", "kv_lens")
        tables = [getattr(self, name) for name in names]
        if isinstance(self.kv_indptr, Table):
            names = (*names[:-1], "kv_last_page_len")
        return [
            place_table(table, name, library, device) if table else None
            for table, name in zip(tables, names, strict=True)
        ]

    def assigned(self) -> tuple[np.ndarray, np.ndarray]:
        """The request and the row of each token, on the host; everything was downloaded."""
        if self.batch_indices is not None and self.positions is not None:
            assert self.batch_indices.values is not None and self.positions.values is not None
            return self.batch_indices.values, self.positions.values
        indptr = np.arange(self.batch + 1) * self.tokens_each
        if self.append_indptr is not None:
            assert self.append_indptr.values is not None
            indptr = self.append_indptr.values
        assert self.lens is not None
        return reference.requests_and_positions(indptr, self.lens)

    def _check(self) -> None:
        if self.append_indptr is not None:
            self._check_indptr(self.append_indptr)
        elif self.batch_indices is not None and self.positions is not None:
            self._check_positions(self.batch_indices, self.positions)
        elif self.lens is not None and (self.lens < self.tokens_each).any():
            wrong = int(np.flatnonzero(self.lens < self.tokens_each)[0])
            raise ValueError(
                f"kv_lens: expected lengths that count the {self.tokens_each} appended tokens, got {self.lens[wrong]} "
                f"for request {wrong}"
            )

    def _check_indptr(self, table: Table) -> None:
        if table.shape != (self.batch + 1,):
            raise ValueError(f"append_indptr: expected shape [batch + 1] = [{self.batch + 1}], got {list(table.shape)}")
        if table.values is None:
            return
        counts = np.diff(table.values.astype(np.int64))
        if table.values[0] != 0 or table.values[-1] != self.num_tokens or (counts < 0).any():
            raise ValueError(
                f"append_indptr: expected numbers from 0 to nnz = {self.num_tokens} that do not decrease, got "
                f"{table.values.tolist() if len(table.values) <= 16 else table.values}"
            )
        if self.lens is not None and (counts > self.lens).any():
            wrong = int(np.flatnonzero(counts > self.lens)[0])
            raise ValueError(
                f"append_indptr: expected no more tokens than the tables hold after appending, got {counts[wrong]} for "
                f"request {wrong} of {self.lens[wrong]} rows"
            )

    def _check_positions(self, batch_indices: Table, positions: Table) -> None:
        for name, table in (("batch_indices", batch_indices), ("positions", positions)):
            if table.shape != (self.num_tokens,):
                raise ValueError(f"{name}: expected shape [nnz] = [{self.num_tokens}], got {list(table.shape)}")
        requests, rows = batch_indices.values, positions.values
        if requests is not None and self.num_tokens and (requests.min() < -1 or requests.max() >= self.batch):
            wrong = int(np.flatnonzero((requests < -1) | (requests >= self.batch))[0])
            raise ValueError(
                f"batch_indices: expected requests from 0 to {self.batch - 1}, or -1 to leave a token out, got "
                f"{requests[wrong]} for token {wrong}"
            )
        if requests is None or rows is None:
            return
        end = np.full(len(rows), 2**31) if self.lens is None else np.append(self.lens, 2**31)[requests]
        bad = (requests >= 0) & ((rows < 0) | (rows >= end))
        if bad.any():
            wrong = int(np.flatnonzero(bad)[0])
            known = "" if self.lens is None else f" below the {end[wrong]} rows of request {requests[wrong]}"
            raise ValueError(f"positions: expected rows >= 0{known}, got {rows[wrong]} for token {wrong}")


def _check_padded(kv_lens: Table, batch: int, max_len: int) -> np.ndarray | None:
    if kv_lens.shape != (batch,):
        raise ValueError(f"kv_lens: expected shape [batch] = [{batch}], got {list(kv_lens.shape)}")
    lens = kv_lens.values
    if lens is None:
        return None
    if batch and (lens.min() < 0 or lens.max() > max_len):
        wrong = int(np.flatnonzero((lens < 0) | (lens > max_len))[0])
        raise ValueError(f"kv_lens: expected lengths from 0 to {max_len}, got {lens[wrong]} for request {wrong}")
    return lens.astype(np.int64)
