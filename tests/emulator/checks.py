"""What the emulator's tests share: decode cases in the emulator's memory, and which of its bytes a call may read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from cases import Arrays, Case, build

from . import EmulatedArray, Emulator, allocate

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
