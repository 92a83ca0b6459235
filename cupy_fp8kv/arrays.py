"""The array boundary: arrays of any library in, arrays of the same library out, on the caller's stream.

A library is recognised by the type of the array, through modules that are imported already: nothing heavy is imported
to look. What a call needs of an array is read directly (address, shape, strides, dtype, device), which costs a
microsecond where a DLPack exchange costs thirty; other libraries come in through ``__dlpack__``. FP8 travels as bytes
plus the name of its type, because CuPy cannot import FP8 through DLPack and NumPy has no such type.

Work goes to the caller's current stream, and outputs and workspace come from the caller's allocator on that stream, so
freeing and reusing memory stays ordered by the stream alone.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np

from .array_library import HOST, Library, Signature
from .jit.device import on_device, require_cupy
from .kept_workspaces import KeptWorkspaces
from .problem import Facts, contiguous_strides

_NUMPY_DTYPES = {
    "float16": np.dtype(np.float16), "float32": np.dtype(np.float32), "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32), "int64": np.dtype(np.int64), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
#: Types that NumPy, or a library's exchange with NumPy, does not know: they travel as integers of the same size.
_CARRIERS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def device_name(index: int) -> str:
    return "host" if index == HOST else f"cuda:{index}"


def numpy_dtype(name: str) -> np.dtype[Any]:
    return _NUMPY_DTYPES[name]


class NumpyLibrary(Library):
    name = "numpy"

    def read(self, array: Any) -> tuple[int, Signature]:
        return array.__array_interface__["data"][0], (array.dtype, array.shape, array.strides)

    def facts(self, signature: Signature) -> Facts:
        dtype, shape, strides = signature
        return Facts(dtype.name, shape, strides, HOST, self.name)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def from_numpy(self, values: np.ndarray, device: int) -> Any:
        return values

    def view_fp8(self, codes: Any, dtype: str) -> Any:
        return codes.view(_NUMPY_DTYPES[dtype])


class CupyLibrary(Library):
    name = "cupy"
    always_writable = True

    def __init__(self, cupy: Any):
        self._cupy = cupy
        self._ndarray = cupy.ndarray
        self._alloc = cupy.cuda.alloc
        self._current_stream = cupy.cuda.get_current_stream
        self._runtime = cupy.cuda.runtime
        self._captured: dict[tuple[int, int, int], list[tuple[int, tuple[Any, int]]]] = {}
        # Of a pool that knows streams by their handles.
        pooled = getattr(cupy.cuda.memory, "PooledMemory", None)
        self._kept = KeptWorkspaces(self._allocate, lambda memory: type(memory.mem) is pooled)
        # Private, and told in half the time that a tuple of strides takes.
        self._tells_contiguous = hasattr(cupy.ndarray, "_c_contiguous")

    def read(self, array: Any) -> tuple[int, Signature]:
        data = array.data
        strides = None if self._tells_contiguous and array._c_contiguous else array.strides
        return data.ptr, (array.dtype, array.shape, strides, data.device_id)

    def read_inputs(self, q: Any, k: Any, v: Any) -> tuple[int, int, int, Signature]:
        # What ``read`` reads, in one call and one tuple.
        if not self._tells_contiguous:
            q_address, k_address, v_address, (q_told, k_told, v_told) = super().read_inputs(q, k, v)
            return q_address, k_address, v_address, (*q_told, *k_told, *v_told)
        q_data, k_data, v_data = q.data, k.data, v.data
        return q_data.ptr, k_data.ptr, v_data.ptr, (
            q.dtype, q.shape, None if q._c_contiguous else q.strides, q_data.device_id,
            k.dtype, k.shape, None if k._c_contiguous else k.strides, k_data.device_id,
            v.dtype, v.shape, None if v._c_contiguous else v.strides, v_data.device_id,
        )  # fmt: skip

    def input_facts(self, signature: Signature) -> list[Facts]:
        return [self.facts(signature[i : i + 4]) for i in (0, 4, 8)]

    def facts(self, signature: Signature) -> Facts:
        dtype, shape, strides, device = signature
        return Facts(dtype.name, shape, strides or contiguous_strides(shape, dtype.itemsize), device, self.name)

    def stream(self, device: int) -> int:
        return self._current_stream(device).ptr

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> tuple[Any, int]:
        if self._runtime.getDevice() == device:
            array = self._ndarray(shape, _NUMPY_DTYPES[dtype])
        else:
            with on_device(self._runtime, device):
                array = self._ndarray(shape, _NUMPY_DTYPES[dtype])
        return array, array.data.ptr

    def empty_like(self, array: Any, shape: tuple[int, ...], dtype: str, device: int) -> tuple[Any, int]:
        if self._runtime.getDevice() != device:
            return self.empty(shape, dtype, device)
        made = self._ndarray(shape, array.dtype)
        return made, made.data.ptr

    def workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        if stream and self._runtime.streamIsCapturing(stream):
            return self._captured_workspace(nbytes, device, stream)
        return self._kept.workspace(nbytes, device, stream)

    def _allocate(self, nbytes: int, device: int) -> tuple[Any, int]:
        memory = self._alloc(nbytes)
        return memory, memory.ptr

    def _captured_workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        # CuPy's pool knows nothing of graphs: what went back to it would be written again by every replay. So a capture
        # keeps a workspace for each of its streams for good: that of eager calls before, as it may not allocate.
        # Each thread has its own, for those that capture one stream may launch in between each other.
        from .jit.launch import capture_id

        key = (capture_id(stream), stream, threading.get_ident())
        held = self._captured.setdefault(key, [])
        if not held or held[-1][0] < nbytes:
            held.append(self._kept.take(nbytes, device, stream) or (nbytes, self._allocate(nbytes, device)))
        return held[-1][1]

    def to_numpy(self, array: Any) -> np.ndarray:
        carrier = _CARRIERS.get(array.dtype.name)
        return array.view(carrier).get().view(array.dtype) if carrier else array.get()

    def from_numpy(self, values: np.ndarray, device: int) -> Any:
        carrier = _CARRIERS.get(values.dtype.name)
        values = np.ascontiguousarray(values)
        with on_device(self._runtime, max(device, 0)):
            if carrier is None:
                return self._cupy.asarray(values)
            array = self._cupy.asarray(values.view(carrier))
        return array.view(values.dtype) if values.dtype.itemsize > 1 else array

    def as_float32(self, array: Any) -> Any:
        return self._cupy.ascontiguousarray(array, "float32")


class TorchLibrary(Library):
    name = "torch"
    always_writable = True

    def __init__(self, torch: Any):
        self._torch = torch
        self._dtypes = {name: getattr(torch, name) for name in _NUMPY_DTYPES if hasattr(torch, name)}
        self._devices: dict[int, Any] = {}
        # Two thirds of the time of new_empty.
        self._empty_like, self._c_order = torch.empty_like, torch.contiguous_format
        self._kept = KeptWorkspaces(self._allocate, bool)
        # Private and 40 times faster than the public call (0.2 against 8 microseconds).
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def read(self, array: Any) -> tuple[int, Signature]:
        if array.is_cuda:
            strides = None if array.is_contiguous() else array.stride()
            return array.data_ptr(), (array.dtype, array.shape, strides, array.get_device())
        if array.device.type != "cpu" or array.layout is not self._torch.strided:
            raise TypeError(f"expected a dense torch tensor on CUDA or CPU, got {array.layout} on {array.device}")
        return array.data_ptr(), (array.dtype, array.shape, array.stride(), HOST)

    def facts(self, signature: Signature) -> Facts:
        dtype, shape, strides, device = signature
        strides = tuple(stride * dtype.itemsize for stride in strides or contiguous_strides(shape, 1))
        return Facts(str(dtype).removeprefix("torch."), tuple(shape), strides, device, self.name)

    def stream(self, device: int) -> int:
        if self._raw_stream is not None:
            return self._raw_stream(device)
        return self._torch.cuda.current_stream(device).cuda_stream

    def _device(self, index: int) -> Any:
        device = self._devices.get(index)
        if device is None:
            name = "cpu" if index == HOST else f"cuda:{index}"
            device = self._devices[index] = self._torch.device(name)
        return device

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> tuple[Any, int]:
        tensor = self._torch.empty(shape, dtype=self._dtypes[dtype], device=self._device(device))
        return tensor, tensor.data_ptr()

    def empty_like(self, array: Any, shape: tuple[int, ...], dtype: str, device: int) -> tuple[Any, int]:
        tensor = self._empty_like(array, memory_format=self._c_order)
        return tensor, tensor.data_ptr()

    def workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        # On other streams the allocator may be recording a graph, or hold the caller to account for what is left.
        if stream:
            return self._allocate(nbytes, device)
        return self._kept.workspace(nbytes, device, stream)

    def _allocate(self, nbytes: int, device: int) -> tuple[Any, int]:
        return self.empty((nbytes,), "uint8", device)

    def to_numpy(self, array: Any) -> np.ndarray:
        tensor = array.detach().cpu()
        name = str(tensor.dtype).removeprefix("torch.")
        carrier = _CARRIERS.get(name)
        if carrier is None:
            return tensor.numpy()
        # torch has no uint16 that every release can hand to NumPy; int16 has the same bits.
        integer = self._torch.int16 if carrier == "uint16" else self._torch.uint8
        return tensor.view(integer).numpy().view(_NUMPY_DTYPES[name])

    def from_numpy(self, values: np.ndarray, device: int) -> Any:
        carrier = _CARRIERS.get(values.dtype.name)
        values = np.ascontiguousarray(values)
        if carrier is None:
            tensor = self._torch.from_numpy(values)
        else:
            integer = values.view("int16" if carrier == "uint16" else "uint8")
            tensor = self._torch.from_numpy(integer).view(self._dtypes[values.dtype.name])
        return tensor if device == HOST else tensor.to(self._device(device))

    def view_fp8(self, codes: Any, dtype: str) -> Any:
        return codes.view(self._dtypes[dtype])

    def as_float32(self, array: Any) -> Any:
        return array.detach().to(self._torch.float32).contiguous()


class JaxLibrary(Library):
    """JAX arrays have no stream a caller could name, so calls wait for the inputs and for the result."""

    name = "jax"
    mutable = False

    def __init__(self, jax: Any):
        self._jax = jax

    def read(self, array: Any) -> tuple[int, Signature]:
        if isinstance(array, self._jax.core.Tracer):
            raise TypeError(
                f"expected a concrete JAX array, got the tracer {array}; call cupy_fp8kv outside jit, vmap and grad"
            )
        devices = array.devices()
        if len(devices) != 1:
            raise ValueError(f"expected a JAX array on one device, got one sharded over {len(devices)}")
        (device,) = devices
        if device.platform not in ("cpu", "gpu", "cuda"):
            raise TypeError(f"expected a JAX array on CPU or CUDA, got one on {device.platform}")
        array.block_until_ready()
        index = HOST if device.platform == "cpu" else device.local_hardware_id
        return array.unsafe_buffer_pointer(), (array.dtype, array.shape, index)

    def facts(self, signature: Signature) -> Facts:
        dtype, shape, device = signature
        return Facts(dtype.name, shape, contiguous_strides(shape, dtype.itemsize), device, self.name)

    def stream(self, device: int) -> int:
        return cupy_library().stream(device)

    def workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        return cupy_library().workspace(nbytes, device, stream)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> tuple[Any, int]:
        return cupy_library().empty(shape, dtype, device)

    def wrap(self, array: Any) -> Any:
        sys.modules["cupy"].cuda.get_current_stream(array.data.device_id).synchronize()
        carrier = _CARRIERS.get(array.dtype.name)
        exported = self._jax.dlpack.from_dlpack(array.view(carrier) if carrier else array)
        if carrier is None:
            return exported
        return self._jax.lax.bitcast_convert_type(exported, array.dtype)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def from_numpy(self, values: np.ndarray, device: int) -> Any:
        devices = self._jax.devices("cpu") if device == HOST else self._jax.local_devices(backend="gpu")
        return self._jax.device_put(values, devices[max(device, 0)])

    def view_fp8(self, codes: Any, dtype: str) -> Any:
        return self._jax.lax.bitcast_convert_type(codes, _NUMPY_DTYPES[dtype])


#: One instance a library, made when its first array comes in.
_libraries: dict[str, Library] = {"numpy": NumpyLibrary()}
_by_type: dict[type, Library] = {}
_MODULES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}
_CLASSES = {"cupy": CupyLibrary, "torch": TorchLibrary, "jax": JaxLibrary}


def library(name: str) -> Library:
    """The library called ``name``, whose module has been imported."""
    found = _libraries.get(name)
    # The first use from several threads at once must give one instance: libraries are compared by identity.
    return found if found is not None else _libraries.setdefault(name, _CLASSES[name](sys.modules[name]))


def cupy_library() -> Library:
    """CuPy's library; RuntimeError that says why if CuPy cannot run here."""
    require_cupy()
    return library("cupy")


def library_of(array: Any, argument: str) -> Library | None:
    """The library ``array`` belongs to, or None for another one that speaks DLPack. TypeError for what is no array."""
    kind = type(array)
    found = _by_type.get(kind)
    if found is not None:
        return found
    for base in kind.__mro__:
        name = _MODULES.get(base.__module__.partition(".")[0])
        if name and name in sys.modules and hasattr(array, "shape") and hasattr(array, "dtype"):
            if isinstance(array, np.generic):
                break
            found = _by_type[kind] = library(name)
            return found
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return None
    raise TypeError(f"{argument}: expected an array of NumPy, CuPy, torch, JAX or with __dlpack__, got {kind.__name__}")


def read(library: Library, array: Any, argument: str) -> tuple[int, Signature]:
    """``library.read`` whose errors begin with the argument's name."""
    try:
        return library.read(array)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: {error}") from None


def adopt(array: Any, argument: str) -> Any:
    """An array of an unknown library as a NumPy or CuPy array that shares its memory; anything else unchanged."""
    if library_of(array, argument) is not None:
        return array
    device_type = int(array.__dlpack_device__()[0])
    if device_type == 1:
        return np.from_dlpack(array)
    if device_type in (2, 3, 13):  # CUDA, pinned, managed
        cupy_library()
        return sys.modules["cupy"].from_dlpack(array)
    raise TypeError(f"{argument}: expected an array on the host or a CUDA device, got DLPack device {device_type}")


def upload(library: Library, values: np.ndarray, device: int) -> tuple[Any, int]:
    """Host values on ``device``, from the allocator of ``library``: something to hold, and the address."""
    if library.name == "jax":
        library = cupy_library()
    array = library.from_numpy(values, device)
    return array, library.read(array)[0]
