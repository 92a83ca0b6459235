"""Problems to launches: what the public operations call when the data are on a CUDA device."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from ..arrays import Library
from ..jit import compiler
from ..jit.device import contexts, device_info, ensure_context, on_device, require_cupy
from ..jit.launch import Launch
from ..jit.params import ParamBlock, divisors
from ..jit.spec import MergeSpec, QuantizeSpec, ScheduleSpec
from ..jit.tensor_map import TensorMaps
from ..paged_problem import paging_fields
from ..plan import Plan, box_rows, least_turns, plan_decode
from ..problem import DecodeProblem
from ..schedule import TURNS_OF_A_REQUEST
from ..tuning.store import tuned_plan

#: Fields of DecodeParams that change from call to call.
_DECODE_LEADING = 23
#: Of them: the addresses of the workspace and the arrays, which most calls change; and the rest.
_DECODE_ARRAYS = 9
_DECODE_REST = _DECODE_LEADING - _DECODE_ARRAYS
#: Where lengths and window stand among the rest.
_KV_LENS_VALUE = 0
_WINDOW_VALUE = 11
#: CTAs of a merge where lengths decide what there is to merge.
_MERGES_PER_SM = 8
#: Fields of QuantizeParams likewise.
_QUANTIZE_LEADING = 4


def _new_tag() -> int:
    """A number that memory does not hold by chance, nor because another plan has left it there."""
    return 1 + int.from_bytes(os.urandom(4), "little") % (2**31 - 1)


class _Call:
    """An argument block of a decode with the launches that read it, for one thread at a time to write and to start."""

    __slots__ = ("block", "decode", "merge", "rest", "schedule", "tensor_maps", "write_arrays", "write_rest")

    def __init__(
        self,
        block: ParamBlock,
        tensor_maps: TensorMaps | None,
        decode: Callable[[ParamBlock], Launch],
        schedule: Callable[[ParamBlock], Launch] | None,
        merge: Callable[[ParamBlock], Launch] | None,
    ):
        self.block = block
        self.write_arrays = block.writer(0, _DECODE_ARRAYS)
        self.write_rest = block.writer(_DECODE_ARRAYS, _DECODE_REST)
        #: What the block holds. The same object has the same values, for a tuple of numbers never changes.
        self.rest: tuple[int | float, ...] | None = None
        self.tensor_maps = tensor_maps
        self.decode = decode(block)
        self.schedule = schedule(block) if schedule else None
        self.merge = merge(block) if merge else None

    def start(self, stream: int, makes_list: bool) -> None:
        if makes_list and self.schedule is not None:
            self.schedule.start(stream)
        self.decode.start(stream)
        if self.merge is not None:
            self.merge.start(stream)


class PreparedDecode:
    """A decode problem planned, compiled and packed for one device: a call only fills in addresses and numbers.

    The plan is the one given, or the one that ``tune`` found, or the planner's.
    """

    def __init__(self, problem: DecodeProblem, device: int, out_strides: tuple[int, int], plan: Plan | None = None):
        self.problem = problem
        self.device = device
        self.info = info = device_info(device)
        self.plan: Plan = plan or tuned_plan(problem, info) or plan_decode(problem, info)
        plan = self.plan
        self._grid = plan.grid
        self._list_bytes, self._out_bytes = plan.workspace_list, plan.workspace_out  # in this order in a workspace
        self._partial_bytes = plan.workspace_out + plan.workspace_state
        self._runtime = require_cupy().cuda.runtime
        self._current_device = self._runtime.getDevice
        rows = box_rows(problem, plan.spec)
        self._new_block = partial(
            ParamBlock, "DecodeParams", _DECODE_LEADING,
            q_stride_request=problem.q_strides[0], q_stride_head=problem.q_strides[1],
            k_stride_request=problem.k_strides[0], k_stride_row=problem.k_strides[1],
            k_stride_head=problem.k_strides[2],
            v_stride_request=problem.v_strides[0], v_stride_row=problem.v_strides[1],
            v_stride_head=problem.v_strides[2],
            out_stride_request=out_strides[0], out_stride_head=out_strides[1],
            kv_len=problem.max_rows, columns=problem.columns, head_dim=problem.head_dim,
            num_kv_heads=problem.num_kv_heads, stages=plan.spec.stages, tag=_new_tag() if plan.merges_inside else 0,
            batch=problem.batch, most_split=plan.bounds.split_requests if plan.bounds else 0,
            least_turns=least_turns(plan.spec), box_shift=rows.bit_length() - 1,
            request_boxes=round(TURNS_OF_A_REQUEST * plan.spec.turn_rows / rows),
            **divisors(
                group_size=problem.group_size, head_teams=problem.num_kv_heads // plan.spec.heads,
                column_blocks=plan.column_blocks, splits=plan.splits, shares=max(1, plan.shares),
                least_boxes=least_turns(plan.spec) * plan.spec.turn_rows // rows,
                list_parts=plan.bounds.parts if plan.bounds else 1, turn_rows=plan.spec.turn_rows,
                page_size=problem.paging.page_size if problem.paging else 1,
            ),
            **paging_fields(problem),
        )  # fmt: skip
        merged = plan.most_merges(problem.batch)
        schedule = ScheduleSpec.of_batch(problem.batch) if plan.bounds else None
        merge = MergeSpec.behind(plan.spec) if merged else None
        compiler.load_all([spec for spec in (plan.spec, schedule, merge) if spec], device)  # at the same time
        self._new_decode = partial(Launch, compiler.load(plan.spec, device), plan.grid, dependent=plan.early)
        self._new_schedule = self._new_merge = None
        if schedule:
            self._new_schedule = partial(Launch, compiler.load(schedule, device), 1, dependent=True)
        if merge:
            columns = merged * problem.num_kv_heads * problem.columns
            # Rarely as many requests are split as may be: CTAs that find nothing to merge are a loss.
            merge_grid = min(columns, _MERGES_PER_SM * self.info.sm_count) if plan.by_lengths else columns
            self._new_merge = partial(Launch, compiler.load(merge, device), merge_grid, dependent=True)
        #: Held while kernels that share a caller's workspace are launched: no other call of this kind comes between.
        self._workspace_lock = threading.Lock()
        #: Calls that no thread is making: after a while, as many as threads have made at the same time.
        self._idle = [self._new_call()]

    def _new_call(self) -> _Call:
        spec = self.plan.spec
        maps = TensorMaps(self.problem, spec) if spec.stages else None
        return _Call(self._new_block(), maps, self._new_decode, self._new_schedule, self._new_merge)

    def _take_call(self) -> _Call:
        """A call to put back among the idle ones. One that fails half written is not: there will be another."""
        try:
            return self._idle.pop()  # atomic, and a fifth of what a lock costs
        except IndexError:
            return self._new_call()

    def run(
        self,
        library: Library,
        out: int,
        lse: int,
        lse_unit: float,
        q: int,
        k: int,
        v: int,
        rest: tuple[int | float, ...],
        work_list: int = 0,
        workspace: tuple[Any, int] | None = None,
    ) -> None:
        """Launch on the caller's current stream.

        ``out`` to ``v``: fields of DecodeParams, and ``rest``: those that follow, up to ``v_scale_stride``. Given the
        tuple of the last call again, it is not packed again.
        ``work_list``: where ``schedule`` has left one; without, a plan that needs it makes its own.
        ``workspace``: something that holds ``plan.workspace`` bytes or more, and their address; None: ours.
        """
        device = self.device
        if device not in contexts.ready:
            ensure_context(self._runtime, device)
        if self._current_device() != device:
            with on_device(self._runtime, device):
                self.run(library, out, lse, lse_unit, q, k, v, rest, work_list, workspace)
            return
        if self._grid == 0:
            return
        stream, makes_list = library.stream(device), not work_list
        partial_out = partial_state = 0
        if self._partial_bytes:
            list_bytes = self._list_bytes if makes_list else 0
            # What the workspace's owner frees when this returns is freed in the order of the stream.
            _workspace, address = workspace or library.workspace(list_bytes + self._partial_bytes, device, stream)
            partial_out = address + list_bytes
            partial_state = partial_out + self._out_bytes
            work_list = work_list or address
        call = self._take_call()
        call.write_arrays(partial_out, partial_state, work_list, out, lse, lse_unit, q, k, v)
        if rest is not call.rest:
            call.write_rest(*rest)
            call.rest = rest
        if call.tensor_maps is not None:
            call.tensor_maps.write(k, v, call.block.tensor_maps)
        if workspace is None:
            call.start(stream, makes_list)
        else:
            with self._workspace_lock:
                call.start(stream, makes_list)
        self._idle.append(call)

    def schedule(self, library: Library, kv_lens: int, window_left: int, work_list: int) -> None:
        """Make the work list of the lengths at ``kv_lens`` on the caller's current stream, for later ``run``."""
        ensure_context(self._runtime, self.device)
        rest = [0] * _DECODE_REST
        rest[_KV_LENS_VALUE], rest[_WINDOW_VALUE] = kv_lens, window_left
        with on_device(self._runtime, self.device):
            call = self._take_call()
            assert call.schedule is not None
            call.write_arrays(0, 0, work_list, *[0] * (_DECODE_ARRAYS - 3))
            call.write_rest(*rest)
            call.rest = None
            call.schedule.start(library.stream(self.device))
            self._idle.append(call)

    def copy_lens(self, library: Library, kv_lens: int, to: int) -> None:
        """Copy the lengths at ``kv_lens`` on the caller's current stream."""
        ensure_context(self._runtime, self.device)
        with on_device(self._runtime, self.device):
            device_to_device = 3  # cudaMemcpyKind
            stream = library.stream(self.device)
            self._runtime.memcpyAsync(to, kv_lens, 4 * self.problem.batch, device_to_device, stream)


class RowAxes:
    """An array ``[..., D]`` as rows on three axes, the way ``quantize.cu`` sees it."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.lead = lead = len(shape) - 1
        self.shape = (1,) * (3 - lead) + tuple(shape[:-1])
        self.strides = (0,) * (3 - lead) + tuple(strides[:-1])
        self.head_dim = shape[-1]

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def scale_strides(self, scale_shape: tuple[int, ...], head_axis: int) -> tuple[int, int, int]:
        """Strides, in elements, of a contiguous scale: ``(1,)``, ``(H,)`` for ``head_axis``, or one for every row."""
        if scale_shape == (1,):
            return 0, 0, 0
        if len(scale_shape) == 1:
            at = head_axis + 3 - self.lead
            return int(at == 0), int(at == 1), int(at == 2)
        return self.shape[1] * self.shape[2], self.shape[2], 1


class Quantizer:
    """Launches the kernels of ``quantize.cu`` for one pair of types on one device."""

    def __init__(self, values: str, codes: str, device: int, software_fp8: bool = False):
        self._types = (values, codes)
        self._device = device
        self._software = software_fp8
        self._runtime = require_cupy().cuda.runtime

    def _launch(self, entry: str, grid: int, stream: int, params: ParamBlock, *values: int | float) -> None:
        ensure_context(self._runtime, self._device)
        spec = QuantizeSpec(entry, *self._types, software_fp8=self._software)
        with params.lock:
            params.write(*values)
            Launch(compiler.load(spec, self._device), grid, params)(stream)

    def _params(self, axes: RowAxes, scale_strides: tuple[int, int, int], scale_count: int) -> ParamBlock:
        return ParamBlock(
            "QuantizeParams", _QUANTIZE_LEADING,
            stride0=axes.strides[0], stride1=axes.strides[1], stride2=axes.strides[2], rows=axes.rows,
            n1=axes.shape[1], n2=axes.shape[2], scale_stride0=scale_strides[0], scale_stride1=scale_strides[1],
            scale_stride2=scale_strides[2], head_dim=axes.head_dim, scale_count=scale_count,
        )  # fmt: skip

    def _grid(self, threads: int, multiple: int = 1) -> int:
        """Enough CTAs of 256 threads, at most some waves of them, and a multiple of ``multiple``."""
        most = 16 * device_info(self._device).sm_count
        grid = max(1, min(-(-threads // 256), most))
        return -(-grid // multiple) * multiple

    def amax(
        self, axes: RowAxes, values: int, scales: int, strides: tuple[int, int, int], count: int, stream: int
    ) -> None:
        """Write the scales of all ``count`` slots that ``strides`` name."""
        with on_device(self._runtime, self._device):
            params = self._params(axes, strides, count)
            self._runtime.memsetAsync(scales, 0, 4 * count, stream)
            if axes.rows:
                # A warp that stays with one head needs one atomic: all warps together step over whole sets of heads.
                grid = self._grid(32 * axes.rows, count if 1 < count <= 256 else 1)
                self._launch("amax", grid, stream, params, values, 0, scales, 0.0)
            if count != axes.rows:
                self._launch("scales", -(-count // 256), stream, params, values, 0, scales, 0.0)

    def convert(
        self,
        entry: str,
        axes: RowAxes,
        values: int,
        out: int,
        scales: int,
        scale: float,
        strides: tuple[int, int, int],
        stream: int,
    ) -> None:
        """``"quantize"`` values to codes, or ``"dequantize"`` codes to values; by ``scale`` if ``scales`` is 0."""
        if axes.rows == 0:
            return
        with on_device(self._runtime, self._device):
            params = self._params(axes, strides, 0)
            grid = self._grid(axes.rows * (axes.head_dim // 4))
            self._launch(entry, grid, stream, params, values, out, scales, scale)
