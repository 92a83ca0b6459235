"""The work list as a pure function: what it promises for any lengths."""

import dataclasses
import itertools

import numpy as np
import pytest
from cases import H100, Case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from listed import random_lens

from cupy_fp8kv import plan as planner
from cupy_fp8kv.jit.spec import ScheduleSpec
from cupy_fp8kv.plan import MAX_WORKSPACE, least_turns, plan_decode, split_rows
from cupy_fp8kv.schedule import MOST_PARTS, ListBounds, ListEntry, SplitRequest, read_list, visible_rows, work_list

#: No copy engine: no rings, so that long requests get lists.
BEFORE_HOPPER = dataclasses.replace(H100, arch=89)
LENS = st.one_of(
    st.lists(st.integers(0, 3000), min_size=1, max_size=80),
    st.lists(st.sampled_from([0, 1, 16, 17, 100_000]), min_size=1, max_size=40),
    st.tuples(st.integers(0, 10**6), st.integers(1, 300)).map(lambda pair: [pair[0]] * pair[1]),
)


def turns_of(kv_len, window_left, turn_rows):
    return -(-visible_rows(kv_len, window_left) // turn_rows)


@settings(max_examples=400, deadline=None)
@given(
    LENS, st.sampled_from([-1, 0, 500]), st.sampled_from([16, 64, 256]), st.integers(1, 200), st.integers(1, 16),
    st.sampled_from([32, 64, 1024]),
)  # fmt: skip
@example([131_072] + [512] * 63, -1, 64, 66, 4, 64)
@example([2**31 - 2**24] * 5, -1, 16, 1, 1, 32)
def test_every_list(lens, window_left, turn_rows, parts, least, threads):
    entries, splits = work_list(
        lens, window_left=window_left, turn_rows=turn_rows, parts=parts, least_turns=least, threads=threads
    )
    bounds = ListBounds(len(lens), parts)
    assert len(entries) <= bounds.entries and len(splits) <= bounds.split_requests
    assert sum(split.parts for split in splits) <= bounds.slots

    # Every request once, in all of its parts, which lie side by side.
    by_request = {}
    for entry in entries:
        by_request.setdefault(entry.request, []).append(entry)
    assert sorted(by_request) == list(range(len(lens)))
    for request, found in by_request.items():
        assert [entry.split for entry in found] == list(range(found[0].splits))
        assert {entry.kv_len for entry in found} == {lens[request]}
    at = [entry.request for entry in entries]
    assert len(list(itertools.groupby(at))) == len(lens)

    # Slots: each split request has its own, side by side.
    assert {split.request: split.parts for split in splits} == {
        request: len(found) for request, found in by_request.items() if len(found) > 1
    }
    slots = [split.slot + i for split in splits for i in range(split.parts)]
    assert slots == list(range(len(slots)))
    for split in splits:
        assert [entry.slot for entry in by_request[split.request]] == [split.slot + i for i in range(split.parts)]

    # Balanced: no part is much more than an equal share, none of several much less than half of one.
    turns = [turns_of(kv_len, window_left, turn_rows) for kv_len in lens]
    chunk = max(least, -(-sum(turns) // parts))
    sizes = [turns[entry.request] / entry.splits for entry in entries]
    assert max(sizes) <= chunk * 9 / 8
    assert all(size > chunk / 2 for size, entry in zip(sizes, entries, strict=True) if entry.splits > 1)
    # Largest first, to a thirty-second.
    assert all(later <= size + chunk * 9 / 8 / 31 for size, later in itertools.pairwise(sizes))


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_read_once(seed):
    print(f"seed {seed}")
    lens, _ = random_lens(seed)
    window_left = (-1, 700)[seed % 2]
    entries, _ = work_list(lens, window_left=window_left, turn_rows=64, parts=37, least_turns=2)
    rows = {}
    for entry in entries:
        begin = entry.kv_len - visible_rows(entry.kv_len, window_left)
        rows.setdefault(entry.request, []).extend(split_rows(begin, entry.kv_len, entry.splits, 4, 16)[entry.split])
    for request, kv_len in enumerate(lens):
        at = kv_len - visible_rows(kv_len, window_left)
        for first, last in sorted(rows[request]):
            assert first == at
            at = last
        assert at == kv_len


def test_equal_requests_that_fill_the_device_are_not_split():
    for lens in ([16_384] * 64, [16_384 - i for i in range(64)]):
        entries, splits = work_list(lens, window_left=-1, turn_rows=64, parts=66, least_turns=4)
        assert len(entries) == 64 and not splits


def test_one_huge_request_is_shared_by_all():
    entries, splits = work_list([131_072] + [512] * 63, window_left=-1, turn_rows=64, parts=66, least_turns=4)
    assert len(splits) == 1 and splits[0].parts > 50 and entries[0].request == 0 and entries[-1].request == 63


def test_a_list_is_read_as_the_kernel_writes_it():
    bounds = ListBounds(3, 2)
    memory = np.array(
        [3, 1, 0, 0, 2, 0, 2, 0, *[9] * 4, 2, 70, 2 << 16, 0, 2, 70, 2 << 16 | 1, 1, 0, 5, 1 << 16, 0, *[9] * 8],
        np.int32,
    )
    assert memory.nbytes == bounds.nbytes
    assert read_list(memory.view(np.uint8), bounds) == (
        [ListEntry(2, 70, 0, 2, 0), ListEntry(2, 70, 1, 2, 1), ListEntry(0, 5, 0, 1, 0)],
        [SplitRequest(2, 0, 2)],
    )


@pytest.mark.parametrize(("batch", "threads"), [(1, 32), (32, 32), (33, 64), (64, 64), (700, 1024), (65536, 1024)])
def test_threads_of_a_batch(batch, threads):
    assert ScheduleSpec.of_batch(batch).threads == threads


# Plans


def ragged(batch, kv_len, num_kv_heads=8, group=4, **options):
    return Case(batch=batch, kv_len=kv_len, num_kv_heads=num_kv_heads, group=group, kv_lens="device", **options).problem


@pytest.mark.parametrize(
    ("problem", "on_hopper", "before"),
    [
        (ragged(64, 16_384), "even", "listed"), (ragged(64, 131_072), "even", "listed"),
        (ragged(2, 131_072), "even", "listed"), (ragged(1, 131_072), "uniform", "uniform"),
        (ragged(64, 512), "even", "uniform"), (ragged(64, 16_384, window_left=300), "even", "uniform"),
        (ragged(2, 512), "uniform", "uniform"), (ragged(65_536, 2048), "listed", "listed"),
        (ragged(8192, 2048), "even", "listed"),
        (ragged(5_000_000, 2048), "uniform", "uniform"), (ragged(64, 16_384, group=33), "listed", "listed"),
        (dataclasses.replace(ragged(64, 16_384), k_strides=(0, 1024, 128)), "listed", "listed"),
        (dataclasses.replace(ragged(64, 16_384), ragged=False), "uniform", "uniform"),
    ],
)  # fmt: skip
def test_where_lengths_decide(problem, on_hopper, before):
    for device, schedule in ((H100, on_hopper), (BEFORE_HOPPER, before)):
        plan = plan_decode(problem, device)
        assert plan.spec.schedule == schedule
        assert (plan.bounds is not None) is (schedule == "listed") and (plan.shares > 0) is (schedule == "even")
        assert plan.workspace <= MAX_WORKSPACE


def test_a_listed_plan_is_known_from_the_shapes_alone():
    plan = plan_decode(ragged(64, 16_384), BEFORE_HOPPER)
    assert plan.grid == 8 * plan.bounds.entries == 8 * (64 + 82) and plan.spec.ctas_per_sm == 4
    assert plan.workspace_out == plan.bounds.slots * 32 * 128 * 4 and plan.workspace_list == plan.bounds.nbytes
    assert "lengths on the device decide" in plan.reason


@pytest.mark.parametrize(("num_kv_heads", "ctas_per_sm"), [(1, 1), (2, 2), (4, 4), (32, 4)])
def test_few_parts_of_one_request_come_from_large_ctas(num_kv_heads, ctas_per_sm):
    plan = plan_decode(ragged(16, 65_536, num_kv_heads), BEFORE_HOPPER)
    assert plan.spec.ctas_per_sm == ctas_per_sm and 1 <= plan.bounds.parts <= MOST_PARTS


def test_parts_have_a_least_length():
    for case_spec in planner.specs(ragged(2, 1), 90):
        assert least_turns(case_spec) * case_spec.turn_rows >= min(256, case_spec.turn_rows)
