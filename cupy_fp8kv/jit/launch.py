"""Launching: the driver's call with a prebuilt argument block, and its form for a kernel that starts early."""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

from .compiler import Kernel
from .device import device_info, require_cupy
from .params import ParamBlock

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@functools.cache
def launch_kernel() -> Any:
    """CuPy's binding of ``cuLaunchKernel``: integers in, some four microseconds."""
    require_cupy()
    return importlib.import_module("cupy_backends.cuda.api.driver").launchKernel


@functools.cache
def _launch_ex() -> Any:
    """``cuLaunchKernelEx``, which CuPy does not bind, or None with a driver that lacks it."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p,) * 4
    return function


class Launch:
    """A kernel with its grid and argument block, ready to go.

    A ``dependent`` kernel may, from sm_90 on, start while the kernel before it on the stream still runs (programmatic
    dependent launch): it calls ``ptx::wait_for_previous_kernel`` before it touches memory. Elsewhere it is launched
    plainly, with the same result.
    """

    __slots__ = ("_arguments", "_config", "_config_address", "_handle", "_launch", "_launch_ex", "_spec", "params")

    def __init__(self, kernel: Kernel, grid: int, params: ParamBlock, dependent: bool = False):
        self.params = params
        self._spec = kernel.spec
        self._handle = kernel.handle
        self._launch = launch_kernel()
        self._launch_ex = _launch_ex() if dependent and device_info(kernel.device).arch >= 90 else None
        # Grid, block, shared memory: what stands between the function and the stream in a launch.
        self._arguments = (kernel.handle, grid, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes)
        attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(*self._arguments[1:], attributes=ctypes.pointer(attribute), attribute_count=1)
        self._config_address = ctypes.addressof(self._config)

    def __call__(self, stream: int, *values: int | float) -> None:
        """Launch on ``stream``; ``values`` are the leading fields of the argument block."""
        params = self.params
        with params.lock:
            params.write(*values)
            if self._launch_ex is None:
                self._launch(*self._arguments, stream, params.address, 0)
                return
            self._config.stream = stream
            status = self._launch_ex(self._config_address, self._handle, params.address, 0)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx failed on {self._spec} with CUDA driver error {status}")
