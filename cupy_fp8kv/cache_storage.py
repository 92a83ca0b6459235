"""What a PagedKVCache stores: pools of pages, and scales, as arrays of one library on one device."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from . import arrays
from .arrays import HOST, Library
from .formats import KVFormat
from .formats import kv_format as format_called
from .jit.device import has_gpu, refuse_capture, require_cupy
from .layouts import check_kv_layout
from .scales import is_number, number, scale_library

#: Scales computed for each row when it is written.
TOKEN = "token"
_LIBRARIES = ("numpy", "cupy", "torch")


def resolve_device(device: Any, library: str | None) -> tuple[Library, int]:
    """The library and the index of the device that a user means. ValueError or RuntimeError if there is none.

    None: the GPU if there is one. A torch device means torch; otherwise arrays are CuPy's on a GPU and NumPy's on the
    host.
    """
    if type(device).__module__ == "torch":
        library = library or "torch"
        device = str(device)
    if device is None:
        index = HOST if library == "numpy" or not has_gpu() else 0
    elif isinstance(device, (int, np.integer)) and not isinstance(device, bool):
        index = int(device)
    elif isinstance(device, str) and device in ("cpu", "host", "cuda"):
        index = 0 if device == "cuda" else HOST
    elif isinstance(device, str) and device.startswith("cuda:") and device[5:].isdigit():
        index = int(device[5:])
    else:
        raise ValueError(f"device: expected 'cpu', 'cuda', 'cuda:N', a number or None, got {device!r}")
    if index < HOST:
        raise ValueError(f"device: expected a number from 0 on, got {index}")
    if library is None:
        library = "numpy" if index == HOST else "cupy"
    if library not in _LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(_LIBRARIES)}, got {library!r}")
    if (library == "numpy") != (index == HOST) and library != "torch":
        raise ValueError(f"library: {library} has no arrays on {arrays.device_name(index)}")
    if index != HOST:
        require_cupy()
    if library == "torch":
        importlib.import_module("torch")
    return arrays.library(library), index


def check_not_captured(library: Library, device: int) -> None:
    """RuntimeError while the current stream is captured: a graph would replay the tables of one step."""
    if device != HOST:
        refuse_capture(library.stream(device), "PagedKVCache", "no append, and page tables sent before")


def send(library: Library, values: np.ndarray, device: int) -> Any:
    """Host values on the device, without waiting for it: by way of pinned memory, on the current stream."""
    check_not_captured(library, device)
    array = library.from_numpy(values, HOST if library.name == "torch" else device)
    if library.name == "torch" and device != HOST:
        array = array.pin_memory().to(device, non_blocking=True)
    return array


class Storage:
    """Pools ``[num_layers, num_pages, 2, page_size, heads, D]`` (or a pair without the third axis, where the formats of
    K and V differ), zero at first; and ``[num_layers, num_pages, page_size, heads]`` float32 for scales of rows."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        kv_format: Any,
        scales: Any,
        kv_layout: str,
        device: Any,
        library: str | None,
    ):
        self.sizes = sizes
        self.kv_layout = check_kv_layout(kv_layout)
        pair = kv_format if isinstance(kv_format, (tuple, list)) else (kv_format, kv_format)
        if len(pair) != 2:
            raise ValueError(f"format: expected one format or a pair (K, V), got {kv_format!r}")
        self.formats: tuple[KVFormat, KVFormat] = format_called(pair[0], "format"), format_called(pair[1], "format")
        self.library, self.device = resolve_device(device, library)
        self.scales = self._scales(scales)
        num_layers, num_pages, page_size, heads, head_dim = sizes
        rows = (page_size, heads) if kv_layout == "NHD" else (heads, page_size)
        self.together = self.formats[0] == self.formats[1]
        shapes: list[tuple[int, ...]]
        if self.together:
            shapes = [(num_layers, num_pages, 2, *rows, head_dim * self.formats[0].itemsize)]
        else:
            shapes = [(num_layers, num_pages, *rows, head_dim * fmt.itemsize) for fmt in self.formats]
        self.bytes = [self._zeros(shape, "uint8") for shape in shapes]
        self.pools = [self._typed(raw, fmt) for raw, fmt in zip(self.bytes, self.formats, strict=False)]
        self.token_scales: list[Any] = []
        if self.has_token_scales:
            self.token_scales = [self._zeros((num_layers, num_pages, *rows), "float32") for _ in range(2)]

    @property
    def has_token_scales(self) -> bool:
        return isinstance(self.scales, str)

    @property
    def nbytes(self) -> int:
        """Bytes of the pools and of the scales of rows."""
        num_layers, num_pages, page_size, heads, head_dim = self.sizes
        row = head_dim * sum(fmt.itemsize for fmt in self.formats) + 8 * self.has_token_scales
        return num_layers * num_pages * page_size * heads * row

    @property
    def format_names(self) -> tuple[str, str]:
        return self.formats[0].name, self.formats[1].name

    def layer(self, layer: int) -> Any:
        """One layer as the paged functions take it."""
        pools = [pool[layer] for pool in self.pools]
        return pools[0] if self.together else tuple(pools)

    def all_layers(self) -> Any:
        """All layers as one cache, in which page p of layer l is page ``l * num_pages + p``."""
        pools = [pool.reshape(-1, *pool.shape[2:]) for pool in self.pools]
        return pools[0] if self.together else tuple(pools)

    def scales_of(self, layer: int) -> dict[str, Any]:
        """``k_scale`` and ``v_scale`` of a layer; nothing where rows have scales of their own."""
        if self.has_token_scales:
            return {}
        found = {}
        for name, scale in zip(("k_scale", "v_scale"), self.scales, strict=True):
            found[name] = scale if scale is None or is_number(scale) or len(scale.shape) < 2 else scale[layer]
        return found

    def token_scales_of(self, layer: int | None) -> dict[str, Any]:
        """``k_token_scales`` and ``v_token_scales`` of a layer, or of all as :meth:`all_layers` has them."""
        if not self.has_token_scales:
            return {}
        parts = [x.reshape(-1, *x.shape[2:]) if layer is None else x[layer] for x in self.token_scales]
        return {"k_token_scales": parts[0], "v_token_scales": parts[1]}

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        if self.library.name == "numpy":
            return np.zeros(shape, dtype)
        array, _ = self.library.empty(shape, dtype, self.device)
        array[...] = 0
        return array

    def _typed(self, raw: Any, fmt: KVFormat) -> Any:
        """Bytes as the type of a 16-bit format; FP8 stays uint8, whose format is told to every call."""
        if fmt.is_fp8:
            return raw
        name = fmt.dtype.name
        return raw.view(getattr(importlib.import_module("torch"), name) if self.library.name == "torch" else fmt.dtype)

    def _scales(self, scales: Any) -> Any:
        """``"token"``, or a pair of None, numbers and float32 arrays on the device."""
        if isinstance(scales, str):
            if scales != TOKEN:
                raise ValueError(f"scales: expected numbers, arrays, a pair (K, V) of them or 'token', got {scales!r}")
            if not all(fmt.is_fp8 for fmt in self.formats):
                raise ValueError(f"scales: 'token' is for FP8, got formats {' and '.join(map(str, self.formats))}")
            return scales
        pair = scales if isinstance(scales, (tuple, list)) else (scales, scales)
        if len(pair) != 2:
            raise ValueError(f"scales: expected one scale or a pair (K, V), got {len(pair)}")
        return tuple(self._scale(scale) for scale in pair)

    def _scale(self, scale: Any) -> Any:
        if scale is None:
            return None
        if is_number(scale):
            return number(scale, "scales")
        num_layers, heads = self.sizes[0], self.sizes[3]
        source = scale_library(scale, "scales")
        if tuple(scale.shape) not in ((), (1,), (heads,), (num_layers, heads)):
            raise ValueError(
                f"scales: expected a number or an array [1], [num_kv_heads] = [{heads}] or [num_layers, num_kv_heads] "
                f"= [{num_layers}, {heads}], got shape {list(scale.shape)}"
            )
        values = np.array(source.to_numpy(scale), np.float32)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError("scales: expected positive, finite numbers")
        return float(values.reshape(())) if values.size == 1 else self.library.from_numpy(values, self.device)
