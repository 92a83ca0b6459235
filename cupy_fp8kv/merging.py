"""Merging attention states: results over parts of a context to the result over all of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import arrays
from .arrays import HOST, Library
from .backends import reference
from .backends.cuda_merging import MergeGeometry, PreparedMerge
from .formats import Q_DTYPES
from .jit.device import refuse_capture
from .operands import Kinds, Operand, check_dtype, check_memory, check_writable, read_operands, runs_on_cuda, store
from .problem import SizeBinder, check_rows

#: head_dim is any multiple of 16 up to this.
MAX_HEAD_DIM = 1024
#: Tokens times heads.
MAX_ROWS = 2**31 - 2**24
_DTYPES = (*Q_DTYPES, "float32")


def merge_state(
    v_a: Any, s_a: Any, v_b: Any, s_b: Any, *, lse_base: str = "2", backend: str | None = None
) -> tuple[Any, Any]:
    """Attention over the rows of a and those of b, from attention over each.

    With weights ``w = base ** s``: ``v = (w_a v_a + w_b v_b) / (w_a + w_b)`` and ``s = log(w_a + w_b)``. Merging is
    associative and commutative up to rounding. (Ye et al., *FlashInfer*, 2025, section 2.2.)

    Parameters
    ----------
    v_a, v_b : arrays ``[n, num_heads, head_dim]``, float16, bfloat16 or float32, of one library on one device. What
        attention gave, normalised. Strides are free, with a contiguous last axis and rows at multiples of 16 bytes;
        head_dim is a multiple of 16 up to 1024.
    s_a, s_b : float32 ``[n, num_heads]``: the log-sum-exp of the logits. ``-inf`` says that there are no rows: such a
        state is neutral, whatever its v holds. NaN and ``+inf`` give NaN, as they do in attention.
    lse_base : ``"2"`` or ``"e"``, of all s.
    backend : None merges where the arrays are; ``"cuda"`` or ``"numpy"`` forces one.

    Returns
    -------
    v : like ``v_a``, of its dtype; computed in float32. 0 where both states are empty.
    s : like ``s_a``.

    Raises
    ------
    ValueError, TypeError
        For shapes, types, devices and options that do not fit, naming the argument.
    """
    return _merge({"v_a": v_a, "s_a": s_a, "v_b": v_b, "s_b": s_b}, lse_base, backend)


def merge_state_in_place(
    v: Any, s: Any, v_other: Any, s_other: Any, mask: Any = None, *, lse_base: str = "2", backend: str | None = None
) -> None:
    """:func:`merge_state` of ``(v, s)`` and ``(v_other, s_other)``, written into ``v`` and ``s``.

    Parameters
    ----------
    v, s, v_other, s_other : as ``v_a``, ``s_a``, ``v_b`` and ``s_b`` of :func:`merge_state`. JAX arrays cannot be
        written and raise TypeError.
    mask : bool (or uint8) ``[n]``, host or device: where it is False the token is left as it is. None: all are merged.
    """
    _merge({"v": v, "s": s, "v_other": v_other, "s_other": s_other}, lse_base, backend, mask, in_place=True)


def merge_states(v: Any, s: Any, *, lse_base: str = "2", backend: str | None = None) -> tuple[Any, Any]:
    """:func:`merge_state` of any number of states.

    Parameters
    ----------
    v : array ``[n, num_states, num_heads, head_dim]``, float16, bfloat16 or float32.
    s : float32 ``[n, num_states, num_heads]``.

    Returns
    -------
    v ``[n, num_heads, head_dim]`` and s ``[n, num_heads]``. Without any states v is 0 and s is -inf.
    """
    return _merge({"v": v, "s": s}, lse_base, backend)


class _Kind(NamedTuple):
    """What the first call of a kind on a device found out."""

    library: Library
    device: int
    prepared: PreparedMerge
    shape: tuple[int, int, int]  # of the result
    dtype: str
    second: tuple[int, int] | None  # bytes from the first to the second state in arrays that hold all of them


_kinds: Kinds[_Kind] = Kinds()


def _merge(
    given: dict[str, Any], lse_base: str, backend: str | None, mask: Any = None, *, in_place: bool = False
) -> tuple[Any, Any]:
    """``given``: v and s of all states, or of the first and of the other one."""
    key, addresses = _read(tuple(given.values()), lse_base, backend, in_place)
    kind = _kinds.find(key)
    if kind is not None and not any(address % 16 for address in addresses[::2]) and all(addresses):
        return _launch(kind, tuple(given.values())[:2], addresses, mask, in_place)
    library, operands = read_operands(**given)
    for operand in operands[: 2 * in_place]:
        check_writable(library, operand)
    sizes = _check(operands, lse_base)
    device = operands[0].facts.device
    if runs_on_cuda(backend, device) and device != HOST:
        kind = _prepare(library, operands, sizes, lse_base, in_place)
        _kinds.keep(key, kind)
        arrays_given = operands[0].array, operands[1].array
        return _launch(kind, arrays_given, tuple(operand.address for operand in operands), mask, in_place)
    mask, _, _ = _read_mask(mask, sizes["n"], library, HOST)
    values = [library.to_numpy(operand.array) for operand in operands]
    if device == HOST and backend == "cuda":
        gpu = arrays.cupy_library()
        moved = [gpu.from_numpy(array, 0) for array in values]
        merged = merge_state(*moved, lse_base=lse_base) if len(moved) == 4 else merge_states(*moved, lse_base=lse_base)
        v, s = (gpu.to_numpy(array) for array in merged)
    else:
        if len(values) == 4:
            values = [np.stack(pair, axis=1) for pair in (values[::2], values[1::2])]
        v, s = reference.merge_states(values[0], values[1], lse_base)
        with np.errstate(over="ignore"):
            v = v.astype(arrays.numpy_dtype(operands[0].facts.dtype))
    if not in_place:
        return library.from_numpy(v, device), library.from_numpy(s, device)
    for operand, result in zip(operands[:2], (v, s), strict=True):
        if mask is not None:
            chosen = mask.reshape(-1, *[1] * (result.ndim - 1))
            result = np.where(chosen, result, library.to_numpy(operand.array))
        store(library, operand, result)
    return operands[0].array, operands[1].array


def _read(given: tuple[Any, ...], lse_base: str, backend: Any, in_place: bool) -> tuple[Any, tuple[int, ...]]:
    """What tells kinds of calls apart (None if that is for the checks to say), and the addresses."""
    kind = type(given[0])
    try:
        library = arrays.library_of(given[0], "")
        if library is None or any(type(array) is not kind for array in given):
            return None, ()
        read = [library.read(array) for array in given]
        key = library, tuple(signature for _, signature in read), lse_base, backend, in_place
        hash(key)
    except (TypeError, ValueError):
        return None, ()
    return key, tuple(address for address, _ in read)


def _check(operands: list[Operand], lse_base: str) -> SizeBinder:
    """Bind the sizes of v, s and of the other v, s. TypeError or ValueError for what does not fit."""
    axes = ("n", "num_heads") if len(operands) == 4 else ("n", "num_states", "num_heads")
    if not isinstance(lse_base, str) or lse_base not in ("2", "e"):
        raise ValueError(f"lse_base: expected '2' or 'e', got {lse_base!r}")
    sizes = SizeBinder()
    first = operands[0]
    check_dtype(first, _DTYPES)
    for v, s in zip(operands[::2], operands[1::2], strict=True):
        if v.facts.dtype != first.facts.dtype:
            raise TypeError(f"{v.argument}: expected {first.facts.dtype} like {first.argument}, got {v.facts.dtype}")
        check_dtype(s, ("float32",))
        sizes.bind(v.argument, v.facts.shape, (*axes, "head_dim"))
        sizes.bind(s.argument, s.facts.shape, axes)
        check_rows(v.argument, v.facts, arrays.numpy_dtype(v.facts.dtype).itemsize)
        if v.facts.device != HOST:
            check_memory(v)
    head_dim, rows = sizes["head_dim"], sizes["n"] * sizes["num_heads"]
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % 16:
        raise ValueError(
            f"{first.argument}: expected a head_dim that is a multiple of 16 up to {MAX_HEAD_DIM}, got {head_dim}"
        )
    if rows > MAX_ROWS:
        raise ValueError(f"{first.argument}: expected at most {MAX_ROWS} tokens times heads, got {rows}")
    return sizes


def _read_mask(mask: Any, tokens: int, library: Library, device: int) -> tuple[Any, int, int]:
    """The mask on the host (bool) or the device: the array, its address and its stride there."""
    if mask is None:
        return None, 0, 0
    if isinstance(mask, (list, tuple)):
        mask = np.asarray(mask, bool)
    mask = arrays.adopt(mask, "mask")
    source = arrays.library_of(mask, "mask")
    assert source is not None  # adopt() leaves no other
    address, signature = arrays.read(source, mask, "mask")
    facts = source.facts(signature)
    if facts.dtype not in ("bool", "uint8"):
        raise TypeError(f"mask: expected bool, got {facts.dtype}")
    if facts.shape != (tokens,):
        raise ValueError(f"mask: expected shape [n] = [{tokens}], got {list(facts.shape)}")
    if device == HOST:
        return source.to_numpy(mask) != 0, 0, 0
    if facts.device == HOST:
        refuse_capture(library.stream(device), "mask")
        mask, address = arrays.upload(library, (source.to_numpy(mask) != 0).astype(np.uint8), device)
        return mask, address, 1
    if source is not library or facts.device != device:
        raise ValueError(
            f"mask: expected an array of {library.name} on {arrays.device_name(device)} like v, got one of "
            f"{source.name} on {arrays.device_name(facts.device)}"
        )
    return mask, address, facts.strides[0] if tokens > 1 else 0


def _elements(s: Operand) -> tuple[int, ...]:
    if any(step % 4 for step in s.strides):
        raise ValueError(f"{s.argument}: expected strides in whole elements, got {list(s.strides)} bytes")
    return tuple(step // 4 for step in s.strides)


def _prepare(library: Library, operands: list[Operand], sizes: SizeBinder, lse_base: str, in_place: bool) -> _Kind:
    v, s = operands[0].strides[:-1], _elements(operands[1])
    second: tuple[int, int] | None = None
    if len(operands) == 4:
        (token, head), (s_token, s_head) = operands[2].strides[:-1], _elements(operands[3])
        v_other, s_other, states = (token, 0, head), (s_token, 0, s_head), 2
    else:
        # The first state, and the others behind it.
        second = v[1], 4 * s[1]
        v_other, s_other, states = (v[0], v[1], v[2]), (s[0], s[1], s[2]), sizes["num_states"]
        v, s = (v[0], v[2]), (s[0], s[2])
    n, heads, head_dim = sizes["n"], sizes["num_heads"], sizes["head_dim"]
    dtype, device = operands[0].facts.dtype, operands[0].facts.device
    row = head_dim * arrays.numpy_dtype(dtype).itemsize
    out, lse = ((v[0], v[1]), (s[0], s[1])) if in_place else ((heads * row, row), (heads, 1))
    geometry = MergeGeometry(
        dtype, n, states, heads, head_dim, out, lse, (v[0], v[1]), (s[0], s[1]), v_other, s_other, lse_base
    )
    return _Kind(library, device, PreparedMerge(geometry, device), (n, heads, head_dim), dtype, second)


def _launch(
    kind: _Kind, given: tuple[Any, ...], addresses: tuple[int, ...], mask: Any, in_place: bool
) -> tuple[Any, Any]:
    library, device, shape = kind.library, kind.device, kind.shape
    held, mask_address, mask_stride = _read_mask(mask, shape[0], library, device)
    if kind.second is not None:
        addresses = (*addresses, addresses[0] + kind.second[0], addresses[1] + kind.second[1])
    if in_place:
        kind.prepared.run(library, *addresses[:2], *addresses, mask_address, mask_stride)
        return given[0], given[1]
    out, out_address = library.empty(shape, kind.dtype, device)
    lse, lse_address = library.empty(shape[:2], "float32", device)
    kind.prepared.run(library, out_address, lse_address, *addresses, mask_address, mask_stride)
    del held
    return library.wrap(out), library.wrap(lse)
