"""Merging attention states: results over parts of a context to the result over all of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays
from .arrays import HOST, Library
from .backends import reference
from .backends.cuda_merging import MergeGeometry, PreparedMerge
from .formats import Q_DTYPES
from .jit.device import refuse_capture
from .operands import Kinds, Operand, check_dtype, check_writable, read_operands, runs_on_cuda, store
from .problem import SizeBinder, check_address, check_rows

#: head_dim is any multiple of 16 up to this.
MAX_HEAD_DIM = 1024
#: Tokens times heads.
MAX_ROWS = 2**31 - 2**24
_DTYPES = (*Q_DTYPES, "float32")
_prepared: Kinds[PreparedMerge] = Kinds()


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
    library, operands = read_operands(v_a=v_a, s_a=s_a, v_b=v_b, s_b=s_b)
    return _merge_two(library, operands, None, lse_base, backend, in_place=False)


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
    library, operands = read_operands(v=v, s=s, v_other=v_other, s_other=s_other)
    for operand in operands[:2]:
        check_writable(library, operand)
    _merge_two(library, operands, mask, lse_base, backend, in_place=True)


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
    library, operands = read_operands(v=v, s=s)
    sizes = _check(operands, ("n", "num_states", "num_heads"), lse_base)
    if not runs_on_cuda(backend, operands[0].facts.device):
        values, sums = (library.to_numpy(operand.array) for operand in operands)
        return _returned(library, operands, *reference.merge_states(values, sums, lse_base))
    if operands[0].facts.device == HOST:
        gpu = arrays.cupy_library()
        merged = merge_states(*_uploaded(library, operands), lse_base=lse_base)
        return _downloaded(library, gpu, merged)
    given_v, given_s = operands
    v_strides, s_strides = given_v.strides[:-1], _elements(given_s)
    # The first state, and the others behind it.
    second_v, second_s = given_v.address + v_strides[1], given_s.address + 4 * s_strides[1]
    return _launch(
        library, sizes, operands, (v_strides[0], v_strides[2]), (s_strides[0], s_strides[2]), v_strides, s_strides,
        (given_v.address, given_s.address, second_v, second_s), lse_base,
    )  # fmt: skip


def _merge_two(
    library: Library, operands: list[Operand], mask: Any, lse_base: str, backend: str | None, *, in_place: bool
) -> tuple[Any, Any]:
    sizes = _check(operands, ("n", "num_heads"), lse_base)
    device = operands[0].facts.device
    cuda = runs_on_cuda(backend, device)
    mask, mask_address, mask_stride = _read_mask(mask, sizes["n"], library, device if cuda else HOST)
    if cuda and device != HOST:
        v_a, s_a, v_b, s_b = operands
        (b_token, b_head), (s_token, s_head) = v_b.strides[:-1], _elements(s_b)
        return _launch(
            library, sizes, operands, v_a.strides[:-1], _elements(s_a), (b_token, 0, b_head), (s_token, 0, s_head),
            tuple(operand.address for operand in operands), lse_base, mask_address, mask_stride, in_place,
        )  # fmt: skip
    if cuda:
        gpu = arrays.cupy_library()
        merged = [gpu.to_numpy(array) for array in merge_state(*_uploaded(library, operands), lse_base=lse_base)]
    else:
        first_v, first_s, other_v, other_s = (library.to_numpy(operand.array) for operand in operands)
        v, s = np.stack([first_v, other_v], axis=1), np.stack([first_s, other_s], axis=1)
        merged = list(reference.merge_states(v, s, lse_base))
    if not in_place:
        return _returned(library, operands, *merged)
    for operand, values in zip(operands[:2], merged, strict=True):
        before = library.to_numpy(operand.array)
        with np.errstate(over="ignore"):
            values = values.astype(before.dtype)
        if mask is not None:
            values = np.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, before)
        store(library, operand, values)
    return operands[0].array, operands[1].array


def _check(operands: list[Operand], axes: tuple[str, ...], lse_base: str) -> SizeBinder:
    """Bind the sizes of v, s and of the other v, s. TypeError or ValueError for what does not fit."""
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
            check_address(v.argument, v.address)
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


def _launch(
    library: Library,
    sizes: SizeBinder,
    operands: list[Operand],
    v: tuple[int, ...],
    s: tuple[int, ...],
    v_other: tuple[int, ...],
    s_other: tuple[int, ...],
    addresses: tuple[int, ...],
    lse_base: str,
    mask_address: int = 0,
    mask_stride: int = 0,
    in_place: bool = False,
) -> tuple[Any, Any]:
    first, device = operands[0], operands[0].facts.device
    n, heads, head_dim = sizes["n"], sizes["num_heads"], sizes["head_dim"]
    states = 2 if len(operands) > 2 else sizes["num_states"]
    row = head_dim * arrays.numpy_dtype(first.facts.dtype).itemsize
    geometry = MergeGeometry(
        first.facts.dtype, n, states, heads, head_dim, v if in_place else (heads * row, row),  # type: ignore[arg-type]
        s if in_place else (heads, 1), v, s, v_other, s_other, mask_stride, lse_base,  # type: ignore[arg-type]
    )  # fmt: skip
    prepared = _prepared.get((geometry, device), lambda: PreparedMerge(geometry, device))
    if in_place:
        prepared.run(library, addresses[0], addresses[1], *addresses, mask_address)
        return first.array, operands[1].array
    out, out_address = library.empty((n, heads, head_dim), first.facts.dtype, device)
    lse, lse_address = library.empty((n, heads), "float32", device)
    prepared.run(library, out_address, lse_address, *addresses, mask_address)
    return library.wrap(out), library.wrap(lse)


def _uploaded(library: Library, operands: list[Operand]) -> list[Any]:
    gpu = arrays.cupy_library()
    return [gpu.from_numpy(library.to_numpy(operand.array), 0) for operand in operands]


def _downloaded(library: Library, gpu: Library, results: tuple[Any, Any]) -> tuple[Any, Any]:
    v, s = (library.from_numpy(gpu.to_numpy(array), HOST) for array in results)
    return v, s


def _returned(library: Library, operands: list[Operand], v: np.ndarray, s: np.ndarray) -> tuple[Any, Any]:
    device, dtype = operands[0].facts.device, arrays.numpy_dtype(operands[0].facts.dtype)
    with np.errstate(over="ignore"):
        return library.from_numpy(v.astype(dtype), device), library.from_numpy(s.astype(np.float32), device)
