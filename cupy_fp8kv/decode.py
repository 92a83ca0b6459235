"""Decode attention over padded caches: the public operations."""

from __future__ import annotations

from typing import Any

from . import dispatch


def single_decode_with_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    *,
    kv_format: Any = None,
    return_lse: bool = False,
    lse_base: str = "2",
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Attention of one query token over one request's KV cache.

    Parameters
    ----------
    q : array ``[num_qo_heads, head_dim]``, float16 or bfloat16.
    k, v : arrays ``[kv_len, num_kv_heads, head_dim]`` for ``kv_layout="NHD"``, ``[num_kv_heads, kv_len, head_dim]`` for
        ``"HND"``.
    use_tensor_cores : accepted for FlashInfer's sake; the kernel always uses tensor cores.

    Everything else is as in :func:`batch_decode_with_padded_kv_cache`.

    Returns
    -------
    out : ``[num_qo_heads, head_dim]``, q's dtype and library; with ``return_lse`` a pair with lse ``[num_qo_heads]``.
    """
    return dispatch.decode(
        False, q, k, v, kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale,
        None, kv_format, return_lse, lse_base, out, backend,
    )  # fmt: skip


def batch_decode_with_padded_kv_cache(
    q: Any,
    k_padded: Any,
    v_padded: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    *,
    kv_lens: Any = None,
    kv_format: Any = None,
    window_left: int = -1,
    return_lse: bool = False,
    lse_base: str = "2",
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Attention of one query token per request over padded KV caches, ``softmax(q kᵀ · sm_scale) v``.

    Query head ``h`` reads cache head ``h // (num_qo_heads / num_kv_heads)`` (Ainslie et al., "GQA", 2023).

    Parameters
    ----------
    q : array ``[batch, num_qo_heads, head_dim]``, float16 or bfloat16, of NumPy, CuPy, torch, JAX or with DLPack.
    k_padded, v_padded : arrays of the same library and device, ``[batch, kv_len, num_kv_heads, head_dim]`` for
        ``kv_layout="NHD"``, ``[batch, num_kv_heads, kv_len, head_dim]`` for ``"HND"``. FP8 as the library's own type
        or as uint8 codes, float16 or bfloat16; K and V may differ. Any strides with a contiguous last axis and rows at
        multiples of 16 bytes. ``head_dim`` is a multiple of 16 up to 256.
    pos_encoding_mode : ``"NONE"``; the others raise NotImplementedError. ``rope_scale``, ``rope_theta`` are theirs.
    q_scale, k_scale, v_scale : numbers, or float arrays with one element; ``k_scale`` and ``v_scale`` also
        ``[num_kv_heads]``. Arrays on the device are read by the kernel, never by the host. The logits are multiplied
        with ``q_scale * k_scale``, the result with ``v_scale``, both in float32.
    logits_soft_cap : logits become ``cap * tanh(logits / cap)`` (Gemma 2); None or 0: they stay.
    sm_scale : the softmax scale, default ``1 / sqrt(head_dim)``.
    kv_lens : int32 ``[batch]``: request b has rows ``[0, kv_lens[b])``; what lies beyond is never read. On the host it
        is checked; on the device it is used as it is, cut to ``[0, kv_len]``, and never copied to the host.
    kv_format : what uint8 codes mean, ``"e4m3"`` (default) or ``"e5m2"``, or a pair (K, V).
    window_left : a query at row n - 1 sees rows ``>= n - 1 - window_left``; negative: all.
    return_lse : also return the log-sum-exp of the logits, float32 ``[batch, num_qo_heads]``.
    lse_base : ``"2"`` or ``"e"``.
    out : array for the result, ``[batch, num_qo_heads, head_dim]``, q's dtype, library and device.
    backend : ``"cuda"`` or ``"numpy"`` to force one. By default device arrays run where they are, and host arrays on
        the GPU if there is one (uploaded, result downloaded), otherwise in NumPy.

    Returns
    -------
    out : ``[batch, num_qo_heads, head_dim]``, q's dtype, in the caller's library on the caller's device, written on
        the caller's current stream. A request without rows gives 0 (and -inf for lse).

    Raises
    ------
    ValueError, TypeError
        Arrays that do not fit together; the message names the argument, what was expected and what came.
    RuntimeError
        ``backend="cuda"`` without a usable GPU, or a kernel that does not compile.
    """
    return dispatch.decode(
        True, q, k_padded, v_padded, kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, window_left,
        logits_soft_cap, sm_scale, kv_lens, kv_format, return_lse, lse_base, out, backend,
    )  # fmt: skip


def batch_decode_with_padded_kv_cache_return_lse(
    q: Any,
    k_padded: Any,
    v_padded: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    *,
    kv_lens: Any = None,
    kv_format: Any = None,
    window_left: int = -1,
    lse_base: str = "2",
    out: Any = None,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """:func:`batch_decode_with_padded_kv_cache` that returns ``(out, lse)``."""
    return dispatch.decode(
        True, q, k_padded, v_padded, kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, window_left,
        logits_soft_cap, sm_scale, kv_lens, kv_format, True, lse_base, out, backend,
    )  # fmt: skip
