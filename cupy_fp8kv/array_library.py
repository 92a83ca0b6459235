"""What the rest needs of an array library; ``arrays`` knows it of each library there is."""

from __future__ import annotations

from typing import Any

import numpy as np

from .problem import Facts

HOST = -1
#: What can be read off an array and decides how a call runs: hashable, and compared before anything is interpreted.
Signature = tuple[Any, ...]


class Library:
    """What the rest needs of an array library. ``read`` is called for every array of every call."""

    name = ""
    mutable = True
    #: Whether ``out`` may be any array, with nothing to check.
    always_writable = False

    def read(self, array: Any) -> tuple[int, Signature]:
        """Address of the first element, and the signature."""
        raise NotImplementedError

    def facts(self, signature: Signature) -> Facts:
        raise NotImplementedError

    def read_inputs(self, q: Any, k: Any, v: Any) -> tuple[int, int, int, Signature]:
        """Addresses of the arrays that every decode call has, and one signature of all three."""
        q_address, q_signature = self.read(q)
        k_address, k_signature = self.read(k)
        v_address, v_signature = self.read(v)
        return q_address, k_address, v_address, (q_signature, k_signature, v_signature)

    def input_facts(self, signature: Signature) -> list[Facts]:
        """The facts of q, k and v from the signature of all three."""
        return [self.facts(one) for one in signature]

    def stream(self, device: int) -> int:
        """The caller's current stream, as a driver handle."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> tuple[Any, int]:
        """An uninitialised, C-contiguous array and its address."""
        raise NotImplementedError

    def empty_like(self, array: Any, shape: tuple[int, ...], dtype: str, device: int) -> tuple[Any, int]:
        """``empty`` for the shape, dtype and device of ``array``, which some libraries do faster."""
        return self.empty(shape, dtype, device)

    def workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        """Bytes of device memory for work on ``stream``, the current one: something to hold, and the address."""
        return self.empty((nbytes,), "uint8", device)

    def wrap(self, array: Any) -> Any:
        """What the caller gets of an array that ``empty`` made and a kernel on the current stream writes."""
        return array

    def to_numpy(self, array: Any) -> np.ndarray:
        """The values on the host: a view if they are there, a copy (after the current stream's work) otherwise."""
        raise NotImplementedError

    def from_numpy(self, values: np.ndarray, device: int) -> Any:
        raise NotImplementedError

    def view_fp8(self, codes: Any, dtype: str) -> Any:
        """uint8 codes as the library's own FP8 type, where it has one."""
        return codes

    def as_float32(self, array: Any) -> Any:
        """A C-contiguous float32 array with the values of a small one, which may be it."""
        return array.astype("float32")
