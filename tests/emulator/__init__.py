"""The CUDA backend on a CPU: the kernels' own text, compiled by a C++ compiler over a host version of the PTX header.

Everything but the module and the launch is the product's: boundary, checks, plan, argument block, order of launches.
Test equipment, not a backend for users: a decode of a few hundred rows takes milliseconds, not microseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import re
import sys
import tempfile
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cupy_fp8kv import arrays, dispatch, operands
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.jit import compiler, launch, sources, tensor_map
from cupy_fp8kv.jit import device as jit_device
from cupy_fp8kv.plan import DeviceInfo

from . import toolchain

HERE = Path(__file__).parent
#: Few SMs, so that small problems take several waves, and a few rows are split.
DEVICE = DeviceInfo("emulated", arch=89, sm_count=6, shared_per_block=101376)


#: One with a copy engine and shared memory for a ring. Which launch it allows is not the point: they stay plain.
HOPPER = DeviceInfo("emulated", arch=90, sm_count=6, shared_per_block=232448)


class EmulatedArray(np.ndarray):
    """A NumPy array that counts as one on device 0."""


def emulated(array: np.ndarray) -> EmulatedArray:
    return np.asarray(array).view(EmulatedArray)


#: Bytes before and after an array that nobody may touch, at a multiple of what rows may start at.
_GUARD = 8192


def allocate(size: int) -> EmulatedArray:
    """``size`` bytes of NaN, so that what is not written shows, between guards that AddressSanitizer knows.

    Guards of our own rather than the allocator's: a write that is reported happens all the same.
    """
    raw = np.full(size + 2 * _GUARD, 0xFF, np.uint8)
    poison = getattr(ctypes.CDLL(None), "__asan_poison_memory_region", None)
    if poison is not None:
        unpoison = ctypes.CDLL(None).__asan_unpoison_memory_region
        poison.argtypes = unpoison.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        poison(raw.ctypes.data, _GUARD)
        poison(raw.ctypes.data + _GUARD + size, _GUARD)
        weakref.finalize(raw, unpoison, raw.ctypes.data, raw.nbytes)
    return emulated(raw[_GUARD : _GUARD + size])


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
        array = allocate(size).view(arrays.numpy_dtype(dtype)).reshape(shape)
        return array, array.ctypes.data

    def workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        return self.empty((nbytes,), "uint8", device)

    def from_numpy(self, values: np.ndarray, device: int) -> Any:
        array, _ = self.empty(values.shape, values.dtype.name, device)
        array[...] = values
        return array

    def as_float32(self, array: Any) -> Any:
        return emulated(np.ascontiguousarray(array, np.float32))


library = _Library()


class _Runtime:
    """What the backend asks of cupy.cuda.runtime."""

    def getDevice(self) -> int:  # noqa: N802
        return 0

    def setDevice(self, index: int) -> None:  # noqa: N802
        assert index == 0

    def memsetAsync(self, address: int, value: int, size: int, stream: int) -> None:  # noqa: N802
        ctypes.memset(address, value, size)

    def memcpyAsync(self, to: int, address: int, size: int, kind: int, stream: int) -> None:  # noqa: N802
        assert kind == 3  # device to device
        ctypes.memmove(to, address, size)

    def streamIsCapturing(self, stream: int) -> bool:  # noqa: N802
        return False


class _BoxMap(ctypes.Structure):
    """BoxMap of runtime.cpp."""

    _fields_ = (
        ("address", ctypes.c_ulonglong), ("strides", ctypes.c_ulonglong * 4), ("sizes", ctypes.c_uint * 5),
        ("box", ctypes.c_uint * 5), ("swizzle_bytes", ctypes.c_uint),
    )  # fmt: skip


def _encode_tiled(
    to: int, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> None:
    """In the place of tensor_map.encode_tiled."""
    assert to % 64 == 0 and address % 16 == 0 and not any(stride % 16 for stride in strides)
    assert all(1 <= size <= 256 for size in box) and all(sizes)
    lengths = {number: length for length, number in tensor_map.SWIZZLES.items()}
    swizzle_bytes = lengths[swizzle] if swizzle else 0
    assert not swizzle or 4 * box[0] <= swizzle_bytes
    made = _BoxMap(
        address, (ctypes.c_ulonglong * 4)(*strides), (ctypes.c_uint * 5)(*sizes), (ctypes.c_uint * 5)(*box),
        swizzle_bytes,
    )  # fmt: skip
    ctypes.memmove(to, ctypes.addressof(made), ctypes.sizeof(made))


class _Watched(ctypes.Structure):
    _fields_ = (("base", ctypes.c_ulonglong), ("size", ctypes.c_ulonglong), ("readable", ctypes.c_void_p))


class _Launch(ctypes.Structure):
    """emulator::Launch of runtime.h."""

    _fields_ = (
        ("params", ctypes.c_void_p),
        *((name, ctypes.c_uint) for name in ("grid", "threads", "shared_bytes", "order")),
        ("watched", ctypes.POINTER(_Watched)),
        ("watched_count", ctypes.c_int),
    )


@contextmanager
def _stderr_of_c() -> Any:
    """Gives a function that returns what was written to file descriptor 2 inside."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read().decode(errors="replace"))[1]
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class Emulator:
    """Compiles specialisations into ``folder`` and stands in for the driver."""

    def __init__(self, folder: Path, common: Path | None = None):
        self.folder = folder
        #: Where libraries are looked for that another emulator of this run has compiled.
        self.common = common or folder
        self.mode = toolchain.current()
        self.seed = int(os.environ.get("EMULATOR_SEED", "1"))
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
        params = re.search(rf"\b{spec.entry}\((?:const )?(?:__grid_constant__ )?(\w+) ?\w+\) {{", text)
        assert params, f"{spec}: an entry point takes one argument, its block of parameters"
        return (
            f'#include "runtime.h"\n{text}\n#line 1 "entry"\n'
            f"static void emulated_entry(void* p) {{ {spec.entry}(*static_cast<const {params[1]}*>(p)); }}\n"
            'extern "C" const char* emulated_launch(const emulator::Launch* launch) {\n'
            "    return emulator::launch(emulated_entry, *launch);\n}\n"
        )

    def load(self, spec: Any, device: int) -> compiler.Kernel:
        kernel = self.compiled.get(spec)
        if kernel is None:
            text = self.source(spec)
            name = hashlib.sha256(text.encode()).hexdigest()[:24] + ".so"
            library = self.common / name
            if not library.exists():
                library = self.folder / name
                toolchain.build(text, library, self.common, str(spec), self.mode)
            entry = ctypes.CDLL(str(library)).emulated_launch
            entry.restype = ctypes.c_char_p
            entry.argtypes = (ctypes.POINTER(_Launch),)
            self._entries.append(entry)
            handle = len(self._entries) - 1
            kernel = self.compiled[spec] = compiler.Kernel(spec, 0, handle, spec.threads, spec.shared_bytes, entry)
        return kernel

    def launch_kernel(self, handle: int, grid: int, *rest: int) -> None:
        """In the form of the driver's cuLaunchKernel, as the backend calls it."""
        _, _, threads, _, _, shared_bytes, _, arguments, _ = rest
        self.launches.append((str(list(self.compiled)[handle]), grid))
        params = ctypes.c_void_p.from_address(arguments).value
        watched = (_Watched * len(self._watched))(*(entry for entry, *_ in self._watched))
        run = _Launch(params, grid, threads, shared_bytes, self.seed, watched, len(watched))
        if not self.mode.sanitized:
            error, said = self._entries[handle](run), ""
        else:
            with _stderr_of_c() as stderr:
                error = self._entries[handle](run)
                said = stderr()
        # What a sanitizer found comes first: what follows from it is less clear.
        error = said or error.decode()
        if error:
            raise RuntimeError(f"emulated launch failed (EMULATOR_SEED={self.seed}): {error[:20000]}")

    def call(self, spec: Any, grid: int, *values: Any) -> None:
        """Launch a kernel whose block of parameters is all addresses and 64-bit integers; arrays give their address."""
        kernel = self.load(spec, 0)
        words = [value.ctypes.data if isinstance(value, np.ndarray) else value for value in values]
        block = (ctypes.c_ulonglong * len(words))(*words)
        argument = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        self.launch_kernel(
            kernel.handle, grid, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes, 0, ctypes.addressof(argument), 0
        )

    @contextmanager
    def installed(self, monkeypatch: Any) -> Any:
        """The CUDA backend runs here, for arrays made by :func:`emulated`."""
        runtime = _Runtime()
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "_by_type", {**arrays._by_type, EmulatedArray: library})
            patch.setattr(compiler, "load", self.load)
            patch.setattr(
                compiler, "load_all", lambda specs, device, advance=None: [self.load(spec, device) for spec in specs]
            )
            patch.setattr(launch, "launch_kernel", lambda: self.launch_kernel)
            patch.setattr(launch, "device_info", lambda index: DEVICE)
            patch.setattr(cuda, "device_info", lambda index: DEVICE)
            patch.setattr(jit_device, "device_info", lambda index: DEVICE)
            patch.setattr(jit_device, "has_gpu", lambda: True)
            patch.setattr(tensor_map, "encode_tiled", _encode_tiled)
            for module in (cuda, jit_device):
                patch.setattr(module, "require_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
            for module in (dispatch, importlib.import_module("cupy_fp8kv.quantize")):
                patch.setattr(module, "has_gpu", lambda: True)
            _forget_calls()
            yield self
        _forget_calls()


def _forget_calls() -> None:
    """What is kept of a kind of call holds launches, which go where they were made to go."""
    dispatch._prepared.clear()
    for kinds in operands.Kinds.everything:
        kinds.clear()
