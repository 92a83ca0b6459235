"""The read limit: the time of the fastest kernel that only reads the same bytes (``cuda_src/read_limit.cu``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ..jit import compiler, sources
from ..jit.device import device_info, require_cupy
from ..jit.launch import launch_kernel
from ..jit.params import STRUCTS, ParamBlock, divisors
from .timing import time_calls


@dataclass(frozen=True)
class ReadSpec:
    """One compiled ``cuda_src/read_limit.cu``: a thread has ``unroll`` loads of 16 bytes in flight."""

    unroll: int
    threads: int
    paged: bool = False

    entry = "read_limit"
    shared_bytes = 0

    def source(self) -> str:
        lines = [
            f"constexpr int kUnroll = {self.unroll};", f"constexpr int kThreads = {self.threads};",
            f"constexpr bool kPaged = {str(self.paged).lower()};",
        ]  # fmt: skip
        return sources.render(str(self), [], lines, "read_limit.cu")

    def __str__(self) -> str:
        return f"read_limit[unroll={self.unroll} threads={self.threads}{' paged' * self.paged}]"


#: What is tried, with the CTAs per SM; 0: a CTA for every tile. The best differs between sizes and between devices.
VARIANTS = (
    (ReadSpec(4, 256), 8), (ReadSpec(4, 256), 0), (ReadSpec(4, 512), 4), (ReadSpec(4, 1024), 2), (ReadSpec(8, 256), 0),
    (ReadSpec(8, 512), 4), (ReadSpec(8, 512), 2), (ReadSpec(8, 128), 0), (ReadSpec(16, 512), 2),
)  # fmt: skip
SPECS = tuple(dict.fromkeys(replace(spec, paged=paged) for paged in (False, True) for spec, _ in VARIANTS))


@dataclass(frozen=True)
class ReadPages:
    """The first ``k_bytes`` and ``v_bytes`` of pools of pages, which ``indices`` (CuPy, int32) puts in order."""

    indices: Any
    k_bytes: int
    v_bytes: int


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
        self._params = ParamBlock("ReadParams", len(STRUCTS["ReadParams"]))
        self._sink = self._cupy.empty(1, "uint32")

    def _launch(self, spec: ReadSpec, ctas_per_sm: int, k: Any, v: Any, pages: ReadPages | None) -> None:
        kernel = compiler.load(cast(Any, spec), self._device)
        k_bytes, v_bytes = (pages.k_bytes, pages.v_bytes) if pages else (k.nbytes, v.nbytes)
        indices = pages.indices.data.ptr if pages else 0
        page_words = {name: array.nbytes // len(array) // 16 if pages else 1 for name, array in (("k", k), ("v", v))}
        tile = 16 * spec.unroll * spec.threads
        grid = ctas_per_sm * self._sms or max(1, -(-k_bytes // tile) + -(-v_bytes // tile))
        stream = self._cupy.cuda.get_current_stream().ptr
        words = divisors(**page_words).values()
        with self._params.lock:
            self._params.write(k.data.ptr, v.data.ptr, self._sink.data.ptr, k_bytes, v_bytes, indices, *words)
            launch_kernel()(kernel.handle, grid, 1, 1, spec.threads, 1, 1, 0, stream, self._params.address, 0)

    def measure(self, sets: Sequence[tuple[Any, Any]], pages: ReadPages | None = None) -> Limit:
        """The limit of pairs of contiguous CuPy arrays, of equal sizes and of a multiple of 16 bytes each.

        ``pages``: the arrays are pools of pages, of which so much is read in this order, at most 32 GB of each.
        """
        nbytes = pages.k_bytes + pages.v_bytes if pages else sets[0][0].nbytes + sets[0][1].nbytes
        variants = [(replace(spec, paged=pages is not None), ctas_per_sm) for spec, ctas_per_sm in VARIANTS]
        compiler.load_all(cast(Any, [spec for spec, _ in variants]), self._device)

        def timed(variant: tuple[ReadSpec, int], replays: int) -> float:
            return time_calls(
                self._cupy, lambda s: self._launch(*variant, *sets[s], pages), len(sets), nbytes, replays=replays
            ).us

        best = min(variants, key=lambda variant: timed(variant, 11))
        # Timed again: the smallest of many figures is lucky.
        spec, ctas_per_sm = best
        grid = f"{ctas_per_sm} CTAs per SM" if ctas_per_sm else "a CTA a tile"
        return Limit(timed(best, 31), nbytes, f"{spec} {grid}")
