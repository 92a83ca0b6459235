"""The order of a cache's axes, ``"NHD"`` or ``"HND"`` as in FlashInfer, and the one order used inside."""

from __future__ import annotations

#: How the rows of requests lie in memory, with the C++ type of the header of the same name in ``cuda_src/layout/``.
LAYOUTS = {"padded": "PaddedLayout", "paged": "PagedLayout"}
#: Names a user may give, with the position of (token, head) among the axes after the batch.
KV_LAYOUTS = {"NHD": (0, 1), "HND": (1, 0)}


def check_kv_layout(kv_layout: str) -> str:
    if not isinstance(kv_layout, str) or kv_layout not in KV_LAYOUTS:
        raise ValueError(f"kv_layout: expected 'NHD' or 'HND', got {kv_layout!r}")
    return kv_layout


def token_head_axes(kv_layout: str, ndim: int) -> tuple[int, int]:
    """Where the token and the head axis of an ``ndim``-dimensional cache with ``head_dim`` last are."""
    token, head = KV_LAYOUTS[check_kv_layout(kv_layout)]
    return ndim - 3 + token, ndim - 3 + head


def to_nhd(values: tuple[int, ...], kv_layout: str) -> tuple[int, ...]:
    """Shape or strides of a cache (``[..., L, H, D]`` or ``[..., H, L, D]``), reordered to ``[..., L, H, D]``."""
    token, head = token_head_axes(kv_layout, len(values))
    return (*values[:-3], values[token], values[head], values[-1])
