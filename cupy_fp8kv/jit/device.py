"""Devices, as far as compiling and planning need them. The only place that asks CuPy what there is."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
import threading
from typing import Any

from ..plan import DeviceInfo


@functools.cache
def cupy_problem() -> str | None:
    """Why CuPy cannot run a kernel here, or None if it can."""
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return 'CuPy is not installed: pip install "cupy_fp8kv[cuda12]" (or cuda13)'
        return f"CuPy cannot be imported: {error}"
    except Exception as error:  # a broken installation raises whatever it likes
        return f"CuPy cannot be imported: {type(error).__name__}: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    if not count:
        return "no CUDA device"
    capability = int(cupy.cuda.Device(0).compute_capability)
    return None if capability >= 80 else f"device 0 is sm_{capability}, and kernels need sm_80 or later"


def has_gpu() -> bool:
    return cupy_problem() is None


def require_cupy() -> Any:
    """CuPy, on a machine where it can run kernels; RuntimeError that says what is missing otherwise."""
    problem = cupy_problem()
    if problem:
        raise RuntimeError(f"the CUDA backend cannot run: {problem}")
    return importlib.import_module("cupy")


@functools.cache
def driver() -> Any:
    """CuPy's bindings of the driver."""
    require_cupy()
    return importlib.import_module("cupy_backends.cuda.api.driver")


@functools.cache
def driver_function(name: str, arguments: int) -> Any:
    """A function of the driver that CuPy does not bind, or None with a driver that lacks it.

    It takes that many ``arguments``, addresses; with 0 it takes whatever ctypes passes on, converted by the caller.
    """
    try:
        function = getattr(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"), name)
    except (OSError, AttributeError):
        return None
    if arguments:
        function.argtypes = (ctypes.c_void_p,) * arguments
    return function


def check_backend(backend: Any) -> None:
    """ValueError for anything but the names of the two backends and None."""
    if not (backend is None or (isinstance(backend, str) and backend in ("cuda", "numpy"))):
        raise ValueError(f"backend: expected 'cuda', 'numpy' or None, got {backend!r}")


def refuse_capture(stream: int, argument: str, expected: str = "a device array, not one on the host") -> None:
    """RuntimeError while ``stream`` is captured: a graph must not hold a copy that only lives as long as the call."""
    if require_cupy().cuda.runtime.streamIsCapturing(stream):
        raise RuntimeError(f"{argument}: expected {expected}, while a graph is captured")


@functools.cache
def device_info(index: int) -> DeviceInfo:
    """What the planner needs to know of CUDA device ``index``. RuntimeError if it is too old."""
    cuda = require_cupy().cuda
    runtime = cuda.runtime
    # One by one: all properties together take the runtime milliseconds, because some are asked of the device.
    return DeviceInfo(
        name=_device_name(runtime, index),
        arch=int(cuda.Device(index).compute_capability),
        sm_count=runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, index),
        shared_per_block=runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
    )


def _device_name(runtime: Any, index: int) -> str:
    name = ctypes.create_string_buffer(256)
    get_name = driver_function("cuDeviceGetName", 3)
    if get_name is None or get_name(ctypes.addressof(name), len(name), index):
        return runtime.getDeviceProperties(index)["name"].decode()
    return name.value.decode()


class _Contexts(threading.local):
    """The devices that this thread has made a context for."""

    def __init__(self) -> None:
        self.ready: set[int] = set()


contexts = _Contexts()


def ensure_context(runtime: Any, index: int) -> None:
    """Make the device's context for this thread: launches go to the driver, which does not make one by itself."""
    if index not in contexts.ready:
        previous = runtime.getDevice()
        runtime.setDevice(index)
        if previous != index:
            runtime.setDevice(previous)
        contexts.ready.add(index)


class on_device:
    """Makes a device current for a launch; costs one query when it already is."""

    __slots__ = ("_index", "_previous", "_runtime")

    def __init__(self, runtime: Any, index: int):
        self._runtime = runtime
        self._index = index

    def __enter__(self) -> None:
        self._previous = self._runtime.getDevice()
        if self._previous != self._index:
            self._runtime.setDevice(self._index)

    def __exit__(self, *exc: object) -> None:
        if self._previous != self._index:
            self._runtime.setDevice(self._previous)
