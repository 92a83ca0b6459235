"""Input sets on the device: the same call on different memory, so that timing goes round more than the caches hold.

Caches are filled by device copies from a few megabytes of seeded normal values, each set from another offset: neither
a random generator of the GPU nor any kernel but the measured ones is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from .. import decode, paged
from ..arrays import cupy_library
from ..backends import reference
from ..formats import KV_FORMATS, KVFormat
from ..jit.device import require_cupy
from ..paged_wrappers import BatchDecodeWithPagedKVCacheWrapper
from .limit import ReadPages
from .suites import Shape
from .timing import sets_needed

#: Values that all caches are copied from. Odd, so that repetitions do not line up with rows or pages.
_BASE_ELEMENTS = (8 << 20) + 16 * 5
#: Elements of K that the oracle of an error may decode; a long request is checked in its first heads.
_MOST_CHECKED = 1 << 24


class Filler:
    """Fills device memory with normal values in any format; host copies of the values are made once a format."""

    def __init__(self, seed: int = 0):
        self._cupy = require_cupy()
        self._normal = np.random.default_rng(seed).standard_normal(_BASE_ELEMENTS, np.float32)
        self._bases: dict[str, Any] = {}

    def _base(self, fmt: KVFormat) -> Any:
        if fmt.name not in self._bases:
            values = reference.encode(self._normal, fmt) if fmt.is_fp8 else self._normal.astype(fmt.dtype)
            self._bases[fmt.name] = self._cupy.asarray(values.view(np.uint8))
        return self._bases[fmt.name]

    def cache(self, shape: tuple[int, ...], fmt: KVFormat, place: int) -> Any:
        """A cache; ``place`` chooses where its values begin. FP8 comes as uint8 codes."""
        base, runtime = self._base(fmt), self._cupy.cuda.runtime
        target = self._cupy.empty(int(np.prod(shape)) * fmt.itemsize, np.uint8)
        at, offset = 0, place * 1_000_003 * 16 * fmt.itemsize % base.nbytes
        stream = self._cupy.cuda.get_current_stream().ptr
        while at < target.nbytes:
            count = min(target.nbytes - at, base.nbytes - offset)
            runtime.memcpyAsync(
                target.data.ptr + at, base.data.ptr + offset, count, runtime.memcpyDeviceToDevice, stream
            )
            at, offset = at + count, 0
        return (target if fmt.is_fp8 else target.view(fmt.dtype)).reshape(shape)


@dataclass(frozen=True)
class InputSets:
    """The calls of one shape: ``call(s)`` decodes set ``s`` into ``outs[s]``."""

    shape: Shape
    qs: Sequence[Any]
    caches: Sequence[tuple[Any, Any]]
    outs: Sequence[Any]
    scales: dict[str, Any]  # CuPy arrays by argument
    kv_lens: Any  # CuPy array, or None

    #: Which pages the requests have, and so which of them a call reads; None: the caches are padded.
    table: ClassVar[Any] = None
    pages: ClassVar[Any] = None

    @classmethod
    def of(cls, shape: Shape, filler: Filler, sets: int | None = None) -> InputSets:
        """Filled sets; those of a shape over pages are :class:`PagedInputSets`."""
        if shape.page_size and not issubclass(cls, PagedInputSets):
            return PagedInputSets.of(shape, filler, sets)
        cupy, library = require_cupy(), cupy_library()
        sets = sets or sets_needed(cupy, shape.kv_bytes)
        rng = np.random.default_rng(1)
        q_shape = (shape.batch, shape.num_qo_heads, shape.head_dim)
        q_dtype = KV_FORMATS[shape.q].dtype
        queries = [rng.standard_normal(q_shape, np.float32).astype(q_dtype) for _ in range(sets)]
        caches = [
            (
                filler.cache(shape.cache_shape, KV_FORMATS[shape.k], 2 * s),
                filler.cache(shape.cache_shape, KV_FORMATS[shape.v], 2 * s + 1),
            )
            for s in range(sets)
        ]
        scales = {}
        if shape.head_scales:
            values = rng.uniform(0.5, 1.5, (2, shape.num_kv_heads)).astype(np.float32)
            scales = {name: cupy.asarray(row) for name, row in zip(("k_scale", "v_scale"), values, strict=True)}
        qs = [library.from_numpy(q, 0) for q in queries]
        outs = [library.empty(q_shape, q_dtype.name, 0)[0] for _ in range(sets)]
        ragged = shape.kv_lens is not None and not shape.page_size
        kv_lens = cupy.asarray(np.array(shape.kv_lens, np.int32)) if ragged else None
        return cls(shape, qs, caches, outs, scales, kv_lens)

    @classmethod
    def in_fp16(cls, shape: Shape, filler: Filler, sets: int) -> InputSets:
        """The same with a cache of fp16: twice the bytes, so half the sets do."""
        return cls.of(replace(shape, k="f16", v="f16"), filler, max(2, -(-sets // 2)))

    def __len__(self) -> int:
        return len(self.qs)

    @cached_property
    def pieces(self) -> list[tuple[Any, Any]]:
        """As many bytes of K and of V as a call of each set reads, in one piece."""
        if self.shape.kv_lens is None:
            return list(self.caches)
        shape = self.shape
        return [
            (
                k.reshape(-1).view(np.uint8)[: shape.elements * KV_FORMATS[shape.k].itemsize],
                v.reshape(-1).view(np.uint8)[: shape.elements * KV_FORMATS[shape.v].itemsize],
            )
            for k, v in self.caches
        ]

    @cached_property
    def calls(self) -> list[Callable[[], Any]]:
        """Each set's call, with what only uint8 codes other than E4M3FN, scales, or lengths ask for."""
        options = dict(self.scales)
        if self.kv_lens is not None:
            options["kv_lens"] = self.kv_lens
        if (self.shape.k, self.shape.v) != ("e4m3", "e4m3"):
            options["kv_format"] = (self.shape.k, self.shape.v)
        return [
            partial(self._decode(), q, k, v, kv_layout=self.shape.kv_layout, out=out, **options)
            for q, (k, v), out in zip(self.qs, self.caches, self.outs, strict=True)
        ]

    def _decode(self) -> Callable[..., Any]:
        return decode.batch_decode_with_padded_kv_cache

    def call(self, s: int) -> None:
        self.calls[s]()

    def plan_call(self) -> Callable[[int], None] | None:
        """``call`` through one plan for all sets, its lengths scheduled here and now; None without plans."""
        plan_class = getattr(importlib.import_module(__package__.partition(".")[0]), "DecodePlan", None)
        if plan_class is None:
            return None
        shape = self.shape
        formats = {} if (shape.k, shape.v) == ("e4m3", "e4m3") else {"kv_format": (shape.k, shape.v)}
        ragged = self.kv_lens is not None
        plan = plan_class(self.qs[0], *self.caches[0], shape.kv_layout, ragged=ragged, **formats)
        if ragged:
            plan.schedule(self.kv_lens)
        runs = [
            partial(plan.run, q, k, v, out=out, **self.scales)
            for q, (k, v), out in zip(self.qs, self.caches, self.outs, strict=True)
        ]
        return lambda s: runs[s]()

    def error(self) -> float:
        """:meth:`error_of` what the last set's ``out`` holds."""
        return self.error_of(cupy_library().to_numpy(self.outs[-1]))

    def error_of(self, out: np.ndarray) -> float:
        """Relative L2 against float64 of a result of the last set: the last request, and the longest and shortest.

        Of a long request only the first heads are looked at.
        """
        lengths = self.shape.lengths
        chosen = {lengths.index(max(lengths)), lengths.index(min(lengths))} if self.shape.kv_lens else set()
        errors = []
        for request in chosen | {self.shape.batch - 1}:
            if request not in self._wanted:
                self._wanted[request] = self._reference(request)
            want = self._wanted[request]
            errors.append(relative_l2(out[request][None, : want.shape[1]], want))
        return max(errors)

    @cached_property
    def _wanted(self) -> dict[int, np.ndarray]:
        return {}

    def _reference(self, request: int) -> np.ndarray:
        """What the last set gives in float64: its first heads, as many as are looked at."""
        shape, library = self.shape, cupy_library()
        length = shape.lengths[request]
        k, v = (self._rows(cache, request) for cache in self.caches[-1])
        heads = max(1, min(shape.num_kv_heads, _MOST_CHECKED // max(1, length * shape.head_dim)))
        query_heads = heads * (shape.num_qo_heads // shape.num_kv_heads)
        scales: dict[str, Any] = {name: library.to_numpy(scale)[:heads] for name, scale in self.scales.items()}
        want, _ = reference.attention(
            library.to_numpy(self.qs[-1][request])[None, :query_heads], k[None, :, :heads], v[None, :, :heads],
            k_format=KV_FORMATS[shape.k], v_format=KV_FORMATS[shape.v], sm_scale=shape.head_dim**-0.5,
            compute_dtype=np.float64, **scales,
        )  # fmt: skip
        return want

    def _rows(self, cache: Any, request: int) -> np.ndarray:
        """K or V of a request on the host, [rows, heads, head_dim]."""
        rows = slice(self.shape.lengths[request])
        if self.shape.kv_layout == "NHD":
            return cupy_library().to_numpy(cache[request][rows])
        return cupy_library().to_numpy(cache[request][:, rows]).swapaxes(0, 1)


@dataclass(frozen=True)
class PageTable:
    """Which pages each request has, on the host, as FlashInfer's three arrays."""

    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int], page_size: int, indices: np.ndarray) -> PageTable:
        rows = np.array(lengths)
        counts = -(-rows // page_size)
        indptr, last = np.concatenate([[0], np.cumsum(counts)]), rows - (counts - 1) * page_size
        return cls(indptr.astype(np.int32), indices.astype(np.int32), last.astype(np.int32))

    def on_device(self) -> tuple[Any, Any, Any]:
        indptr, indices, last = (require_cupy().asarray(x) for x in (self.indptr, self.indices, self.last_page_len))
        return indptr, indices, last


@dataclass(frozen=True)
class PagedInputSets(InputSets):
    """The same over pages: the caches are pools, in which the pages of all requests lie in random order."""

    @cached_property
    def table(self) -> PageTable:
        shape = self.shape
        order = np.random.default_rng(0).permutation(sum(shape.page_counts))
        return PageTable.of(shape.lengths, shape.page_size, order)

    @cached_property
    def tables(self) -> tuple[Any, Any, Any]:
        return self.table.on_device()

    @cached_property
    def pages(self) -> ReadPages:
        """As many bytes as a call reads of K, and of V, in the order of the pages: where pages are not full, other
        bytes than those."""
        shape = self.shape
        k_bytes, v_bytes = (shape.elements * KV_FORMATS[name].itemsize for name in (shape.k, shape.v))
        return ReadPages(self.tables[1], k_bytes, v_bytes)

    @cached_property
    def pieces(self) -> list[tuple[Any, Any]]:
        return list(self.caches)

    def _decode(self) -> Callable[..., Any]:
        indptr, indices, last = self.tables
        return partial(paged.batch_decode_with_paged_kv_cache, indptr=indptr, indices=indices, last_page_len=last)

    def plan_call(self) -> Callable[[int], None]:
        """``call`` through FlashInfer's wrapper, planned here and now."""
        shape = self.shape
        wrapper = BatchDecodeWithPagedKVCacheWrapper(None, shape.kv_layout)
        wrapper.plan(
            *self.tables, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, shape.page_size,
            data_type=(KV_FORMATS[shape.k].dtype, KV_FORMATS[shape.v].dtype), q_data_type=KV_FORMATS[shape.q].dtype,
        )  # fmt: skip
        runs = [
            partial(wrapper.run, q, cache, out=out, **self.scales)
            for q, cache, out in zip(self.qs, self.caches, self.outs, strict=True)
        ]
        return lambda s: runs[s]()

    def _rows(self, cache: Any, request: int) -> np.ndarray:
        table, library = self.table, cupy_library()
        pages = table.indices[table.indptr[request] : table.indptr[request + 1]]
        found = np.stack([library.to_numpy(cache[int(page)]) for page in pages])
        if self.shape.kv_layout == "HND":
            found = found.swapaxes(1, 2)
        return found.reshape(-1, *found.shape[2:])[: self.shape.lengths[request]]


def relative_l2(got: Any, want: Any) -> float:
    """``|got - want| / |want|``"""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
