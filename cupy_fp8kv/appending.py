"""The way of one append: arguments checked and bound, then written by NumPy or by ``append.cu``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import arrays, scales
from .append_tables import AppendTables, Padded, Paged, Tokens
from .arrays import HOST
from .backends import reference_cache as reference
from .backends.cuda_append import PreparedAppend, side_strides
from .counters import AppendCounters
from .formats import Q_DTYPES, KVFormat
from .jit.spec import AppendSpec
from .operands import Kinds, Operand, read_operands, runs_on_cuda, store
from .problem import SizeBinder, check_address, check_rows
from .stored_cache import StoredCache

_FLOATS = (*Q_DTYPES, "float32")
_CODES = ("uint8", "float8_e4m3fn", "float8_e5m2")
#: Tokens times heads of an append.
MAX_ROWS = 2**31 - 2**24
_prepared: Kinds[PreparedAppend] = Kinds()


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
class _Side:
    """K or V: what comes in, and how it is written."""

    name: str  # "k" or "v"
    operand: Operand
    fmt: KVFormat
    copies: bool
    scale: Any
    token_scales: Operand | None

    @property
    def spec(self) -> AppendSpec:
        return AppendSpec("" if self.copies else self.operand.facts.dtype, self.fmt.name)


@dataclass(frozen=True)
class _Count:
    """Tokens, on one axis or on two (requests, and tokens of each), and strides (outer, inner, head) of K and V."""

    outer: int
    inner: int
    strides: list[tuple[int, int, int]]

    @property
    def tokens(self) -> int:
        return self.outer * self.inner


def append(
    append_key: Any,
    append_value: Any,
    cache: Any,
    kv_layout: str,
    tokens: Tokens,
    table: Paged | Padded,
    options: Options,
) -> None:
    """Write tokens into a cache. Everything is checked before anything is written."""
    there = StoredCache.of(cache, kv_layout, options.kv_format, padded=isinstance(table, Padded))
    runs_on_cuda(options.backend, there.device)
    equally = isinstance(table, Padded) and tokens.indptr is None
    sides, count = check_tokens(append_key, append_value, there, options, equally)
    write_tokens(there, sides, count, tokens, table, options)


def write_tokens(
    there: StoredCache,
    sides: list[_Side],
    count: _Count,
    tokens: Tokens,
    table: Paged | Padded,
    options: Options,
) -> None:
    """The rest of :func:`append`, for what :func:`check_tokens` has checked."""
    cuda = runs_on_cuda(options.backend, there.device)
    equally = isinstance(table, Padded) and tokens.indptr is None
    on_host = not cuda or there.device == HOST
    tables = AppendTables.of(tokens, table, count.tokens, count.inner if equally else 0, there, download=on_host)
    if not count.tokens or not there.sizes.num_kv_heads:
        return
    if not cuda:
        _append_in_numpy(there, sides, count, tables, options.counters)
    elif there.device == HOST:
        _append_uploaded(there, sides, tokens, table, options)
    else:
        _launch(there, sides, count, tables, options.counters)


# Checks


def check_tokens(
    append_key: Any, append_value: Any, cache: StoredCache, options: Options, equally: bool = False
) -> tuple[list[_Side], _Count]:
    """Everything about keys and values and the options; TypeError or ValueError for what does not fit the cache."""
    library, operands = read_operands(append_key=append_key, append_value=append_value)
    cache.check_place(library, operands[0])
    sides = _sides(operands, cache, options)
    count = _count(operands, cache, equally)
    _check_counters(options.counters, cache, sides)
    return sides, count


def _sides(operands: list[Operand], cache: StoredCache, options: Options) -> list[_Side]:
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
        if scales.is_number(scale) and not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"{name}_scale: expected a positive, finite number, got {scale}")
        same = dtype == fmt.dtype.name and not given and options.counters is None
        found.append(_Side(name, operand, fmt, codes or same, scale, token_scales))
    return found


def _count(operands: list[Operand], cache: StoredCache, equally: bool) -> _Count:
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
            check_address(operand.argument, operand.address)
        steps = operand.strides
        strides.append((steps[0], steps[1] if len(lead) == 2 else 0, steps[-2]))
    count = _Count(binder[lead[0]], binder["n"] if len(lead) == 2 else 1, strides)
    if count.tokens * sizes.num_kv_heads > MAX_ROWS:
        raise ValueError(f"append_key: expected at most {MAX_ROWS} tokens times heads, got {count.tokens} tokens")
    return count


def _check_counters(counters: Any, cache: StoredCache, sides: list[_Side]) -> None:
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


# Writing


def _append_in_numpy(
    cache: StoredCache, sides: list[_Side], count: _Count, tables: AppendTables, counters: AppendCounters | None
) -> None:
    requests, positions = tables.assigned()
    assert tables.pages is not None
    page, slot = reference.places(requests, positions, tables.pages, cache.sizes.page_size)
    heads = cache.sizes.num_kv_heads
    known = [scales.host_scale(side.scale, f"{side.name}_scale", heads) for side in sides]
    seen: list[reference.Written] = []

    def write(*parts: np.ndarray) -> None:
        for side, part, scale in zip(sides, parts, known, strict=True):
            x = cache.library.to_numpy(side.operand.array)
            x = x.reshape(count.tokens, *x.shape[-2:])
            if side.copies:
                reference.copy_rows(part, x, page, slot)
            elif side.token_scales is None:
                seen.append(reference.write_rows(part, x, page, slot, side.fmt, scale))
            else:
                whole = cache.library.to_numpy(side.token_scales.array)
                beside = whole if cache.kv_layout == "NHD" else whole.swapaxes(1, 2)
                seen.append(reference.write_rows(part, x, page, slot, side.fmt, token_scales=beside))
                store(cache.library, side.token_scales, whole)

    cache.written_back(write)
    if counters is not None:
        counters.add([part.saturated for part in seen], [part.nan for part in seen], np.stack([p.amax for p in seen]))


def _append_uploaded(
    cache: StoredCache, sides: list[_Side], tokens: Tokens, table: Paged | Padded, options: Options
) -> None:
    """Host arrays that the GPU is asked for: all go up, and what was written comes back."""
    gpu = arrays.cupy_library()

    def up(operand: Operand | None) -> Any:
        return None if operand is None else gpu.from_numpy(cache.library.to_numpy(operand.array), 0)

    moved = [up(part) for part in cache.parts]
    beside = [up(side.token_scales) for side in sides]
    there = moved[0] if len(moved) == 1 else tuple(moved)
    counters = options.counters and AppendCounters(cache.sizes.num_kv_heads, there)
    formats = tuple(fmt.name for fmt in cache.formats)
    changed = options._replace(
        k_token_scales=beside[0], v_token_scales=beside[1], kv_format=formats, counters=counters, backend="cuda"
    )
    append(up(sides[0].operand), up(sides[1].operand), there, cache.kv_layout, tokens, table, changed)
    for part, array in zip(cache.parts, moved, strict=True):
        store(cache.library, part, gpu.to_numpy(array))
    for side, array in zip(sides, beside, strict=True):
        if side.token_scales is not None:
            store(cache.library, side.token_scales, gpu.to_numpy(array))
    if counters is not None and options.counters is not None:
        counts = gpu.to_numpy(counters.counts).tolist()
        options.counters.add(counts[:2], counts[2:4], gpu.to_numpy(counters.amax))


def _launch(
    cache: StoredCache, sides: list[_Side], count: _Count, tables: AppendTables, counters: AppendCounters | None
) -> None:
    library, device, sizes = cache.library, cache.device, cache.sizes
    placed = tables.placed(library, device)
    k_scale, v_scale = (
        scales.device_scale(side.scale, f"{side.name}_scale", sizes.num_kv_heads, library, device, "the cache")
        for side in sides
    )
    fixed = {
        "num_tokens": count.tokens, "num_kv_heads": sizes.num_kv_heads, "head_dim": sizes.head_dim,
        "page_size": sizes.page_size, "num_pages": sizes.num_pages, "inner": count.inner,
        "tokens_each": tables.tokens_each,
    }  # fmt: skip
    strides: dict[str, int] = {}
    for side, values, rows in zip(sides, count.strides, (sizes.k_strides, sizes.v_strides), strict=True):
        beside = cache.beside_strides(side.token_scales)
        strides |= side_strides(side.name, values, rows, beside)
    specs = sides[0].spec, sides[1].spec
    prepared = _prepared.get(
        (device, specs, *fixed.values(), *strides.values()), lambda: PreparedAppend(specs, fixed, strides, device)
    )
    counts, amax = counters.addresses() if counters else (0, 0)
    prepared.run(
        library, *(side.operand.address for side in sides), *cache.addresses,
        *(side.token_scales.address if side.token_scales else 0 for side in sides),
        k_scale.address, v_scale.address, k_scale.known, v_scale.known, k_scale.stride, v_scale.stride,
        *(table.address if table else 0 for table in placed), counts, amax, tables.batch, tables.num_indices,
    )  # fmt: skip
