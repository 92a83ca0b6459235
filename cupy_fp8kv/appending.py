"""The way of one append: checked, then written by NumPy or by ``append.cu``.

The first call of a kind (same types, shapes, strides, options) on a device is checked as a whole; later ones read
addresses, look at page tables and launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import arrays, scales
from .append_checks import Count, Options, Side, check_scales, check_tokens
from .append_tables import AppendTables, Padded, Paged, Tokens
from .arrays import HOST
from .backends import reference_cache as reference
from .backends.cuda_append import PreparedAppend, side_strides
from .counters import AppendCounters
from .operands import Kinds, Operand, runs_on_cuda, store
from .stored_cache import StoredCache


@dataclass(frozen=True)
class _Kind:
    """What the first call of a kind on a device found out. ``there`` has no arrays: they come with each call."""

    there: StoredCache
    count: Count
    tokens_each: int
    prepared: PreparedAppend
    apart: int  # bytes from K to V in one array, or 0


_kinds: Kinds[_Kind] = Kinds(4096)


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
    padded = isinstance(table, Padded)
    equally = padded and tokens.indptr is None
    checked(append_key, append_value, cache, kv_layout, options, padded, equally).write(tokens, table)


def checked(
    append_key: Any,
    append_value: Any,
    cache: Any,
    kv_layout: str,
    options: Options,
    padded: bool = False,
    equally: bool = False,
) -> OnDevice | OnHost:
    """An append of which only the tables are missing. TypeError or ValueError for what does not fit."""
    key, addresses = _read(append_key, append_value, cache, kv_layout, options, padded, equally)
    kind = _kinds.find(key)
    if kind is not None and not any(address % 16 for address in addresses[:4]) and all(addresses[:4]):
        check_scales(options)
        return OnDevice(kind, addresses, options)
    there = StoredCache.of(cache, kv_layout, options.kv_format, padded=padded)
    cuda = runs_on_cuda(options.backend, there.device)
    sides, count = check_tokens(append_key, append_value, there, options, equally)
    if not cuda or there.device == HOST or not count.tokens or not there.sizes.num_kv_heads:
        return OnHost(there, sides, count, count.inner if equally else 0, cuda, options)
    kind = _prepare(there, sides, count, equally)
    _kinds.keep(key, kind)
    beside = (side.token_scales.address if side.token_scales else 0 for side in sides)
    parts = there.parts[0].address, there.parts[-1].address
    return OnDevice(kind, (*(side.operand.address for side in sides), *parts, *beside), options)


def _read(
    append_key: Any, append_value: Any, cache: Any, kv_layout: str, options: Options, padded: bool, equally: bool
) -> tuple[Any, tuple[int, ...]]:
    """What tells kinds of calls apart (None if that is for the checks to say), and addresses: of keys, values, the
    cache's first and last array, and the scales beside it."""
    parts = cache if isinstance(cache, (tuple, list)) else (cache,)
    given = (append_key, append_value, *parts, options.k_token_scales, options.v_token_scales)
    kind = type(append_key)
    try:
        library = arrays.library_of(append_key, "append_key")
        if library is None or any(type(array) is not kind and array is not None for array in given):
            return None, ()
        read = [(0, None) if array is None else library.read(array) for array in given]
        counters = options.counters
        counted = counters and (counters.library, counters.device, counters.num_kv_heads)
        scaled = options.k_scale is None, options.v_scale is None
        formats = tuple(options.kv_format) if isinstance(options.kv_format, list) else options.kv_format
        key = (
            library, len(parts), tuple(signature for _, signature in read), kv_layout, formats, scaled, counted,
            options.backend, padded, equally,
        )  # fmt: skip
        hash(key)
    except (TypeError, ValueError, AttributeError):
        return None, ()
    addresses = [address for address, _ in read]
    return key, (*addresses[:3], addresses[1 + len(parts)], *addresses[-2:])


def _prepare(there: StoredCache, sides: list[Side], count: Count, equally: bool) -> _Kind:
    sizes = there.sizes
    tokens_each = count.inner if equally else 0
    fixed = {
        "num_tokens": count.tokens, "num_kv_heads": sizes.num_kv_heads, "head_dim": sizes.head_dim,
        "page_size": sizes.page_size, "num_pages": sizes.num_pages, "inner": count.inner, "tokens_each": tokens_each,
    }  # fmt: skip
    strides: dict[str, int] = {}
    for side, values, rows in zip(sides, count.strides, (sizes.k_strides, sizes.v_strides), strict=True):
        strides |= side_strides(side.name, values, rows, there.beside_strides(side.token_scales))
    prepared = PreparedAppend((sides[0].spec, sides[1].spec), fixed, strides, there.device)
    apart = there.addresses[1] - there.parts[-1].address
    return _Kind(replace(there, array=None, parts=()), count, tokens_each, prepared, apart)


@dataclass(frozen=True)
class OnDevice:
    """``addresses``: of keys, values, the cache's first and last array, and scales of rows."""

    kind: _Kind
    addresses: tuple[int, ...]
    options: Options

    @property
    def num_tokens(self) -> int:
        return self.kind.count.tokens

    def write(self, tokens: Tokens, table: Paged | Padded) -> None:
        """Launch on the caller's current stream."""
        kind, options = self.kind, self.options
        there = kind.there
        library, device, heads = there.library, there.device, there.sizes.num_kv_heads
        tables = AppendTables.of(tokens, table, kind.count.tokens, kind.tokens_each, there, download=False)
        placed = tables.placed(library, device)
        k_scale = scales.device_scale(options.k_scale, "k_scale", heads, library, device, "the cache")
        v_scale = scales.device_scale(options.v_scale, "v_scale", heads, library, device, "the cache")
        counts, amax = options.counters.addresses() if options.counters else (0, 0)
        k, v, k_cache, v_cache, *beside = self.addresses
        kind.prepared.run(
            library, k, v, k_cache, v_cache + kind.apart, *beside, k_scale.address, v_scale.address,
            k_scale.known, v_scale.known, k_scale.stride, v_scale.stride,
            *(table.address if table else 0 for table in placed), counts, amax, tables.batch, tables.num_indices,
        )  # fmt: skip


@dataclass(frozen=True)
class OnHost:
    """An append by NumPy, one of host arrays that the GPU is asked for, or one of no tokens."""

    there: StoredCache
    sides: list[Side]
    count: Count
    tokens_each: int
    cuda: bool
    options: Options

    @property
    def num_tokens(self) -> int:
        return self.count.tokens

    def write(self, tokens: Tokens, table: Paged | Padded) -> None:
        on_host = not self.cuda or self.there.device == HOST
        tables = AppendTables.of(tokens, table, self.count.tokens, self.tokens_each, self.there, download=on_host)
        if not self.count.tokens or not self.there.sizes.num_kv_heads:
            return
        if self.cuda:
            _append_uploaded(self.there, self.sides, tokens, table, self.options)
        else:
            _append_in_numpy(self.there, self.sides, self.count, tables, self.options.counters)


def _append_in_numpy(
    cache: StoredCache, sides: list[Side], count: Count, tables: AppendTables, counters: AppendCounters | None
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
    cache: StoredCache, sides: list[Side], tokens: Tokens, table: Paged | Padded, options: Options
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
