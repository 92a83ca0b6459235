"""Launching: the driver's call with a prebuilt argument block, and its form for a kernel that starts early."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from .compiler import Kernel
from .device import device_info, driver, driver_function
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
    return driver().launchKernel


def capture_id(stream: int) -> int:
    """The number of the capture that ``stream`` takes part in; each capture of a process has its own."""
    status, number = ctypes.c_int(0), ctypes.c_ulonglong(0)
    get_info = driver_function("cuStreamGetCaptureInfo_v2", 6)
    error = 1
    if get_info is not None:
        error = get_info(stream, ctypes.addressof(status), ctypes.addressof(number), None, None, None)
    if error or status.value != 1:
        raise RuntimeError(f"the driver does not tell which capture stream {stream:#x} is in (error {error})")
    return number.value


class Launch:
    """A kernel with its grid and argument block, ready to go.

    A ``dependent`` kernel may, from sm_90 on, start while the kernel before it on the stream still runs (programmatic
    dependent launch): it calls ``ptx::wait_for_previous_kernel`` before it touches memory. Elsewhere it is launched
    plainly, with the same result.
    """

    __slots__ = (
        "_attribute", "_block", "_config", "_ex_arguments", "_launch", "_launch_ex", "_params", "_spec", "_stream",
    )  # fmt: skip

    def __init__(self, kernel: Kernel, grid: int, params: ParamBlock, dependent: bool = False):
        self._params = params  # keeps the block
        self._spec = kernel.spec
        self._block = params.address
        early = dependent and device_info(kernel.device).arch >= 90
        # Arguments that ctypes need not convert take half the time of numbers.
        self._launch_ex = driver_function("cuLaunchKernelEx", 0) if early else None
        # Grid, block, shared memory: what stands between the function and the stream in a launch.
        sizes = (grid, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes)
        self._launch = functools.partial(launch_kernel(), kernel.handle, *sizes)
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(*sizes, attributes=ctypes.pointer(self._attribute), attribute_count=1)
        #: The stream that the configuration names.
        self._stream = 0
        addresses = (ctypes.addressof(self._config), kernel.handle, self._block)
        self._ex_arguments = (*(ctypes.c_void_p.from_param(address) for address in addresses), None)

    def start(self, stream: int) -> None:
        """Launch on ``stream``. Nobody else may have written into the argument block since it was filled."""
        if self._launch_ex is None:
            self._launch(stream, self._block, 0)
            return
        if stream != self._stream:
            self._config.stream = self._stream = stream
        status = self._launch_ex(*self._ex_arguments)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx failed on {self._spec} with CUDA driver error {status}")

    __call__ = start  # Python calls a method sooner than an object
