"""The way of one decode call over pages. As ``dispatch``: the first call of a kind is checked, planned and compiled."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from . import arrays, scales
from .arrays import HOST, Library
from .backends import paged_reference
from .backends.table_check import validate
from .dispatch import (
    Prepared,
    check_options,
    prepare_problem,
    prepared_for,
    run_on_device,
    runs_on_cuda,
    to_caller,
)
from .formats import KV_FORMATS
from .layouts import check_kv_layout
from .options import as_key, check_lse_base
from .outputs import read_out
from .page_tables import PageTables
from .paged_problem import Planned, bind_paged
from .pages import CacheSignature, adopt_cache, bind_cache, cache_facts, cache_library, host_cache, read_cache
from .problem import SizeBinder
from .workspaces import Workspace


class PagedOptions(NamedTuple):
    """What a decode call over pages takes beside arrays; defaults as in FlashInfer."""

    kv_layout: str = "NHD"
    pos_encoding_mode: str = "NONE"
    q_scale: Any = None
    k_scale: Any = None
    v_scale: Any = None
    logits_soft_cap: float | None = None
    sm_scale: float | None = None
    window_left: int = -1
    kv_format: Any = None
    return_lse: bool = False
    lse_base: str = "2"
    out: Any = None
    backend: str | None = None
    validate: bool = False
    #: What errors call K and V.
    names: tuple[str, str] = ("paged_kv_cache", "paged_kv_cache")
    planned: Planned | None = None


@functools.lru_cache(1024)
def _page_size(library: Library, signature: CacheSignature, kv_layout: str, names: tuple[str, str]) -> int:
    k, v, _ = cache_facts(library, signature, names[0])
    return bind_cache(SizeBinder(), k, v, kv_layout, names).page_size


def page_size_of(cache: Any, kv_layout: str, names: tuple[str, str]) -> int:
    """Rows of a page of a cache of any library."""
    cache = adopt_cache(cache, names[0])
    library = cache_library(cache, names[0])
    return _page_size(library, read_cache(library, cache, names[0])[2], check_kv_layout(kv_layout), names)


def decode_paged(
    q: Any, cache: Any, tables: PageTables, options: PagedOptions, workspace: Workspace | None = None
) -> Any:
    """Decode over the pages that ``tables`` name, of the rows of q that they say.

    ``workspace``: the caller's, or None: ours.
    """
    q, cache = arrays.adopt(q, "q"), adopt_cache(cache, options.names[0])
    library = arrays.library_of(q, "q")
    assert library is not None  # adopt() leaves no other
    if (other := cache_library(cache, options.names[0])) is not library:
        raise TypeError(f"{options.names[0]}: expected an array of {library.name} like q, got one of {other.name}")
    q_address, q_signature = arrays.read(library, q, "q")
    k_address, v_address, cache_signature = read_cache(library, cache, options.names[0])
    out = options.out
    out_address, out_signature = read_out(library, out) if out is not None else (0, None)
    window_left, soft_cap, kv_format = as_key(options.window_left, options.logits_soft_cap, options.kv_format)
    key = (
        "paged", library, q_signature, cache_signature, out_signature, options.kv_layout, options.pos_encoding_mode,
        soft_cap, window_left, kv_format, options.lse_base, options.backend, options.names,
        (tables.batch, tables.names[-1]), tables.kind, options.planned, (tables.queries, tables.q_rows),
    )  # fmt: skip
    prepared = prepared_for(key, _prepare)
    sm_scale = options.sm_scale
    sm_scale = prepared.default_scale if sm_scale is None else scales.number(sm_scale, "sm_scale")
    paging = prepared.problem.paging
    assert paging is not None
    tables.check_pages(paging.num_pages)
    if not prepared.cuda or prepared.device == HOST:
        return _decode_from_host(
            library, prepared, q, cache, tables, options, window_left, soft_cap, sm_scale
        )  # fmt: skip
    if workspace is not None:
        workspace.check(prepared.workspace, prepared.problem, library, prepared.device)
    placed = tables.placed(library, prepared.device)
    if options.validate:
        validate(placed, library, prepared.device, paging.num_pages)
    return run_on_device(
        library, prepared, q, (q_address, k_address, v_address + prepared.v_offset, out_address), placed.addresses,
        options.q_scale, options.k_scale, options.v_scale, window_left, soft_cap, sm_scale, options.return_lse, out,
        workspace=None if workspace is None else (workspace.owner, workspace.address),
    )  # fmt: skip


def _prepare(
    _: str,
    library: Library,
    q_signature: Any,
    cache_signature: CacheSignature,
    out_signature: Any,
    kv_layout: str,
    pos_encoding_mode: str,
    logits_soft_cap: float | None,
    window_left: int,
    kv_format: Any,
    lse_base: str,
    backend: str | None,
    names: tuple[str, str],
    batch: tuple[int, str],
    kind: tuple[int, int, int],
    planned: Planned | None,
    queries: tuple[int, int],
) -> Prepared:
    check_lse_base(lse_base)
    check_options(pos_encoding_mode, logits_soft_cap, backend)
    q = library.facts(q_signature)
    k, v, v_offset = cache_facts(library, cache_signature, names[0])
    if planned is not None:
        planned.check(q, k, v, check_kv_layout(kv_layout), names)
    problem = bind_paged(
        q, k, v, batch=batch, kind=kind, names=names, kv_layout=kv_layout, requested_format=kv_format,
        soft_cap=bool(logits_soft_cap), window_left=window_left, position=pos_encoding_mode, queries=queries,
    )  # fmt: skip
    cuda = runs_on_cuda(problem, q, k, v, backend, names)
    out = None if out_signature is None else library.facts(out_signature)
    return prepare_problem(problem, q, cuda, lse_base, out, backend, v_offset)


def _decode_from_host(
    library: Library,
    prepared: Prepared,
    q: Any,
    cache: Any,
    tables: PageTables,
    options: PagedOptions,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float,
) -> Any:
    """The call on host arrays: on the GPU (uploaded, result downloaded) or in NumPy, as was decided."""
    problem = prepared.problem
    assert problem.paging is not None
    tables = tables.downloaded()
    tables.check_pages(problem.paging.num_pages)
    query, (k, v) = library.to_numpy(q), host_cache(library, cache)
    numbers: dict[str, Any] = {
        "q_scale": scales.host_scale(options.q_scale, "q_scale", 0),
        "k_scale": scales.host_scale(options.k_scale, "k_scale", problem.num_kv_heads),
        "v_scale": scales.host_scale(options.v_scale, "v_scale", problem.num_kv_heads),
        "window_left": window_left, "logits_soft_cap": logits_soft_cap, "sm_scale": sm_scale,
        "lse_base": options.lse_base,
    }  # fmt: skip
    if prepared.cuda:
        cupy = arrays.cupy_library()
        moved = [cupy.from_numpy(array, 0) for array in (query, k, v)]
        uploaded = PagedOptions(
            kv_layout=options.kv_layout, pos_encoding_mode=options.pos_encoding_mode, return_lse=True, backend="cuda",
            kv_format=(problem.k_format, problem.v_format), names=options.names, **numbers,
        )  # fmt: skip
        on_device, lse_on_device = decode_paged(moved[0], (moved[1], moved[2]), tables, uploaded)
        result, lse = cupy.to_numpy(on_device), cupy.to_numpy(lse_on_device)
    else:
        if options.kv_layout == "HND":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        result, lse = paged_reference.paged_attention(
            query, k, v, tables.pages_of_requests(), tables.kv_lens(), tables.queries_of_requests(),
            k_format=KV_FORMATS[problem.k_format],
            v_format=KV_FORMATS[problem.v_format], **numbers,
        )  # fmt: skip
        with np.errstate(over="ignore"):
            result = result.astype(query.dtype)
    return to_caller(library, prepared, result, lse, options.return_lse, options.out)
