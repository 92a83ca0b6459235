"""Counters that appending keeps on the device, for a caller who wants to know what quantisation lost."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays

#: Elements of ``counts``.
SATURATED, NAN, SKIPPED = slice(0, 2), slice(2, 4), slice(4, 5)


class AppendCounters:
    """What the appends that were given it have seen. It lies where the cache is, and no append waits for it.

    Parameters
    ----------
    num_kv_heads : heads of the cache.
    like : the cache, or any array of its library on its device.

    Attributes
    ----------
    saturated : int64 ``[2]``, of K and V: values that, divided by the scale, were beyond what rounds to the largest
        finite value of the cache's format; infinities are among them. (A 16-bit cache holds infinity for them.)
    nan : int64 ``[2]``, of K and V: values stored as NaN.
    skipped : int64 ``[1]``: tokens that were not written, because a table on the device put them outside the cache.
    amax : float32 ``[2, num_kv_heads]``, of K and V: the largest finite magnitude, before any scale.
    """

    def __init__(self, num_kv_heads: int, like: Any):
        like = arrays.adopt(like[0] if isinstance(like, (tuple, list)) else like, "like")
        library = arrays.library_of(like, "like")
        assert library is not None  # adopt() leaves no other
        if not library.mutable:
            raise TypeError(f"like: expected an array that can be written, got one of {library.name}")
        device = library.facts(arrays.read(library, like, "like")[1]).device
        self.num_kv_heads = num_kv_heads
        self.library = library
        self.device = device
        self.counts = library.from_numpy(np.zeros(5, np.int64), device)
        self.amax = library.from_numpy(np.zeros((2, num_kv_heads), np.float32), device)

    @property
    def saturated(self) -> Any:
        return self.counts[SATURATED]

    @property
    def nan(self) -> Any:
        return self.counts[NAN]

    @property
    def skipped(self) -> Any:
        return self.counts[SKIPPED]

    def reset(self) -> None:
        """Back to zero, on the current stream."""
        self.counts[...] = 0
        self.amax[...] = 0

    def addresses(self) -> tuple[int, int]:
        return self.library.read(self.counts)[0], self.library.read(self.amax)[0]

    def add(self, saturated: list[int], nan: list[int], amax: np.ndarray) -> None:
        """What the NumPy backend has seen."""
        new = np.array([*saturated, *nan, 0], np.int64)
        largest = np.maximum(self.library.to_numpy(self.amax), amax)
        self.counts[...] = self.library.from_numpy(self.library.to_numpy(self.counts) + new, self.device)
        self.amax[...] = self.library.from_numpy(largest, self.device)

    def __repr__(self) -> str:
        """Reads the counters, so it waits for the device."""
        counts, amax = self.library.to_numpy(self.counts), self.library.to_numpy(self.amax)
        sides = ", ".join(
            f"{name}: {counts[SATURATED][i]} saturated, {counts[NAN][i]} NaN, amax {amax[i].max(initial=0.0):.4g}"
            for i, name in enumerate(("K", "V"))
        )
        return f"AppendCounters({sides}; {counts[4]} tokens skipped)"
