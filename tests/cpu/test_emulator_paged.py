"""The decode kernels over pages, executed on the CPU: every read of a cache and of a page table is checked."""

import dataclasses

import emulator
import numpy as np
import pytest
from cases import Placed
from emulator.bugs import ADDRESS, MODE, PLAIN, Bug, each_of_this_mode, noticed
from emulator.checks import move
from paged_cases import NO_PAGE, build_paged, paged, pairwise_paged

import cupy_fp8kv
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.plan import plan_decode

CHOSEN = [
    case
    for case in pairwise_paged()
    if case.base.kv_len * case.base.batch * case.base.num_kv_heads <= 2100 and case.base.kv_len <= 350
][::2]
#: A whole page, none, one row, one row less than a page and more than a tile.
LENS = (64, 0, 1, 63, 37)


def run(machine, case, arrays=None, call=None):
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
        out, lse = call(moved) if call else moved.call()
    assert any(" paged" in title for title, _ in machine.launches[before:])
    assert isinstance(out, emulator.EmulatedArray)
    arrays.check(np.asarray(out), np.asarray(lse))
    return np.asarray(out), np.asarray(lse)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_decode(emulate, case):
    run(emulate, case)


def test_the_cases_reach_every_path():
    assert {case.page_size for case in CHOSEN} == {1, 2, 3, 5, 16, 17, 64, 256}
    for name in ("form", "table", "where", "shared"):
        assert len({getattr(case, name) for case in CHOSEN}) >= 2, name
    for name in ("layout", "view", "k", "v"):
        assert len({getattr(case.base, name) for case in CHOSEN}) >= 2, name
    assert {KV_FORMATS[case.base.k].itemsize for case in CHOSEN} == {1, 2}


@pytest.mark.parametrize("table", ["csr", "blocks"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("group", [3, 5, 7])
def test_page_sizes(emulate, page_size, layout, table, group):
    case = paged(page_size, table=table, layout=layout, group=group, num_kv_heads=2, batch=5, kv_len=64, lens=LENS,
                 window_left=40 if group == 5 else -1, shared=group == 3, seed=page_size)  # fmt: skip
    run(emulate, case)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
def test_tiles_of_one_two_and_four_times_16_rows(emulate, head_dim):
    case = paged(5, head_dim=head_dim, group=2, batch=2, kv_len=300, lens=(300, 131), view="padded", seed=head_dim)
    run(emulate, case)


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
def test_any_number_of_splits(emulate, monkeypatch, splits):
    def plan(problem, device):
        found = plan_decode(problem, device)
        heads = problem.batch * problem.num_qo_heads * splits
        return dataclasses.replace(
            found, splits=splits, grid=found.grid // found.splits * splits,
            workspace_out=heads * problem.head_dim * 4, workspace_state=heads * 8,
        )  # fmt: skip

    monkeypatch.setattr(cuda, "plan_decode", plan)
    run(emulate, paged(16, group=3, batch=3, kv_len=300, lens=(300, 0, 77), seed=5))


def test_pages_that_follow_each_other_give_the_bits_of_a_padded_cache(emulate):
    case = paged(16, form="pair", group=4, num_kv_heads=2, batch=3, kv_len=96, lens=(96, 50, 7), seed=2)
    arrays = build_paged(case)
    out, lse = run(emulate, case, arrays)
    moved = arrays.padded.to(move)
    again = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse(
        moved.q.view, moved.k.view, moved.v.view, kv_lens=move(arrays.padded.kv_lens)
    )
    assert np.array_equal(np.asarray(again[0]), out) and np.array_equal(np.asarray(again[1]), lse)


def test_strides_backwards(emulate):
    """Pages, rows and heads from the last to the first."""
    case = paged(8, form="pair", group=2, num_kv_heads=3, batch=2, kv_len=50, lens=(50, 33), seed=4)
    arrays = build_paged(case)

    def reversed_(placed):
        return Placed(np.ascontiguousarray(placed.base[::-1, ::-1, ::-1]), (slice(None, None, -1),) * 3)

    arrays = dataclasses.replace(
        arrays, pools=tuple(map(reversed_, arrays.pools)), readable=tuple(map(reversed_, arrays.readable))
    )
    run(emulate, case, arrays)


@pytest.mark.skipif(MODE != PLAIN, reason="a sanitizer would need memory for its own view of so much memory")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pools_of_more_than_2_32_bytes(emulate, layout):
    """Pages at both ends of a pool that is mostly never touched, and so takes no memory."""
    case = paged(16, group=2, num_kv_heads=8, batch=2, kv_len=100, lens=(100, 37), layout=layout, seed=5)
    arrays = build_paged(case)
    small = arrays.pools[0].base
    num_pages = (5 << 30) // small[0].nbytes
    large = emulator.emulated(np.zeros((num_pages, *small.shape[1:]), np.uint8))
    used = np.arange(len(small))
    numbers = np.where(used % 2, used, num_pages - 1 - used).astype(np.int32)
    large[numbers] = small
    indices = arrays.tables["indices"]
    there = numbers[np.minimum(indices, used[-1])]
    tables = arrays.tables | {"indices": np.where(indices == NO_PAGE, NO_PAGE, there).astype(np.int32)}
    moved = dataclasses.replace(arrays, tables=tables).to(move)
    out, lse = dataclasses.replace(moved, pools=(Placed(large),)).call()
    assert large.size > 2**32
    arrays.check(np.asarray(out), np.asarray(lse))


def test_tables_that_claim_too_many_rows_are_cut(emulate):
    """A last page has no more rows than a page, a request no more than its row of the block table, and none below 0."""
    case = paged(16, group=2, batch=3, kv_len=96, lens=(96, 64, 0), seed=6)
    arrays = build_paged(case)
    wrong = arrays.tables["last_page_len"].copy()
    wrong[0] = 1000
    arrays = dataclasses.replace(arrays, tables=arrays.tables | {"last_page_len": wrong})
    run(emulate, case, arrays)
    case = paged(16, table="blocks", group=2, batch=2, kv_len=96, lens=(96, 0), seed=6)
    arrays = build_paged(case)
    tables = {"block_tables": arrays.tables["block_tables"][:, :6].copy(), "kv_lens": np.array([1000, -3], np.int32)}
    readable = {"block_tables": arrays.readable_tables["block_tables"][:, :6].copy()}
    run(emulate, case, dataclasses.replace(arrays, tables=tables, readable_tables=readable))


# Wrappers


def planned(wrapper, case, moved, **changes):
    base = case.base
    arguments = {
        "num_qo_heads": base.group * base.num_kv_heads, "num_kv_heads": base.num_kv_heads, "head_dim": base.head_dim,
        "page_size": case.page_size, "window_left": base.window_left, "logits_soft_cap": base.soft_cap,
        "data_type": (base.k, base.v), "q_data_type": base.q,
    } | {"indptr": None, "indices": None, "last_page_len": None} | moved.tables | changes  # fmt: skip
    wrapper.plan(**arguments)
    return wrapper


SPLIT = paged(16, group=4, num_kv_heads=2, batch=1, kv_len=700, lens=(690,), seed=3)


def test_the_callers_workspace_is_used_and_no_other(emulate, monkeypatch):
    arrays = build_paged(SPLIT)
    needed = cupy_fp8kv.workspace_size(1, 8, 2, 128, 16, data_type="e4m3", device=emulator.DEVICE)
    assert needed > 0
    space = move(np.zeros(needed, np.uint8))

    def call(moved):
        wrapper = planned(cupy_fp8kv.BatchDecodeWithPagedKVCacheWrapper(space), SPLIT, moved)
        monkeypatch.setattr(emulator.library, "workspace", None)
        return wrapper.run_return_lse(moved.padded.q.view, moved.cache)

    run(emulate, SPLIT, arrays, call)
    assert np.asarray(space).any() and "merge" in emulate.launches[-1][0]


@pytest.mark.parametrize("nbytes", [0, 16, "one less"])
def test_a_workspace_too_small_is_refused_in_plan(emulate, nbytes):
    moved = build_paged(SPLIT).to(move)
    needed = cupy_fp8kv.workspace_size(1, 8, 2, 128, 16, data_type="e4m3", device=emulator.DEVICE)
    space = move(np.zeros(needed - 1 if nbytes == "one less" else nbytes, np.uint8))
    wrapper = cupy_fp8kv.BatchDecodeWithPagedKVCacheWrapper(space)
    with pytest.raises(
        ValueError, match=rf"^float_workspace_buffer: expected {needed} bytes or more .* got {len(space)}"
    ):
        planned(wrapper, SPLIT, moved)
    wrapper.reset_workspace_buffer(None)
    planned(wrapper, SPLIT, moved)
    with pytest.raises(ValueError, match=r"^float_workspace_buffer: "):
        wrapper.reset_workspace_buffer(space)
    assert wrapper.run(moved.padded.q.view, moved.cache).shape == (1, 8, 128), "the one before is still in use"


def test_runs_follow_tables_on_the_device(emulate):
    """Lengths and pages change in place between runs; as in a replay, nothing on the host knows."""
    case = paged(16, group=2, num_kv_heads=2, batch=3, kv_len=200, lens=(200, 17, 64), seed=8)
    first, second = build_paged(case), build_paged(case, lens=(3, 200, 0))
    size = max(len(arrays.tables["indices"]) for arrays in (first, second))
    tables = {name: move(np.zeros(size if name == "indices" else len(value), np.int32))
              for name, value in first.tables.items()}  # fmt: skip
    wrapper = cupy_fp8kv.BatchDecodeWithPagedKVCacheWrapper()
    planned(wrapper, case, first, **tables)
    for arrays in (first, second, first):
        for name, values in arrays.tables.items():
            tables[name][: len(values)] = values

        def call(moved):
            return wrapper.run_return_lse(moved.padded.q.view, moved.cache)

        run(emulate, case, arrays, call)


@pytest.mark.parametrize("where", ["host", "device"])
def test_plans_go_into_a_graphs_buffers(emulate, where):
    case = paged(16, where=where, group=2, num_kv_heads=2, batch=3, kv_len=200, lens=(200, 17, 64), seed=8)
    buffers = [move(np.full(n, NO_PAGE, np.int32)) for n in (4, 100, 3)]
    wrapper = cupy_fp8kv.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, *buffers)
    assert wrapper.is_cuda_graph_enabled
    kernels = set()
    for lens in ((200, 17, 64), (0, 1, 200), (5, 0, 0)):

        def call(moved):
            planned(wrapper, case, moved)
            for buffer, values in zip(buffers, moved.tables.values(), strict=True):
                assert np.array_equal(buffer[: len(values)], values)
            return wrapper.run_return_lse(moved.padded.q.view, moved.cache)

        before = len(emulate.launches)
        run(emulate, case, build_paged(case, lens), call)
        kernels.add(tuple(emulate.launches[before:]))
    assert len(kernels) == 1, "a graph holds one launch, whatever the lengths"


def test_tables_of_the_host_go_up_once(emulate, monkeypatch):
    case = paged(16, where="host", group=2, batch=2, kv_len=50, lens=(50, 20), seed=1)
    arrays = build_paged(case)
    space = move(np.zeros(1 << 16, np.uint8))
    given = {name: value.copy() for name, value in arrays.tables.items()}

    def call(moved):
        wrapper = planned(cupy_fp8kv.BatchDecodeWithPagedKVCacheWrapper(space), case, moved, **given)
        for value in given.values():
            value[:] = -1  # the plan has its own copy
        monkeypatch.setattr(emulator.arrays, "upload", None)
        wrapper.run(moved.padded.q.view, moved.cache)
        return wrapper.run_return_lse(moved.padded.q.view, moved.cache)

    run(emulate, case, arrays, call)


def test_validation_reports_what_a_device_holds(emulate):
    case = paged(16, group=2, batch=3, kv_len=100, lens=(100, 0, 40), seed=1)
    arrays = build_paged(case)
    moved = arrays.to(move)
    assert moved.call(validate=True)[0].shape == (3, 2, 128)
    for name, at, value, said in (
        ("indices", 3 + 7, NO_PAGE, rf"^indices: expected pages from 0 to .* got {NO_PAGE} as page 0 of request 2"),
        ("indices", 3 + 2, -1, "^indices: expected pages from 0 to .* got -1 as page 2 of request 0"),
        ("last_page_len", 2, 17, "^last_page_len: expected rows from 1 to page_size = 16, got 17 for request 2"),
        ("last_page_len", 0, 0, "^last_page_len: expected rows from 1 to page_size = 16, got 0 for request 0"),
        ("indptr", 1, 99, "^indptr: expected numbers that do not decrease, got 10 after 99 for request 1"),
        ("indptr", 3, 999, "^indptr: expected at most the 18 entries of indices, got 999 at 3"),
    ):  # fmt: skip
        wrong = arrays.tables[name].copy()
        wrong[at] = value
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(moved, tables=moved.tables | {name: move(wrong)}).call(validate=True)
        wrapper = cupy_fp8kv.BatchDecodeWithPagedKVCacheWrapper(validate=True)
        with pytest.raises(ValueError, match=said):
            planned(wrapper, case, moved, **{name: move(wrong)}).run(moved.padded.q.view, moved.cache)


# Planted bugs


WINDOWED = paged(5, group=3, num_kv_heads=2, batch=2, kv_len=61, lens=(61, 18), window_left=20, seed=3)
LONG = paged(5, head_dim=64, group=3, batch=1, kv_len=1300, lens=(1290,), seed=3)


def check_windowed(machine):
    run(machine, WINDOWED)


def check_long(machine):
    run(machine, LONG)


def check_blocks(machine):
    run(machine, paged(16, table="blocks", group=2, batch=3, kv_len=40, lens=(40, 0, 17), seed=3))


PAGED = "layout/paged.cuh"
BUGS = [
    Bug("entries past the end", (PLAIN, ADDRESS), PAGED, "range_.clamp(first + 32 * i + lane_)",
        "first + 32 * i + lane_", check_windowed),
    Bug("the entries of this tile again", (PLAIN,), PAGED, "ask(row + step);", "ask(row);", check_long),
    Bug("rows of another lane", (PLAIN,), PAGED, "ptx::shuffle(known, in_tile % 32)",
        "ptx::shuffle(known, in_tile % 16)", check_long),
    Bug("pages of another request", (PLAIN,), PAGED, "request * p.block_table_stride", "0",
        check_blocks),
    Bug("V where K is", (PLAIN,), PAGED, "p.v + head * p.v_stride_head", "p.k + head * p.v_stride_head",
        check_windowed),
    Bug("a full last page", (PLAIN, ADDRESS), PAGED, "max_of(0, min_of(rows, p.page_size.value));",
        "p.page_size.value;", check_windowed),
]  # fmt: skip


@each_of_this_mode(BUGS)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, machine, bug):
    noticed(tmp_path, monkeypatch, machine, bug)


@pytest.mark.parametrize("check", [check_windowed, check_long, check_blocks])
def test_checks_of_planted_bugs_pass_without_them(emulate, check):
    check(emulate)
