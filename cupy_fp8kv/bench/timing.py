"""How long a call takes on the device, and how long it keeps the host.

Device: a CUDA graph of many calls, which go round several input sets that together exceed the L2 cache, is replayed;
the figure is the median replay divided by its calls, so a call carries its own launch gap and finds nothing cached.
Host: the wall time until an eager call returns, nothing waited for.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

METHOD = (
    "median of CUDA graph replays, each of many calls over input sets that together exceed 4 times the L2 cache; "
    "limit: the fastest of several kernels that only read the same bytes, in the same run "
    "(of a ragged batch: as many bytes in one piece; of pages: the same pages in the same random order)"
)
CACHE_METHOD = (
    "median of CUDA graph replays, each of many calls over input sets that together exceed 4 times the L2 cache; "
    "MB: read and written, each byte once; limit, in the same run: a cudaMemcpyAsync from device to device that reads "
    "and writes as many bytes together, or (of decode) the fastest of several kernels that only read as many"
)
#: Input sets hold this many times the L2 cache.
_L2_MULTIPLE = 4.2
#: A replay should take about so long, and has at most so many calls.
_REPLAY_US = 2000.0
_MOST_CALLS = 480
_MOST_SECONDS = 3.0
#: What the length of a replay is guessed from; only its order of magnitude matters.
_GUESSED_BYTES_PER_US = 3.3e6

Call = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median replay, and those that a tenth of the replays stay below and above."""

    us: float
    low: float
    high: float


def l2_bytes(cupy: Any) -> int:
    return int(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["l2CacheSize"])


def sets_needed(cupy: Any, set_bytes: int) -> int:
    """How many input sets of ``set_bytes`` a timing must go round."""
    return max(2, math.ceil(_L2_MULTIPLE * l2_bytes(cupy) / max(1, set_bytes)))


def capture(stream: Any, call: Call, sets: int, calls: int) -> Any:
    """The graph of ``calls`` calls, which go round the sets, on ``stream``, which is the current one."""
    stream.begin_capture()
    try:
        for index in range(calls):
            call(index % sets)
    except BaseException:
        with contextlib.suppress(Exception):  # says only that the capture was spoilt
            stream.end_capture()
        raise
    return stream.end_capture()


class CupyGraphs:
    """How calls that follow CuPy's current stream are run on a stream, and become a graph."""

    def on(self, stream: Any) -> Any:
        """Makes ``stream``, one of CuPy's, the current one."""
        return stream

    def capture(self, stream: Any, call: Call, sets: int, calls: int) -> Callable[[], object]:
        """What launches the calls again, on ``stream``, which is the current one."""
        graph = capture(stream, call, sets, calls)
        return lambda: graph.launch(stream)


def time_calls(cupy: Any, call: Call, sets: int, set_bytes: int, *, replays: int = 21, graphs: Any = None) -> Timing:
    """Time ``call(s)``: it launches on the current stream with input set ``s < sets``, into memory it is given.

    ``graphs``: what :class:`CupyGraphs` is for CuPy, for a library that has a current stream of its own.
    """
    graphs = graphs or CupyGraphs()
    calls = max(sets, math.ceil(_REPLAY_US / max(1.0, set_bytes / _GUESSED_BYTES_PER_US)))
    calls = min(math.ceil(calls / sets) * sets, max(_MOST_CALLS // sets * sets, sets))
    stream = cupy.cuda.Stream(non_blocking=True)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    times: list[float] = []

    cupy.cuda.runtime.deviceSynchronize()  # inputs may come from another stream
    with graphs.on(stream):
        # Compiles, and leaves the workspace of a call in this stream's pool: a capture should find it there.
        for index in range(3):
            call(index % sets)
        stream.synchronize()
        launch = graphs.capture(stream, call, sets, calls)
        for _ in range(3):
            launch()
        stream.synchronize()
        give_up = time.perf_counter() + _MOST_SECONDS
        while len(times) < replays and (len(times) < 5 or time.perf_counter() < give_up):
            start.record(stream)
            launch()
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3 / calls)
    times.sort()
    return Timing(statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10])


def host_us(cupy: Any, call: Call, sets: int, *, calls: int = 40, blocks: int = 5, graphs: Any = None) -> float:
    """Microseconds until an eager call returns: the median of some blocks of calls, fewer than a stream can queue."""
    times = []
    stream = cupy.cuda.Stream(non_blocking=True)
    with (graphs or CupyGraphs()).on(stream):
        call(0)
        for _ in range(blocks):
            stream.synchronize()
            started = time.perf_counter()
            for index in range(calls):
                call(index % sets)
            times.append((time.perf_counter() - started) / calls * 1e6)
        stream.synchronize()
    return statistics.median(times)
