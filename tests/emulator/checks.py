"""What the emulator's tests share: decode cases in the emulator's memory, and which of its bytes a call may read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from cases import Arrays, Case, build

from cupy_fp8kv.backends.cuda import PreparedDecode
from cupy_fp8kv.jit.spec import ScheduleSpec
from cupy_fp8kv.plan import least_turns
from cupy_fp8kv.schedule import read_list, work_list

from . import EmulatedArray, Emulator, allocate, library

#: Split over CTAs and merged; and short requests whose last tile is not full.
SPLIT = Case(group=5, num_kv_heads=1, batch=1, kv_len=1500, seed=2)
TAIL = Case(group=3, num_kv_heads=2, batch=2, kv_len=61, kv_lens="device", lens=(61, 18), view="padded")


def move(values: np.ndarray) -> Any:
    """A copy in an allocation of its own."""
    copy = allocate(values.nbytes).view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def readable_rows(case: Case, arrays: Arrays, moved: Arrays) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which elements of the buffers of K and V the call may read, as pairs for ``Emulator.watching``."""
    lens = arrays.kv_lens if arrays.kv_lens is not None else [case.kv_len] * case.batch
    for placed in (moved.k, moved.v):
        mask = dataclasses.replace(placed, base=np.zeros(placed.base.shape, bool))
        view = mask.view if case.layout == "NHD" else mask.view.swapaxes(1, 2)
        for request, length in enumerate(lens):
            first = 0 if case.window_left < 0 else max(0, length - 1 - case.window_left)
            view[request, first:length] = True
        yield np.asarray(placed.base), mask.base


def run(machine: Emulator, case: Case, arrays: Arrays | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Check a case, with every read of K and V, and return (out, lse)."""
    arrays = arrays or build(case)
    moved = arrays.to(move)
    with machine.watching(*readable_rows(case, arrays, moved)):
        out, lse = moved.call()
    assert isinstance(out, EmulatedArray)
    if case.given_out:
        written = np.asarray(moved.out.outside).tobytes() != np.asarray(arrays.out.outside).tobytes()
        assert not written, "memory around out was written"
    arrays.check(np.asarray(out), np.asarray(lse))
    return np.asarray(out), np.asarray(lse)


def made_list(lens: Any, most: int, window_left: int = -1, num_kv_heads: int = 1) -> tuple[Any, Any]:
    """The work list of some lengths below ``most``: what the kernel makes, and what it is defined to be."""
    case = Case(batch=len(lens), kv_len=most, num_kv_heads=num_kv_heads, kv_lens="device", window_left=window_left)
    prepared = PreparedDecode(case.problem, 0, (0, 0))
    bounds, spec = prepared.plan.bounds, prepared.plan.spec
    assert bounds is not None
    memory, kv_lens = allocate(bounds.nbytes), move(np.array(lens, np.int32))
    prepared.schedule(library, kv_lens.ctypes.data, window_left, memory.ctypes.data)
    want = work_list(
        np.clip(lens, 0, most).tolist(), window_left=window_left, turn_rows=spec.turn_rows, parts=bounds.parts,
        least_turns=least_turns(spec), threads=ScheduleSpec.of_batch(len(lens)).threads,
    )  # fmt: skip
    made = read_list(np.asarray(memory), bounds)
    assert len(made[0]) <= bounds.entries and len(made[1]) <= bounds.split_requests
    return made, want
