"""What an append checks of keys, values and options, apart from where the tokens go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import arrays, scales
from .arrays import HOST
from .counters import AppendCounters
from .formats import Q_DTYPES, KVFormat
from .jit.spec import AppendSpec
from .operands import Operand, check_memory, read_operands
from .problem import SizeBinder, check_rows
from .stored_cache import StoredCache

_FLOATS = (*Q_DTYPES, "float32")
#: Tokens times heads of an append.
MAX_ROWS = 2**31 - 2**24


class Options(NamedTuple):
    """What both public operations take by keyword."""

    k_scale: Any = None
    v_scale: Any = None
    k_token_scales: Any = None
    v_token_scales: Any = None
    kv_format: Any = None
    counters: AppendCounters | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Side:
    """K or V: what comes in, and how it is written."""

    name: str  # "k" or "v"
    operand: Operand
    fmt: KVFormat
    copies: bool
    scale: Any
    token_scales: Operand | None

    @property
    def spec(self) -> AppendSpec:
        if self.copies:
            return AppendSpec.copying(self.fmt.itemsize)
        return AppendSpec(self.operand.facts.dtype, self.fmt.name)


@dataclass(frozen=True)
class Count:
    """Tokens, on one axis or on two (requests, and tokens of each), and strides (outer, inner, head) of K and V."""

    outer: int
    inner: int
    strides: list[tuple[int, int, int]]

    @property
    def tokens(self) -> int:
        return self.outer * self.inner


def check_tokens(
    append_key: Any, append_value: Any, cache: StoredCache, options: Options, equally: bool
) -> tuple[list[Side], Count]:
    """Everything but tables; TypeError or ValueError for what does not fit the cache."""
    library, operands = read_operands(append_key=append_key, append_value=append_value)
    cache.check_place(library, operands[0])
    check_scales(options)
    sides = _sides(operands, cache, options)
    count = _count(operands, cache, equally)
    _check_counters(options.counters, cache, sides)
    return sides, count


def check_scales(options: Options) -> None:
    """What can be wrong with a number."""
    for name, scale in (("k_scale", options.k_scale), ("v_scale", options.v_scale)):
        if scales.is_number(scale) and not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"{name}: expected a positive, finite number, got {scale}")


def _sides(operands: list[Operand], cache: StoredCache, options: Options) -> list[Side]:
    found = []
    for name, operand, fmt in zip(("k", "v"), operands, cache.formats, strict=True):
        scale, beside = getattr(options, f"{name}_scale"), getattr(options, f"{name}_token_scales")
        token_scales = cache.beside(beside, f"{name}_token_scales")
        dtype = operand.facts.dtype
        codes = fmt.is_fp8 and dtype in ("uint8", fmt.dtype.name)
        if dtype not in _FLOATS and not codes:
            raise TypeError(
                f"{operand.argument}: expected {', '.join(_FLOATS)}{f' or {fmt} codes' * fmt.is_fp8} for a cache of "
                f"{fmt}, got {dtype}"
            )
        given = scale is not None or token_scales is not None
        if codes and given:
            which = f"{name}_scale" if scale is not None else f"{name}_token_scales"
            raise ValueError(f"{which}: expected None, because {operand.argument} holds codes already, got a scale")
        if scale is not None and token_scales is not None:
            raise ValueError(f"{name}_scale: expected None beside {name}_token_scales, which are computed")
        if token_scales is not None and not fmt.is_fp8:
            raise ValueError(f"{name}_token_scales: expected None for a cache of {fmt}; scales of rows are for FP8")
        same = dtype == fmt.dtype.name and not given and options.counters is None
        found.append(Side(name, operand, fmt, codes or same, scale, token_scales))
    return found


def _count(operands: list[Operand], cache: StoredCache, equally: bool) -> Count:
    sizes, binder = cache.sizes, SizeBinder()
    binder.bind(cache.argument, (sizes.num_kv_heads, sizes.head_dim), ("num_kv_heads", "head_dim"))
    lead: tuple[str, ...] = ("nnz",)
    if equally:
        binder.bind(cache.argument, (sizes.num_pages,), ("batch",))
        lead = ("batch", "n") if len(operands[0].facts.shape) == 4 else ("batch",)
    strides = []
    for operand in operands:
        binder.bind(operand.argument, operand.facts.shape, (*lead, "num_kv_heads", "head_dim"))
        check_rows(operand.argument, operand.facts, arrays.numpy_dtype(operand.facts.dtype).itemsize)
        if operand.facts.device != HOST:
            check_memory(operand)
        steps = operand.strides
        strides.append((steps[0], steps[1] if len(lead) == 2 else 0, steps[-2]))
    count = Count(binder[lead[0]], binder["n"] if len(lead) == 2 else 1, strides)
    if count.tokens * sizes.num_kv_heads > MAX_ROWS:
        raise ValueError(f"append_key: expected at most {MAX_ROWS} tokens times heads, got {count.tokens} tokens")
    return count


def _check_counters(counters: Any, cache: StoredCache, sides: list[Side]) -> None:
    if counters is None:
        return
    if not isinstance(counters, AppendCounters):
        raise TypeError(f"counters: expected AppendCounters, got {type(counters).__name__}")
    if counters.library is not cache.library or counters.device != cache.device:
        raise ValueError(
            f"counters: expected arrays of {cache.library.name} on {arrays.device_name(cache.device)} like the cache, "
            f"got ones of {counters.library.name} on {arrays.device_name(counters.device)}"
        )
    if counters.num_kv_heads != cache.sizes.num_kv_heads:
        raise ValueError(
            f"counters: expected counters for {cache.sizes.num_kv_heads} heads, got ones for {counters.num_kv_heads}"
        )
    for side in sides:
        if side.copies:
            raise ValueError(f"counters: expected None, because {side.operand.argument} holds codes already")
