"""States to merge, and what they merge to, for the tests of every backend."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from oracle import assert_same_specials

Array = np.ndarray[Any, Any]

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
#: Of the largest |v| of a row; rounding alone costs 2^-11, 2^-8 and 2^-24.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}


def states(shape: tuple[int, int, int, int], dtype: str, seed: int = 0, spread: float = 4.0) -> tuple[Array, Array]:
    """``v[n, states, H, D]`` and ``s[n, states, H]``: some states are empty, with NaN in their v; some rows wholly."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(shape).astype(DTYPES[dtype])
    s = (rng.standard_normal(shape[:-1]) * spread).astype(np.float32)
    s[rng.random(s.shape) < 0.2] = -np.inf
    if s.size:
        s[-1, :, 0] = -np.inf
    v[s == -np.inf] = np.nan
    return v, s


def merged(v: Array, s: Array, lse_base: str = "2") -> tuple[Array, Array]:
    """The definition, in float64, without a running state: a weighted mean."""
    v, s = v.astype(np.float64), s.astype(np.float64)
    power = np.exp2 if lse_base == "2" else np.exp
    with np.errstate(all="ignore"):
        largest = s.max(axis=1, initial=-np.inf, keepdims=True)
        weights = power(s - np.where(np.isneginf(largest), 0.0, largest))
        total = weights.sum(axis=1)
        values = np.where((s == -np.inf)[..., None], 0.0, v)
        out = (weights[..., None] * values).sum(axis=1) / np.where(total == 0.0, 1.0, total)[..., None]
        return out, (np.log2 if lse_base == "2" else np.log)(total) + largest[:, 0]


def check(v: Any, s: Any, want_v: Array, want_s: Array, dtype: str) -> None:
    v, s = np.asarray(v), np.asarray(s)
    assert v.dtype == DTYPES[dtype] and s.dtype == np.float32
    assert v.shape == want_v.shape and s.shape == want_s.shape
    v, s = v.astype(np.float64), s.astype(np.float64)
    assert_same_specials(v, want_v, "v")
    assert_same_specials(s, want_s, "s")
    finite = np.isfinite(want_v)
    allowed = TOLERANCES[dtype] * np.abs(np.where(finite, want_v, 0)).max(axis=-1, keepdims=True, initial=1.0)
    off = np.abs(np.where(finite, v, 0.0) - np.where(finite, want_v, 0.0))
    assert (off <= allowed).all(), f"v: off by {off.max():.3g}"
    finite = np.isfinite(want_s)
    off = np.abs(s[finite] - want_s[finite]) / np.maximum(1.0, np.abs(want_s[finite]))
    assert off.max(initial=0.0) <= 1e-5, f"s: off by {off.max():.3g}"


def specials() -> tuple[Array, Array]:
    """Every pair of interesting sums in one row each, v finite; then NaN and infinities in v."""
    sums = np.array([0.0, -3.0, 200.0, -1e30, 1e30, -3.4e38, -np.inf, np.inf, np.nan], np.float32)
    s = np.stack(np.meshgrid(sums, sums), axis=-1).reshape(-1, 2, 1)
    v = np.random.default_rng(1).standard_normal((len(s), 2, 1, 16)).astype(np.float32)
    more = np.zeros((4, 2, 1), np.float32)
    values = np.ones((4, 2, 1, 16), np.float32)
    values[0, 0, 0, 3], values[1, 1, 0, 4], values[2, 0, 0, 5] = np.nan, np.inf, -np.inf
    values[3, 0, 0, 6], values[3, 1, 0, 6] = np.inf, -np.inf
    return np.concatenate([v, values]), np.concatenate([s, more])
