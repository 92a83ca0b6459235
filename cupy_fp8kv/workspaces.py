"""Device memory for partial results: what a caller gives, and how much is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import arrays
from .arrays import HOST, Library, device_name
from .backends import cuda
from .formats import Q_DTYPES, KVFormat, dtype_name
from .formats import kv_format as format_called
from .paged_problem import Planned
from .plan import DeviceInfo
from .problem import MAX_KV_LEN, DecodeProblem, check_heads


@dataclass(frozen=True)
class Workspace:
    """Device memory of the caller's."""

    library: Library
    device: int
    address: int
    nbytes: int
    owner: Any

    def check(self, needed: int, problem: DecodeProblem, library: Library, device: int) -> None:
        """ValueError if it is too small for a problem, or where it cannot be used."""
        if self.device != device or self.library is not library:
            raise ValueError(
                f"float_workspace_buffer: expected an array of {library.name} on {device_name(device)} like q, got one "
                f"of {self.library.name} on {device_name(self.device)}"
            )
        if self.nbytes < needed:
            raise ValueError(
                f"float_workspace_buffer: expected {needed} bytes or more for {problem}, got {self.nbytes}"
            )


def read_workspace(buffer: Any) -> Workspace | None:
    """None for no buffer, and for one on the host, where no partial results are kept."""
    if buffer is None:
        return None
    buffer = arrays.adopt(buffer, "float_workspace_buffer")
    library = arrays.library_of(buffer, "float_workspace_buffer")
    assert library is not None  # adopt() leaves no other
    address, signature = arrays.read(library, buffer, "float_workspace_buffer")
    facts = library.facts(signature)
    if facts.device == HOST:
        return None
    if not library.mutable:
        raise TypeError(f"float_workspace_buffer: {library.name} arrays cannot be written; pass None")
    itemsize = buffer.dtype.itemsize
    if not facts.is_contiguous(itemsize) or address % 16:
        raise ValueError("float_workspace_buffer: expected a contiguous array that starts at a multiple of 16 bytes")
    nbytes = itemsize
    for size in facts.shape:
        nbytes *= size
    return Workspace(library, facts.device, address, nbytes, buffer)


def positive(value: Any, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{argument}: expected a positive integer, got {value!r}")
    return int(value)


def planned_formats(data_type: Any, q_data_type: Any) -> tuple[str | None, str, str]:
    """Formats of q (None: any), K and V."""
    pair = data_type if isinstance(data_type, (tuple, list)) else (data_type, data_type)
    if len(pair) != 2:
        raise ValueError(f"data_type: expected a type or a pair (K, V), got {data_type!r}")
    k, v = (_format_of(one, "data_type") for one in pair)
    if q_data_type is None:
        return (k.name if k.dtype.name in Q_DTYPES else None), k.name, v.name
    q = _format_of(q_data_type, "q_data_type")
    if q.dtype.name not in Q_DTYPES:
        raise TypeError(f"q_data_type: expected {' or '.join(Q_DTYPES)}, got {q.dtype.name}")
    return q.name, k.name, v.name


def _format_of(value: Any, argument: str) -> KVFormat:
    # uint8 is what codes come in where a library has no FP8 type.
    if not isinstance(value, KVFormat) and dtype_name(value) == "uint8":
        return format_called("e4m3")
    return format_called(value, argument)


def planned_call(
    num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any, data_type: Any, q_data_type: Any
) -> Planned:
    """What a plan is told of sizes and types, checked."""
    sizes = (
        positive(num_qo_heads, "num_qo_heads"),
        positive(num_kv_heads, "num_kv_heads"),
        positive(head_dim, "head_dim"),
    )
    check_heads(*sizes)
    return Planned(*sizes, positive(page_size, "page_size"), *planned_formats(data_type, q_data_type))


def workspace_size(
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int = 16,
    *,
    max_kv_len: int | None = None,
    data_type: Any = "float16",
    q_data_type: Any = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    device: int | DeviceInfo = 0,
) -> int:
    """Bytes of ``float_workspace_buffer`` that a wrapper needs for such calls. Without a buffer it allocates itself.

    Parameters
    ----------
    max_kv_len : rows of the longest request; None: whatever comes.
    device : CUDA device index, or the description of a device that is not there.

    Everything else is as in :meth:`BatchDecodeWithPagedKVCacheWrapper.plan`.
    """
    planned = planned_call(num_qo_heads, num_kv_heads, head_dim, page_size, data_type, q_data_type)
    rows = MAX_KV_LEN if max_kv_len is None else positive(max_kv_len, "max_kv_len")
    batch = positive(batch_size, "batch_size")
    info = device if isinstance(device, DeviceInfo) else cuda.device_info(device)
    # Calls are planned by the pages of the longest request, rounded up to a power of two (PageTables.kind), and a plan
    # for fewer may need more.
    most_pages = 1 << (-(-rows // page_size) - 1).bit_length()
    kinds = [min(page_size << i, MAX_KV_LEN) for i in range(most_pages.bit_length())]
    problems = [planned.problem(batch, (kind, MAX_KV_LEN, 0), window_left, bool(logits_soft_cap)) for kind in kinds]
    return max(most_workspace(problem, info) for problem in problems)


def most_workspace(problem: DecodeProblem, device: DeviceInfo) -> int:
    """Bytes that a problem needs whatever its strides are, which a wrapper is not told: some rule rings out."""
    row = (1, 1, 1)  # that the copy engine can step through, as far as a planner looks
    problems = (problem, replace(problem, k_strides=row, v_strides=row))
    return max(cuda.plan_decode(one, device).workspace for one in problems)
