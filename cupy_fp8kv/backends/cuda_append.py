"""Launching ``append.cu``."""

from __future__ import annotations

from ..arrays import Library
from ..jit import compiler
from ..jit import device as jit_device
from ..jit.launch import Launch
from ..jit.params import ParamBlock, divisors
from ..jit.spec import AppendSpec

#: Fields of AppendParams that change from call to call.
_LEADING = 22
_AXES = {"": ("outer", "inner", "head"), "_cache": ("page", "row", "head"), "_scales": ("page", "row", "head")}


def side_strides(side: str, *strides: tuple[int, int, int]) -> dict[str, int]:
    """Fields for the strides of a side's values, cache and scales."""
    return {
        f"{side}{suffix}_stride_{axis}": stride
        for (suffix, axes), given in zip(_AXES.items(), strides, strict=True)
        for axis, stride in zip(axes, given, strict=True)
    }


def lanes_of(head_dim: int) -> int:
    """Threads of a row: four elements each, a power of two."""
    return min(32, 1 << (max(1, head_dim // 4) - 1).bit_length())


class PreparedAppend:
    """A kind of append compiled and packed for one device: one launch, or one for K and one for V if they differ."""

    def __init__(
        self, specs: tuple[AppendSpec, AppendSpec], sizes: dict[str, int], strides: dict[str, int], device: int
    ):
        self._device = device
        self._runtime = jit_device.require_cupy().cuda.runtime
        heads, lanes = sizes["num_kv_heads"], lanes_of(sizes["head_dim"])
        rows = sizes["num_tokens"] * heads
        per_cta = AppendSpec.threads // lanes
        grid = max(1, min(-(-rows // per_cta), 8 * jit_device.device_info(device).sm_count))
        # A group of threads then stays with one head, and has one maximum to tell.
        if heads <= 256:
            grid = -(-grid // heads) * heads
        self._launches = []
        for first, sides in ((0, 2),) if specs[0] == specs[1] else ((0, 1), (1, 1)):
            params = ParamBlock(
                "AppendParams", _LEADING, **strides, rows=rows, head_dim=sizes["head_dim"],
                page_size=sizes["page_size"], num_pages=sizes["num_pages"], lanes=lanes, first_side=first, sides=sides,
                counts_skipped=int(first == 0),
                **divisors(num_heads=heads, inner=sizes["inner"], tokens_each=max(1, sizes["tokens_each"])),
            )  # fmt: skip
            self._launches.append((params, Launch(compiler.load(specs[first], device), sides * grid, params)))

    def run(self, library: Library, *values: int | float) -> None:
        """Launch on the caller's current stream. ``values``: AppendParams from ``k`` to ``num_indices``."""
        jit_device.ensure_context(self._runtime, self._device)
        with jit_device.on_device(self._runtime, self._device):
            for params, launch in self._launches:
                with params.lock:
                    params.write(*values)
                    launch(library.stream(self._device))
