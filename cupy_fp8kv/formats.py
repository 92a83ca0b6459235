"""Number formats: what a KV cache stores, and what a query may be.

A format has one entry here and one header of the same name in ``cuda_src/kv_format/``; everything else (kernels,
tests, ``info``, benchmarks) finds it through :data:`KV_FORMATS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class KVFormat:
    """How one element of a KV cache is stored.

    ``name`` is the header in ``cuda_src/kv_format/`` and what users write, ``policy`` the C++ type in it, ``title``
    the name in prose, ``dtype`` the NumPy (or ml_dtypes) type of one element, ``max`` its largest finite value.
    """

    name: str
    policy: str
    title: str
    dtype: np.dtype
    max: float

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def is_fp8(self) -> bool:
        return self.itemsize == 1

    @property
    def largest_rounded(self) -> float:
        """The largest float32 that rounds to ``max`` (to nearest even); what is beyond it saturates or overflows."""
        code = int(np.array(self.max).astype(self.dtype).view(f"u{self.itemsize}"))
        below = np.array(code - 1, f"u{self.itemsize}").view(self.dtype).astype(np.float64)
        tie = np.float32(self.max + (self.max - float(below)) / 2)
        return float(tie if code % 2 == 0 else np.nextafter(tie, np.float32(0)))

    def __str__(self) -> str:
        return self.title


def _format(name: str, title: str, scalar: type) -> KVFormat:
    return KVFormat(name, name.upper(), title, np.dtype(scalar), float(ml_dtypes.finfo(scalar).max))


E4M3 = _format("e4m3", "E4M3FN", ml_dtypes.float8_e4m3fn)
E5M2 = _format("e5m2", "E5M2", ml_dtypes.float8_e5m2)
F16 = _format("f16", "FP16", np.float16)
BF16 = _format("bf16", "BF16", ml_dtypes.bfloat16)

#: Every format a cache may have, by name.
KV_FORMATS: dict[str, KVFormat] = {f.name: f for f in (E4M3, E5M2, F16, BF16)}
#: The formats that quantise: one byte an element.
FP8_FORMATS: dict[str, KVFormat] = {f.name: f for f in KV_FORMATS.values() if f.is_fp8}
#: Queries (and with them results) come in these types.
Q_DTYPES = ("float16", "bfloat16")
#: The code every NaN is stored as; both FP8 formats share it.
NAN_CODE = 0x7F

_BY_DTYPE_NAME = {f.dtype.name: f for f in KV_FORMATS.values()}
_ALIASES = {
    "fp8": E4M3, "fp8_e4m3": E4M3, "e4m3fn": E4M3, "float8_e4m3fn": E4M3, "fp8_e5m2": E5M2, "float8_e5m2": E5M2,
    "fp16": F16, "half": F16, "float16": F16, "bfloat16": BF16,
}  # fmt: skip


def dtype_name(dtype: Any) -> str:
    """The plain name (``"float16"``, ``"float8_e4m3fn"``) of a NumPy, ml_dtypes, torch or JAX dtype, or of a string."""
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        return _ALIASES[name].dtype.name if name in _ALIASES else name
    if type(dtype).__module__ == "torch":
        return str(dtype).removeprefix("torch.")
    try:
        return np.dtype(dtype).name
    except TypeError:
        raise TypeError(f"expected a dtype of NumPy, ml_dtypes, torch or JAX, or its name; got {dtype!r}") from None


def float_dtype(dtype: Any, argument: str = "dtype") -> str:
    """The name of a 16- or 32-bit float type, for arguments such as ``dequantize``'s ``dtype``."""
    name = dtype_name(dtype)
    if name not in (*Q_DTYPES, "float32"):
        raise TypeError(f"{argument}: expected float16, bfloat16 or float32, got {name}")
    return name


def kv_format(value: Any, argument: str = "kv_format") -> KVFormat:
    """The format named by a string (``"e4m3"``, ``"fp8_e5m2"`` …), a dtype of any library or a :class:`KVFormat`."""
    if isinstance(value, KVFormat):
        return value
    if isinstance(value, str):
        key = value.lower().removeprefix("torch.")
        found = KV_FORMATS.get(key) or _ALIASES.get(key)
    else:
        try:
            key = dtype_name(value)
        except TypeError:
            key = repr(value)
        found = _BY_DTYPE_NAME.get(key)
    if found is None:
        raise ValueError(f"{argument}: expected one of {', '.join(KV_FORMATS)} (or their dtypes), got {key}")
    return found


def format_of_dtype(name: str, argument: str) -> KVFormat:
    """The format a cache array's own dtype carries; ``uint8`` is E4M3FN.

    Raises TypeError for the FP8 types whose codes mean something else (``fnuz``, ``e8m0fnu`` …) and anything else.
    """
    if name == "uint8":
        return E4M3
    if name in _BY_DTYPE_NAME:
        return _BY_DTYPE_NAME[name]
    hint = ""
    if "fnuz" in name:
        hint = " (fnuz types have another bias and another NaN: convert the values first)"
    elif name.startswith("float8"):
        hint = " (its codes are not those of float8_e4m3fn or float8_e5m2)"
    expected = "uint8, float8_e4m3fn, float8_e5m2, float16 or bfloat16"
    raise TypeError(f"{argument}: expected a cache of {expected}, got {name}{hint}")
