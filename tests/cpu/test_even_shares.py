"""Equal shares as a pure function, and plans that have them: what they promise for any lengths and any problem."""

import dataclasses
import itertools

import numpy as np
import pytest
from cases import H100, Case
from even import random_shares
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_plan import ANY_DEVICE, PROBLEMS

from cupy_fp8kv.jit.spec import MergeSpec
from cupy_fp8kv.plan import MAX_WORKSPACE, plan_decode, specs
from cupy_fp8kv.problem import Paging
from cupy_fp8kv.ring_plans import LEAST_BOX_ROWS, MIN_RING_FILL, box_rows
from cupy_fp8kv.schedule import even_shares, visible_rows

LENS = st.one_of(
    st.lists(st.integers(0, 3000), min_size=1, max_size=60),
    st.lists(st.sampled_from([0, 1, 127, 128, 129, 100_000]), min_size=1, max_size=40),
    st.tuples(st.integers(0, 10**6), st.integers(1, 100)).map(lambda pair: [pair[0]] * pair[1]),
)


def unit_of(lens, window_left, box_rows, request_boxes, paged):
    """Rows of a unit of the line: each of 32 lanes sums up neighbouring requests, and no sum has 27 bits."""
    begins = [kv_len - visible_rows(kv_len, window_left) for kv_len in lens]
    rows = [n - (begin // box_rows * box_rows if paged else begin) for n, begin in zip(lens, begins, strict=True)]
    each = -(-len(rows) // 32)

    def fits(unit):
        weights = [max(1, -(-n // unit)) + request_boxes for n in rows] + [0] * (32 * each - len(rows))
        return max(np.array(weights, np.int64).reshape(32, each).sum(1)) < 2**26

    return next(unit for unit in (box_rows << shift for shift in itertools.count()) if fits(unit))


def check_shares(lens, window_left, box_rows, count, least_boxes, request_boxes, paged):
    """Everything that decode.cu and merge.cu rely on."""
    unit = unit_of(lens, window_left, box_rows, request_boxes, paged)
    found = even_shares(
        lens, window_left=window_left, box_rows=box_rows, shares=count, least_boxes=least_boxes,
        request_boxes=request_boxes, paged=paged,
    )  # fmt: skip
    assert len(found) == count
    parts = {}
    for share, of_share in enumerate(found):
        # A share goes through neighbouring requests in turn, and only its first and its last may be others' as well.
        assert [part.request for part in of_share] == sorted({part.request for part in of_share})
        assert all(part.is_whole for part in of_share[1:-1])
        for part in of_share:
            parts.setdefault(part.request, []).append((share, part))

    # Every visible row once, in order; a request without rows has a box all the same, which writes its result.
    assert sorted(parts) == list(range(len(lens)))
    for request, kv_len in enumerate(lens):
        begin = kv_len - visible_rows(kv_len, window_left)
        of_request = [part for _, part in parts[request]]
        assert (of_request[0].begin, of_request[-1].end) == (begin, kv_len)
        assert all(a.end == b.begin for a, b in itertools.pairwise(of_request))
        assert all(part.begin < part.end for part in of_request) or len(of_request) == 1
        first_row = begin // box_rows * box_rows if paged else begin
        assert all((part.begin - first_row) % unit == 0 for part in of_request[1:])

    # Partial results: slots of their own, and as EvenSchedule::parts finds them.
    partial = [part.slot for of_share in found for part in of_share if not part.is_whole]
    assert len(set(partial)) == len(partial) and all(0 <= slot < 2 * count for slot in partial)
    for of_request in parts.values():
        first = of_request[0][0]
        assert [share for share, _ in of_request] == [first + i for i in range(len(of_request))]
        assert all(part.is_whole is (len(of_request) == 1) for _, part in of_request)
        if len(of_request) > 1:
            assert [part.slot for _, part in of_request] == [
                2 * first + (not i) + 2 * i for i in range(len(of_request))
            ]
    assert sum(len(of_request) > 1 for of_request in parts.values()) <= count - 1

    # Shares of one weight, to a unit; what a request costs beside its units may lie on either side of a cut.
    weights = [
        sum(
            max(1, -(-(part.end - (part.begin // box_rows * box_rows if paged else part.begin)) // unit))
            for part in of_share
        )
        for of_share in found
    ]  # fmt: skip
    length = sum(weights) + request_boxes * len(lens)
    assert length < 2**31
    used = max(1, min(length // least_boxes, count))
    assert all(not of_share for of_share in found[used:])
    longest = -(-length // used)
    for weight, of_share in zip(weights[:used], found, strict=False):
        whole = sum(part.end == lens[part.request] for part in of_share)
        assert weight <= longest
        assert weight + request_boxes * (whole + 1) >= longest - 1


@settings(max_examples=400, deadline=None)
@given(
    LENS, st.sampled_from([-1, 0, 500]), st.sampled_from([8, 32, 128]), st.integers(1, 140), st.integers(1, 16),
    st.sampled_from([1, 4, 16]), st.booleans(),
)  # fmt: skip
@example([131_072] + [512] * 63, -1, 32, 132, 8, 4, False)
@example([2**31 - 2**24] * 5, -1, 16, 16, 2, 8, True)
@example([2**31 - 2**24] * 90 + [0, 1, 31, 2**30], 2**31 - 2**25, 8, 140, 16, 16, True)
@example([2**31 - 1] * 3000, -1, 32, 132, 8, 4, True)
@example([2**31 - 2**24] + [5] * 31, -1, 32, 132, 8, 4, False)
@example([0] * 5, -1, 128, 132, 2, 1, False)
def test_every_share(lens, window_left, box_rows, count, least_boxes, request_boxes, paged):
    check_shares(lens, window_left, box_rows, count, least_boxes, request_boxes, paged)


@pytest.mark.parametrize("seed", range(20))
def test_large_batches(seed):
    print(f"seed {seed}")
    lens, count, least_boxes = random_shares(seed)
    check_shares(lens, (-1, 700)[seed % 2], 32, count, least_boxes, (4, 1)[seed % 2], bool(seed % 2))


def test_one_huge_request_is_shared_by_all():
    found = even_shares([131_072] + [512] * 63, window_left=-1, box_rows=32, shares=16, least_boxes=8, request_boxes=4)
    sizes = [sum(part.end - part.begin for part in of_share) for of_share in found]
    assert sum(part.request == 0 for of_share in found for part in of_share) >= 12 and min(sizes) > 0.5 * max(sizes)


# Plans


def ragged(batch, kv_len, num_kv_heads=8, group=4, **options):
    return Case(batch=batch, kv_len=kv_len, num_kv_heads=num_kv_heads, group=group, kv_lens="device", **options).problem


@settings(max_examples=400, deadline=None)
@given(PROBLEMS, ANY_DEVICE)
def test_every_plan_of_equal_shares(problem, device):
    problem = dataclasses.replace(problem, ragged=True)
    plan = plan_decode(problem, device)
    if not plan.shares:
        return
    spec = plan.spec
    teams = problem.num_kv_heads // spec.heads
    assert plan.grid == plan.shares * teams and MIN_RING_FILL < plan.grid / device.sm_count <= 1
    assert problem.num_kv_heads % spec.heads == 0 and spec.ctas_per_sm == 1
    rows = box_rows(problem, spec)
    assert rows >= LEAST_BOX_ROWS and rows & (rows - 1) == 0 and spec.turn_rows % rows == 0
    assert not problem.paging or problem.paging.page_size % rows == 0
    assert plan.workspace <= MAX_WORKSPACE and not plan.workspace_list
    assert plan.by_lengths and plan.most_merges(problem.batch) == (0 if plan.merges_inside else plan.shares - 1)
    assert "lengths decide" in plan.reason


@pytest.mark.parametrize(
    ("num_kv_heads", "heads", "shares"), [(1, 1, 132), (2, 1, 66), (8, 1, 16), (3, 1, 44), (16, 2, 16), (32, 2, 8)]
)
def test_pairs_of_heads_where_there_are_many(num_kv_heads, heads, shares):
    plan = plan_decode(ragged(16, 16_384, num_kv_heads), H100)
    assert (plan.spec.heads, plan.shares) == (heads, shares)


def test_another_team_where_the_first_leaves_much_of_the_device_idle():
    """Of 80 heads, 80 single ones keep 80 SMs busy, 40 pairs 120."""
    plan = plan_decode(ragged(16, 16_384, 80, 1), H100)
    assert plan.spec.heads == 2 and plan.grid == 120
    plan = plan_decode(ragged(16, 16_384, 15, 1), H100)
    assert plan.spec.heads == 1 and plan.grid == 120


@pytest.mark.parametrize(
    "problem",
    [
        ragged(64, 16_384, group=17), ragged(1, 1024), ragged(64, 16_384, head_dim=256, k="f16", v="f16"),
        dataclasses.replace(ragged(64, 16_384), v_strides=(1 << 24, -1024, 128)),
        dataclasses.replace(ragged(64, 16_384), paging=Paging(4, 4096, 16_384, 0)),
        dataclasses.replace(ragged(64, 16_384), ragged=False),
    ],
    ids=["column blocks", "short", "long rows", "backwards", "small pages", "equal requests"],
)  # fmt: skip
def test_what_is_not_read_in_equal_shares(problem):
    assert plan_decode(ragged(64, 16_384), H100).shares and not plan_decode(problem, H100).shares


def test_partial_results_of_many_heads_do_not_exceed_the_workspace():
    problem = ragged(64, 16_384, num_kv_heads=1, group=16, head_dim=256)
    some = dataclasses.replace(H100, sm_count=700)
    plan = plan_decode(problem, some)
    assert 0.9 * MAX_WORKSPACE < plan.workspace <= MAX_WORKSPACE and plan.shares < 700


def test_boxes_are_as_long_as_pages_allow_and_no_longer_than_those_of_padded_caches():
    for page_size, rows in ((8, 8), (24, 8), (16, 16), (48, 16), (80, 16), (96, 32), (64, 32), (512, 32)):
        problem = dataclasses.replace(ragged(64, 16_384), paging=Paging(page_size, 4096, 16_384, 0))
        plan = plan_decode(problem, H100)
        assert plan.spec.schedule == "even" and box_rows(problem, plan.spec) == rows
    padded = ragged(64, 16_384)
    assert box_rows(padded, plan_decode(padded, H100).spec) == 32


def test_kernels_of_equal_shares_are_for_devices_with_rings():
    for paging in (None, Paging(16, 100, 1600, 0)):
        problem = dataclasses.replace(ragged(4, 100), paging=paging)
        even = [spec for spec in specs(problem, 90) if spec.schedule == "even"]
        assert {spec.heads for spec in even} == {1, 2} and all(spec.stages for spec in even)
        assert {MergeSpec.behind(spec).layout for spec in even} == {problem.layout}
        assert not any(spec.schedule == "even" for spec in specs(problem, 89))
        assert not any(spec.stages for spec in specs(problem, 120, 99 << 10))


@pytest.mark.parametrize("sm_count", [16, 46, 78, 132])
@pytest.mark.parametrize("queries", [1, 4])
def test_every_ring_fits_the_shared_memory(sm_count, queries):
    """Few SMs get long rings each, and wide V, or many queries, large boxes."""
    device = dataclasses.replace(H100, sm_count=sm_count)
    formats = ("e4m3", "f16", "bf16")
    for k, v, head_dim, heads, columns in itertools.product(
        formats, formats, range(16, 257, 16), (1, 2, 8, 16), (8, 16)
    ):
        paging = Paging(16, 1, 4096, 0)
        problem = ragged(64, 4096, heads, columns // queries, head_dim=head_dim, k=k, v=v)
        for one in (problem, dataclasses.replace(problem, paging=paging)):
            if one.paging:
                one = dataclasses.replace(one, queries=queries)
            plan = plan_decode(one, device)
            assert plan.spec.shared_bytes * plan.spec.ctas_per_sm <= device.shared_per_block + 1024
