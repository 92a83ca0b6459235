"""What is timed: named shapes, in suites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..formats import KV_FORMATS


@dataclass(frozen=True)
class Shape:
    """One decode call. ``head_scales``: K and V with a scale for every head, on the device.

    ``kv_lens``: the rows of each request, on the device; ``kv_len`` is then what each has room for in the cache, and
    only the rows that count are counted as bytes. None: every request has ``kv_len`` rows, and the call no lengths.

    ``page_size``: rows of a page, of caches in pages that lie in random order; 0: padded caches.
    """

    name: str
    batch: int
    kv_len: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int = 128
    q: str = "f16"
    k: str = "e4m3"
    v: str = "e4m3"
    kv_layout: str = "NHD"
    head_scales: bool = False
    kv_lens: tuple[int, ...] | None = None
    page_size: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.kv_lens or (self.kv_len,) * self.batch

    @property
    def elements(self) -> int:
        """Of K, and of V, that the call reads."""
        return sum(self.lengths) * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        return self.elements * (KV_FORMATS[self.k].itemsize + KV_FORMATS[self.v].itemsize)

    @property
    def page_counts(self) -> tuple[int, ...]:
        """Pages of each request."""
        return tuple(-(-length // self.page_size) for length in self.lengths)

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Of K, and of V: a request of a padded cache, or a page, comes first."""
        first, length = (sum(self.page_counts), self.page_size) if self.page_size else (self.batch, self.kv_len)
        rows = (length, self.num_kv_heads) if self.kv_layout == "NHD" else (self.num_kv_heads, length)
        return (first, *rows, self.head_dim)

    def in_pages(self, page_size: int, kv_layout: str = "NHD") -> Shape:
        """The same over pages, under a name of its own."""
        name = f"{self.name}.p{page_size}{'' if kv_layout == 'NHD' else '.hnd'}"
        return replace(self, name=name, page_size=page_size, kv_layout=kv_layout)

    @property
    def unpaged_name(self) -> str:
        """The name before :meth:`in_pages`."""
        return self.name.partition(f".p{self.page_size}")[0] if self.page_size else self.name


_DECODE = (
    Shape("mha.b1.l1k", 1, 1024, 32, 32),
    Shape("mha.b16.l1k", 16, 1024, 32, 32),
    Shape("mha.b64.l1k", 64, 1024, 32, 32),
    Shape("mha.b16.l4k", 16, 4096, 32, 32),
    Shape("mha.b1.l32k", 1, 32768, 32, 32),
    Shape("mha.b4.l8k", 4, 8192, 32, 32),
    Shape("gqa4.b1.l32k", 1, 32768, 32, 8),
    Shape("gqa4.b16.l4k", 16, 4096, 32, 8),
    Shape("gqa4.b64.l4k", 64, 4096, 32, 8),
    Shape("gqa4.b128.l1k", 128, 1024, 32, 8),
    Shape("gqa4.b256.l512", 256, 512, 32, 8),
    Shape("gqa8.b1.l128k", 1, 131072, 64, 8),
    Shape("gqa8.b16.l8k", 16, 8192, 64, 8),
    Shape("gqa8.b64.l4k", 64, 4096, 64, 8),
    Shape("gqa16.b16.l4k", 16, 4096, 128, 8),
    Shape("d64.gqa4.b64.l4k", 64, 4096, 32, 8, 64),
    Shape("d256.gqa2.b16.l4k", 16, 4096, 16, 8, 256),
)

_SMALL = (
    Shape("mha.b1.l128", 1, 128, 32, 32),
    Shape("mha.b1.l1k", 1, 1024, 32, 32),
    Shape("gqa4.b1.l128", 1, 128, 32, 8),
    Shape("gqa4.b1.l1k", 1, 1024, 32, 8),
    Shape("gqa4.b1.l8k", 1, 8192, 32, 8),
    Shape("gqa8.b1.l2k", 1, 2048, 64, 8),
    Shape("gqa8.b1.l16k", 1, 16384, 64, 8),
)


def log_uniform(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths whose logarithms are equally likely: what requests of a busy server look like. Always the same ones."""
    logarithms = np.random.default_rng(0).uniform(math.log(low), math.log(high), count)
    return tuple(int(length) for length in np.exp(logarithms).round())


_RAGGED = (
    Shape("ragged.mha.b32", 32, 16384, 32, 32, kv_lens=log_uniform(32, 16, 16384)),
    Shape("ragged.gqa4.b64", 64, 16384, 32, 8, kv_lens=log_uniform(64, 16, 16384)),
    Shape("ragged.gqa8.b64", 64, 16384, 64, 8, kv_lens=log_uniform(64, 16, 16384)),
    Shape("long.gqa4.b64", 64, 131072, 32, 8, kv_lens=(131072, *(512,) * 63)),
)


def _formats() -> tuple[Shape, ...]:
    base = Shape("", 16, 4096, 32, 8)
    shapes = [replace(base, name=name, k=name, v=name) for name in KV_FORMATS]
    shapes += [
        replace(base, name="k.f16.v.e4m3", k="f16"),
        replace(base, name="k.e4m3.v.e5m2", v="e5m2"),
        replace(base, name="q.bf16", q="bf16"),
        replace(base, name="hnd", kv_layout="HND"),
        replace(base, name="head_scales", head_scales=True),
    ]
    return tuple(shapes + [replace(base, name=f"group{group}", num_qo_heads=8 * group) for group in (3, 5, 6, 7)])


def _paged() -> tuple[Shape, ...]:
    """Ordinary page sizes at several shapes; HND, single rows, and a page without a factor of 16 at one."""
    known = {shape.name: shape for shape in (*_DECODE, *_RAGGED)}
    names = (
        "gqa4.b64.l4k", "mha.b16.l1k", "gqa4.b16.l4k", "gqa4.b128.l1k", "mha.b64.l1k", "gqa8.b16.l8k",
        "ragged.gqa4.b64", "long.gqa4.b64",
    )  # fmt: skip
    base = known[names[0]]
    others = (base.in_pages(16, "HND"), base.in_pages(64, "HND"), base.in_pages(1), base.in_pages(5))
    return tuple(known[name].in_pages(page_size) for name in names for page_size in (16, 64)) + others


SUITES = {"decode": _DECODE, "ragged": _RAGGED, "small": _SMALL, "formats": _formats(), "paged": _paged()}
#: What the other rows of a suite are held against, by the suite's name.
BASES = {"formats": "e4m3"}


def chosen(suite: str, known: Sequence[Any], prefixes: list[str]) -> list[Any]:
    """Of what is known of a suite that whose name starts with one of ``prefixes``; all without any. ValueError if none
    does."""
    found = [one for one in known if not prefixes or one.name.startswith(tuple(prefixes))]
    if not found:
        names = ", ".join(one.name for one in known)
        raise ValueError(f"no shape of suite {suite} starts with {' or '.join(prefixes)}; it has {names}")
    return found
