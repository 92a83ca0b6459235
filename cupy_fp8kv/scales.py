"""Scales of q, K and V: numbers the host knows, or arrays that only the kernel reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .arrays import HOST, Library, library_of, read, upload
from .formats import dtype_name
from .jit.device import refuse_capture


class Scale(NamedTuple):
    """``known`` times what the array holds. ``address`` is 0 without an array; ``stride`` is 1 for one scale a head."""

    known: float
    address: int
    stride: int
    owner: Any  # keeps the array alive until the launch


NO_SCALE = Scale(1.0, 0, 0, None)

MOST_FLOAT32 = 3.4028234e38
#: Types that a scale array may have.
SCALE_DTYPES = ("float16", "bfloat16", "float32", "float64")


def scale_library(value: Any, argument: str) -> Library:
    """The library of a scale array, whose dtype is checked on the way. TypeError for anything else."""
    library = library_of(value, argument)
    if library is None:
        raise TypeError(
            f"{argument}: expected a number or an array of NumPy, CuPy, torch or JAX, got {type(value).__name__}"
        )
    name = dtype_name(value.dtype)
    if name not in SCALE_DTYPES:
        raise TypeError(f"{argument}: expected a number or an array of {', '.join(SCALE_DTYPES)}, got {name}")
    return library


def _check_shape(value: Any, argument: str, num_kv_heads: int) -> int:
    """The number of scales: 1 or ``num_kv_heads`` (0 heads: only one scale is allowed). ValueError otherwise."""
    shape = tuple(value.shape)
    if shape == () or shape == (1,):
        return 1
    if num_kv_heads and shape == (num_kv_heads,):
        return num_kv_heads
    expected = f"[1] or [num_kv_heads] = [{num_kv_heads}]" if num_kv_heads else "[1]"
    raise ValueError(f"{argument}: expected a number or an array {expected}, got shape {list(shape)}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def number(value: Any, argument: str) -> float:
    """A number as a float; TypeError for anything else."""
    if not is_number(value):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{argument}: expected a number that a float holds, got one of {len(str(value))} digits"
        ) from None


def host_scale(value: Any, argument: str, num_kv_heads: int) -> float | np.ndarray:
    """A scale for the NumPy backend: a number, or float32 ``[num_kv_heads]``. Device arrays are downloaded."""
    if value is None:
        return 1.0
    if is_number(value):
        return number(value, argument)
    library = scale_library(value, argument)
    _check_shape(value, argument, num_kv_heads)
    values = np.asarray(library.to_numpy(value), dtype=np.float32)
    return float(values.reshape(())) if values.size == 1 and values.ndim < 2 else values


def device_scale(value: Any, argument: str, num_kv_heads: int, library: Library, device: int, like: str = "q") -> Scale:
    """A scale for a kernel on ``device``. An array there is never read by the host; a host array is uploaded.

    ``like`` names the argument whose library and device they are.
    """
    if value is None:
        return NO_SCALE
    if type(value) is float:
        return Scale(value, 0, 0, None)
    if is_number(value):
        return Scale(number(value, argument), 0, 0, None)
    source = scale_library(value, argument)
    count = _check_shape(value, argument, num_kv_heads)
    address, signature = read(source, value, argument)
    facts = source.facts(signature)
    if facts.device == HOST:
        values = np.asarray(source.to_numpy(value), dtype=np.float32).reshape(count)
        if count == 1:
            return Scale(float(values[0]), 0, 0, None)
        refuse_capture(library.stream(device), argument)
        value, address = upload(library, values, device)
        return Scale(1.0, address, 1, value)
    if source is not library:
        raise TypeError(f"{argument}: expected an array of {library.name} like {like}, got one of {source.name}")
    if facts.device != device:
        raise ValueError(f"{argument}: expected an array on device {device} like {like}, got device {facts.device}")
    if facts.dtype != "float32" or (count > 1 and facts.strides != (4,)):
        refuse_capture(library.stream(device), argument, "contiguous float32")
        value = source.as_float32(value)
        address, _ = source.read(value)
    return Scale(1.0, address, int(count > 1), value)


def call_scales(
    q_scale: Any, k_scale: Any, v_scale: Any, sm_scale: float, num_kv_heads: int, library: Library, device: int
) -> tuple[Scale, Scale, Scale, float]:
    """The scales of a call's q, K and V for its kernel, and what the host knows of the factor of its logits.

    ValueError if that, or what it knows of the result's, is too large.
    """
    q = device_scale(q_scale, "q_scale", 0, library, device)
    k = device_scale(k_scale, "k_scale", num_kv_heads, library, device)
    v = device_scale(v_scale, "v_scale", num_kv_heads, library, device)
    logit_scale = sm_scale * q.known * k.known
    if not (-MOST_FLOAT32 <= logit_scale <= MOST_FLOAT32 and -MOST_FLOAT32 <= v.known <= MOST_FLOAT32):
        raise ValueError(
            f"sm_scale, q_scale, k_scale, v_scale: expected finite factors in float32, got {logit_scale} for the "
            f"logits and {v.known} for the result"
        )
    return q, k, v, logit_scale
