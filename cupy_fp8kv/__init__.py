"""Attention over FP8 KV caches: CUDA kernels compiled at run time through CuPy, and a NumPy backend that defines them.

Importing reads the CUDA sources and imports neither CuPy nor torch nor JAX; kernels are compiled at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .decode import (
    batch_decode_with_padded_kv_cache,
    batch_decode_with_padded_kv_cache_return_lse,
    single_decode_with_kv_cache,
)
from .explain import Explanation, explain, warmup
from .formats import KV_FORMATS, KVFormat
from .plan import DeviceInfo
from .quantize import dequantize, quantize

if TYPE_CHECKING:
    from .allocator import OutOfPagesError
    from .append import append_padded_kv_cache, append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
    from .cache import PagedKVCache
    from .cascade import BatchDecodeWithSharedPrefixPagedKVCacheWrapper, MultiLevelCascadeAttentionWrapper
    from .counters import AppendCounters
    from .decode_plan import DecodePlan
    from .merging import merge_state, merge_state_in_place, merge_states
    from .page_moves import copy_pages, gather
    from .paged import batch_decode_with_paged_kv_cache
    from .paged_wrappers import BatchDecodeWithPagedKVCacheWrapper, CUDAGraphBatchDecodeWithPagedKVCacheWrapper
    from .tuning.tune import TuneResult, tune
    from .workspaces import workspace_size

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


#: Imported when they are asked for: programs that decode padded caches start faster without them. Not here: a function
#: with the name of its module, because importing the module would put that in its place.
_LATER = {
    "allocator": ("OutOfPagesError",),
    "append": ("append_padded_kv_cache", "append_paged_kv_cache", "get_batch_indices_positions", "get_seq_lens"),
    "cache": ("PagedKVCache",),
    "cascade": ("BatchDecodeWithSharedPrefixPagedKVCacheWrapper", "MultiLevelCascadeAttentionWrapper"),
    "counters": ("AppendCounters",),
    "decode_plan": ("DecodePlan",),
    "merging": ("merge_state", "merge_state_in_place", "merge_states"),
    "page_moves": ("copy_pages", "gather"),
    "paged": ("batch_decode_with_paged_kv_cache",),
    "paged_wrappers": ("BatchDecodeWithPagedKVCacheWrapper", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper"),
    "tuning.tune": ("TuneResult", "tune"),
    "workspaces": ("workspace_size",),
}
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
