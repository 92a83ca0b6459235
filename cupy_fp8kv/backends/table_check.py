"""Page tables on a device, checked there: what ``validate=True`` asks for."""

from __future__ import annotations

import numpy as np

from ..arrays import Library, cupy_library
from ..jit import compiler
from ..jit.device import on_device, refuse_capture
from ..jit.launch import Launch
from ..jit.params import STRUCTS, ParamBlock
from ..jit.spec import CheckTablesSpec
from ..page_tables import PageTables
from . import cuda

#: check_tables.cu: what is found, above the number of a page.
_PAGE_BITS = 29
_WHAT = {1: "a page that the cache does not have", 2: "a length that its pages do not have", 3: "bounds of its pages"}


def validate(tables: PageTables, library: Library, device: int, num_pages: int) -> None:
    """ValueError for placed tables with a page, a length or bounds that cannot be. Waits for the device.

    The device looks through the tables and tells one number a request; they are only downloaded to say what is wrong.
    """
    stream = library.stream(device)
    refuse_capture(stream, "validate", "False")
    if not tables.batch:
        return
    owner = cupy_library() if library.name == "jax" else library
    runtime = cuda.require_cupy().cuda.runtime
    with on_device(runtime, device):
        found, address = owner.empty((tables.batch,), "int32", device)
        runtime.memsetAsync(address, 0, 4 * tables.batch, stream)
        params = ParamBlock("CheckTablesParams", len(STRUCTS["CheckTablesParams"]))
        lens, indptr, pages, *_ = tables.addresses
        with params.lock:
            entries = tables.pages.shape[-1]
            params.write(address, lens, indptr, pages, tables.pages.stride, entries, tables.page_size, num_pages)
            Launch(compiler.load(CheckTablesSpec(), device), tables.batch, params)(stream)
        told = owner.to_numpy(found).view(np.uint32)
    if told.any():
        tables.downloaded().check_pages(num_pages)
        # They have changed since.
        request = int(np.flatnonzero(told)[0])
        what, page = (
            int(told[request]) >> _PAGE_BITS,
            (1 << _PAGE_BITS) - 1 - (int(told[request]) & (1 << _PAGE_BITS) - 1),
        )
        raise ValueError(f"page table: found {_WHAT[what]} at page {page} of request {request}")
