"""Problems to launches: what the public operations call when the data are on a CUDA device."""

from __future__ import annotations

from typing import Any

from ..arrays import Library
from ..jit import compiler
from ..jit.device import device_info, ensure_context, on_device, require_cupy
from ..jit.launch import Launch
from ..jit.params import ParamBlock, divisors
from ..jit.spec import MergeSpec, QuantizeSpec
from ..jit.tensor_map import TensorMaps
from ..paged_problem import paging_fields
from ..plan import Plan, plan_decode
from ..problem import DecodeProblem

#: Fields of DecodeParams that change from call to call.
_DECODE_LEADING = 20
#: Where K stands among the values of a call; V follows.
_K_VALUE = 4
#: Fields of QuantizeParams likewise.
_QUANTIZE_LEADING = 4


class PreparedDecode:
    """A decode problem planned, compiled and packed for one device: a call only fills in addresses and numbers."""

    def __init__(self, problem: DecodeProblem, device: int, out_strides: tuple[int, int]):
        self.problem = problem
        self.device = device
        self.plan: Plan = plan_decode(problem, device_info(device))
        plan = self.plan
        self._runtime = require_cupy().cuda.runtime
        params = ParamBlock(
            "DecodeParams", _DECODE_LEADING,
            q_stride_request=problem.q_strides[0], q_stride_head=problem.q_strides[1],
            k_stride_request=problem.k_strides[0], k_stride_row=problem.k_strides[1],
            k_stride_head=problem.k_strides[2],
            v_stride_request=problem.v_strides[0], v_stride_row=problem.v_strides[1],
            v_stride_head=problem.v_strides[2],
            out_stride_request=out_strides[0], out_stride_head=out_strides[1],
            kv_len=problem.max_rows, group_size=problem.group_size, head_dim=problem.head_dim,
            num_kv_heads=problem.num_kv_heads,
            **divisors(
                head_teams=problem.num_kv_heads // plan.spec.heads, column_blocks=plan.column_blocks,
                splits=plan.splits, page_size=problem.paging.page_size if problem.paging else 1,
            ),
            **paging_fields(problem),
        )  # fmt: skip
        # With a merge behind it, a call may start while the merge of the call before it runs.
        split = plan.splits > 1
        self._params = params
        self._tensor_maps = TensorMaps(problem, plan.spec) if plan.spec.stages else None
        self._decode = Launch(compiler.load(plan.spec, device), plan.grid, params, dependent=split)
        if split:
            merge = compiler.load(MergeSpec(problem.q_format), device)
            self._merge = Launch(merge, problem.batch * problem.num_qo_heads, params, dependent=True)

    def run(self, library: Library, values: tuple[int | float, ...], workspace: tuple[Any, int] | None = None) -> None:
        """Launch on the caller's current stream. ``values``: DecodeParams from ``out`` to ``v_scale_stride``.

        ``workspace``: something that holds ``plan.workspace`` bytes or more, and their address; None: ours.
        """
        ensure_context(self._runtime, self.device)
        if self._runtime.getDevice() != self.device:
            with on_device(self._runtime, self.device):
                self._run(library, values, workspace)
        else:
            self._run(library, values, workspace)

    def _run(self, library: Library, values: tuple[int | float, ...], workspace: tuple[Any, int] | None) -> None:
        plan = self.plan
        if plan.grid == 0:
            return
        stream, params = library.stream(self.device), self._params
        if plan.splits == 1:
            with params.lock:
                self._write(0, 0, values)
                self._decode(stream)
            return
        # What the workspace's owner frees when this returns is freed in the order of the stream.
        _workspace, partial_out = workspace or library.workspace(plan.workspace, self.device, stream)
        with params.lock:
            self._write(partial_out, partial_out + plan.workspace_out, values)
            self._decode(stream)
            self._merge(stream)

    def _write(self, partial_out: int, partial_state: int, values: tuple[int | float, ...]) -> None:
        self._params.write(partial_out, partial_state, *values)
        if self._tensor_maps:
            self._tensor_maps.write(int(values[_K_VALUE]), int(values[_K_VALUE + 1]), self._params.tensor_maps)


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
