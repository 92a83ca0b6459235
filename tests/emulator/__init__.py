"""The CUDA backend on a CPU: the kernels' own text, compiled by g++ over a host version of the one PTX header.

Everything but the module and the launch is the product's: boundary, checks, plan, argument block, order of launches.
Test equipment, not a backend for users: a decode of a few hundred rows takes milliseconds, not microseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cupy_fp8kv import arrays, dispatch
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.jit import compiler, launch, sources
from cupy_fp8kv.jit import device as jit_device
from cupy_fp8kv.plan import DeviceInfo

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-x", "c++"]
#: Few SMs, so that small problems take several waves, and a few rows are split.
DEVICE = DeviceInfo("emulated", arch=89, sm_count=6, shared_per_block=101376)


class EmulatedArray(np.ndarray):
    """A NumPy array that counts as one on device 0."""


def emulated(array: np.ndarray) -> EmulatedArray:
    return np.asarray(array).view(EmulatedArray)


class _Library(arrays.NumpyLibrary):
    name = "emulated"

    def read(self, array: Any) -> tuple[int, Any]:
        return array.ctypes.data, (array.dtype, array.shape, array.strides)

    def facts(self, signature: Any) -> Any:
        return super().facts(signature)._replace(device=0, library=self.name)

    def stream(self, device: int) -> int:
        return 0

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> tuple[Any, int]:
        size = int(np.prod(shape)) * arrays.numpy_dtype(dtype).itemsize
        raw = np.full(size + 64, 0xFF, np.uint8)  # NaN: what is not written shows
        start = -raw.ctypes.data % 64
        array = emulated(raw[start : start + size].view(arrays.numpy_dtype(dtype)).reshape(shape))
        return array, array.ctypes.data

    def workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        return self.empty((nbytes,), "uint8", device)

    def from_numpy(self, values: np.ndarray, device: int) -> Any:
        array, _ = self.empty(values.shape, values.dtype.name, device)
        array[...] = values
        return array

    def as_float32(self, array: Any) -> Any:
        return emulated(np.ascontiguousarray(array, np.float32))


class _Runtime:
    """What the backend asks of cupy.cuda.runtime."""

    def getDevice(self) -> int:  # noqa: N802
        return 0

    def setDevice(self, index: int) -> None:  # noqa: N802
        assert index == 0

    def memsetAsync(self, address: int, value: int, size: int, stream: int) -> None:  # noqa: N802
        ctypes.memset(address, value, size)

    def streamIsCapturing(self, stream: int) -> bool:  # noqa: N802
        return False


class _Watched(ctypes.Structure):
    _fields_ = (("base", ctypes.c_ulonglong), ("size", ctypes.c_ulonglong), ("readable", ctypes.c_void_p))


class Emulator:
    """Compiles specialisations into ``folder`` and stands in for the driver."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seed = 1
        self.compiled: dict[Any, compiler.Kernel] = {}
        self._entries: list[Any] = []
        self.launches: list[tuple[str, int]] = []
        self._watched: list[tuple[Any, ...]] = []

    @contextmanager
    def watching(self, *pairs: tuple[np.ndarray, np.ndarray]) -> Any:
        """Inside, a read of an array's byte fails where the bool array beside it, of equal shape, is False."""
        for array, readable in pairs:
            bytes_readable = np.ascontiguousarray(np.repeat(readable[..., None], array.itemsize, -1).astype(np.uint8))
            entry = _Watched(array.ctypes.data, array.nbytes, bytes_readable.ctypes.data)
            self._watched.append((entry, array, bytes_readable))
        try:
            yield
        finally:
            self._watched.clear()

    def source(self, spec: Any) -> str:
        """The specialisation as NVRTC would get it, with the PTX header exchanged and a C entry behind it."""
        real = sources.FILES["base/ptx.cuh"]
        sources.FILES["base/ptx.cuh"] = (HERE / "ptx.cuh").read_text(encoding="utf-8")
        try:
            text = spec.source()
        finally:
            sources.FILES["base/ptx.cuh"] = real
        params = "QuantizeParams" if type(spec).__name__ == "QuantizeSpec" else "DecodeParams"
        head = f'#line 1 "runtime.h"\n{(HERE / "runtime.h").read_text(encoding="utf-8")}\n#line 1 "specialisation"\n'
        return head + text + (
            f"\nstatic void emulated_entry(void* p) {{ {spec.entry}(*static_cast<const {params}*>(p)); }}\n"
            'extern "C" const char* emulated_launch(void* p, unsigned grid, unsigned threads, unsigned seed,\n'
            "                                       const emulator::Watched* watched, int count) {\n"
            "    emulator::watched = watched, emulator::watched_count = count;\n"
            "    return emulator::launch(emulated_entry, p, grid, threads, seed);\n}\n"
        )  # fmt: skip

    def load(self, spec: Any, device: int) -> compiler.Kernel:
        kernel = self.compiled.get(spec)
        if kernel is None:
            text = self.source(spec)
            name = self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
            library = name.with_suffix(".so")
            name.with_suffix(".cpp").write_text(text, encoding="utf-8")
            command = ["g++", *FLAGS, str(name.with_suffix(".cpp")), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ cannot compile {spec}:\n{done.stderr[:4000]}")
            entry = ctypes.CDLL(str(library)).emulated_launch
            entry.restype = ctypes.c_char_p
            entry.argtypes = (
                ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int,
            )  # fmt: skip
            self._entries.append(entry)
            handle = len(self._entries) - 1
            kernel = self.compiled[spec] = compiler.Kernel(spec, 0, handle, spec.threads, spec.shared_bytes, entry)
        return kernel

    def launch_kernel(self, handle: int, grid: int, *rest: int) -> None:
        """In the form of the driver's cuLaunchKernel, as the backend calls it."""
        _, _, threads, _, _, _, _, arguments, _ = rest
        self.launches.append((str(list(self.compiled)[handle]), grid))
        params = ctypes.c_void_p.from_address(arguments).value
        watched = (_Watched * len(self._watched))(*(entry for entry, *_ in self._watched))
        error = self._entries[handle](params, grid, threads, self.seed, watched, len(watched))
        if error:
            raise RuntimeError(f"emulated launch failed: {error.decode()}")

    @contextmanager
    def installed(self, monkeypatch: Any) -> Any:
        """The CUDA backend runs here, for arrays made by :func:`emulated`."""
        runtime = _Runtime()
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "_by_type", {**arrays._by_type, EmulatedArray: _Library()})
            patch.setattr(compiler, "load", self.load)
            patch.setattr(launch, "launch_kernel", lambda: self.launch_kernel)
            patch.setattr(launch, "device_info", lambda index: DEVICE)
            patch.setattr(cuda, "device_info", lambda index: DEVICE)
            for module in (cuda, jit_device):
                patch.setattr(module, "require_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
            for module in (dispatch, importlib.import_module("cupy_fp8kv.quantize")):
                patch.setattr(module, "has_gpu", lambda: True)
            dispatch._prepared.clear()
            yield self
        dispatch._prepared.clear()
