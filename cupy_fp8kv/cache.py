"""A KV cache in pages that looks after itself: append tokens, decode, fork, free."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from . import arrays
from .allocator import OutOfPagesError, PageAllocator
from .append_checks import Options
from .append_tables import Paged, Tokens
from .appending import checked
from .arrays import HOST
from .cache_storage import Storage, check_not_captured, send
from .counters import AppendCounters
from .decode import batch_decode_with_padded_kv_cache
from .formats import dtype_name
from .page_moves import copy_pages, gather
from .paged import batch_decode_with_paged_kv_cache
from .quantize import dequantize

__all__ = ["OutOfPagesError", "PagedKVCache"]

#: Page tables that are kept; a step asks for one or two of them in every layer.
_MOST_TABLES = 8


class PagedKVCache:
    """Keys and values of many requests and layers in one pool of pages.

    Parameters
    ----------
    num_layers, num_pages, page_size, num_kv_heads, head_dim : sizes. A page holds ``page_size`` tokens of one request,
        in all layers; head_dim is a multiple of 16 up to 256.
    format : what is stored, ``"e4m3"`` (default), ``"e5m2"``, ``"f16"``, ``"bf16"`` or a dtype, or a pair (K, V).
    scales : None stores values as they are. A number, or an array ``[num_kv_heads]`` or ``[num_layers,
        num_kv_heads]``, or a pair (K, V) of such: stored = value / scale. ``"token"``: each row of each head gets its
        own, computed when it is appended.
    kv_layout : ``"NHD"`` or ``"HND"``, the order in which pages are stored.
    device : None (the GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, a number or a torch device.
    library : whose arrays the cache holds, takes and returns: ``"numpy"``, ``"cupy"`` or ``"torch"``. By default torch
        for a torch device, else CuPy on a GPU and NumPy on the host.

    Page tables are the cache's business. They live on the device; changes go there through pinned memory on the current
    stream, and nothing waits for the device. Lengths and page numbers are known to the host, so appends and decodes
    cannot be captured into a graph that is replayed with other lengths: for that, use the functions with tables of your
    own.

    Examples
    --------
    >>> cache = PagedKVCache(2, num_pages=64, page_size=16, num_kv_heads=8, head_dim=128)  # doctest: +SKIP
    >>> cache.allocate("a")
    >>> for layer in range(2):
    ...     cache.append(layer, "a", k[layer], v[layer])        # prompt: [n, 8, 128]
    >>> out = cache.decode(0, q)                                # one query token a request: [1, Hq, 128]
    >>> cache.fork("a", "b")                                    # shares pages until one of them writes
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        format: Any = "e4m3",
        scales: Any = None,
        kv_layout: str = "NHD",
        device: Any = None,
        library: str | None = None,
    ):
        self._allocator = PageAllocator(num_pages, page_size, num_layers)
        for name, value in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if head_dim % 16 or head_dim > 256:
            raise ValueError(f"head_dim: expected a multiple of 16 up to 256, got {head_dim}")
        sizes = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self._storage = Storage(sizes, format, scales, kv_layout, device, library)
        self._tables: dict[Any, tuple[Any, Any, Any, Any]] = {}

    # Requests

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """The requests in the order in which they came, which is their order in :meth:`decode`."""
        return self._allocator.requests

    @property
    def allocator(self) -> PageAllocator:
        """The page tables on the host, to look at."""
        return self._allocator

    def __contains__(self, request: object) -> bool:
        return request in self._allocator

    def __len__(self) -> int:
        return len(self.requests)

    def length(self, request: Hashable, layer: int = 0) -> int:
        """Tokens of a request in a layer."""
        return self._allocator.length(request, layer)

    def allocate(self, request: Hashable = None) -> Hashable:
        """A new request without tokens; its name, a new number if none is given."""
        request = self._new_name() if request is None else request
        self._allocator.allocate(request)
        return request

    def fork(self, request: Hashable, new: Hashable = None) -> Hashable:
        """A new request with the tokens of another: it shares the pages, until one of them writes into a shared one.

        Costs no memory and no copy now; a write copies the page it goes to, in all layers. Returns the new name.
        """
        new = self._new_name() if new is None else new
        self._allocator.fork(request, new)
        return new

    def free(self, request: Hashable) -> None:
        """Forget a request. Pages that no other one shares are free again."""
        self._allocator.free(request)

    def _new_name(self) -> int:
        name = len(self._allocator.requests)
        while name in self._allocator:
            name += 1
        return name

    # Tokens

    def append(
        self,
        layer: int,
        requests: Any,
        k: Any,
        v: Any,
        counts: Sequence[int] | None = None,
        *,
        counters: AppendCounters | None = None,
    ) -> None:
        """Add tokens to one request or to several, in one layer.

        Parameters
        ----------
        requests : one request, or a list or tuple of different ones.
        k, v : for one request ``[n, num_kv_heads, head_dim]``, or ``[num_kv_heads, head_dim]`` for one token; for
            several ``[nnz, num_kv_heads, head_dim]``, the tokens of one after those of the other. Types as for
            :func:`append_paged_kv_cache`, of the cache's library on its device.
        counts : how many of them each of several requests gets; None: one each.
        counters : as for :func:`append_paged_kv_cache`.

        Raises
        ------
        OutOfPagesError
            If the pages do not suffice. Nothing has changed then, as with every other error.
        """
        several = isinstance(requests, (list, tuple))
        if not several and len(getattr(k, "shape", ())) == 2:
            k, v = k[None], v[None]
        storage = self._storage
        check_not_captured(storage.library, storage.device)
        scales = {**storage.scales_of(self._layer(layer)), **storage.token_scales_of(layer)}
        options = Options(**scales, kv_format=storage.format_names, counters=counters)
        # Before the allocator changes anything.
        call = checked(k, v, storage.layer(layer), storage.kv_layout, options)
        total = call.num_tokens
        wanted = self._counts(requests if several else [requests], counts if several else [total], total)
        pairs = self._allocator.extend(layer, wanted)
        if pairs:
            self._copy(pairs)
        if not total:
            return
        names, lens = [request for request, _ in wanted], [n for _, n in wanted]
        indptr, indices, last, _ = self._page_tables(layer, tuple(names))
        starts = self._sent(("starts", *lens), lambda: np.cumsum([0, *lens]))
        call.write(Tokens(starts), Paged(indptr, indices, last))

    def decode(self, layer: int, q: Any, requests: Sequence[Hashable] | None = None, **options: Any) -> Any:
        """Attention of one query token for each request over its tokens in a layer.

        Parameters
        ----------
        q : ``[number of requests, num_qo_heads, head_dim]``, float16 or bfloat16, of the cache's library and device.
        requests : which ones, in the order of q; None: all, in the order of :attr:`requests`.
        options : what :func:`batch_decode_with_paged_kv_cache` takes by keyword beside the cache, its tables and its
            scales: ``sm_scale``, ``window_left``, ``logits_soft_cap``, ``return_lse`` and so on.

        Returns
        -------
        As :func:`batch_decode_with_paged_kv_cache`. With ``scales="token"`` the tokens are gathered and converted
        first, because the kernels know scales of heads only: correct, and a good deal slower.
        """
        storage = self._storage
        if storage.device == HOST:
            options.setdefault("backend", "numpy")
        chosen = self.requests if requests is None else tuple(requests)
        indptr, indices, last, lens = self._page_tables(self._layer(layer), chosen)
        if not storage.has_token_scales:
            options = {**storage.scales_of(layer), **options}
            return batch_decode_with_paged_kv_cache(
                q, storage.layer(layer), None, indptr, indices, last, storage.kv_layout,
                kv_format=storage.format_names, **options,
            )  # fmt: skip
        longest = max((self.length(request, layer) for request in chosen), default=0)
        k, v, k_scales, v_scales = gather(
            storage.layer(layer), indptr, indices, last, storage.kv_layout, max_kv_len=longest,
            **storage.token_scales_of(layer),
        )  # fmt: skip
        dtype = dtype_name(q.dtype)
        k, v = (
            dequantize(codes, scales, dtype, kv_format=fmt, kv_layout=storage.kv_layout)
            for codes, scales, fmt in zip((k, v), (k_scales, v_scales), storage.formats, strict=True)
        )
        return batch_decode_with_padded_kv_cache(q, k, v, storage.kv_layout, kv_lens=lens, **options)

    def gather(self, layer: int, requests: Sequence[Hashable] | None = None) -> tuple[Any, ...]:
        """Keys and values of requests as padded arrays of what is stored, as :func:`gather` returns them."""
        storage = self._storage
        chosen = self.requests if requests is None else tuple(requests)
        indptr, indices, last, _ = self._page_tables(self._layer(layer), chosen)
        longest = max((self.length(request, layer) for request in chosen), default=0)
        return gather(
            storage.layer(layer), indptr, indices, last, storage.kv_layout, max_kv_len=longest,
            **storage.token_scales_of(layer),
        )  # fmt: skip

    # What the functions of the package take

    def pages(self, layer: int) -> Any:
        """The pool of a layer, ``[num_pages, 2, page_size, num_kv_heads, head_dim]``, in HND heads first; or a pair."""
        return self._storage.layer(self._layer(layer))

    def page_tables(self, layer: int = 0, requests: Sequence[Hashable] | None = None) -> tuple[Any, Any, Any]:
        """``indptr``, ``indices`` and ``last_page_len`` of requests, int32 on the cache's device."""
        chosen = self.requests if requests is None else tuple(requests)
        return self._page_tables(self._layer(layer), chosen)[:3]

    def _page_tables(self, layer: int, requests: tuple[Hashable, ...]) -> tuple[Any, Any, Any, Any]:
        """Also the lengths. They are sent once for all layers of a step, in one piece."""
        page_size = self._allocator.page_size
        lens = self._allocator.lengths(requests, layer)
        counts = [-(-n // page_size) for n in lens]

        def build() -> np.ndarray:
            pages = [self._allocator.pages(request)[:n] for request, n in zip(requests, counts, strict=True)]
            last = [n - (count - 1) * page_size if count else 0 for n, count in zip(lens, counts, strict=True)]
            return np.array([*np.cumsum([0, *counts]), *last, *lens, *(page for some in pages for page in some)])

        table = self._sent((self._allocator.version, requests, *lens), build)
        batch = len(requests)
        ends = np.cumsum([batch + 1, batch, batch])
        return table[: ends[0]], table[ends[2] :], table[ends[0] : ends[1]], table[ends[1] : ends[2]]

    def _sent(self, key: Any, build: Any) -> Any:
        """A table of integers on the device, sent when it is asked for the first time."""
        found = self._tables.get(key)
        if found is None:
            while len(self._tables) >= _MOST_TABLES:
                del self._tables[next(iter(self._tables))]
            found = self._tables[key] = send(self._storage.library, build().astype(np.int32), self._storage.device)
        return found

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages in all layers."""
        layers = np.arange(self._allocator.num_layers)[:, None] * self._allocator.num_pages
        storage = self._storage
        source, target = (
            send(storage.library, (layers + np.array(pages)).ravel().astype(np.int32), storage.device)
            for pages in zip(*pairs, strict=True)
        )
        copy_pages(storage.all_layers(), source, target, storage.kv_layout, **storage.token_scales_of(None))

    def _layer(self, layer: int) -> int:
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
            raise TypeError(f"layer: expected an integer, got {layer!r}")
        if not 0 <= layer < self._allocator.num_layers:
            raise ValueError(f"layer: expected a number from 0 to {self._allocator.num_layers - 1}, got {layer}")
        return int(layer)

    @staticmethod
    def _counts(requests: Any, counts: Any, num_tokens: int) -> list[tuple[Hashable, int]]:
        if counts is None:
            counts = [1] * len(requests)
        counts = [int(n) for n in counts]
        if len(counts) != len(requests) or sum(counts) != num_tokens:
            raise ValueError(
                f"counts: expected a number of tokens for each of {len(requests)} requests, {num_tokens} in all, got "
                f"{counts}"
            )
        return list(zip(requests, counts, strict=True))

    # The whole

    @property
    def nbytes(self) -> int:
        """Bytes of device (or host) memory for pages and the scales of rows, used or not."""
        return self._storage.nbytes

    def save(self, path: str | PathLike[str]) -> None:
        """Write pages that are in use, scales and page tables to a safetensors file. Requests must be str or int."""
        from .cache_files import save

        save(self, path)

    @classmethod
    def load(
        cls, path: str | PathLike[str], *, num_pages: int | None = None, device: Any = None, library: str | None = None
    ) -> PagedKVCache:
        """A cache as it was saved, on any device; ``num_pages``: of the new pool, by default as many as it had."""
        from .cache_files import load

        return load(cls, path, num_pages, device, library)

    def __repr__(self) -> str:
        num_layers, num_pages, page_size, heads, head_dim = self._storage.sizes
        k, v = self._storage.formats
        used, shared = num_pages - self._allocator.num_free, self._allocator.num_shared
        scales = ", a scale a row" if self._storage.has_token_scales else ""
        return (
            f"PagedKVCache({num_layers} layers, {heads} heads of {head_dim}, {k if k == v else f'K {k}, V {v}'}"
            f"{scales}, {self._storage.kv_layout}, {self._storage.library.name} on "
            f"{arrays.device_name(self._storage.device)}: {len(self)} requests, {used} of {num_pages} pages of "
            f"{page_size} tokens used{f', {shared} shared' if shared else ''}, {self.nbytes / 1e6:.1f} MB)"
        )
