"""Arrays that callers give for results."""

from __future__ import annotations

from typing import Any

from . import arrays
from .arrays import Library, device_name
from .problem import Facts, check_rows


def read_out(library: Library, out: Any) -> tuple[int, Any]:
    if not library.mutable:
        raise TypeError(f"out: {library.name} arrays cannot be written; leave it out")
    if arrays.library_of(out, "out") is not library:
        raise TypeError(f"out: expected an array of {library.name} like q, got {type(out).__name__}")
    if library.name == "numpy" and not out.flags.writeable:
        raise ValueError("out: expected an array that can be written, got a read-only one")
    return arrays.read(library, out, "out")


def check_out(out: Facts, q: Facts) -> tuple[int, int]:
    """Strides (request, head) of ``out``; it must look like ``q``."""
    for what, expected, got in (
        ("shape", list(q.shape), list(out.shape)),
        ("dtype", q.dtype, out.dtype),
        ("device", device_name(q.device), device_name(out.device)),
    ):
        if expected != got:
            raise (TypeError if what == "dtype" else ValueError)(f"out: expected {what} {expected} like q, got {got}")
    check_rows("out", out, 2)
    row = 2 * out.shape[-1]
    heads, head_stride = out.shape[-2], abs(out.strides[-2])
    batch, batch_stride = (out.shape[0], abs(out.strides[0])) if len(out.shape) == 3 else (1, 0)
    apart = (heads < 2 or head_stride >= row) and (batch < 2 or batch_stride >= row)
    nested = batch < 2 or heads < 2 or batch_stride >= heads * head_stride or head_stride >= batch * batch_stride
    if not (apart and nested):
        raise ValueError(f"out: expected rows that do not overlap, got strides {list(out.strides)} in bytes")
    return (0, out.strides[0]) if len(out.shape) == 2 else (out.strides[0], out.strides[1])
