"""What every operation means, in NumPy: the CPU backend, and the oracle of all tests.

Arguments are taken as valid; the public operations check them. Caches come as ``[B, L, Hkv, D]`` (NHD) views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..formats import NAN_CODE, KVFormat

Array = np.ndarray[Any, Any]

#: Elements of K (and of V) that :func:`attention` holds decoded at a time; its temporaries are a few times this.
BLOCK_ELEMENTS = 1 << 18


# Codecs


def encode(values: Any, fmt: KVFormat) -> Array:
    """FP8 codes (uint8) of float values.

    Rounds to nearest even, once, from float64 too; finite values beyond the range and infinities become the largest
    finite value of their sign; every NaN becomes ``0x7F``, without its sign, as the hardware's conversion does.
    """
    values = np.asarray(values)
    with np.errstate(all="ignore"):
        # fp16 and bf16 are exact in float32.
        exact = _float32_round_to_odd(values) if values.dtype == np.float64 else values.astype(np.float32)
        codes = np.clip(exact, -fmt.max, fmt.max).astype(fmt.dtype).view(np.uint8)
    return np.where(np.isnan(exact), np.uint8(NAN_CODE), codes)


def decode_codes(codes: Array, fmt: KVFormat) -> Array:
    """The float32 values of FP8 codes (uint8)."""
    return _code_values(fmt, np.dtype(np.float32))[codes]


def to_float(array: Array, fmt: KVFormat, dtype: Any = np.float32) -> Array:
    """The values of a cache block in float32 or float64: uint8 codes or ml_dtypes FP8, fp16, bf16."""
    if fmt.is_fp8:
        return _code_values(fmt, np.dtype(dtype))[array.view(np.uint8)]
    return array.astype(dtype)


@cache
def _code_values(fmt: KVFormat, dtype: np.dtype[Any]) -> Array:
    values = np.arange(256, dtype=np.uint8).view(fmt.dtype).astype(dtype)
    values.flags.writeable = False
    return values


def _float32_round_to_odd(values: Array) -> Array:
    """float64 to float32 so that a later rounding to fewer bits equals rounding once.

    An inexact value is cut toward zero and its last bit set: it can then neither be, nor cross, a tie of FP8 values
    (ml_dtypes alone rounds float64 to float32 first, and that result to even).
    """
    near = values.astype(np.float32)
    cut = np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    inexact = (cut != values) & ~np.isnan(values)
    odd: Array = cut.view(np.uint32) | inexact.astype(np.uint32)
    return odd.view(np.float32)


# Quantisation: stored = x / scale


def broadcast_scale(scale: Any, shape: tuple[int, ...], head_axis: int) -> Array:
    """A scale as float32, shaped to broadcast against an array of ``shape``.

    ``scale`` has shape ``()`` or ``(1,)``: one for all; ``shape[:-1]``: one per token and head; ``(H,)``: one per
    head, where ``H = shape[head_axis]``.
    """
    array: Array = np.asarray(scale, np.float32)
    if array.ndim <= 1 and array.size == 1:
        return array.reshape(())
    if array.shape == shape[:-1]:
        return array[..., None]
    per_head = [1] * len(shape)
    per_head[head_axis] = shape[head_axis]
    return array.reshape(per_head)


def amax_scale(x: Array, fmt: KVFormat, granularity: str, head_axis: int = -2) -> Array:
    """The float32 scale that maps the largest finite ``|x|`` to the largest value of ``fmt``.

    ``granularity`` is ``"tensor"`` (result ``(1,)``), ``"head"`` (``(H,)``) or ``"token"`` (per token and head,
    ``x.shape[:-1]``). The scale is 1 where it would not be a normal float: nothing finite, all zeros, or an underflow
    (devices flush subnormals).
    """
    axes = {
        "tensor": tuple(range(x.ndim)),
        "head": tuple(axis for axis in range(x.ndim) if axis != head_axis % x.ndim),
        "token": (x.ndim - 1,),
    }[granularity]
    with np.errstate(all="ignore"):
        magnitude = np.abs(x.astype(np.float32))
        scale = np.max(magnitude, axis=axes, where=np.isfinite(magnitude), initial=0.0) / np.float32(fmt.max)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))
    return scale.reshape(1) if granularity == "tensor" else scale


def quantize(x: Array, fmt: KVFormat, scale: Any, *, head_axis: int = -2) -> Array:
    """The codes (uint8) of ``x / scale``: a true division in float32, then :func:`encode`."""
    with np.errstate(all="ignore"):
        return encode(x.astype(np.float32) / broadcast_scale(scale, x.shape, head_axis), fmt)


def dequantize(codes: Array, fmt: KVFormat, scale: Any, out_dtype: Any = np.float32, *, head_axis: int = -2) -> Array:
    """``codes * scale`` in float32, then cast to ``out_dtype``; what overflows the cast becomes infinite."""
    with np.errstate(all="ignore"):
        values = to_float(codes, fmt) * broadcast_scale(scale, codes.shape, head_axis)
        return values.astype(np.dtype(out_dtype), copy=False)


# Attention


@dataclass(frozen=True, eq=False)
class SoftmaxState:
    """What attention over some rows leaves for attention over more of them.

    With ``x`` the logits of the rows: ``m = max x``, ``d = sum exp(x - m)``, ``o = sum exp(x - m) v``, of shapes
    ``[...]``, ``[...]`` and ``[..., D]``. Merging is associative, and the empty state (``m = -inf``, ``d = 0``,
    ``o = 0``) is its neutral element. (Milakov & Gimelshein, *Online normalizer calculation for softmax*, 2018.)
    """

    o: Array
    m: Array
    d: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], head_dim: int, dtype: Any = np.float32) -> SoftmaxState:
        return cls(np.zeros((*shape, head_dim), dtype), np.full(shape, -np.inf, dtype), np.zeros(shape, dtype))

    @classmethod
    def of(cls, logits: Array, v: Array) -> SoftmaxState:
        """The state of rows with ``logits[..., group, L]`` and ``v[..., L, D]``, which the group shares."""
        m = logits.max(axis=-1, initial=-np.inf)
        p = np.exp(logits - _origin(m)[..., None])
        return cls(p @ v, m, p.sum(axis=-1))

    def update(self, logits: Array, v: Array) -> SoftmaxState:
        return self.merge(SoftmaxState.of(logits, v))

    def merge(self, other: SoftmaxState) -> SoftmaxState:
        m = np.maximum(self.m, other.m)
        a, b = np.exp(self.m - _origin(m)), np.exp(other.m - _origin(m))
        return SoftmaxState(a[..., None] * self.o + b[..., None] * other.o, m, a * self.d + b * other.d)

    def finish(self, lse_base: str = "2") -> tuple[Array, Array]:
        """``out = o / d`` and ``lse = log sum exp x``, base ``"2"`` or ``"e"``; 0 and -inf for an empty state."""
        empty = self.m == -np.inf
        d = np.where(empty, np.ones_like(self.d), self.d)
        out = np.where(empty[..., None], np.zeros_like(self.o), self.o / d[..., None])
        lse = self.m + np.log(d)
        return out, lse * math.log2(math.e) if lse_base == "2" else lse


def merge_states(v: Array, s: Array, lse_base: str = "2", compute_dtype: Any = np.float32) -> tuple[Array, Array]:
    """The states ``(v[n, states, H, D], s[n, states, H])`` merged to ``v[n, H, D]`` and ``s[n, H]``.

    ``v`` is the mean of values that attention over some rows gives, ``s`` the log-sum-exp of their logits, base
    ``"2"`` or ``"e"``. ``s = -inf`` says that there are no rows: such a state is neutral, whatever its v holds.
    """
    with np.errstate(all="ignore"):
        m = s.astype(compute_dtype) * (math.log(2.0) if lse_base == "2" else 1.0)
        empty = m == -np.inf
        o = np.where(empty[..., None], 0, v.astype(compute_dtype))
        total = SoftmaxState.empty((s.shape[0], s.shape[2]), v.shape[3], compute_dtype)
        for i in range(s.shape[1]):
            total = total.merge(SoftmaxState(o[:, i], m[:, i], np.where(empty[:, i], 0, np.ones_like(m[:, i]))))
        return total.finish(lse_base)


def _origin(m: Array) -> Array:
    """What to subtract from logits whose maximum is ``m``; an empty state has none (and -inf - -inf would be NaN)."""
    return np.where(m == -np.inf, np.zeros_like(m), m)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    k_format: KVFormat,
    v_format: KVFormat,
    sm_scale: float,
    q_scale: Any = 1.0,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    logits_soft_cap: float | None = 0.0,
    window_left: int = -1,
    kv_lens: Array | None = None,
    lse_base: str = "2",
    compute_dtype: Any = np.float32,
    block_tokens: int | None = None,
) -> tuple[Array, Array]:
    """Decode attention of one query token a request over its cache.

    Parameters
    ----------
    q : ``[B, Hq, D]``, fp16 or bf16. Head ``h`` reads KV head ``h // (Hq / Hkv)``.
    k, v : ``[B, L, Hkv, D]``, uint8 codes, ml_dtypes FP8, fp16 or bf16, each as its format says; strides are free.
    sm_scale, q_scale, k_scale : the logits are ``q.k * sm_scale * q_scale * k_scale``. Numbers or arrays of shape
        ``()`` or ``(1,)``; ``k_scale`` and ``v_scale`` also ``(Hkv,)``.
    v_scale : multiplies the result, in the compute dtype.
    logits_soft_cap : logits become ``cap * tanh(logits / cap)``; 0 or None: they stay.
    window_left : only rows ``>= kv_len - 1 - window_left`` count; negative: all.
    kv_lens : ``[B]`` integers, rows of each request (no more than L); None: L. Other rows are never read.
    lse_base : ``"2"`` or ``"e"``.
    compute_dtype : float32 or float64, of all arithmetic and of both results.
    block_tokens : rows taken at a time; None: so many that temporaries stay within some megabytes.

    Returns
    -------
    out ``[B, Hq, D]`` (not yet rounded to q's dtype) and lse ``[B, Hq]``. 0 and -inf where a request has no rows, or
    no logit above -inf. NaN, and infinities, do what they do in ``exp(x - max) / sum``: a +inf logit gives NaN.
    """
    batch, num_qo_heads, head_dim = q.shape
    max_len, num_kv_heads = k.shape[1:3]
    group = num_qo_heads // num_kv_heads
    block = block_tokens or max(1, BLOCK_ELEMENTS // (num_kv_heads * max(head_dim, group)))
    lens = [max_len] * batch if kv_lens is None else [min(int(n), max_len) for n in kv_lens]
    out = np.empty((batch, num_kv_heads, group, head_dim), compute_dtype)
    lse = np.empty((batch, num_kv_heads, group), compute_dtype)

    with np.errstate(all="ignore"):
        # Multiplied in float64 and rounded once; [Hkv or 1, 1, 1] against logits [Hkv, group, rows].
        logit_scale = (sm_scale * _per_head(q_scale) * _per_head(k_scale)).astype(compute_dtype)
        out_scale = _per_head(v_scale).astype(compute_dtype)
        for b, kv_len in enumerate(lens):
            query = q[b].astype(compute_dtype).reshape(num_kv_heads, group, head_dim)
            state = SoftmaxState.empty((num_kv_heads, group), head_dim, compute_dtype)
            start = 0 if window_left < 0 else max(0, kv_len - 1 - window_left)
            for first in range(start, kv_len, block):
                rows = slice(first, min(first + block, kv_len))
                keys = to_float(k[b, rows], k_format, compute_dtype)
                logits = query @ keys.transpose(1, 2, 0) * logit_scale
                if logits_soft_cap:
                    logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
                values = to_float(v[b, rows], v_format, compute_dtype)
                state = state.update(logits, values.transpose(1, 0, 2))
            out[b], lse[b] = state.finish(lse_base)
        out *= out_scale
    return out.reshape(batch, num_qo_heads, head_dim), lse.reshape(batch, num_qo_heads)


def _per_head(scale: Any) -> Array:
    return np.asarray(scale, np.float64).reshape(-1, 1, 1)
