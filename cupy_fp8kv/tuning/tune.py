"""``tune``: the best plan for one problem on the user's card, measured there and kept."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import dispatch
from ..jit import compiler, sources
from ..jit.device import cupy_problem, device_info
from ..jit.spec import MergeSpec, Spec
from ..plan import DeviceInfo, Plan
from ..problem import DecodeProblem
from . import store
from .measure import Call, GpuContest
from .options import plan_options
from .search import Timed, search

#: The planner's choice stays unless another plan is faster by more than what two measurements differ by.
_MIN_GAIN = 0.003

#: What is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], object]
_Counter = Callable[[int], Callable[[], object]]


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes
    ----------
    problem, device : what was tuned, and where.
    plan : the plan that is used from now on (with ``save``): the fastest, or the planner's own choice if no other gains
        more than measurements differ by.
    planned : the planner's choice.
    us, planned_us : microseconds a call of the two, medians of CUDA graph replays in turn.
    tried : every option with its time, best first; those that left the search early were timed roughly.
    cold : whether calls found nothing of the caches in the L2 cache. False if there was no memory for copies.
    seconds : how long the search took, compilation included.
    path : the file that keeps the plan, None if none does.
    """

    problem: DecodeProblem
    device: DeviceInfo
    plan: Plan
    planned: Plan
    us: float
    planned_us: float
    tried: tuple[Timed, ...]
    cold: bool
    seconds: float
    path: Path | None = None

    @property
    def gain(self) -> float:
        """How much longer the planner's choice takes: 0.02 for 2 %."""
        return self.planned_us / self.us - 1

    def __repr__(self) -> str:
        chosen = "the planner's choice stays" if self.plan is self.planned else f"{self.gain:.1%} faster than planned"
        return (
            f"<TuneResult: {chosen}, {self.us:.2f} µs against {self.planned_us:.2f} µs, {len(self.tried)} options in "
            f"{self.seconds:.1f} s>"
        )

    def __str__(self) -> str:
        def shown(plan: Plan) -> str:
            return f"{plan.spec}, {plan.splits} splits"

        return "\n".join((
            f"problem  {self.problem}",
            f"device   {self.device.name}, sm_{self.device.arch}, {self.device.sm_count} SMs",
            f"planned  {self.planned_us:.2f} µs  {shown(self.planned)}",
            f"tuned    {self.us:.2f} µs  {shown(self.plan)}",
            f"gain     {self.gain:.1%} of {len(self.tried)} options in {self.seconds:.1f} s"
            f"{'' if self.cold else '; the caches may have been in L2, there was no memory for copies'}",
            f"kept     {self.path or 'no'}",
        ))  # fmt: skip

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "problem": asdict(self.problem), "device": asdict(self.device), "sources": sources.digest(),
            "us": self.us, "planned_us": self.planned_us, "gain": self.gain, "cold": self.cold,
            "seconds": round(self.seconds, 2),
            "tried": [
                {
                    "spec": str(one.plan.spec), "splits": one.plan.splits, "us": one.us, "rounds": one.rounds,
                    "planned": one.plan is self.planned, "tuned": one.plan is self.plan,
                }
                for one in self.tried
            ],
        }  # fmt: skip


def tune(
    q: Any,
    k_padded: Any,
    v_padded: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    *,
    kv_format: Any = None,
    window_left: int = -1,
    save: bool = True,
    progress: Progress | None = None,
) -> TuneResult:
    """Find the fastest plan for such calls on this card by measuring, and use it from then on.

    Times every sensible plan (tiles, warps, splits, rings) as CUDA graph replays on copies of the caches that together
    exceed the L2 cache, drops the slower ones round by round, and holds each plan's result against the planner's.

    Parameters
    ----------
    q, k_padded, v_padded, … : as in :func:`batch_decode_with_padded_kv_cache`, or in
        :func:`single_decode_with_kv_cache` if q has two axes; arrays on a CUDA device, of any library. They are read,
        never written. What counts is their kind (shapes, formats, strides of the caches, options), so any values will
        do; finite ones are the better check.
    save : keep the plan on disk, beside the compiled kernels, for this and every later process: calls of the kind then
        use it, until the package's version or its kernels change. CUDA graphs captured before keep their plan. With
        False only the result tells of it.
    progress : called with what is being done, how much is done, and how much there is.

    There are no ``kv_lens``: requests with lengths of their own are another kind of call, whose time depends on the
    lengths, and are left to the planner.

    Returns
    -------
    :class:`TuneResult`, which prints itself: the plan, its time and the planner's, and every option with its time.

    Raises
    ------
    ValueError, TypeError
        As a call with these arguments does, and for arrays on the host.
    RuntimeError
        Without a usable GPU, or for a plan whose result is wrong, which is never kept.
    """
    if problem := cupy_problem():
        raise RuntimeError(f"tune needs a GPU to measure on: {problem}")
    call = Call.padded(
        q, k_padded, v_padded, kv_layout, pos_encoding_mode=pos_encoding_mode, q_scale=q_scale, k_scale=k_scale,
        v_scale=v_scale, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
        kv_format=kv_format,
    )  # fmt: skip
    result = tune_call(call, progress)
    return keep(result) if save else result


def tune_call(call: Call, progress: Progress | None = None) -> TuneResult:
    """The search for a call; nothing is kept."""
    return searched(call, progress)[0]


def searched(call: Call, progress: Progress | None = None) -> tuple[TuneResult, GpuContest]:
    """The same, and the contest that it was held in, for more of them."""
    started = time.perf_counter()
    if not call.problem.batch or not call.problem.kv_len:
        raise ValueError(f"k: expected requests with rows, there is nothing to tune in {call.problem}")
    info = device_info(call.device)
    options = plan_options(call.problem, info)
    planned = options[0]
    compile_plans(options, call.problem.q_format, call.device, counter("compiling", progress))
    contest = GpuContest(call)
    tried = search(options, contest, counter("timing", progress)(len(options)))
    planned_us = next(one.us for one in tried if one.plan is planned)
    plan, us = planned, planned_us
    if tried[0].us * (1 + _MIN_GAIN) < planned_us:
        plan, us = tried[0].plan, tried[0].us
    result = TuneResult(
        call.problem, info, plan, planned, us, planned_us, tuple(tried), contest.cold, time.perf_counter() - started
    )  # fmt: skip
    return result, contest


def keep(result: TuneResult) -> TuneResult:
    """Keep the plan of a result on disk and have later calls use it."""
    record = store.Record(result.plan, result.us, result.planned_us, len(result.tried))
    try:
        path = store.save(result.problem, result.device, record)
    except OSError as error:
        warnings.warn(f"cupy_fp8kv: a tuned plan cannot be kept: {error}", RuntimeWarning, stacklevel=3)
        return result
    dispatch.forget()
    return replace(result, path=path)


def compile_plans(plans: Iterable[Plan], q_format: str, device: int, counter: _Counter) -> None:
    """Compile what plans need, on all cores."""
    specs = specs_of(plans, q_format)
    compiler.load_all(specs, device, counter(len(specs)))


def specs_of(plans: Iterable[Plan], q_format: str) -> list[Spec]:
    """The kernels of plans, each once."""
    return [*dict.fromkeys(plan.spec for plan in plans), MergeSpec(q_format)]


def counter(what: str, progress: Progress | None) -> _Counter:
    """For a number of things to do, the function to call after each of them."""

    def start(total: int) -> Callable[[], object]:
        done = itertools.count(1)
        return lambda: progress and progress(what, next(done), total)

    return start
