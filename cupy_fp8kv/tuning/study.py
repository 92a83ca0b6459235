"""The planner study: random shapes, the planner's choice against the best of all options."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.text import Text

from .. import terminal
from ..bench.inputs import Filler
from ..bench.measure import machine_record
from ..bench.suites import Shape
from ..formats import KV_FORMATS
from ..jit import sources
from ..jit.compiler import load_all
from ..jit.device import device_info, require_cupy
from ..jit.processes import compile_to_files
from ..plan import Plan
from ..problem import DecodeProblem, Facts, bind_decode
from .options import plan_options
from .report import Bars, call_of
from .search import Verdict, judge
from .tune import TuneResult, counter, searched, specs_of

#: Bytes of K and V of a shape, drawn evenly on a logarithmic scale.
_BYTES = (4e6, 1e9)
_MOST_BATCH = 256
_MIN_KV_LEN = 16
_KV_HEADS = (1, 2, 3, 4, 5, 6, 8, 8, 8, 10, 12, 16, 20, 32, 32)
_GROUPS = (1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 12, 16, 32)
#: Mostly what models have; a kernel is compiled for each.
_HEAD_DIMS = (64, 64, 80, 96, 128, 128, 128, 128, 192, 256)
#: What the planner is held to: the median loss, and the worst.
TARGETS = (0.01, 0.05)


@dataclass(frozen=True)
class Outcome:
    shape: Shape
    result: TuneResult
    verdict: Verdict
    seconds: float  # of the search and the verdict


@dataclass
class Study:
    """What was asked for, and what there is of it so far.

    ``kernels``: how many the options of all shapes need, ``compiled``: how many of them no file held. ``seconds`` is
    the wall time of everything, ``compile_seconds`` of compiling and loading all kernels before the first shape.
    """

    seed: int
    count: int
    machine: dict[str, Any]
    kernels: int = 0
    compiled: int = 0
    compile_seconds: float = 0.0
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [outcome.verdict.loss for outcome in self.outcomes]

    @property
    def noises(self) -> list[float]:
        return [outcome.verdict.noise for outcome in self.outcomes]

    def summary(self) -> dict[str, float]:
        return {
            "median_loss": statistics.median(self.losses), "worst_loss": max(self.losses),
            "median_noise": statistics.median(self.noises), "worst_noise": max(self.noises),
        }  # fmt: skip


def random_shapes(seed: int, count: int) -> list[Shape]:
    """Shapes nobody chose; the first ones are the same for any count."""
    return [_random_shape(f"{seed}.{index}") for index in range(count)]


def _random_shape(name: str) -> Shape:
    rng = random.Random(name)
    head_dim, kv_heads, group = rng.choice(_HEAD_DIMS), rng.choice(_KV_HEADS), rng.choice(_GROUPS)
    rows = _log_uniform(rng, *_BYTES) / (2 * kv_heads * head_dim)  # of all requests
    batch = min(round(_log_uniform(rng, 1, _MOST_BATCH)), int(rows / _MIN_KV_LEN))
    return Shape(name, batch, round(rows / batch), kv_heads * group, kv_heads, head_dim)


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def problem_of(shape: Shape) -> DecodeProblem:
    """What a call of this shape is, over contiguous arrays."""

    def facts(dtype: str, sizes: tuple[int, ...], itemsize: int) -> Facts:
        strides = [itemsize]
        for size in reversed(sizes[1:]):
            strides.append(strides[-1] * size)
        return Facts(dtype, sizes, tuple(reversed(strides)), 0, "cupy")

    def cache(name: str) -> Facts:
        return facts(KV_FORMATS[name].dtype.name, shape.cache_shape, KV_FORMATS[name].itemsize)

    q = facts(KV_FORMATS[shape.q].dtype.name, (shape.batch, shape.num_qo_heads, shape.head_dim), 2)
    return bind_decode(q, cache(shape.k), cache(shape.v), batched=True, kv_layout=shape.kv_layout)


def run(seed: int, count: int, seconds: float, done: Callable[[Study], object] = lambda study: None) -> Study:
    """Search shapes, as many as ``seconds`` suffice for; ``done`` is called after each with what there is by then.

    terminal.CommandError if no shape was searched.
    """
    cupy, started = require_cupy(), time.perf_counter()
    device = cupy.cuda.runtime.getDevice()
    shapes = random_shapes(seed, count)
    study = Study(seed, count, machine_record())
    with terminal.progress() as bars:
        task, parts = bars.add_task("shapes", total=count), Bars(bars)
        _compile(study, shapes, device, parts)
        study.compile_seconds = study.seconds = time.perf_counter() - started
        _say(bars, f"{study.kernels} kernels, {study.compiled} of them compiled, {study.compile_seconds:.1f} s")
        filler = Filler()
        for shape in shapes:
            began = time.perf_counter()
            if began - started > seconds:
                break
            result, contest = searched(call_of(shape, filler), parts)
            verdict = judge(result.tried, result.planned, contest)
            del contest  # and its copies of the caches
            cupy.get_default_memory_pool().free_all_blocks()
            now = time.perf_counter()
            study.outcomes.append(Outcome(shape, result, verdict, now - began))
            study.seconds = now - started
            _say(bars, _line(study.outcomes[-1]))
            done(study)
            bars.advance(task)
    if not study.outcomes:
        raise terminal.CommandError(f"no shape was searched in {seconds:g} seconds: compiling took all of them")
    return study


def _compile(study: Study, shapes: Sequence[Shape], device: int, parts: Bars) -> None:
    """Every kernel of every shape before the first is measured, so that no core waits for a shape's last kernel."""
    info = device_info(device)
    plans = [plan for shape in shapes for plan in plan_options(problem_of(shape), info)]
    specs = specs_of(plans, "f16")
    study.kernels, study.compiled = compile_to_files(specs, info.arch, counter("compiling", parts))
    load_all(specs, device, counter("loading", parts)(len(specs)))


def _say(bars: Any, line: str) -> None:
    """On stderr, above the bars if there are any."""
    bars.console.print(line, soft_wrap=True)


def _line(outcome: Outcome) -> str:
    shape, verdict = outcome.shape, outcome.verdict
    return (
        f"{shape.name}: {shape.batch} × {shape.kv_len}, {shape.num_qo_heads}/{shape.num_kv_heads} heads of "
        f"{shape.head_dim}: planned {verdict.planned_us:.2f} µs, best {verdict.best_us:.2f} µs, loss "
        f"{verdict.loss:.2%}, noise {verdict.noise:.2%}, {len(outcome.result.tried)} options, {outcome.seconds:.1f} s"
    )


def render(study: Study) -> Any:
    told, searched_of = study.summary(), len(study.outcomes)
    left_out = f"; {study.count - searched_of} shapes were left out for want of time"
    table = terminal.table(
        f"planner study, seed {study.seed}: {study.machine['device']}, median loss {told['median_loss']:.2%}, "
        f"worst {told['worst_loss']:.2%} of {searched_of} shapes{left_out if study.count > searched_of else ''}",
        "shape", "requests × rows", "heads", "D", "KV MB", "planned µs", "best µs", "loss", "noise", "options",
        "planned", "best",
        caption=f"loss: the planner's choice against the best option, measured afresh in turn; wanted: median "
        f"{TARGETS[0]:.0%}, worst {TARGETS[1]:.0%}; noise: two measurements of the planner's choice in the same turns; "
        f"{study.kernels} kernels in {study.compile_seconds:.0f} s, {study.seconds:.0f} s in all",
    )  # fmt: skip
    for column in table.columns[-2:]:
        column.justify = "left"
    for outcome in study.outcomes:
        shape, result, verdict = outcome.shape, outcome.result, outcome.verdict
        table.add_row(
            shape.name, f"{shape.batch} × {shape.kv_len}", f"{shape.num_qo_heads}/{shape.num_kv_heads}",
            str(shape.head_dim), f"{shape.kv_bytes / 1e6:.1f}", f"{verdict.planned_us:.2f}", f"{verdict.best_us:.2f}",
            Text(f"{verdict.loss:.2%}", style="red" if verdict.loss > TARGETS[1] else ""), f"{verdict.noise:.2%}",
            str(len(result.tried)), _short(result.planned), _short(verdict.best),
        )  # fmt: skip
    return table


def _short(plan: Plan) -> str:
    spec = plan.spec
    ring = f" ring {spec.heads} heads {spec.stages} stages" if spec.stages else ""
    return f"{spec.tile_rows} rows {spec.warps}x{spec.ctas_per_sm}{ring}, {plan.splits} splits"


def _chosen(plan: Plan) -> dict[str, int]:
    """What a plan decides; the rest of its kernel follows from the shape."""
    spec = plan.spec
    return {
        "columns": 8 * spec.column_tiles, "rows": spec.tile_rows, "warps": spec.warps, "ctas_per_sm": spec.ctas_per_sm,
        "heads": spec.heads, "stages": spec.stages, "splits": plan.splits, "grid": plan.grid,
    }  # fmt: skip


def record(study: Study) -> dict[str, Any]:
    """As JSON takes it, with every option of every shape: planners' rules can be derived from it."""
    return {
        "seed": study.seed, "count": study.count, **study.machine, "sources": sources.digest(), **study.summary(),
        "kernels": study.kernels, "compiled": study.compiled, "compile_seconds": round(study.compile_seconds, 2),
        "measure_seconds": round(sum(outcome.seconds for outcome in study.outcomes), 2),
        "seconds": round(study.seconds, 2),
        "shapes": [_of_shape(outcome) for outcome in study.outcomes],
    }  # fmt: skip


def _of_shape(outcome: Outcome) -> dict[str, Any]:
    """``candidates``: best first, with the microseconds of the last round that each came into (more rounds, more
    replays); ``planned_us`` and ``best_us`` were measured afterwards."""
    result, verdict = outcome.result, outcome.verdict
    return {
        **asdict(outcome.shape), "kv_bytes": outcome.shape.kv_bytes, "loss": verdict.loss, "noise": verdict.noise,
        "cold": result.cold, "options": len(result.tried), "seconds": round(outcome.seconds, 2),
        "planned": _chosen(result.planned), "planned_us": verdict.planned_us, "planned_again_us": verdict.again_us,
        "best": _chosen(verdict.best), "best_us": verdict.best_us,
        "candidates": [{**_chosen(one.plan), "us": round(one.us, 3), "rounds": one.rounds} for one in result.tried],
    }  # fmt: skip
