"""Arguments of one operation that must be arrays of one library on one device, read once and named in errors."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from . import arrays
from .arrays import HOST, Library, device_name
from .jit import device as jit_device
from .problem import Facts, check_address


class Operand(NamedTuple):
    argument: str
    array: Any
    address: int
    facts: Facts

    @property
    def strides(self) -> tuple[int, ...]:
        """In bytes, 0 for axes that are never stepped along."""
        return tuple(step if size > 1 else 0 for size, step in zip(self.facts.shape, self.facts.strides, strict=True))


def read_operands(**named: Any) -> tuple[Library, list[Operand]]:
    """All arguments as arrays of the first one's library, on its device. TypeError or ValueError otherwise."""
    found: list[Operand] = []
    first: Library | None = None
    for argument, array in named.items():
        array = arrays.adopt(array, argument)
        library = arrays.library_of(array, argument)
        assert library is not None  # adopt() leaves no other
        if first is None:
            first, name = library, argument
        if library is not first:
            raise TypeError(f"{argument}: expected an array of {first.name} like {name}, got one of {library.name}")
        address, signature = arrays.read(library, array, argument)
        found.append(Operand(argument, array, address, library.facts(signature)))
        if found[-1].facts.device != found[0].facts.device:
            expected, got = (device_name(operand.facts.device) for operand in (found[0], found[-1]))
            raise ValueError(f"{argument}: expected device {expected} like {name}, got {got}")
    assert first is not None
    return first, found


def check_dtype(operand: Operand, dtypes: tuple[str, ...]) -> None:
    if operand.facts.dtype not in dtypes:
        expected = ", ".join(dtypes[:-1]) + " or " * (len(dtypes) > 1) + dtypes[-1]
        raise TypeError(f"{operand.argument}: expected {expected}, got {operand.facts.dtype}")


def check_memory(operand: Operand) -> None:
    """ValueError for an array on a device that starts where rows must not, or that has elements and no memory."""
    check_address(operand.argument, operand.address)
    if not operand.address and 0 not in operand.facts.shape:
        raise ValueError(f"{operand.argument}: expected an array with memory, got one at address 0 (a fake tensor?)")


def check_writable(library: Library, operand: Operand) -> None:
    """What is written in place must be an array that can be written, no element of which is another one's."""
    argument, facts = operand.argument, operand.facts
    if not library.mutable:
        raise TypeError(f"{argument}: {library.name} arrays cannot be written")
    if isinstance(operand.array, np.ndarray) and not operand.array.flags.writeable:
        raise ValueError(f"{argument}: expected an array that can be written, got a read-only one")
    reach = arrays.numpy_dtype(facts.dtype).itemsize
    for step, size in sorted((abs(step), size) for size, step in zip(facts.shape, facts.strides, strict=True)):
        if size > 1 and step < reach and 0 not in facts.shape:
            raise ValueError(
                f"{argument}: expected elements that do not overlap, got strides {list(facts.strides)} in bytes"
            )
        reach = max(reach, step * size)


def runs_on_cuda(backend: Any, device: int) -> bool:
    """Whether an operation runs on CUDA: where its arrays are unless ``backend`` says otherwise."""
    jit_device.check_backend(backend)
    cuda = backend == "cuda" or (backend is None and device != HOST)
    if cuda and not jit_device.has_gpu():
        raise RuntimeError(f"backend: cuda was asked for: {jit_device.cupy_problem()}")
    return cuda


def store(library: Library, operand: Operand, values: np.ndarray) -> None:
    """Write host values into an operand, wherever it is. uint8 codes may stand for any FP8 type."""
    if operand.facts.device == HOST:
        target = library.to_numpy(operand.array)  # the same memory
        target[...] = values if values.itemsize > 1 else values.view(target.dtype)
    else:
        operand.array[...] = library.from_numpy(values, operand.facts.device)


T = TypeVar("T")


class Kinds(Generic[T]):
    """What the first call of a kind found out, kept for the next ones; all is forgotten when it becomes too much."""

    everything: ClassVar[list[Kinds[Any]]] = []

    def __init__(self, most: int = 1024):
        self._most = most
        self._found: dict[Hashable, T] = {}
        self._lock = threading.Lock()
        self.everything.append(self)

    def find(self, key: Hashable) -> T | None:
        return self._found.get(key)

    def keep(self, key: Hashable, found: T) -> None:
        """None as a key says that there is nothing to tell this kind of call by."""
        if key is None:
            return
        with self._lock:
            if len(self._found) >= self._most:
                self._found.clear()
            self._found[key] = found

    def clear(self) -> None:
        self._found.clear()
