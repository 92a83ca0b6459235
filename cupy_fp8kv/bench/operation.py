"""An operation on caches, as the benchmark times it: what is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays import cupy_library
from ..formats import KV_FORMATS
from ..jit.device import require_cupy
from .inputs import Filler

E4M3, F16 = KV_FORMATS["e4m3"], KV_FORMATS["f16"]
#: Tokens, pages or states that a check looks at, spread evenly.
_CHECKED = 48


@dataclass(frozen=True)
class Prepared:
    """``call(s)`` is the operation on input set s, ``error()`` that of the last set (:attr:`Operation.tolerance`)."""

    call: Callable[[int], Any]
    error: Callable[[], float]


class Operation(Protocol):
    """A frozen description, which knows the bytes that have to be moved and prepares calls on input sets of its own."""

    @property
    def name(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def written_bytes(self) -> int: ...

    @property
    def tolerance(self) -> float:
        """Of errors: relative L2, or 0 where nothing is rounded, and an error is the fraction of bytes that differ."""

    @property
    def against(self) -> str:
        """The operation that gives the same in another way, which this one is held against; or nothing."""

    def prepare(self, filler: Filler, sets: int) -> Prepared: ...


@dataclass(frozen=True)
class PageSizes:
    """A cache of E4M3FN in pages, NHD."""

    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def row_bytes(self) -> int:
        """Of K, or of V."""
        return self.num_kv_heads * self.head_dim

    def pool(self, filler: Filler, pages: int, place: int = 0) -> Any:
        return filler.cache((pages, 2, self.page_size, self.num_kv_heads, self.head_dim), E4M3, place)


USUAL_PAGES = PageSizes()


def to_host(array: Any) -> np.ndarray:
    return cupy_library().to_numpy(array)


def to_device(*arrays: Any) -> list[Any]:
    return [require_cupy().asarray(np.ascontiguousarray(array)) for array in arrays]


def some(count: int) -> list[int]:
    """Numbers below ``count`` that a check looks at: the first, the last, and some between them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, _CHECKED))})


def differing(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """The fraction of bytes that differ."""
    return float(np.mean([(a.view(np.uint8) != b.view(np.uint8)).mean() for a, b in zip(got, want, strict=True)]))
