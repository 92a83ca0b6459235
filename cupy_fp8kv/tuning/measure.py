"""Running the plans of one call on the device: checked against the planner's, and timed as CUDA graphs."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import dispatch
from ..arrays import HOST, adopt
from ..backends.cuda import PreparedDecode
from ..bench.timing import capture, l2_bytes, sets_needed
from ..formats import KV_FORMATS
from ..jit.device import device_info, on_device, require_cupy
from ..jit.params import STRUCTS
from ..plan import MAX_WORKSPACE, Plan, plan_decode
from ..problem import DecodeProblem

#: What a call writes into DecodeParams, in order; the addresses of partial results, before it, are the backend's.
_FIELDS = [name for name, _ in STRUCTS["DecodeParams"]]
_FIELDS = _FIELDS[_FIELDS.index("out") :]
_OUT, _LSE, _K, _V = (_FIELDS.index(name) for name in ("out", "lse", "k", "v"))
#: A replay should take about so long, and has at most so many calls.
_REPLAY_US = 300.0
_MOST_CALLS = 480
_GUESSED_BYTES_PER_US = 3.3e6
#: Copies of the caches take at most this share of the memory that is free.
_MEMORY_SHARE = 0.7
#: Two plans' results may differ by so much of a row's norm, as they round weights and sums differently.
_TOLERANCES = {"f16": 3e-3, "bf16": 2e-2}
_LSE_TOLERANCE = 1e-3
#: Rows are held against each other in pieces of so many elements, which a core's cache holds.
_COMPARED_ELEMENTS = 1 << 16

#: Arguments of ``PreparedDecode.run``: fields up to ``v``, and the rest of them in a tuple.
_Values = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One decode call as the backend gets it: what it says of the problem, and the values of DecodeParams."""

    problem: DecodeProblem
    device: int
    values: _Values
    held: Any  # keeps the memory behind the addresses

    @classmethod
    def of(cls, **arguments: Any) -> Call:
        """The call with these arguments of ``dispatch.decode``, checked like any other; nothing is launched."""
        found: list[Any] = []

        def probe(prepared: Any) -> Any:
            if not prepared.cuda or prepared.device == HOST:
                raise ValueError(
                    "q: expected an array on a CUDA device, like those of the calls to come, got a host one"
                )
            instead = copy.copy(prepared)
            instead.run = lambda library, *values: found.extend(
                (prepared.problem, prepared.device, values[: _FIELDS.index("v") + 2])
            )
            return instead

        results = dispatch.decode(**arguments, probe=probe)
        problem, device, values = found
        return cls(problem, device, values, (results, arguments))

    @classmethod
    def padded(cls, q: Any, k: Any, v: Any, kv_layout: str = "NHD", **options: Any) -> Call:
        """A call of ``batch_decode_with_padded_kv_cache``, or of ``single_decode_with_kv_cache`` if q has two axes."""
        arguments: dict[str, Any] = {
            "pos_encoding_mode": "NONE", "q_scale": None, "k_scale": None, "v_scale": None, "window_left": -1,
            "logits_soft_cap": None, "sm_scale": None, "kv_format": None, **options,
        }  # fmt: skip
        return cls.of(
            batched=len(adopt(q, "q").shape) == 3, q=q, k=k, v=v, kv_layout=kv_layout, kv_lens=None, return_lse=True,
            lse_base="2", out=None, backend="cuda", **arguments,
        )  # fmt: skip


class _Arena:
    """The backend's library here: CuPy's current stream, and one workspace for all plans."""

    name = "cupy"

    def __init__(self, cupy: Any):
        self._stream = cupy.cuda.get_current_stream
        self._memory = cupy.cuda.alloc(MAX_WORKSPACE)

    def stream(self, device: int) -> int:
        return self._stream(device).ptr

    def workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        assert nbytes <= MAX_WORKSPACE
        return self._memory, self._memory.ptr


class GpuContest:
    """A :class:`search.Contest` on the device of a call. It holds copies of the caches until it is dropped."""

    def __init__(self, call: Call):
        self._cupy = cupy = require_cupy()
        self._call = call
        self.problem, self.device = call.problem, call.device
        self._rows = (self.problem.batch * self.problem.num_qo_heads, self.problem.head_dim)
        with on_device(cupy.cuda.runtime, self.device):
            cupy.cuda.runtime.deviceSynchronize()  # the arrays may come from any stream
            self._stream = cupy.cuda.Stream(non_blocking=True)
            with self._stream:
                self._arena: Any = _Arena(cupy)
                self._out = cupy.empty(self._rows, "uint16")
                self._lse = cupy.empty(self._rows[:1], "float32")
                self._sets = self._input_sets()
                self._want = self._result(self._prepare(plan_decode(self.problem, device_info(self.device))))
        #: Whether a call finds nothing of its caches in the L2 cache.
        self.cold = len(self._sets) * self.problem.kv_bytes >= 4 * l2_bytes(cupy)

    # Data

    def _input_sets(self) -> list[_Values]:
        """The values of the call on as many copies of its caches as exceed the L2 cache, if there is memory."""
        runtime, values = self._cupy.cuda.runtime, _put(self._call.values, {_OUT: self._out.data.ptr, _LSE: 0})
        kv_bytes = self.problem.kv_bytes
        wanted = 1 if kv_bytes >= 4 * l2_bytes(self._cupy) else min(sets_needed(self._cupy, kv_bytes), _MOST_CALLS)
        extents = {index: _extent(self.problem, cache) for index, cache in ((_K, "k"), (_V, "v"))}
        pitch = sum(-(-(high - low) // 512) * 512 for low, high in extents.values())
        copies = min(wanted - 1, int(_MEMORY_SHARE * runtime.memGetInfo()[0]) // max(1, pitch))
        if copies < 1:
            return [values]
        # Not from a pool, which would keep what other libraries may need.
        self._copies = self._cupy.cuda.Memory(copies * pitch)
        sets, at = [values], self._copies.ptr
        for _ in range(copies):
            places = {}
            for index, (low, high) in extents.items():
                runtime.memcpyAsync(
                    at, int(values[index]) + low, high - low, runtime.memcpyDeviceToDevice, self._stream.ptr
                )
                places[index] = at - low
                at += -(-(high - low) // 512) * 512
            sets.append(_put(values, places))
        return sets

    # Running

    def _prepare(self, plan: Plan) -> PreparedDecode:
        row = self.problem.head_dim * 2
        return PreparedDecode(self.problem, self.device, (self.problem.num_qo_heads * row, row), plan)

    def _result(self, prepared: PreparedDecode) -> tuple[np.ndarray, np.ndarray]:
        """What a plan computes on the call's own caches, on the host: out in rows, and lse.

        There it is compared too. CuPy would have nvcc compile reductions for every head dimension and power of two of
        rows, seconds each, in which dozens of plans are timed.
        """
        cupy, stream = self._cupy, self._stream.ptr
        for array in (self._out, self._lse):
            cupy.cuda.runtime.memsetAsync(array.data.ptr, 0xFF, array.nbytes, stream)  # NaN, in any format
        prepared.run(self._arena, *_put(self._sets[0], {_LSE: self._lse.data.ptr}))
        out, lse = cupy.asnumpy(self._out), cupy.asnumpy(self._lse)
        return out.view(KV_FORMATS[self.problem.q_format].dtype), lse

    def check(self, plan: Plan) -> None:
        """RuntimeError if the plan's result is not the planner's, to what rounding explains."""
        with on_device(self._cupy.cuda.runtime, self.device), self._stream:
            got = self._result(self._prepare(plan))
        wrong = wrong_rows(got, self._want, _TOLERANCES[self.problem.q_format])
        if wrong:
            raise RuntimeError(
                f"a plan is wrong, please report it: {plan.spec} in {plan.splits} splits gives another result than the "
                f"planner's choice in {wrong} of {self._rows[0]} rows of {self.problem}"
            )

    # Timing

    def _graph(self, plan: Plan) -> Callable[[], float]:
        """A function that replays the plan's graph and gives microseconds a call."""
        cupy, stream, prepared, sets = self._cupy, self._stream, self._prepare(plan), self._sets
        calls = max(len(sets), math.ceil(_REPLAY_US * _GUESSED_BYTES_PER_US / max(1, self.problem.kv_bytes)))
        calls = max(min(calls, _MOST_CALLS) // len(sets), 1) * len(sets)
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        graph = capture(stream, lambda s: prepared.run(self._arena, *sets[s]), len(sets), calls)

        def replay() -> float:
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            return cupy.cuda.get_elapsed_time(start, stop) * 1e3 / calls

        replay()  # uploads the graph
        return replay

    def alone(self, plan: Plan, replays: int, give_up_us: float) -> float:
        with on_device(self._cupy.cuda.runtime, self.device), self._stream:
            replay = self._graph(plan)
            times = [replay()]
            if times[0] <= give_up_us:
                times += [replay() for _ in range(replays - 1)]
        return statistics.median(times)

    def in_turn(self, plans: Sequence[Plan], replays: int) -> list[float]:
        with on_device(self._cupy.cuda.runtime, self.device), self._stream:
            graphs = [self._graph(plan) for plan in plans]
            times = [[replay() for replay in graphs] for _ in range(replays)]
        return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def _put(values: _Values, places: dict[int, int]) -> _Values:
    """The values with others in some places."""
    return tuple(places.get(index, value) for index, value in enumerate(values))


def _extent(problem: DecodeProblem, cache: str) -> tuple[int, int]:
    """Bytes from the first element of a cache to the lowest in memory, and to the end of the highest."""
    strides = {"k": problem.k_strides, "v": problem.v_strides}[cache]
    itemsize = KV_FORMATS[{"k": problem.k_format, "v": problem.v_format}[cache]].itemsize
    sizes = (problem.batch, problem.kv_len, problem.num_kv_heads)
    steps = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
    return sum(min(0, step) for step in steps), sum(max(0, step) for step in steps) + problem.head_dim * itemsize


def wrong_rows(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray], tolerance: float) -> int:
    """How many rows of (out, lse), floats of any kind ``[rows, D]`` and ``[rows]``, are not those wanted.

    The norm of a row's difference is held against the row's norm and that of all rows together, because a row whose
    terms cancel has the rounding errors of the terms. What is not finite must not be finite in the other either; which
    of NaN and infinity it is depends, for infinities in a cache, on the order of rows.
    """
    (out, lse), (want_out, want_lse) = got, want
    rows, head_dim = out.shape
    off, size = np.empty((2, rows), np.float32)
    step = max(1, _COMPARED_ELEMENTS // head_dim)
    with np.errstate(all="ignore"):  # what is not finite, and squares of it
        for first in range(0, rows, step):
            part = slice(first, first + step)
            a, b = out[part].astype(np.float32), want_out[part].astype(np.float32)
            off[part], size[part] = _squares(a - b), _squares(b)
            if not np.isfinite(off[part]).all():
                off[part], size[part] = _squares(_difference(a, b)), _squares(np.where(np.isfinite(b), b, 0))
        right = off <= tolerance**2 * (size + size.mean())
        known = np.where(np.isfinite(want_lse), np.abs(want_lse), 0)
        right &= np.abs(_difference(lse, want_lse)) <= _LSE_TOLERANCE * (1 + 0.01 * known)
    return int((~right).sum())


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b, 0 where neither is finite."""
    same = (a == b) | ~(np.isfinite(a) | np.isfinite(b))
    return np.where(same, 0, a) - np.where(same, 0, b)


def _squares(rows: np.ndarray) -> np.ndarray:
    """The sum of squares of each row."""
    return np.einsum("rd,rd->r", rows, rows)
