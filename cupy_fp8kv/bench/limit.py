"""The read limit: the time of the fastest kernel that only reads the same bytes (``cuda_src/read_limit.cu``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..jit import compiler, sources
from ..jit.device import device_info, require_cupy
from ..jit.launch import launch_kernel
from ..jit.params import ParamBlock
from .timing import time_calls


@dataclass(frozen=True)
class ReadSpec:
    """One compiled ``cuda_src/read_limit.cu``: a thread has ``unroll`` loads of 16 bytes in flight."""

    unroll: int
    threads: int

    entry = "read_limit"
    shared_bytes = 0

    def source(self) -> str:
        lines = [f"constexpr int kUnroll = {self.unroll};", f"constexpr int kThreads = {self.threads};"]
        return sources.render(str(self), [], lines, "read_limit.cu")

    def __str__(self) -> str:
        return f"read_limit[unroll={self.unroll} threads={self.threads}]"


#: What is tried, with the CTAs per SM; 0: a CTA for every tile. The best differs between sizes and between devices.
VARIANTS = (
    (ReadSpec(4, 256), 8), (ReadSpec(4, 256), 0), (ReadSpec(4, 512), 4), (ReadSpec(4, 1024), 2), (ReadSpec(8, 256), 0),
    (ReadSpec(8, 512), 4), (ReadSpec(8, 512), 2), (ReadSpec(8, 128), 0), (ReadSpec(16, 512), 2),
)  # fmt: skip
SPECS = tuple(dict.fromkeys(spec for spec, _ in VARIANTS))


@dataclass(frozen=True)
class Limit:
    """``us`` microseconds to read ``nbytes``, by ``variant``."""

    us: float
    nbytes: int
    variant: str

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.us * 1e6


class ReadLimit:
    """Measures the limit on CuPy's current device."""

    def __init__(self) -> None:
        self._cupy: Any = require_cupy()
        self._device = self._cupy.cuda.runtime.getDevice()
        self._sms = device_info(self._device).sm_count
        self._params = ParamBlock("ReadParams", 5)
        self._sink = self._cupy.empty(1, "uint32")

    def _launch(self, spec: ReadSpec, ctas_per_sm: int, k: Any, v: Any) -> None:
        kernel = compiler.load(cast(Any, spec), self._device)
        tile = 16 * spec.unroll * spec.threads
        grid = ctas_per_sm * self._sms or max(1, -(-k.nbytes // tile) + -(-v.nbytes // tile))
        stream = self._cupy.cuda.get_current_stream().ptr
        with self._params.lock:
            self._params.write(k.data.ptr, v.data.ptr, self._sink.data.ptr, k.nbytes, v.nbytes)
            launch_kernel()(kernel.handle, grid, 1, 1, spec.threads, 1, 1, 0, stream, self._params.address, 0)

    def measure(self, sets: Sequence[tuple[Any, Any]]) -> Limit:
        """The limit of pairs of contiguous CuPy arrays, of equal sizes and of a multiple of 16 bytes each."""
        nbytes = sets[0][0].nbytes + sets[0][1].nbytes

        def timed(variant: tuple[ReadSpec, int], replays: int) -> float:
            return time_calls(
                self._cupy, lambda s: self._launch(*variant, *sets[s]), len(sets), nbytes, replays=replays
            ).us

        best = min(VARIANTS, key=lambda variant: timed(variant, 11))
        # Timed again: the smallest of many figures is lucky.
        spec, ctas_per_sm = best
        grid = f"{ctas_per_sm} CTAs per SM" if ctas_per_sm else "a CTA a tile"
        return Limit(timed(best, 31), nbytes, f"{spec} {grid}")
