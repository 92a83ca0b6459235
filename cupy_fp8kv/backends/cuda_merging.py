"""Launching ``merge_states.cu``."""

from __future__ import annotations

import math
from typing import NamedTuple

from .. import arrays
from ..arrays import Library
from ..jit import compiler
from ..jit import device as jit_device
from ..jit.launch import Launch
from ..jit.params import ParamBlock, divisors
from ..jit.spec import MergeStatesSpec

#: Fields of MergeStatesParams that change from call to call.
_LEADING = 8
_THREADS = MergeStatesSpec.threads
#: States that a group of threads takes at a time.
_AT_ONCE = 4


class MergeGeometry(NamedTuple):
    """What a kind of merge looks like. Strides of v in bytes, of s in elements."""

    dtype: str
    num_tokens: int
    num_states: int
    num_heads: int
    head_dim: int
    out: tuple[int, int]  # token, head
    lse: tuple[int, int]
    v: tuple[int, int]
    s: tuple[int, int]
    v_other: tuple[int, int, int]  # token, state, head
    s_other: tuple[int, int, int]
    lse_base: str


class PreparedMerge:
    """A kind of merge compiled and packed for one device."""

    def __init__(self, geometry: MergeGeometry, device: int):
        self._device = device
        self._runtime = jit_device.require_cupy().cuda.runtime
        shares = geometry.head_dim * arrays.numpy_dtype(geometry.dtype).itemsize // 16
        # Parts decide on the order of a sum, which is the same for every dtype.
        parts = max(1, min(-(-geometry.num_states // _AT_ONCE), _THREADS // (geometry.head_dim // 4)))
        rows, rows_per_cta = geometry.num_tokens * geometry.num_heads, _THREADS // (shares * parts)
        natural = geometry.lse_base == "e"
        self._params = ParamBlock(
            "MergeStatesParams", _LEADING,
            out_stride_row=geometry.out[0], out_stride_head=geometry.out[1],
            lse_stride_row=geometry.lse[0], lse_stride_head=geometry.lse[1],
            v_stride_row=geometry.v[0], v_stride_head=geometry.v[1],
            s_stride_row=geometry.s[0], s_stride_head=geometry.s[1],
            v_other_stride_row=geometry.v_other[0], v_other_stride_state=geometry.v_other[1],
            v_other_stride_head=geometry.v_other[2],
            s_other_stride_row=geometry.s_other[0], s_other_stride_state=geometry.s_other[1],
            s_other_stride_head=geometry.s_other[2],
            s_unit=math.log2(math.e) if natural else 1.0,
            lse_unit=math.log(2.0) if natural else 1.0, rows=rows, rows_per_cta=rows_per_cta,
            num_states=geometry.num_states, parts=parts,
            **divisors(team=shares * parts, shares=shares, num_heads=geometry.num_heads),
        )  # fmt: skip
        self._launch = None
        if rows:
            kernel = compiler.load(MergeStatesSpec(geometry.dtype), device)
            self._launch = Launch(kernel, -(-rows // rows_per_cta), self._params)

    def run(self, library: Library, *values: int) -> None:
        """Launch on the caller's current stream. ``values``: MergeStatesParams from ``out`` to ``mask_stride``."""
        if self._launch is None:
            return
        jit_device.ensure_context(self._runtime, self._device)
        with jit_device.on_device(self._runtime, self._device), self._params.lock:
            self._params.write(*values)
            self._launch(library.stream(self._device))
