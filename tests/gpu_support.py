"""What the GPU tests share. ``cp`` is CuPy, or None where nothing could run anyway (conftest.py then skips)."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from cupy_fp8kv import dispatch
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.jit.device import device_info, has_gpu

cp: Any = importlib.import_module("cupy") if has_gpu() else None

#: As integers of the same size: what CuPy cannot be given directly.
_CARRIERS = {np.dtype(ml_dtypes.bfloat16): np.uint16}


def to_cupy(values: Any) -> Any:
    carrier = _CARRIERS.get(values.dtype)
    return cp.asarray(values) if carrier is None else cp.asarray(values.view(carrier)).view(values.dtype)


def to_host(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, cp.ndarray):
        carrier = _CARRIERS.get(array.dtype)
        if carrier is None:
            return cp.asnumpy(array)
        return cp.asnumpy(cp.ascontiguousarray(array).view(carrier)).view(array.dtype)
    if type(array).__module__.startswith("torch"):
        name = str(array.dtype).removeprefix("torch.")
        if name == "bfloat16":
            bits = array.detach().cpu().contiguous().view(importlib.import_module("torch").int16)
            return bits.numpy().view(ml_dtypes.bfloat16)
        if name.startswith("float8"):
            return array.detach().cpu().view(importlib.import_module("torch").uint8).numpy()
        return array.detach().cpu().numpy()
    return np.asarray(array)


def assert_same_bits(got: Any, want: Any, name: str = "result") -> None:
    got, want = np.ascontiguousarray(to_host(got)), np.ascontiguousarray(to_host(want))
    facts = [(array.dtype, array.shape) for array in (got, want)]
    assert facts[0] == facts[1], f"{name}: {facts[0]}, expected {facts[1]}"
    differ = np.flatnonzero((got.view(np.uint8) != want.view(np.uint8)).ravel())
    assert not len(differ), f"{name}: {len(differ)} of {got.nbytes} bytes differ, the first at byte {differ[0]}"


def poison_pool(*sizes: int) -> None:
    """Leave NaN in the freed memory that the next allocations of these sizes get."""
    blocks = [cp.full(size, 0xFF, np.uint8) for size in sizes for _ in range(2) if size]
    cp.cuda.get_current_stream().synchronize()
    del blocks


def device() -> Any:
    return device_info(cp.cuda.runtime.getDevice())


@contextmanager
def planned(monkeypatch: Any, change: Any) -> Any:
    """Inside, every call is planned anew and its plan goes through ``change``; gives the list of plans."""
    plans: list[Any] = []
    original = cuda.plan_decode

    def changed(problem: Any, info: Any) -> Any:
        plans.append(change(original(problem, info)))
        return plans[-1]

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "plan_decode", changed)
        patch.setattr(dispatch, "_prepared", {})
        yield plans


_SPIN = r"""
extern "C" __global__ void spin(unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < nanoseconds);
}
"""


@cache
def _spin_kernel() -> Any:
    kernel = cp.RawKernel(_SPIN, "spin")
    kernel((1,), (1,), (np.uint64(0),))  # compiled and loaded here, not in the middle of what a test measures
    cp.cuda.runtime.deviceSynchronize()
    return kernel


def spin(milliseconds: float) -> None:
    """Keep CuPy's current stream busy for so long."""
    _spin_kernel()((1,), (1,), (np.uint64(milliseconds * 1e6),))


def warm_spin() -> None:
    _spin_kernel()
