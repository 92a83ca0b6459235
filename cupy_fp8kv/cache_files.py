"""Saving and loading a PagedKVCache: safetensors files of bytes, with what they mean beside them as JSON.

Pages are uint8 whatever their format, because NumPy's side of safetensors knows no FP8. Only pages in use are written,
as pages 0, 1, 2, …
"""

from __future__ import annotations

import importlib
import json
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from .scales import is_number

if TYPE_CHECKING:
    from .cache import PagedKVCache

#: The key of the metadata, and the version of what is in it.
_KEY, _VERSION = "cupy_fp8kv", 1


def _safetensors() -> Any:
    try:
        importlib.import_module("safetensors")
        return importlib.import_module("safetensors.numpy")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "safetensors":
            raise
        raise ImportError(
            'saving and loading a PagedKVCache need safetensors: pip install "cupy_fp8kv[safetensors]"'
        ) from None


def save(cache: PagedKVCache, path: str | PathLike[str]) -> None:
    """As :meth:`PagedKVCache.save` says."""
    safetensors = _safetensors()
    allocator, storage = cache.allocator, cache._storage
    for request in allocator.requests:
        if isinstance(request, bool) or not isinstance(request, (str, int)):
            raise TypeError(f"requests: expected names that are str or int to save, got {request!r}")
    used = sorted({page for request in allocator.requests for page in allocator.pages(request)})
    place = {page: i for i, page in enumerate(used)}
    arrays = dict(zip(_names(storage), [*storage.bytes, *storage.token_scales], strict=True))
    # A layer at a time: the host need not hold what is not in use.
    tensors = {
        name: np.stack([storage.library.to_numpy(array[layer])[used] for layer in range(allocator.num_layers)])
        for name, array in arrays.items()
    }
    numbers: list[Any] = [None, None]
    if not storage.has_token_scales:
        for i, (name, scale) in enumerate(zip(("k_scale", "v_scale"), storage.scales, strict=True)):
            if scale is None or is_number(scale):
                numbers[i] = scale
            else:
                tensors[name] = storage.library.to_numpy(scale)
    layers = range(allocator.num_layers)
    facts = {
        "version": _VERSION, "sizes": storage.sizes, "format": storage.format_names, "kv_layout": storage.kv_layout,
        "scales": storage.scales if storage.has_token_scales else numbers,
        "requests": [
            [name, [place[page] for page in allocator.pages(name)], [allocator.length(name, i) for i in layers]]
            for name in allocator.requests
        ],
    }  # fmt: skip
    safetensors.save_file(tensors, fspath(path), metadata={_KEY: json.dumps(facts)})


def load(
    kind: type[PagedKVCache], path: str | PathLike[str], num_pages: int | None, device: Any, library: str | None
) -> PagedKVCache:
    """As :meth:`PagedKVCache.load` says. ValueError for a file that is not one of these."""
    _safetensors()
    with importlib.import_module("safetensors").safe_open(fspath(path), framework="numpy") as file:
        text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise ValueError(f"path: expected a file that PagedKVCache.save wrote, got {fspath(path)}")
        facts = json.loads(text)
        if facts["version"] != _VERSION:
            raise ValueError(f"path: expected version {_VERSION} of the file, got {facts['version']}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    num_layers, saved_pages, page_size, heads, head_dim = facts["sizes"]
    used = max((page for _, pages, _ in facts["requests"] for page in pages), default=-1) + 1
    num_pages = saved_pages if num_pages is None else num_pages
    if num_pages < used:
        raise ValueError(f"num_pages: expected at least the {used} pages in use, got {num_pages}")
    scales = facts["scales"]
    if not isinstance(scales, str):
        scales = tuple(tensors.get(name, value) for name, value in zip(("k_scale", "v_scale"), scales, strict=True))
    cache = kind(
        num_layers, num_pages, page_size, heads, head_dim, format=tuple(facts["format"]), scales=scales,
        kv_layout=facts["kv_layout"], device=device, library=library,
    )  # fmt: skip
    storage = cache._storage
    for name, array in zip(_names(storage), [*storage.bytes, *storage.token_scales], strict=True):
        for layer in range(num_layers):
            array[layer][:used] = storage.library.from_numpy(tensors[name][layer], storage.device)
    cache.allocator.restore(facts["requests"])
    return cache


def _names(storage: Any) -> list[str]:
    names = ["pages"] if storage.together else ["k_pages", "v_pages"]
    return names + ["k_token_scales", "v_token_scales"] * storage.has_token_scales
