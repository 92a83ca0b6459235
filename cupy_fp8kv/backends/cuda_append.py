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
#: Shares of 16 bytes that a thread takes of a row at a time, and CTAs that an SM has.
_SHARES = 2
_CTAS = 4
_AXES = {"": ("outer", "inner", "head"), "_cache": ("page", "row", "head"), "_scales": ("page", "row", "head")}


def side_strides(side: str, *strides: tuple[int, int, int]) -> dict[str, int]:
    """Fields for the strides of a side's values, cache and scales."""
    return {
        f"{side}{suffix}_stride_{axis}": stride
        for (suffix, axes), given in zip(_AXES.items(), strides, strict=True)
        for axis, stride in zip(axes, given, strict=True)
    }


def lanes_of(row_bytes: int) -> int:
    """Threads of a row, a power of two."""
    return min(32, 1 << (-(-row_bytes // (16 * _SHARES)) - 1).bit_length())


def grid_of(rows: int, per_cta: int, heads: int, most: int) -> int:
    """CTAs of a side, ``most`` at a time."""
    needed = max(1, -(-rows // per_cta))
    if needed <= most or heads > most:
        return min(needed, most)
    # A group of threads then stays with one head, and has one maximum to tell.
    return most - most % heads


class PreparedAppend:
    """A kind of append compiled and packed for one device: one launch, or one for K and one for V if they differ."""

    def __init__(
        self, specs: tuple[AppendSpec, AppendSpec], sizes: dict[str, int], strides: dict[str, int], device: int
    ):
        self._device = device
        self._runtime = jit_device.require_cupy().cuda.runtime
        heads, head_dim, page_size = sizes["num_kv_heads"], sizes["head_dim"], sizes["page_size"]
        rows = sizes["num_tokens"] * heads
        self._launches = []
        for first, sides in ((0, 2),) if specs[0] == specs[1] else ((0, 1), (1, 1)):
            lanes = lanes_of(head_dim * specs[first].itemsize)
            most = _CTAS * jit_device.device_info(device).sm_count // sides
            grid = grid_of(rows, AppendSpec.threads // lanes, heads, most)
            params = ParamBlock(
                "AppendParams", _LEADING, **strides, rows=rows, head_dim=head_dim,
                # In pages without rows there is no place.
                num_pages=sizes["num_pages"] if page_size else 0,
                lanes=lanes, first_side=first, sides=sides, counts_skipped=int(first == 0),
                **divisors(page_size=max(1, page_size)) | {"page_size": page_size},
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
