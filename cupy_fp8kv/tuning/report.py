"""What ``python -m cupy_fp8kv tune`` does and prints."""

from __future__ import annotations

from typing import Any

from rich.progress import TaskID
from rich.text import Text

from .. import terminal
from ..bench.inputs import Filler, InputSets
from ..bench.suites import Shape
from . import store
from .measure import Call
from .search import Timed
from .tune import Progress, TuneResult, keep, tune_call

#: Rows of a table; what was tried beyond them is in the record.
_MOST_ROWS = 16


def call_of(shape: Shape, filler: Filler) -> Call:
    """A call of this shape, on caches of its own."""
    inputs = InputSets.of(shape, filler, sets=1)
    (q,), ((k, v),) = inputs.qs, inputs.caches
    return Call.padded(q, k, v, shape.kv_layout, kv_format=(shape.k, shape.v), **inputs.scales)


class Bars:
    """A progress bar for each thing that ``tune`` reports to do."""

    def __init__(self, bars: Any):
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks or done == 1:
            if what in self._tasks:
                self._bars.remove_task(self._tasks[what])
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)


def run(shape: Shape, save: bool) -> TuneResult:
    with terminal.progress() as bars:
        progress: Progress = Bars(bars)
        result = tune_call(call_of(shape, Filler()), progress)
    return keep(result) if save else result


def clear() -> str:
    """Remove all tuned plans; what to say of it."""
    return f"removed {store.clear()} tuned plans from {store.folder()}"


def remark(one: Timed, result: TuneResult) -> str:
    marks = [name for name, plan in (("planned", result.planned), ("tuned", result.plan)) if one.plan is plan]
    return ", ".join(marks)


def render(result: TuneResult) -> list[Any]:
    """The best options and the planner's choice, and what became of it."""
    table = terminal.table(
        str(result.problem), "kernel", "splits", "CTAs", "µs", "to the best", "rounds", "",
        caption="medians of CUDA graph replays over copies of the caches; every result was held against the planner's",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    shown = list(result.tried[:_MOST_ROWS])
    shown += [one for one in result.tried[_MOST_ROWS:] if one.plan in (result.planned, result.plan)]
    best = result.tried[0].us
    for one in shown:
        said = remark(one, result)
        table.add_row(
            str(one.plan.spec), str(one.plan.splits), str(one.plan.grid), f"{one.us:.2f}", f"{one.us / best - 1:+.1%}",
            str(one.rounds), Text(said, style="green" if "tuned" in said else ""),
        )  # fmt: skip
    return [table, str(result)]
