"""A cache, paged or padded, that an operation writes or copies from: its arrays read and checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arrays
from .arrays import HOST, Library, device_name
from .formats import KV_FORMATS, KVFormat
from .layouts import KV_LAYOUTS, to_nhd
from .operands import Operand, check_dtype, check_memory, check_writable, read_operands, store
from .pages import PagedSizes, adopt_cache, bind_cache, cache_facts, cache_library, host_cache, read_cache
from .problem import SizeBinder, check_rows, formats_of


@dataclass(frozen=True)
class StoredCache:
    """A padded cache counts as one of ``batch`` pages, of which request b has page b.

    ``array`` is one array or a pair, ``parts`` the same as operands; ``addresses`` are those of K and V.
    """

    library: Library
    array: Any
    parts: tuple[Operand, ...]
    addresses: tuple[int, int]
    device: int
    kv_layout: str
    sizes: PagedSizes
    formats: tuple[KVFormat, KVFormat]

    @classmethod
    def of(
        cls, cache: Any, kv_layout: str, kv_format: Any = None, *, padded: bool = False, written: bool = True
    ) -> StoredCache:
        """``padded``: ``cache`` is the pair (k_padded, v_padded). TypeError or ValueError for what does not fit."""
        names = ("k_padded", "v_padded") if padded else ("paged_kv_cache", "paged_kv_cache")
        cache = tuple(map(arrays.adopt, cache, names)) if padded else adopt_cache(cache)
        library = cache_library(cache, names[0])
        addresses = read_cache(library, cache, names[0])
        k, v, apart = cache_facts(library, addresses[2], names[0])
        sizes = bind_cache(SizeBinder(), k, v, kv_layout, names)
        k_format, v_format = (KV_FORMATS[name] for name in formats_of(k, v, kv_format))
        if sizes.head_dim % 16 or not sizes.head_dim:
            raise ValueError(f"{names[0]}: expected a head_dim that is a multiple of 16, got {sizes.head_dim}")
        pair = cache if isinstance(cache, (tuple, list)) else (cache,)
        parts = tuple(
            Operand(name, array, address, library.facts(signature))
            for name, array, address, signature in zip(names, pair, addresses[:2], addresses[2], strict=False)
        )
        for part, facts, fmt in zip(parts, (k, v), (k_format, v_format), strict=False):
            if written:
                check_writable(library, part)
            check_rows(part.argument, facts, fmt.itemsize)
            if facts.device != k.device:
                expected, got = device_name(k.device), device_name(facts.device)
                raise ValueError(f"{part.argument}: expected V on device {expected} like K, got {got}")
            if facts.device != HOST:
                check_memory(part)
        # In one array V lies behind K; `apart` is 0 for a pair, which has two addresses.
        both = addresses[0], addresses[1] + apart
        return cls(library, cache, parts, both, k.device, kv_layout, sizes, (k_format, v_format))

    @property
    def argument(self) -> str:
        return self.parts[0].argument

    def host(self) -> tuple[np.ndarray, np.ndarray]:
        """K and V as ``[num_pages, page_size, heads, D]`` on the host: views if they are there, copies otherwise."""
        k, v = host_cache(self.library, self.array)
        return self._nhd(k), self._nhd(v)

    def written_back(self, write: Any) -> None:
        """Call ``write(k, v)`` with host views of K and V; where the cache is elsewhere it gets what they are then."""
        if self.device == HOST:
            write(*self.host())
            return
        copies = [self.library.to_numpy(part.array) for part in self.parts]
        k, v = (copies[0][:, 0], copies[0][:, 1]) if len(copies) == 1 else copies
        write(self._nhd(k), self._nhd(v))
        for part, values in zip(self.parts, copies, strict=True):
            store(self.library, part, values)

    def _nhd(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.kv_layout == "NHD" else rows.swapaxes(1, 2)

    def beside(self, value: Any, argument: str, written: bool = True) -> Operand | None:
        """float32 scales of rows, shaped like K or V without the last axis, of the cache's library on its device."""
        if value is None:
            return None
        library, (operand,) = read_operands(**{argument: value})
        self.check_place(library, operand)
        check_dtype(operand, ("float32",))
        rows = ("page_size", "num_kv_heads") if KV_LAYOUTS[self.kv_layout][0] == 0 else ("num_kv_heads", "page_size")
        expected = (self.sizes.num_pages, *(getattr(self.sizes, axis) for axis in rows))
        if operand.facts.shape != expected:
            raise ValueError(
                f"{argument}: expected shape [num_pages, {', '.join(rows)}] = {list(expected)} like the cache, got "
                f"{list(operand.facts.shape)}"
            )
        if any(step % 4 for step in operand.strides):
            raise ValueError(f"{argument}: expected strides in whole elements, got {list(operand.strides)} bytes")
        if written:
            check_writable(library, operand)
        return operand

    def beside_host(self, operand: Operand) -> np.ndarray:
        """Scales as ``[num_pages, page_size, heads]`` on the host."""
        return self._nhd(self.library.to_numpy(operand.array))

    def beside_strides(self, operand: Operand | None) -> tuple[int, int, int]:
        """Strides of the axes (page, row, head) of scales, in elements."""
        if operand is None:
            return 0, 0, 0
        page, row, head, _ = to_nhd((*operand.strides, 0), self.kv_layout)
        return page // 4, row // 4, head // 4

    def check_place(self, library: Library, operand: Operand) -> None:
        """TypeError or ValueError for an operand that is not of the cache's library or on its device."""
        if library is not self.library:
            ours, theirs = self.library.name, library.name
            raise TypeError(f"{operand.argument}: expected an array of {ours} like the cache, got one of {theirs}")
        if operand.facts.device != self.device:
            expected, got = device_name(self.device), device_name(operand.facts.device)
            raise ValueError(f"{operand.argument}: expected device {expected} like the cache, got {got}")
