"""The benchmark: every shape of a suite against the read limit of the same run, as a table and as a record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from .. import info, terminal
from ..formats import KV_FORMATS
from ..jit import sources
from ..jit.device import require_cupy
from .inputs import Filler, InputSets
from .limit import Limit, ReadLimit
from .suites import Shape
from .timing import METHOD, host_us, time_calls

#: Relative L2 that rounding the result to q's type may cost, with as much again for everything else.
TOLERANCES = {"f16": 5e-4, "bf16": 4e-3}


@dataclass(frozen=True)
class Row:
    """Times in microseconds; ``fraction`` is limit over ours. fp16 figures are None where they were not asked for."""

    shape: Shape
    kv_bytes: int
    limit: Limit
    us: float
    us_low: float
    us_high: float
    host_us: float
    error: float
    fp16_us: float | None

    @property
    def fraction(self) -> float:
        return self.limit.us / self.us

    @property
    def gb_per_second(self) -> float:
        return self.kv_bytes / self.us / 1e3

    @property
    def speedup(self) -> float | None:
        return None if self.fp16_us is None else self.fp16_us / self.us

    @property
    def wrong(self) -> bool:
        return not self.error <= TOLERANCES[self.shape.q]

    def record(self) -> dict[str, Any]:
        values = {**asdict(self.shape), **asdict(self)}
        del values["shape"]
        limit = values.pop("limit")
        return {
            **values, "limit_us": limit["us"], "limit_by": limit["variant"], "fraction": self.fraction,
            "gb_per_second": self.gb_per_second, "fp16_speedup": self.speedup,
        }  # fmt: skip


def measure(shape: Shape, filler: Filler, reader: ReadLimit, *, fp16: bool) -> Row:
    cupy = require_cupy()
    inputs = InputSets.of(shape, filler)
    limit = reader.measure(inputs.caches)
    timing = time_calls(cupy, inputs.call, len(inputs), shape.kv_bytes)
    error = inputs.error()  # of a replay's result
    host = host_us(cupy, inputs.call, len(inputs))
    fp16_us = None
    if fp16 and (KV_FORMATS[shape.k].is_fp8 or KV_FORMATS[shape.v].is_fp8):
        count = len(inputs)
        del inputs
        wide = InputSets.in_fp16(shape, filler, count)
        fp16_us = time_calls(cupy, wide.call, len(wide), wide.shape.kv_bytes).us
    return Row(shape, shape.kv_bytes, limit, timing.us, timing.low, timing.high, host, error, fp16_us)


def run(shapes: list[Shape], *, fp16: bool) -> list[Row]:
    """Measure all shapes. terminal.CommandError if one does not fit into the device's memory."""
    cupy = require_cupy()
    filler, reader = Filler(), ReadLimit()
    rows = []
    with terminal.progress() as bar:
        task = bar.add_task("", total=len(shapes))
        for shape in shapes:
            bar.update(task, description=shape.name)
            try:
                rows.append(measure(shape, filler, reader, fp16=fp16))
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise terminal.CommandError(f"{shape.name} does not fit into the device's memory: {error}") from error
            cupy.get_default_memory_pool().free_all_blocks()
            bar.advance(task)
    return rows


def render(rows: list[Row], suite: str) -> Any:
    machine = machine_record()
    table = terminal.table(
        f"{suite}: {machine['device']}, CuPy {machine['cupy']}, driver for CUDA {machine['driver_cuda']}",
        "shape", "KV MB", "limit µs", "ours µs", "of limit", "GB/s", "fp16 cache µs", "speedup", "host µs", "error",
        caption=METHOD,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.shape.name, f"{row.kv_bytes / 1e6:.1f}", f"{row.limit.us:.2f}", f"{row.us:.2f}", f"{row.fraction:.3f}",
            f"{row.gb_per_second:.0f}", "-" if row.fp16_us is None else f"{row.fp16_us:.2f}",
            "-" if row.speedup is None else f"{row.speedup:.2f}", f"{row.host_us:.1f}",
            Text(f"{row.error:.1e}", style="red" if row.wrong else ""),
        )  # fmt: skip
    return table


def machine_record() -> dict[str, Any]:
    """The machine and the versions of a record: no paths, nothing personal."""
    facts = info.gather()
    device = facts["devices"][require_cupy().cuda.runtime.getDevice()]
    return {
        "device": device["name"], "arch": device["arch"], "sm_count": device["sm_count"],
        "memory_bytes": device["memory_bytes"],
        **{name: facts[name] for name in ("driver_cuda", "runtime_cuda", "nvrtc")},
        **{name: facts["versions"][name] for name in ("python", "cupy_fp8kv", "numpy", "cupy")},
    }  # fmt: skip


def record(rows: list[Row], suite: str) -> dict[str, Any]:
    return {
        "suite": suite, **machine_record(), "sources": sources.digest(), "method": METHOD,
        "tolerances": TOLERANCES, "rows": [row.record() for row in rows],
    }  # fmt: skip
