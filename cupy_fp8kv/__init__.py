"""Attention over FP8 KV caches: CUDA kernels compiled at run time through CuPy, and a NumPy backend that defines them.

Importing reads the CUDA sources and imports neither CuPy nor torch nor JAX; kernels are compiled at first use.
"""

from typing import TYPE_CHECKING, Any

from .decode import (
    batch_decode_with_padded_kv_cache,
    batch_decode_with_padded_kv_cache_return_lse,
    single_decode_with_kv_cache,
)
from .decode_plan import DecodePlan
from .explain import Explanation, explain, warmup
from .formats import KV_FORMATS, KVFormat
from .plan import DeviceInfo
from .quantize import dequantize, quantize

if TYPE_CHECKING:
    from .tuning.tune import TuneResult, tune

__version__ = "0.1.0"

__all__ = [
    "KV_FORMATS",
    "DecodePlan",
    "DeviceInfo",
    "Explanation",
    "KVFormat",
    "TuneResult",
    "__version__",
    "batch_decode_with_padded_kv_cache",
    "batch_decode_with_padded_kv_cache_return_lse",
    "dequantize",
    "explain",
    "quantize",
    "single_decode_with_kv_cache",
    "tune",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """``tune`` is imported when it is asked for: programs that only decode start faster without it."""
    if name not in ("TuneResult", "tune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .tuning import tune as module

    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
