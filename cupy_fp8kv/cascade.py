"""Decode attention where requests share parts of their context: each part is read once for all who share it.

The queries of the requests that share a part become columns of the same tiles, and what they give is merged with
attention over the other parts. (Ye et al., *Cascade Inference*, 2024.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import arrays
from .layouts import check_kv_layout
from .merging import merge_state
from .page_tables import PageTables, read_page_tables
from .paged import batch_decode_with_paged_kv_cache
from .paged_dispatch import PagedOptions, decode_paged
from .pages import adopt_cache, check_csr, csr_pages, download_table, read_table
from .plan import MAX_COLUMNS, takes_many_queries
from .positions import check_pos_encoding_mode
from .problem import check_heads


class _Sizes(NamedTuple):
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int


class _Level:
    """Which rows of q share which pages.

    The rows of q of a segment are taken as many at a time as a tile has columns for, by requests with the same pages:
    so equal shares divide long segments of many rows and short ones alike.
    """

    def __init__(self, qo_indptr: np.ndarray, tables: PageTables, group_size: int, most_columns: int = MAX_COLUMNS):
        self.rows = int(qo_indptr[-1])
        self._given = qo_indptr, tables, group_size
        self._alone: _Level | None = None
        counts = np.diff(qo_indptr)
        most = max(1, most_columns // group_size)
        size = int(max((-(-count // -(-count // most)) for count in counts.tolist() if count), default=1))
        parts = -(-counts // size)
        if (parts == 1).all():
            self._tables = tables
        else:
            assert tables.indptr and tables.indptr.values is not None and tables.pages.values is not None
            assert tables.lens.values is not None
            owners = np.repeat(np.arange(len(counts)), parts)
            pages = csr_pages(tables.indptr.values, tables.pages.values)
            indptr = np.cumsum([0, *(len(pages[owner]) for owner in owners)])
            indices = np.concatenate([np.zeros(0, np.int32), *(pages[owner] for owner in owners)])
            self._tables = read_page_tables(tables.page_size, indptr, indices, tables.lens.values[owners])
        if size > 1:
            starts = [np.arange(a, b, size) for a, b in itertools.pairwise(qo_indptr.tolist())]
            self._tables = self._tables.with_queries(np.concatenate([*starts, qo_indptr[-1:]]))

    def attend(self, q: Any, cache: Any, options: dict[str, Any], names: tuple[str, str]) -> tuple[Any, Any]:
        """(v, s) of each row of q over the pages of its segment."""
        cache = adopt_cache(cache, names[0])
        arrays_of = cache if isinstance(cache, tuple) else (cache,)
        takes_many = takes_many_queries(arrays_of[0].shape[-1], (array.itemsize for array in arrays_of))
        if self._tables.queries > 1 and not takes_many:
            self._alone = self._alone or _Level(*self._given, most_columns=1)
            return self._alone.attend(q, cache, options, names)
        result: tuple[Any, Any] = decode_paged(
            q, cache, self._tables, PagedOptions(**options, return_lse=True, names=names)
        )
        return result


class MultiLevelCascadeAttentionWrapper:
    """Attention over contexts that form a tree: a beginning of all, beginnings of some, what each request has alone.

    Parameters
    ----------
    num_levels : how many parts a context has.
    float_workspace_buffer : accepted for FlashInfer's sake; memory is allocated when it is needed.
    kv_layout : ``"NHD"`` or ``"HND"``.
    backend : as in :func:`batch_decode_with_paged_kv_cache`.

    One query token a request: at the last level every request has a segment of its own.
    """

    def __init__(
        self, num_levels: int, float_workspace_buffer: Any = None, kv_layout: str = "NHD", *, backend: str | None = None
    ):
        if isinstance(num_levels, bool) or not isinstance(num_levels, int) or num_levels < 1:
            raise ValueError(f"num_levels: expected a positive integer, got {num_levels!r}")
        self._num_levels = num_levels
        self._kv_layout = check_kv_layout(kv_layout)
        self._backend = backend
        self._plan: tuple[list[_Level], _Sizes, dict[str, Any]] | None = None

    def plan(
        self,
        qo_indptr_arr: Sequence[Any],
        paged_kv_indptr_arr: Sequence[Any],
        paged_kv_indices_arr: Sequence[Any],
        paged_kv_last_page_len: Sequence[Any],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """Note who shares what. Reads all tables, and waits for those on a device.

        Parameters
        ----------
        qo_indptr_arr : for each level int32 ``[segments + 1]``: the requests of rows ``[qo_indptr[j], qo_indptr[j+1])``
            of q share segment j. At the last level that is one request each.
        paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len : for each level the pages of its segments.
        causal : accepted for FlashInfer's sake; a single query token sees all of its context.
        """
        check_pos_encoding_mode(pos_encoding_mode)
        check_heads(num_qo_heads, num_kv_heads, head_dim)
        given = {
            "qo_indptr_arr": qo_indptr_arr, "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr, "paged_kv_last_page_len": paged_kv_last_page_len,
        }  # fmt: skip
        for name, tables in given.items():
            if not isinstance(tables, (list, tuple)) or len(tables) != self._num_levels:
                raise ValueError(f"{name}: expected a list of {self._num_levels} tables, one a level, got {tables!r}")
        levels, batch = [], None
        for level in range(self._num_levels):
            names = [f"{name}[{level}]" for name in given]
            qo, indptr, indices, last = (
                download_table(read_table(tables[level], name, 1), name)
                for tables, name in zip(given.values(), names, strict=True)
            )
            check_csr(indptr, indices, last, last.shape[0], page_size, (names[1], names[2], names[3]))
            rows = _checked_rows(qo.values, last.shape[0], names[0], batch)
            batch = int(rows[-1])
            if level == self._num_levels - 1 and (np.diff(rows) != 1).any():
                raise NotImplementedError(
                    f"{names[0]}: expected one query token for each request, got {np.diff(rows).tolist()}"
                )
            assert indptr.values is not None and indices.values is not None and last.values is not None
            # Copies: a caller may use these arrays for the next step before this one runs.
            pages = read_page_tables(page_size, indptr.values, indices.values, last.values).snapshot()
            levels.append(_Level(rows, pages, num_qo_heads // num_kv_heads))
        options = {"logits_soft_cap": logits_soft_cap, "sm_scale": sm_scale}
        self._plan = levels, _Sizes(num_qo_heads, num_kv_heads, head_dim, page_size), options

    begin_forward = plan

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        *,
        kv_format: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of ``q [batch, num_qo_heads, head_dim]``; the pages of all levels are in one cache.

        Returns
        -------
        out : like q; with ``return_lse`` also the log-sum-exp, base 2.
        """
        if self._plan is None:
            raise RuntimeError("run: expected a plan, got none; call plan first")
        levels, sizes, options = self._plan
        options = options | {
            "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "kv_format": kv_format,
            "kv_layout": self._kv_layout, "backend": self._backend,
        }  # fmt: skip
        q = arrays.adopt(q, "q")
        _check_query(q, levels[-1].rows, sizes)
        cache = tuple(paged_kv_cache) if isinstance(paged_kv_cache, (tuple, list)) else paged_kv_cache
        names = ("paged_kv_cache", "paged_kv_cache")
        v, s = levels[-1].attend(q, cache, options, names)
        for level in levels[:-1]:
            v, s = merge_state(v, s, *level.attend(q, cache, options, names), backend=self._backend)
        return (v, s) if return_lse else v

    forward = run

    def end_forward(self) -> None:
        """Forget the plan."""
        self._plan = None

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Accepted for FlashInfer's sake."""


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decode attention of requests that begin alike: one prefix as plain arrays, what each has alone in pages.

    Parameters are those of :class:`MultiLevelCascadeAttentionWrapper`.
    """

    def __init__(self, float_workspace_buffer: Any = None, kv_layout: str = "NHD", *, backend: str | None = None):
        self._kv_layout = check_kv_layout(kv_layout)
        self._backend = backend
        self._planned = False

    def plan(
        self,
        unique_kv_indptr: Any,
        unique_kv_indices: Any,
        unique_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: Any = "float16",
    ) -> None:
        """Note the pages of what each request has alone. Tables on a device stay there and are not waited for.

        ``data_type`` is accepted for FlashInfer's sake: the arrays say it, or ``kv_format`` of :meth:`run`.
        """
        check_heads(num_qo_heads, num_kv_heads, head_dim)
        self._tables = (unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len)
        self._sizes = _Sizes(num_qo_heads, num_kv_heads, head_dim, page_size)
        self._prefix: dict[tuple[int, int], _Level] = {}
        self._planned = True

    begin_forward = plan

    def run(
        self,
        q: Any,
        k_shared: Any,
        v_shared: Any,
        unique_kv_cache: Any,
        allow_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        logits_soft_cap: float | None = None,
        kv_format: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of ``q [batch, num_qo_heads, head_dim]`` over the prefix and what each request has alone.

        Parameters
        ----------
        k_shared, v_shared : ``[shared_len, num_kv_heads, head_dim]`` (``"HND"``: heads before rows).
        unique_kv_cache : the cache that the planned pages are in.
        allow_fp16_qk_reduction : accepted for FlashInfer's sake; sums are fp32. ``rope_scale`` and ``rope_theta``
            belong to modes that do not exist yet.
        """
        if not self._planned:
            raise RuntimeError("run: expected a plan, got none; call plan (begin_forward) first")
        options = {
            "sm_scale": sm_scale, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "kv_format": kv_format,
            "logits_soft_cap": logits_soft_cap, "kv_layout": self._kv_layout, "backend": self._backend,
        }  # fmt: skip
        q, sizes = arrays.adopt(q, "q"), self._sizes
        _check_query(q, None, sizes)
        k_shared, v_shared = arrays.adopt(k_shared, "k_shared"), arrays.adopt(v_shared, "v_shared")
        for name, rows in (("k_shared", k_shared), ("v_shared", v_shared)):
            if len(getattr(rows, "shape", ())) != 3:
                raise ValueError(f"{name}: expected 3 axes, a sequence of rows, got shape {list(rows.shape)}")
        shared_len = k_shared.shape[0 if self._kv_layout == "NHD" else 1]
        pair = isinstance(unique_kv_cache, (tuple, list))
        k_unique, v_unique = unique_kv_cache if pair else (unique_kv_cache, None)
        indptr, indices, last = self._tables
        v, s = batch_decode_with_paged_kv_cache(
            q, k_unique, v_unique, indptr, indices, last, return_lse=True, **options
        )
        batch = q.shape[0]
        if shared_len and batch:
            # The prefix is a cache of one page.
            prefix = self._prefix.get((batch, shared_len))
            if prefix is None:
                pages = read_page_tables(shared_len, [0, 1], [0], [shared_len])
                prefix = _Level(np.array([0, batch]), pages, sizes.num_qo_heads // sizes.num_kv_heads)
                self._prefix[batch, shared_len] = prefix
            shared = prefix.attend(q, (k_shared[None], v_shared[None]), options, ("k_shared", "v_shared"))
            v, s = merge_state(v, s, *shared, backend=self._backend)
        return (v, s) if return_lse else v

    forward = run

    def end_forward(self) -> None:
        """Forget the plan."""
        self._planned = False

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Accepted for FlashInfer's sake."""


def _checked_rows(qo_indptr: np.ndarray | None, segments: int, name: str, batch: int | None) -> np.ndarray:
    assert qo_indptr is not None
    if qo_indptr.shape != (segments + 1,):
        raise ValueError(f"{name}: expected shape [segments + 1] = [{segments + 1}], got {list(qo_indptr.shape)}")
    rows = qo_indptr.astype(np.int64)
    if rows[0] != 0 or (np.diff(rows) < 0).any() or (batch is not None and rows[-1] != batch):
        end = "the number of rows of q" if batch is None else f"{batch} as in the levels before"
        raise ValueError(f"{name}: expected numbers from 0 to {end} that do not decrease, got {rows.tolist()}")
    return rows


def _check_query(q: Any, batch: int | None, sizes: _Sizes) -> None:
    shape = tuple(getattr(q, "shape", ()))
    expected = (shape[0] if batch is None and shape else batch, sizes.num_qo_heads, sizes.head_dim)
    if shape != expected:
        first = "batch" if batch is None else batch
        raise ValueError(f"q: expected shape [{first}, {expected[1]}, {expected[2]}] as planned, got {list(shape)}")
