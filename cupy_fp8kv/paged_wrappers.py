"""FlashInfer's wrappers for decode over paged caches: planned once, run for every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from . import scales
from .backends import cuda
from .dispatch import check_options
from .graph_buffers import fill_buffers, in_buffers, read_buffers
from .layouts import check_kv_layout
from .options import as_key
from .page_tables import PageTables, read_page_tables
from .paged_dispatch import PagedOptions, decode_paged
from .paged_problem import Planned
from .pages import Table
from .workspaces import Workspace, most_workspace, planned_call, read_workspace


@dataclass(frozen=True)
class _Plan:
    tables: PageTables
    planned: Planned
    pos_encoding_mode: str
    window_left: int
    logits_soft_cap: float | None
    sm_scale: float | None


class BatchDecodeWithPagedKVCacheWrapper:
    """Decode attention over paged caches, for many layers with one page table.

    Parameters
    ----------
    float_workspace_buffer : device memory for partial results, of any type; :func:`workspace_size` tells how much is
        needed, and ``plan`` checks it. None: memory is allocated when it is needed.
    kv_layout : ``"NHD"`` or ``"HND"``.
    use_cuda_graph : the page table lies in the three buffers, at addresses that a captured graph keeps; ``plan`` writes
        there, and a replay reads what is there.
    use_tensor_cores : accepted for FlashInfer's sake; the kernel always uses tensor cores.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer : int32 arrays on the device for
        ``use_cuda_graph``: ``[batch + 1]``, ``[most pages of all requests]``, ``[batch]``. The batch size is theirs.
    backend : ``"cuda"`` or ``"numpy"`` to force one, as in :func:`batch_decode_with_padded_kv_cache`.
    validate : check page tables on a device too, in every ``run``, which then waits for it.

    ``plan`` comes before ``run``. It reads page tables only where they are on the host, and never waits for the device;
    how long requests are decides nothing but speed. Page tables on the host are uploaded once, on the current stream:
    that of ``plan`` with a ``float_workspace_buffer``, else that of the first ``run``. What runs on another stream has
    to be ordered after it.
    """

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
        *,
        backend: str | None = None,
        validate: bool = False,
    ):
        self._kv_layout = check_kv_layout(kv_layout)
        self._backend = backend
        self._validate = validate
        self._use_tensor_cores = bool(use_tensor_cores)
        self._workspace = read_workspace(float_workspace_buffer)
        self._plan: _Plan | None = None
        self._buffers: tuple[Table, ...] | None = None
        given = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        if use_cuda_graph:
            self._buffers = read_buffers(given)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._buffers is not None

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another workspace from now on; ``int_workspace_buffer`` is accepted for FlashInfer's sake."""
        space = read_workspace(float_workspace_buffer)
        if self._plan is not None:
            self._check_workspace(space, self._plan)
        self._workspace = space

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        data_type: Any = "float16",
        q_data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        block_tables: Any = None,
        kv_lens: Any = None,
    ) -> None:
        """Say which pages the requests of the coming calls have, and what the calls look like.

        Parameters
        ----------
        indptr, indices, last_page_len, block_tables, kv_lens : as in :func:`batch_decode_with_paged_kv_cache`, on the
            host or the device; the first three are None where the last two are given. Arrays on the host are checked,
            and copied. Arrays on the device are read by every run, as they are then; with ``use_cuda_graph`` they are
            copied into the buffers now.
        page_size : rows of a page.
        data_type : type of the cache, or a pair (K, V): a dtype of torch, NumPy or ml_dtypes, or a name; for codes in
            uint8 it says what they mean.
        q_data_type : type of q. None: ``data_type``, if that is one for q, otherwise either.

        Everything else is as in :func:`batch_decode_with_padded_kv_cache`.

        Raises
        ------
        ValueError, TypeError
            What is wrong with these, with page tables on the host, or a workspace that is too small.
        """
        planned = planned_call(num_qo_heads, num_kv_heads, head_dim, page_size, data_type, q_data_type)
        window_left, cap, _ = as_key(window_left, logits_soft_cap, None)
        check_options(pos_encoding_mode, cap, self._backend)
        if sm_scale is not None:
            sm_scale = scales.number(sm_scale, "sm_scale")
        tables = read_page_tables(planned.page_size, indptr, indices, last_page_len, block_tables, kv_lens)
        made = _Plan(tables, planned, pos_encoding_mode, window_left, cap, sm_scale)
        if self._buffers is not None:
            made = replace(made, tables=in_buffers(tables, self._buffers))
            self._check_workspace(self._workspace, made)
            fill_buffers(tables, self._buffers)
        else:
            made = replace(made, tables=tables.snapshot())
            self._check_workspace(self._workspace, made)
            if self._workspace is not None and self._backend != "numpy":
                made.tables.placed(self._workspace.library, self._workspace.device)
        self._plan = made

    begin_forward = plan

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        return_lse: bool = False,
        *,
        out: Any = None,
        lse_base: str = "2",
    ) -> Any:
        """Attention of q over the planned pages of a cache.

        Parameters
        ----------
        q : ``[batch, num_qo_heads, head_dim]``, as planned.
        paged_kv_cache : one array ``[num_pages, 2, page_size, num_kv_heads, head_dim]`` (``"HND"``: heads before rows),
            or a pair of arrays without the second axis, as planned.

        Everything else is as in :func:`batch_decode_with_padded_kv_cache`.

        Returns
        -------
        out : ``[batch, num_qo_heads, head_dim]``, q's dtype, library and device; with ``return_lse`` a pair with lse.

        Raises
        ------
        RuntimeError
            Without a plan; and as :func:`batch_decode_with_paged_kv_cache`.
        ValueError, TypeError
            Arrays of other sizes or types than planned, pages that the cache does not have, a workspace too small.
        """
        made = self._planned()
        return self._call(made, q, paged_kv_cache, q_scale, k_scale, v_scale, return_lse, out, lse_base)

    def run_return_lse(
        self,
        q: Any,
        paged_kv_cache: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        *,
        out: Any = None,
        lse_base: str = "2",
    ) -> tuple[Any, Any]:
        """:meth:`run` that returns ``(out, lse)``."""
        return self.run(q, paged_kv_cache, q_scale, k_scale, v_scale, True, out=out, lse_base=lse_base)

    def forward(
        self,
        q: Any,
        paged_kv_cache: Any,
        pos_encoding_mode: str = "NONE",
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """:meth:`run` with options of its own in place of the plan's, as in FlashInfer."""
        made = replace(
            self._planned(), pos_encoding_mode=pos_encoding_mode, window_left=window_left,
            logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
        )  # fmt: skip
        return self._call(made, q, paged_kv_cache, q_scale, k_scale, v_scale, return_lse, None, "2")

    def forward_return_lse(
        self,
        q: Any,
        paged_kv_cache: Any,
        pos_encoding_mode: str = "NONE",
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Any, Any]:
        """:meth:`forward` that returns ``(out, lse)``."""
        return self.forward(
            q, paged_kv_cache, pos_encoding_mode, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale,
            rope_scale, rope_theta, return_lse=True,
        )  # fmt: skip

    def end_forward(self) -> None:
        """Nothing: a plan holds until the next one. For programs that call it."""

    def _planned(self) -> _Plan:
        if self._plan is None:
            raise RuntimeError(f"{type(self).__name__}: call plan() before run()")
        return self._plan

    def _call(
        self,
        made: _Plan,
        q: Any,
        cache: Any,
        q_scale: Any,
        k_scale: Any,
        v_scale: Any,
        return_lse: bool,
        out: Any,
        lse_base: str,
    ) -> Any:
        planned = made.planned
        options = PagedOptions(
            self._kv_layout, made.pos_encoding_mode, q_scale, k_scale, v_scale, made.logits_soft_cap, made.sm_scale,
            made.window_left, (planned.k_format, planned.v_format), return_lse, lse_base, out, self._backend,
            self._validate, planned=planned,
        )  # fmt: skip
        return decode_paged(q, cache, made.tables, options, self._workspace)

    def _check_workspace(self, space: Workspace | None, made: _Plan) -> None:
        if space is not None and self._backend != "numpy":
            tables, cap = made.tables, bool(made.logits_soft_cap)
            problem = made.planned.problem(tables.batch, tables.kind, made.window_left, cap)
            needed = most_workspace(problem, cuda.device_info(space.device))
            space.check(needed, problem, space.library, space.device)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """:class:`BatchDecodeWithPagedKVCacheWrapper` with ``use_cuda_graph``, whose arguments have other names.

    Make one ``run`` of the kind before capturing one: the first compiles. Then ``plan`` and replay.
    """

    def __init__(
        self,
        workspace_buffer: Any,
        indptr_buffer: Any,
        indices_buffer: Any,
        last_page_len_buffer: Any,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
        *,
        backend: str | None = None,
        validate: bool = False,
    ):
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer,
            backend=backend, validate=validate,
        )  # fmt: skip
