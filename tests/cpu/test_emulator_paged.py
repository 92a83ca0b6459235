"""The decode kernels over pages, executed on the CPU: every read of a cache and of a page table is checked."""

import dataclasses

import emulator
import numpy as np
import pytest
from emulator.checks import move
from paged_cases import build_paged, paged, pairwise_paged

from cupy_fp8kv.backends import cuda
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.plan import plan_decode

CHOSEN = [
    case
    for case in pairwise_paged()
    if case.base.kv_len * case.base.batch * case.base.num_kv_heads <= 2100 and case.base.kv_len <= 350
][::2]


def run(machine, case, arrays=None):
    """Check a case, with every read of pages and page tables, and return (out, lse)."""
    arrays = arrays or build_paged(case)
    moved = arrays.to(move)
    watched = [
        (np.asarray(pool.base), mask.base) for pool, mask in zip(moved.pools, arrays.readable, strict=True)
    ]  # fmt: skip
    watched += [
        (np.asarray(moved.tables[name]), readable)
        for name, readable in arrays.readable_tables.items() if arrays.on_device(name)
    ]  # fmt: skip
    before = len(machine.launches)
    with machine.watching(*watched):
        out, lse = moved.call()
    assert any(" paged" in title for title, _ in machine.launches[before:]) or not arrays.padded.q.view.size
    arrays.check(np.asarray(out), np.asarray(lse))
    return np.asarray(out), np.asarray(lse)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_decode(emulate, case):
    run(emulate, case)
