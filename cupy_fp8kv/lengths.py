"""Lengths of requests, ``kv_lens``: checked where the host can see them, left where they are on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays
from .arrays import HOST, Library, device_name
from .jit.device import refuse_capture
from .problem import DecodeProblem


def host_lens(kv_lens: Any, batch: int, kv_len: int) -> np.ndarray:
    """Lengths on the host, checked: integers, ``[batch]``, each in ``[0, kv_len]``; as int32. Any array, or a list."""
    source = None if isinstance(kv_lens, (list, tuple)) else arrays.library_of(kv_lens, "kv_lens")
    try:
        lens = np.asarray(source.to_numpy(kv_lens) if source else kv_lens)
    except ValueError:
        raise ValueError(f"kv_lens: expected {batch} integers, got {kv_lens!r}") from None
    if not lens.size:
        lens = lens.astype(np.int32)
    if lens.dtype.kind not in "iu":
        raise TypeError(f"kv_lens: expected int32, got {lens.dtype}")
    if lens.shape != (batch,):
        raise ValueError(f"kv_lens: expected shape [{batch}], got {list(lens.shape)}")
    if batch and (lens.min() < 0 or lens.max() > kv_len):
        wrong = int(np.flatnonzero((lens < 0) | (lens > kv_len))[0])
        raise ValueError(f"kv_lens: expected lengths from 0 to {kv_len}, got {lens[wrong]} for request {wrong}")
    return lens.astype(np.int32)


def device_lens(kv_lens: Any, library: Library, problem: DecodeProblem, device: int) -> tuple[Any, int]:
    """Lengths where the kernel reads them: something to hold, and the address."""
    if isinstance(kv_lens, (list, tuple)):
        kv_lens = np.asarray(kv_lens)
    source = arrays.library_of(kv_lens, "kv_lens")
    if source is None:
        raise TypeError(f"kv_lens: expected an array of {library.name} or NumPy, got {type(kv_lens).__name__}")
    address, signature = arrays.read(source, kv_lens, "kv_lens")
    facts = source.facts(signature)
    if facts.device == HOST:
        lens = host_lens(kv_lens, problem.batch, problem.kv_len)
        refuse_capture(library.stream(device), "kv_lens")
        return arrays.upload(library, lens, device)
    if source is not library:
        raise TypeError(f"kv_lens: expected an array of {library.name} like q, got one of {source.name}")
    if facts.device != device:
        raise ValueError(f"kv_lens: expected device {device_name(device)} like q, got {device_name(facts.device)}")
    if facts.dtype != "int32":
        raise TypeError(f"kv_lens: expected int32, got {facts.dtype}")
    if facts.shape != (problem.batch,) or (problem.batch > 1 and facts.strides != (4,)):
        raise ValueError(
            f"kv_lens: expected a contiguous array [{problem.batch}], got shape {list(facts.shape)} with strides "
            f"{list(facts.strides)} in bytes"
        )
    return kv_lens, address
