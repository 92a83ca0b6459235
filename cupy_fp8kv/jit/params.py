"""Argument blocks of kernels, packed as ``cuda_src/params.cuh`` declares them."""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Callable
from typing import Any

from . import sources

TENSOR_MAP_BYTES = 128
_CODES = {"i64": "q", "int": "i", "float": "f", "TensorMap": f"{TENSOR_MAP_BYTES}s"}
#: base/divide.cuh: what a field ``name`` of type Divisor consists of.
_DIVISOR = (("", "i"), ("_multiplier", "I"), ("_shift", "i"))
_STRUCT = re.compile(r"struct (\w+) \{(.*?)\n\};", re.S)
_FIELD = re.compile(r"^\s*(?:const )?(\w+)(\*?) (\w+);", re.M)


def _declared_structs() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for name, body in _STRUCT.findall(sources.FILES["params.cuh"]):
        fields = found[name] = []
        for kind, star, field in _FIELD.findall(body):
            if kind == "Divisor":
                fields += [(field + part, code) for part, code in _DIVISOR]
            else:
                fields.append((field, "P" if star else _CODES[kind]))
    return found


def divisors(**values: int) -> dict[str, int]:
    """The fields of each named Divisor, which divides numbers below 2^31."""
    fields: dict[str, int] = {}
    for name, value in values.items():
        shift = (value - 1).bit_length()
        multiplier = (2**32 * (2**shift - value)) // value + 1
        fields |= {name: value, f"{name}_multiplier": multiplier, f"{name}_shift": shift}
    return fields


STRUCTS = _declared_structs()


class ParamBlock:
    """The memory that a launch hands to a kernel: a packed struct, and the array of its one address.

    ``leading`` is the number of fields that change from call to call; they stand first, behind any tensor maps, so that
    ``write`` is one pack. ``tensor_maps`` are the bytes of the maps, one behind the other.
    Hold ``lock`` from ``write`` until the launch has returned: the driver copies the block during the launch.
    """

    def __init__(self, name: str, leading: int, **fixed: int | float):
        maps = sum(code == _CODES["TensorMap"] for _, code in STRUCTS[name])
        fields = STRUCTS[name][maps:]
        missing = [field for field, _ in fields[leading:] if field not in fixed]
        if missing or len(fixed) != len(fields) - leading:
            raise AssertionError(f"{name}: fields after the first {leading} do not match; missing {missing}")
        whole = struct.Struct("@" + "".join(code for _, code in fields))
        self._codes = "".join(code for _, code in fields[:leading])
        # A launch copies sizeof(struct) bytes: padded at the end to the alignment of its maps or pointers.
        alignment = 64 if maps else 8
        self._start = maps * TENSOR_MAP_BYTES
        size = -(-(self._start + whole.size) // alignment) * alignment
        self._buffer = ctypes.create_string_buffer(size)
        values: list[Any] = [0] * leading + [fixed[field] for field, _ in fields[leading:]]
        whole.pack_into(self._buffer, self._start, *values)
        address = ctypes.addressof(self._buffer)
        self.tensor_maps = memoryview(self._buffer).cast("B")[: self._start]
        self._argument = (ctypes.c_void_p * 1)(address)
        self.address = ctypes.addressof(self._argument)
        #: Takes the values of the leading fields.
        self.write = self.writer(0, leading)
        self.lock = threading.Lock()

    def writer(self, first: int, count: int) -> Callable[..., None]:
        """What packs the values of ``count`` leading fields, the first of which is number ``first``."""
        codes = self._codes[first : first + count]
        # "0": as far as the first of them is aligned.
        start = struct.calcsize(f"@{self._codes[:first]}0{codes[0]}")
        return functools.partial(struct.Struct(f"@{codes}").pack_into, self._buffer, self._start + start)
