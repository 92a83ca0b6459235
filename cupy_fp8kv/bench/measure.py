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
from .operation import Operation
from .peers import Peer
from .report import CacheRow, Report, Row
from .suites import Shape
from .timing import CACHE_METHOD, METHOD, host_us, sets_needed, time_calls


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


def measure_operation(operation: Operation, filler: Filler, reader: ReadLimit) -> CacheRow:
    cupy = require_cupy()
    nbytes = operation.read_bytes + operation.written_bytes
    sets = sets_needed(cupy, nbytes)
    prepared = operation.prepare(filler, sets)
    timing = time_calls(cupy, prepared.call, sets, nbytes)
    error = prepared.error()
    host = host_us(cupy, prepared.call, sets)
    del prepared
    cupy.get_default_memory_pool().free_all_blocks()
    half = nbytes // 2
    pairs = [
        (filler.cache((half,), KV_FORMATS["e4m3"], 2 * s), filler.cache((half,), KV_FORMATS["e4m3"], 2 * s + 1))
        for s in range(sets)
    ]
    if operation.written_bytes:
        limit_us, limit_by = _copy_us(pairs), "cudaMemcpyAsync"
    else:
        limit = reader.measure(pairs)
        limit_us, limit_by = limit.us, limit.variant
    return CacheRow(
        operation.name, operation.what, operation.read_bytes, operation.written_bytes, limit_us, limit_by, timing.us,
        timing.low, timing.high, host, error, operation.tolerance, operation.against,
    )  # fmt: skip


def _copy_us(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Copying the first array of each pair to the second one."""
    cupy = require_cupy()
    runtime = cupy.cuda.runtime

    def copy(s: int) -> None:
        (source, target), stream = pairs[s], cupy.cuda.get_current_stream().ptr
        runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, runtime.memcpyDeviceToDevice, stream)

    return time_calls(cupy, copy, len(pairs), 2 * pairs[0][0].nbytes, replays=31).us


def held_against_each_other(rows: Sequence[CacheRow]) -> list[CacheRow]:
    """With the times of the rows that others name."""
    times = {row.name: row.us for row in rows}
    return [replace(row, against_us=times.get(row.against)) for row in rows]


def _fp16_us(shape: Shape, filler: Filler, sets: int) -> float | None:
    """The time over a cache of fp16; None where that does not fit, though FP8 does."""
    cupy = require_cupy()
    try:
        wide = InputSets.in_fp16(shape, filler, sets)
    except cupy.cuda.memory.OutOfMemoryError:
        return None
    return time_calls(cupy, wide.call, len(wide), wide.shape.kv_bytes).us


def run(suite: str, cases: Sequence[Any], *, fp16: bool, peers: Sequence[Peer]) -> Report:
    """Measure all shapes, then each peer on them; or all operations of suite cache, which has no peers.

    terminal.CommandError if one does not fit into the memory.
    """
    cupy = require_cupy()
    filler, reader = Filler(), ReadLimit()
    rows: list[Any] = []
    with terminal.progress() as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=case.name)
            try:
                if suite == "cache":
                    rows.append(measure_operation(case, filler, reader))
                else:
                    rows.append(measure(case, filler, reader, fp16=fp16))
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise terminal.CommandError(f"{case.name} does not fit into the device's memory: {error}") from error
            cupy.get_default_memory_pool().free_all_blocks()
            bar.advance(task)
    del filler, reader
    cupy.get_default_memory_pool().free_all_blocks()  # the peers need the memory
    if suite == "cache":
        return Report(suite, machine_record(), sources.digest(), CACHE_METHOD, tuple(held_against_each_other(rows)))
    infos, figures = peer_process.measure(peers, cases)
    measured = tuple(
        replace(row, peers={name: of[row.name] for name, of in figures.items() if row.name in of}) for row in rows
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
