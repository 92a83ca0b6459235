"""The oracle of all tests, what may be far from it by how much, and random cases.

Judges a kernel, not a cache (NUMERICS, standard 1): the oracle reads the same bytes, in float64.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import NAN_CODE, KVFormat

Array = np.ndarray[Any, Any]

#: By output dtype: relative L2 of a request; distance of an element, relative to max |ref| of its (request, head).
#: Rounding alone costs up to 2^-11 (fp16) and 2^-9 (bf16) of an element, and about 2e-4 and 1.6e-3 in L2.
TOLERANCES = {"float16": (5e-4, 1e-3), "bfloat16": (4e-3, 8e-3)}
#: Absolute, in either base.
LSE_TOLERANCE = 1e-4


def oracle(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """``reference.attention`` in float64; its options."""
    return reference.attention(q, k, v, compute_dtype=np.float64, **options)


def relative_l2(a: Any, b: Any) -> float:
    """``|a - b| / |b|``; for ``b = 0``: 0 if ``a`` is 0 too, else inf."""
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    error, norm = np.linalg.norm(a - b), np.linalg.norm(b)
    return float(error / norm) if norm else float(np.inf if error else 0.0)


def assert_same_specials(got: Array, want: Array, name: str) -> None:
    """NaN, +inf and -inf at exactly the same places."""
    for what, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differ = np.argwhere(test(got) != test(want))
        assert not len(differ), f"{name}: {what} where it should not be, or missing, at {differ[:4].tolist()} …"


def assert_close(out: Any, lse: Any, ref_out: Array, ref_lse: Array, q_dtype: Any) -> None:
    """Hold ``out[B, H, D]`` (or ``[H, D]``) and ``lse[B, H]`` against the oracle's, at the tolerances of ``q_dtype``.

    Places of NaN and infinities come first and must be equal (of ``ref_out``: after rounding to ``q_dtype``); then,
    over finite elements, relative L2 of each request, each element against max |ref| of its request and head, and
    the LSE. Errors below half the smallest subnormal of ``q_dtype`` (3e-8 for fp16) are its rounding and pass.
    ``lse`` may be None where an operation returns none.
    """
    dtype = np.dtype(q_dtype)
    l2_tolerance, tolerance = TOLERANCES[dtype.name]
    floor = float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2
    assert np.asarray(out).shape == ref_out.shape, f"out: shape {np.asarray(out).shape}, expected {ref_out.shape}"
    out = np.asarray(out).astype(np.float64)
    with np.errstate(over="ignore"):
        assert_same_specials(out, ref_out.astype(dtype).astype(np.float64), "out")
    finite = np.isfinite(out) & np.isfinite(ref_out)
    got, want = (np.where(finite, x, 0.0).reshape(-1, *ref_out.shape[-2:]) for x in (out, ref_out))
    for b in range(len(got)):
        error, norm = np.linalg.norm(got[b] - want[b]), np.linalg.norm(want[b])
        allowed = l2_tolerance * norm + floor * np.sqrt(got[b].size)
        assert error <= allowed, f"out: relative L2 {error / norm:.2e} > {l2_tolerance:g} in request {b}"
    excess = np.abs(got - want) - tolerance * np.abs(want).max(axis=-1, keepdims=True, initial=0.0) - floor
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else ()
    assert not excess.size or excess[worst] <= 0, (
        f"out: {got[worst]:.6g}, expected {want[worst]:.6g} at (request, head, channel) {tuple(map(int, worst))}"
    )
    if lse is None:
        return
    lse = np.asarray(lse).astype(np.float64)
    assert lse.shape == ref_lse.shape, f"lse: shape {lse.shape}, expected {ref_lse.shape}"
    assert_same_specials(lse, ref_lse, "lse")
    finite = np.isfinite(lse)
    off = float(np.abs(lse[finite] - ref_lse[finite]).max(initial=0.0))
    assert off <= LSE_TOLERANCE, f"lse: off by {off:.2e} > {LSE_TOLERANCE:g}"


def random_query(rng: np.random.Generator, shape: tuple[int, ...], q_dtype: Any) -> Array:
    return rng.standard_normal(shape, np.float32).astype(np.dtype(q_dtype))


def random_cache(rng: np.random.Generator, shape: tuple[int, ...], fmt: KVFormat, kind: str = "normal") -> Array:
    """A cache of finite elements; uint8 codes for the FP8 formats, else the format's own dtype.

    ``kind="normal"``: standard normal values. ``kind="codes"`` (FP8 only): every finite code alike, whose values
    span the whole range, so that softmax is one-hot unless a scale is small.
    """
    if kind == "codes":
        codes = np.arange(256, dtype=np.uint8)
        return rng.choice(codes[np.isfinite(reference.decode_codes(codes, fmt))], shape)
    values = rng.standard_normal(shape, np.float32)
    return reference.encode(values, fmt) if fmt.is_fp8 else values.astype(fmt.dtype)


def poison(array: Array, fmt: KVFormat) -> Array:
    """Fill a cache, or a view of rows that must not be read, with NaN, in place; returns it."""
    array[...] = NAN_CODE if array.dtype == np.uint8 else np.asarray(np.nan).astype(fmt.dtype)
    return array
