"""Decode attention where requests share parts of their context: each part is read once for all who share it.

The queries of the requests that share a part become query heads of one request (columns of the same tiles), and what
they give is merged with attention over the other parts. (Ye et al., *Cascade Inference*, 2024.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import arrays
from .arrays import HOST, Library
from .jit.device import refuse_capture
from .layouts import check_kv_layout
from .merging import merge_state
from .paged import batch_decode_with_paged_kv_cache
from .pages import check_csr, download_table, read_table
from .positions import check_pos_encoding_mode
from .problem import MAX_GROUP_SIZE, check_heads


class _Sizes(NamedTuple):
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int


class _Level:
    """Which queries share which pages: a batch of folded requests, each of equally many queries of one segment.

    ``rows[requests, queries]`` are rows of q (repeated where a segment has fewer), ``back[n]`` is where the result of
    each row of q is among them. Both are None where every segment has one query.
    """

    def __init__(self, qo_indptr: np.ndarray, tables: tuple[np.ndarray, np.ndarray, np.ndarray], group_size: int):
        counts, (indptr, indices, last) = np.diff(qo_indptr), tables
        self.rows = self.back = None
        owners = np.arange(len(counts))
        if (counts != 1).any():
            most = max(1, MAX_GROUP_SIZE // group_size)
            parts = np.maximum(1, -(-counts // most))
            size = int((-(-counts // parts)).max(initial=1))
            owners = np.repeat(np.arange(len(counts)), -(-counts // size))
            starts = np.concatenate([np.arange(a, b, size) for a, b in itertools.pairwise(qo_indptr)])
            ends = qo_indptr[1:][owners]
            self.rows = np.minimum(starts[:, None] + np.arange(size), ends[:, None] - 1)
            self.back = np.empty(qo_indptr[-1], np.int64)
            for request, start in enumerate(starts):
                count = min(size, ends[request] - start)
                self.back[start : start + count] = request * size + np.arange(count)
        pages = np.diff(indptr)
        self.indptr = np.concatenate([[0], np.cumsum(pages[owners])]).astype(np.int32)
        self.indices = np.concatenate([indices[indptr[i] : indptr[i + 1]] for i in owners] or [indices[:0]])
        self.last = last[owners]
        self._placed: dict[tuple[Library, int], list[Any]] = {}

    def attend(self, q: Any, sizes: _Sizes, cache: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """(v, s) of each row of q over the pages of its segment."""
        library = arrays.library_of(q, "q")
        assert library is not None  # adopt() leaves no other
        rows, back, *tables = self._on(library, library.facts(arrays.read(library, q, "q")[1]).device)
        heads, group, head_dim = sizes.num_kv_heads, sizes.num_qo_heads // sizes.num_kv_heads, sizes.head_dim
        if rows is not None:
            requests, size = self.rows.shape  # type: ignore[union-attr]
            q = _permuted(q[rows].reshape(requests, size, heads, group, head_dim), 0, 2, 1, 3, 4)
            q = q.reshape(requests, heads * size * group, head_dim)
        out, lse = batch_decode_with_paged_kv_cache(q, *cache, *tables, return_lse=True, **options)
        if rows is None:
            return out, lse
        out = _permuted(out.reshape(requests, heads, size, group, head_dim), 0, 2, 1, 3, 4)
        lse = _permuted(lse.reshape(requests, heads, size, group), 0, 2, 1, 3)
        return (
            out.reshape(requests * size, heads * group, head_dim)[back],
            lse.reshape(requests * size, heads * group)[back],
        )

    def _on(self, library: Library, device: int) -> list[Any]:
        """Rows, places and page tables where q is."""
        placed = self._placed.get((library, device))
        if placed is None:
            if device != HOST:
                refuse_capture(library.stream(device), "plan")
            values = (self.rows, self.back, self.indptr, self.indices, self.last)
            placed = [None if value is None else library.from_numpy(value, device) for value in values]
            self._placed[library, device] = placed
        return placed


def _permuted(x: Any, *axes: int) -> Any:
    return x.permute(axes) if hasattr(x, "permute") else x.transpose(axes)


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
            values = (indptr.values.astype(np.int64), indices.values, last.values)
            levels.append(_Level(rows, values, num_qo_heads // num_kv_heads))
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
        _check_query(q, int(levels[-1].indptr.shape[0]) - 1, sizes)
        cache = tuple(paged_kv_cache) if isinstance(paged_kv_cache, (tuple, list)) else (paged_kv_cache, None)
        v, s = levels[-1].attend(q, sizes, cache, options)
        for level in levels[:-1]:
            v, s = merge_state(v, s, *level.attend(q, sizes, cache, options), backend=self._backend)
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
                tables = np.array([0, 1]), np.zeros(1, np.int32), np.array([shared_len], np.int32)
                prefix = _Level(np.array([0, batch]), tables, sizes.num_qo_heads // sizes.num_kv_heads)
                self._prefix[batch, shared_len] = prefix
            shared = prefix.attend(q, sizes, (k_shared[None], v_shared[None]), options)
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
