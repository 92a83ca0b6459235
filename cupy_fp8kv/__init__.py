"""Attention over FP8 KV caches: CUDA kernels compiled at run time through CuPy, and a NumPy backend that defines them.

Importing reads the CUDA sources and imports neither CuPy nor torch nor JAX; kernels are compiled at first use.
"""

from typing import TYPE_CHECKING, Any

from .allocator import OutOfPagesError
from .append import append_padded_kv_cache, append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from .cache import PagedKVCache
from .cascade import BatchDecodeWithSharedPrefixPagedKVCacheWrapper, MultiLevelCascadeAttentionWrapper
from .counters import AppendCounters
from .decode import (
    batch_decode_with_padded_kv_cache,
    batch_decode_with_padded_kv_cache_return_lse,
    single_decode_with_kv_cache,
)
from .decode_plan import DecodePlan
from .explain import Explanation, explain, warmup
from .formats import KV_FORMATS, KVFormat
from .merging import merge_state, merge_state_in_place, merge_states
from .page_moves import copy_pages, gather
from .paged import batch_decode_with_paged_kv_cache
from .paged_wrappers import BatchDecodeWithPagedKVCacheWrapper, CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from .plan import DeviceInfo
from .quantize import dequantize, quantize
from .workspaces import workspace_size

if TYPE_CHECKING:
    from .tuning.tune import TuneResult, tune

__version__ = "0.1.0"

__all__ = [
    "KV_FORMATS",
    "AppendCounters",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "DecodePlan",
    "DeviceInfo",
    "Explanation",
    "KVFormat",
    "MultiLevelCascadeAttentionWrapper",
    "OutOfPagesError",
    "PagedKVCache",
    "TuneResult",
    "__version__",
    "append_padded_kv_cache",
    "append_paged_kv_cache",
    "batch_decode_with_padded_kv_cache",
    "batch_decode_with_padded_kv_cache_return_lse",
    "batch_decode_with_paged_kv_cache",
    "copy_pages",
    "dequantize",
    "explain",
    "gather",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "quantize",
    "single_decode_with_kv_cache",
    "tune",
    "warmup",
    "workspace_size",
]


def __getattr__(name: str) -> Any:
    """``tune`` is imported when it is asked for: programs that only decode start faster without it."""
    if name not in ("TuneResult", "tune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .tuning import tune as module

    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
