"""The planner study: random shapes, the planner's choice against the best of all options."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from .. import terminal
from ..bench.inputs import Filler
from ..bench.measure import machine_record
from ..bench.suites import Shape
from ..formats import KV_FORMATS
from ..jit import sources
from ..jit.device import device_info, require_cupy
from ..problem import DecodeProblem, Facts, bind_decode
from .options import plan_options
from .report import Bars, call_of
from .tune import TuneResult, compile_plans, counter, tune_call

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

    @property
    def loss(self) -> float:
        """How much longer the planner's choice takes than the best option: 0.02 for 2 %."""
        return self.result.planned_us / self.result.best_us - 1


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


def run(shapes: Sequence[Shape], seconds: float) -> list[Outcome]:
    """Search every shape, as many as ``seconds`` suffice for. terminal.CommandError if that is none."""
    cupy, started = require_cupy(), time.perf_counter()
    device = cupy.cuda.runtime.getDevice()
    outcomes = []
    with terminal.progress() as bars:
        task, parts = bars.add_task("shapes", total=len(shapes)), Bars(bars)
        # All at once, so that no core waits for a shape's last kernel.
        plans = [plan for shape in shapes for plan in plan_options(problem_of(shape), device_info(device))]
        compile_plans(plans, "f16", device, counter("compiling", parts))
        filler = Filler()
        for shape in shapes:
            if time.perf_counter() - started > seconds:
                break
            outcomes.append(Outcome(shape, tune_call(call_of(shape, filler), parts)))
            cupy.get_default_memory_pool().free_all_blocks()
            bars.advance(task)
    if not outcomes:
        raise terminal.CommandError(f"no shape was searched in {seconds:g} seconds: compiling took all of them")
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    losses = [outcome.loss for outcome in outcomes]
    return {"median_loss": statistics.median(losses), "worst_loss": max(losses)}


def render(outcomes: Sequence[Outcome], wanted: int, seed: int) -> Any:
    machine, told = machine_record(), summary(outcomes)
    left_out = f"; {wanted - len(outcomes)} shapes were left out for want of time" if wanted > len(outcomes) else ""
    table = terminal.table(
        f"planner study, seed {seed}: {machine['device']}, median loss {told['median_loss']:.2%}, "
        f"worst {told['worst_loss']:.2%} of {len(outcomes)} shapes{left_out}",
        "shape", "requests × rows", "heads", "D", "KV MB", "planned µs", "best µs", "loss", "options", "planned",
        "best",
        caption=f"loss: the planner's choice against the best option, in turn; wanted: median {TARGETS[0]:.0%}, "
        f"worst {TARGETS[1]:.0%}",
    )  # fmt: skip
    for column in table.columns[-2:]:
        column.justify = "left"
    for outcome in outcomes:
        shape, result = outcome.shape, outcome.result
        table.add_row(
            shape.name, f"{shape.batch} × {shape.kv_len}", f"{shape.num_qo_heads}/{shape.num_kv_heads}",
            str(shape.head_dim), f"{shape.kv_bytes / 1e6:.1f}", f"{result.planned_us:.2f}", f"{result.best_us:.2f}",
            Text(f"{outcome.loss:.2%}", style="red" if outcome.loss > TARGETS[1] else ""), str(len(result.tried)),
            _short(result.planned), _short(result.tried[0].plan),
        )  # fmt: skip
    return table


def _short(plan: Any) -> str:
    spec = plan.spec
    ring = f" ring {spec.heads} heads {spec.stages} stages" if spec.stages else ""
    return f"{spec.tile_rows} rows {spec.warps}x{spec.ctas_per_sm}{ring}, {plan.splits} splits"


def record(outcomes: Sequence[Outcome], wanted: int, seed: int) -> dict[str, Any]:
    """As JSON takes it: of each shape only the last round."""
    return {
        "seed": seed, "count": wanted, **machine_record(), "sources": sources.digest(), **summary(outcomes),
        "shapes": [
            {
                **asdict(outcome.shape), "kv_bytes": outcome.shape.kv_bytes, "loss": outcome.loss,
                "options": len(outcome.result.tried), "cold": outcome.result.cold,
                "planned": _short(outcome.result.planned), "planned_us": outcome.result.planned_us,
                "best": _short(outcome.result.tried[0].plan), "best_us": outcome.result.best_us,
                "seconds": round(outcome.result.seconds, 2),
                "last_round": [
                    {"plan": _short(one.plan), "spec": str(one.plan.spec), "splits": one.plan.splits, "us": one.us}
                    for one in outcome.result.tried
                    if one.rounds == outcome.result.tried[0].rounds
                ],
            }
            for outcome in outcomes
        ],
    }  # fmt: skip
