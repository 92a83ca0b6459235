"""Measuring: every shape of a suite against the read limit of the same run, and the peers after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .. import info, terminal
from ..formats import KV_FORMATS
from ..jit import sources
from ..jit.device import require_cupy
from . import peer_process
from .inputs import Filler, InputSets
from .limit import ReadLimit
from .peers import Peer
from .report import Report, Row
from .suites import Shape
from .timing import METHOD, host_us, time_calls


def measure(shape: Shape, filler: Filler, reader: ReadLimit, *, fp16: bool) -> Row:
    cupy = require_cupy()
    inputs = InputSets.of(shape, filler)
    limit = reader.measure(inputs.pieces, inputs.pages)
    timing = time_calls(cupy, inputs.call, len(inputs), shape.kv_bytes)
    error = inputs.error()  # of a replay's result
    host = host_us(cupy, inputs.call, len(inputs))
    plan_call, plan_us, plan_host = inputs.plan_call(), None, None
    if plan_call:
        inputs.outs[-1].data.memset(0xFF, inputs.outs[-1].nbytes)  # NaN, lest the results before pass for the plan's
        plan_us = time_calls(cupy, plan_call, len(inputs), shape.kv_bytes).us
        error = max(error, inputs.error())
        plan_host = host_us(cupy, plan_call, len(inputs))
    count = len(inputs)
    del inputs, plan_call
    fp16_us = None
    if fp16 and (KV_FORMATS[shape.k].is_fp8 or KV_FORMATS[shape.v].is_fp8):
        fp16_us = _fp16_us(shape, filler, count)
    return Row(
        shape, shape.kv_bytes, limit.us, limit.variant, timing.us, timing.low, timing.high, host, error, fp16_us,
        plan_us, plan_host,
    )  # fmt: skip


def _fp16_us(shape: Shape, filler: Filler, sets: int) -> float | None:
    """The time over a cache of fp16; None where that does not fit, though FP8 does."""
    cupy = require_cupy()
    try:
        wide = InputSets.in_fp16(shape, filler, sets)
    except cupy.cuda.memory.OutOfMemoryError:
        return None
    return time_calls(cupy, wide.call, len(wide), wide.shape.kv_bytes).us


def run(suite: str, shapes: Sequence[Shape], *, fp16: bool, peers: Sequence[Peer]) -> Report:
    """Measure all shapes, then each peer on them. terminal.CommandError if one does not fit into the memory."""
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
    del filler, reader
    cupy.get_default_memory_pool().free_all_blocks()  # the peers need the memory
    infos, figures = peer_process.measure(peers, shapes)
    measured = tuple(
        replace(row, peers={name: of[row.shape.name] for name, of in figures.items() if row.shape.name in of})
        for row in rows
    )
    return Report(suite, machine_record(), sources.digest(), METHOD, measured, infos)


def machine_record() -> dict[str, Any]:
    """The machine and the versions of a record: no paths, nothing personal. Without a GPU, no device."""
    facts = info.gather()
    device: dict[str, Any] = {"name": None, "arch": None, "sm_count": None, "memory_bytes": None}
    if facts["devices"]:
        device = facts["devices"][require_cupy().cuda.runtime.getDevice()]
    return {
        "device": device["name"], "arch": device["arch"], "sm_count": device["sm_count"],
        "memory_bytes": device["memory_bytes"],
        **{name: facts[name] for name in ("driver_cuda", "runtime_cuda", "nvrtc")},
        **{name: facts["versions"][name] for name in ("python", "cupy_fp8kv", "numpy", "cupy")},
    }  # fmt: skip
