"""The planner as a pure function: what it promises, for any problem on any device."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
from cases import H100, pairwise_cases
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cupy_fp8kv
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.plan import MAX_COLUMNS, DeviceInfo, plan_decode, specs, split_rows
from cupy_fp8kv.problem import MAX_GROUP_SIZE, MAX_KV_LEN, DecodeProblem, Paging

KB = 1024
DEVICES = {
    "H100": H100,
    "A100": DeviceInfo("A100", 80, 108, 163 * KB),
    "L40S": DeviceInfo("L40S", 89, 142, 99 * KB),
    "RTX 5090": DeviceInfo("RTX 5090", 120, 170, 99 * KB),
    "Orin": DeviceInfo("Orin", 87, 16, 163 * KB),
    "small": DeviceInfo("small", 86, 20, 99 * KB),
    "one SM": DeviceInfo("one SM", 90, 1, 227 * KB),
}
#: What one SM has beyond what one CTA may ask for, and what the system takes of it for each CTA.
RESERVED = KB
MOST_WORKSPACE = 16 << 20


def problem(batch=1, kv_len=1000, num_kv_heads=1, group=1, head_dim=128, q="f16", k="e4m3", v="e4m3", **options):
    rows = [head_dim * KV_FORMATS[name].itemsize for name in (k, v)]
    k_strides, v_strides = ((kv_len * num_kv_heads * row, num_kv_heads * row, row) for row in rows)
    return DecodeProblem(
        batch, kv_len, num_kv_heads * group, num_kv_heads, head_dim, q, k, v, (0, 0), k_strides, v_strides, **options
    )


PROBLEMS = st.builds(
    problem,
    batch=st.one_of(st.integers(1, 300), st.sampled_from([1, 16, 33, 34, 265, 1000, 4096])),
    kv_len=st.one_of(
        st.integers(0, 300), st.integers(0, 100_000), st.sampled_from([0, 1, 1 << 20, 1 << 24, 2**31 - 1])
    ),
    num_kv_heads=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32]),
    group=st.one_of(st.integers(1, 16), st.integers(1, MAX_GROUP_SIZE)),
    head_dim=st.integers(1, 16).map(lambda n: 16 * n),
    q=st.sampled_from(["f16", "bf16"]),
    k=st.sampled_from(list(KV_FORMATS)),
    v=st.sampled_from(list(KV_FORMATS)),
    soft_cap=st.booleans(),
    window=st.one_of(st.just(-1), st.integers(1, 5000)),
    ragged=st.booleans(),
    paging=st.sampled_from([None, Paging(16, 100, 1 << 20, 0), Paging(24, 100, 1 << 20, 0)]),
).map(lambda problem: dataclasses.replace(problem, ragged=problem.ragged or problem.paging is not None))
ANY_DEVICE = st.sampled_from(list(DEVICES.values()))
ON_ANY_DEVICE = pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)


# The rows of a split


@settings(max_examples=500, deadline=None)
@given(
    st.integers(0, 5000), st.integers(0, 9000), st.integers(1, 300), st.sampled_from([1, 2, 4, 6, 8, 12, 16]),
    st.sampled_from([16, 32, 64]),
)  # fmt: skip
@example(0, 0, 1, 16, 16)
@example(7, 0, 5, 8, 16)
@example(100, 1, 3, 4, 64)
def test_splits_cover_every_row_once(begin, rows, splits, warps, tile_rows):
    parts = split_rows(begin, begin + rows, splits, warps, tile_rows)
    assert len(parts) == splits
    turn = warps * tile_rows
    for part in parts:
        assert all(begin <= first < last <= begin + rows and last - first <= turn for first, last in part)
        assert all((first - begin) % turn == 0 for first, _ in part)
        # Only the last rows of all may make a turn shorter than the warps could take.
        assert all(last - first == turn or last == begin + rows for first, last in part)
    at = begin
    for first, last in sorted(itertools.chain(*parts)):
        assert first == at
        at = last
    assert at == begin + rows
    # The first splits are the longer ones, by no more than a turn: none waits long for another.
    lengths = [sum(last - first for first, last in part) for part in parts]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= turn


def test_splits_of_millions_of_rows():
    rows = 5_000_003
    parts = split_rows(3, rows, 132, 16, 16)
    assert sum(last - first for part in parts for first, last in part) == rows - 3
    assert len(set(itertools.chain(*parts))) == sum(map(len, parts)) == math.ceil((rows - 3) / 256)


# What every plan promises


@settings(max_examples=600, deadline=None)
@given(PROBLEMS, ANY_DEVICE)
@example(problem(batch=34, num_kv_heads=1, group=128, head_dim=256, kv_len=100_000), H100)
def test_every_plan(problem, device):
    plan = plan_decode(problem, device)
    spec = plan.spec
    pieces, left_over = divmod(plan.grid, plan.splits)
    assert plan.splits >= 1 and not left_over and plan.grid < 2**31
    requests = plan.bounds.entries if plan.bounds else plan.shares or problem.batch
    # A CTA has one cache head of a request, or several whole ones.
    assert pieces and requests * problem.num_kv_heads * plan.column_blocks % pieces == 0
    assert (plan.spec.schedule == "listed") is (plan.bounds is not None) <= problem.ragged
    assert (plan.spec.schedule == "even") is (plan.shares > 0) <= problem.ragged
    assert plan.by_lengths is (plan.spec.schedule != "uniform")

    # Every query head of a group has a column, and no CTA is without one.
    columns = 8 * spec.column_tiles
    assert columns <= MAX_COLUMNS and spec.column_tiles in (1, 2)
    assert (plan.column_blocks - 1) * columns < problem.group_size <= plan.column_blocks * columns

    # The specialisation is the problem's, and one that warmup compiles.
    assert (spec.q, spec.k, spec.v, spec.head_dim) == (
        problem.q_format, problem.k_format, problem.v_format, problem.head_dim
    )  # fmt: skip
    assert spec.soft_cap == problem.soft_cap and spec.position == problem.position and not spec.software_fp8
    assert spec.layout == problem.layout
    assert spec.source() in {one.source() for one in specs(problem, device.arch, device.shared_per_block)}
    merging = 3 if plan.shares else 0
    assert spec.threads == 32 * (spec.warps + (spec.stages > 0) + merging) <= 1024 and spec.warps >= 1

    # One wave wherever splitting is what fills the device.
    if plan.splits > 1 and pieces < 2 * device.sm_count:
        assert plan.grid <= device.sm_count * spec.ctas_per_sm

    # Shared memory fits a CTA, and as many CTAs as the plan counts on fit an SM.
    assert spec.shared_bytes <= device.shared_per_block
    assert spec.ctas_per_sm * (spec.shared_bytes + RESERVED) <= device.shared_per_block + RESERVED

    # A split has work for its warps: never more splits than tiles.
    tiles = math.ceil(problem.rows_read / spec.tile_rows)
    assert plan.splits == 1 or plan.splits <= tiles

    # The workspace holds one state and one row of floats for each split of a head, aligned for vector loads.
    parts = problem.batch * problem.num_qo_heads * plan.splits if plan.splits > 1 else 0
    if plan.bounds:
        assert plan.splits == 1 and plan.bounds.batch == problem.batch > 1
        parts = plan.bounds.slots * problem.num_qo_heads
    if plan.shares > 1:
        assert plan.splits == plan.column_blocks == 1 and plan.spec.stages
        parts = 2 * plan.shares * problem.num_qo_heads
        # A thread of the last CTA does not read many parts one after the other.
        tasks = spec.heads * problem.group_size * problem.head_dim // 4
        assert not plan.merges_inside or plan.shares / max(1, 32 * spec.warps // tasks) <= 24
        assert plan.merges_inside or plan.most_merges(problem.batch) == plan.shares - 1
    else:
        assert not plan.merges_inside
    # What CTAs tell each other has a tag beside each number, and a state for four of them.
    floats, states = (12, 0) if plan.merges_inside else (4, 8)
    assert plan.workspace_out == parts * problem.head_dim * floats and plan.workspace_state == parts * states
    assert plan.workspace == plan.workspace_out + plan.workspace_state + plan.workspace_list
    assert plan.workspace_out % 16 == 0

    assert plan.reason and plan_decode(problem, device) == plan


@settings(max_examples=600, deadline=None)
@given(PROBLEMS, ANY_DEVICE)
@example(problem(batch=34, num_kv_heads=1, group=128, head_dim=256, kv_len=100_000), H100)
@example(problem(batch=265, num_kv_heads=1, group=16, head_dim=128, kv_len=100_000), H100)
def test_workspace_is_bounded(problem, device):
    assert plan_decode(problem, device).workspace <= MOST_WORKSPACE


@ON_ANY_DEVICE
@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("kv_len", [0, 1])
def test_next_to_nothing(device, batch, kv_len):
    plan = plan_decode(problem(batch=batch, kv_len=kv_len, num_kv_heads=2), device)
    assert plan.splits == 1 and plan.grid == 2 * batch and plan.workspace == 0


@ON_ANY_DEVICE
@pytest.mark.parametrize("group", range(1, MAX_GROUP_SIZE + 1))
def test_columns_of_every_group(device, group):
    plan = plan_decode(problem(group=group), device)
    columns = 8 * plan.spec.column_tiles
    heads = [
        block * columns + column
        for block in range(plan.column_blocks)
        for column in range(min(columns, group - block * columns))
    ]
    assert heads == list(range(group))


@ON_ANY_DEVICE
def test_a_long_request_alone_fills_the_device(device):
    for kv_len in (200_000, 10_000_000, MAX_KV_LEN):
        plan = plan_decode(problem(kv_len=kv_len), device)
        assert plan.splits > 1 or device.sm_count == 1
        assert 0.9 * device.sm_count * plan.spec.ctas_per_sm <= plan.grid <= device.sm_count * plan.spec.ctas_per_sm


@ON_ANY_DEVICE
def test_a_full_batch_is_not_split(device):
    plan = plan_decode(problem(batch=2 * device.sm_count, kv_len=4096), device)
    assert plan.splits == 1 and plan.workspace == 0


def test_the_window_bounds_what_is_planned_for():
    long, windowed = (problem(kv_len=1_000_000, window=window) for window in (-1, 17))
    assert plan_decode(long, H100).splits > 100 and plan_decode(windowed, H100).splits == 1
    assert plan_decode(windowed, H100) == plan_decode(problem(kv_len=17), H100)


@pytest.mark.parametrize(
    ("changes", "takes_ring"),
    [
        ({}, True), ({"k_strides": (8192 * 1024, -1024, 128)}, False),
        ({"v_strides": (0, 1024, 128)}, False), ({"kv_len": 1024}, True), ({"kv_len": 1023}, True),
        ({"kv_len": 15}, False), ({"kv_len": 400, "batch": 400}, False),
        ({"batch": 17}, True), ({"head_dim": 256}, True), ({"num_qo_heads": 128}, True), ({"batch": 90}, False),
        ({"num_qo_heads": 512}, False), ({"window": 2000}, True), ({"window": 1000}, True),
        ({"batch": 130, "kv_len": 1024}, True), ({"batch": 130, "kv_len": 1023}, False), ({"k_format": "bf16"}, True),
        ({"k_format": "bf16", "head_dim": 256}, False),
    ],
)  # fmt: skip
def test_a_ring_is_taken_where_it_was_found_faster(changes, takes_ring):
    some = dataclasses.replace(problem(batch=16, kv_len=8192, num_kv_heads=8, group=8), **changes)
    assert (plan_decode(some, H100).spec.stages > 0) is takes_ring
    for device in ("A100", "L40S", "RTX 5090"):
        assert not plan_decode(some, DEVICES[device]).spec.stages


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "kv_len", "heads", "splits", "ctas_per_sm", "kilobytes"),
    [
        (4, 32, 8192, 1, 1, 1, 48), (8, 32, 8192, 2, 1, 1, 48), (64, 8, 4096, 2, 1, 2, 24),
        (1, 32, 32768, 2, 8, 1, 48), (1, 8, 131072, 2, 33, 1, 48), (1, 8, 32768, 1, 16, 1, 48),
        (64, 32, 1024, 2, 1, 2, 24),
        (9, 8, 8192, 1, 1, 1, 96), (12, 8, 8192, 1, 1, 1, 64), (20, 8, 8192, 2, 1, 1, 80),
        (40, 8, 4096, 2, 1, 2, 40), (8, 8, 16384, 2, 4, 1, 48),
    ],
)  # fmt: skip
def test_heads_splits_and_bytes_of_a_ring(batch, num_kv_heads, kv_len, heads, splits, ctas_per_sm, kilobytes):
    """Whatever the number of CTAs, all rings together have some 6 MB in flight."""
    plan = plan_decode(problem(batch=batch, num_kv_heads=num_kv_heads, kv_len=kv_len), H100)
    spec = plan.spec
    assert (spec.heads, plan.splits, spec.ctas_per_sm) == (heads, splits, ctas_per_sm)
    assert spec.stages * spec.stage_bytes == kilobytes * KB
    assert 6e6 < min(plan.grid, 132 * ctas_per_sm) * kilobytes * KB < 8e6


@pytest.mark.parametrize(
    ("changes", "early"),
    [
        ({"kv_len": 15}, False), ({"kv_len": 512, "batch": 600}, True), ({"kv_len": 512, "batch": 1}, True),
        ({"kv_len": 8192}, True), ({"kv_len": 8192, "k_strides": (0, 1024, 128)}, False),
    ],
)  # fmt: skip
def test_calls_start_early_unless_one_wave_shares_sms(changes, early):
    """One wave of CTAs without a ring or a merge is placed unevenly where SMs still have some of the kernel before."""
    assert plan_decode(dataclasses.replace(problem(batch=16, num_kv_heads=8), **changes), H100).early is early


@pytest.mark.parametrize(
    ("batch", "kv_len", "splits"),
    [(7, 1400, False), (7, 60_000, True), (8, 4096, False), (8, 16_384, True), (2, 1400, True)],
)
def test_few_ctas_share_requests_where_memory_has_more_to_give(batch, kv_len, splits):
    """56 CTAs for whole requests read less than memory gives: splitting pays off for long ones only."""
    plan = plan_decode(problem(batch=batch, kv_len=kv_len, num_kv_heads=8), H100)
    assert (plan.splits > 1) is splits and plan.spec.stages


def test_short_requests_have_some_turns_and_no_ring_longer_than_they_are():
    for kv_len in (40, 100, 300, 700, 1000):
        plan = plan_decode(problem(batch=16, kv_len=kv_len, num_kv_heads=8, head_dim=32), H100)
        spec = plan.spec
        assert spec.stages and (spec.subtiles == 1 or kv_len >= 4 * spec.turn_rows)
        assert spec.stages <= max(5, -(-kv_len // spec.turn_rows))


def test_strides_do_not_matter_without_a_ring():
    one = problem(batch=3, kv_len=5000, ragged=True)
    other = dataclasses.replace(one, k_strides=(1 << 40, 4096, 128), v_strides=(1, 2, 3), q_strides=(512, 256))
    assert plan_decode(one, H100) == plan_decode(other, H100)


def test_warps_per_sm_are_never_more_than_registers_allow():
    """32 K registers for 16 warps of 128: at least what accumulators and both tiles of a lane need must be left."""
    for case in pairwise_cases():
        for spec in specs(case.problem, 90):
            steps = spec.head_dim // 16
            accumulators = 4 * steps * spec.column_tiles
            tiles = spec.subtiles * 2 * steps * (KV_FORMATS[spec.k].itemsize + KV_FORMATS[spec.v].itemsize)
            assert accumulators + tiles < 65536 // (spec.threads * spec.ctas_per_sm), spec


def test_specs_are_few_and_distinct():
    rng = random.Random(0)
    for _ in range(200):
        some = problem(
            group=rng.randint(1, 128), head_dim=16 * rng.randint(1, 16), k=rng.choice(list(KV_FORMATS)),
            v=rng.choice(list(KV_FORMATS)), soft_cap=rng.random() < 0.5,
        )  # fmt: skip
        found = specs(some, 90)
        assert len(set(found)) == len(found) <= 16 and found[:3] == specs(some, 89)
        assert len({str(spec) for spec in found}) == len(found)


@ON_ANY_DEVICE
def test_specs_for_a_device_are_those_it_can_load(device):
    """A kernel that asks for more shared memory than there is cannot even be loaded."""
    for head_dim in (64, 128):
        found = specs(problem(head_dim=head_dim), device.arch, device.shared_per_block)
        assert found and all(spec.shared_bytes <= device.shared_per_block for spec in found)
    assert len(specs(problem(), 90, 227 * KB)) == len(specs(problem(), 90)) > len(specs(problem(), 120, 99 * KB)) == 3


# Telling


def test_plans_print_themselves():
    case_q, cache = np.zeros((2, 8, 128), np.float16), np.zeros((2, 30_000, 2, 128), np.uint8)
    for device in DEVICES.values():
        told = cupy_fp8kv.explain(case_q, cache, cache, device=device)
        assert told.backend == "cuda" and told.device == device
        assert told.plan == plan_decode(told.problem, device)
        text = str(told)
        for expected in (
            device.name, f"sm_{device.arch}", f"{device.sm_count} SMs", str(told.plan.spec), told.plan.reason,
            f"splits   {told.plan.splits} ", f"grid {told.plan.grid}", "2 requests of 30000 rows", "8/2 heads of 128",
        ):  # fmt: skip
            assert expected in text, f"{expected!r} is not in\n{text}"
        assert ("then merge" in text) == (told.plan.splits > 1)


def test_explain_knows_that_requests_with_lengths_of_their_own_are_planned_otherwise():
    q, cache = np.zeros((4, 32, 128), np.float16), np.zeros((4, 8192, 32, 128), np.uint8)
    padded = cupy_fp8kv.explain(q, cache, cache, device=H100)
    assert padded.plan.spec.stages and "rings on 128 of 132 places" in str(padded)
    last = "merged by the last CTA of a request"
    for device, splits, merge in (("H100", "by equal shares", last), ("A100", "by a work list", "then merge")):
        ragged = cupy_fp8kv.explain(q, cache, cache, device=DEVICES[device], kv_lens=np.full(4, 5, np.int32))
        assert ragged.problem.ragged and ragged.plan.by_lengths
        assert f"splits   {splits} " in str(ragged) and merge in str(ragged)


def test_explain_says_numpy_where_numpy_runs():
    q, cache = np.zeros((8, 64), np.float16), np.zeros((100, 2, 64), np.uint8)
    told = cupy_fp8kv.explain(q, cache, cache, backend="numpy", kv_format="e5m2", window_left=10)
    assert told.backend == "numpy" and told.plan is None and told.device is None
    assert told.problem.k_format == "e5m2" and told.problem.window == 11
    assert "numpy" in str(told) and "kernel" not in str(told)


def test_explain_plans_what_a_call_runs():
    for case in pairwise_cases()[::8]:
        q = np.zeros((case.batch, case.group * case.num_kv_heads, case.head_dim), KV_FORMATS[case.q].dtype)
        k, v = (
            np.zeros((case.batch, case.kv_len, case.num_kv_heads, case.head_dim),
                     np.uint8 if KV_FORMATS[name].is_fp8 else KV_FORMATS[name].dtype)
            for name in (case.k, case.v)
        )  # fmt: skip
        told = cupy_fp8kv.explain(
            q, k, v, kv_format=(case.k, case.v), window_left=case.window_left, logits_soft_cap=case.soft_cap,
            kv_lens=np.full(case.batch, case.kv_len, np.int32) if case.problem.ragged else None, device=H100,
        )  # fmt: skip
        assert told.plan == case.plan(H100)
