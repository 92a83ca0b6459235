"""Work lists: what schedule.cu makes of lengths, against its definition, and decode and merge that read it."""

import emulator
import numpy as np
import pytest
from emulator.checks import made_list, run
from listed import HUGE_AND_SMALL, NAMED, listed_cases, lists_everywhere, random_lens

from cupy_fp8kv.jit.spec import ScheduleSpec
from cupy_fp8kv.plan import plan_decode

FEW = listed_cases()[:: max(1, len(listed_cases()) // 24)]


@pytest.fixture
def lists(emulate, monkeypatch):
    with lists_everywhere(monkeypatch):
        yield emulate


@pytest.mark.parametrize("seed", range(24))
def test_the_list_is_as_defined(lists, seed):
    lens, most = random_lens(seed)
    made, want = made_list(lens, most, (-1, -1, 300)[seed % 3], (1, 2, 5)[seed % 3])
    assert made == want


def test_lengths_out_of_bounds_are_cut(lists):
    made, want = made_list((2**31 - 1, -5, 70, -(2**31)), 900)
    assert made == want and sorted({entry.kv_len for entry in made[0]}) == [0, 70, 900]


def test_lengths_of_more_rows_than_32_bits_count(lists):
    most = 2**31 - 2**24
    made, want = made_list([most, 3, most - 1] * 40, most)
    assert made == want and sum(entry.kv_len for entry in made[0]) > 2**35


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_a_batch_of_many_rounds(lists, monkeypatch, threads):
    monkeypatch.setattr(ScheduleSpec, "of_batch", lambda batch: ScheduleSpec(threads))
    made, want = made_list([(37 * i) % 900 for i in range(700)], 900)
    assert made == want


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_any_order_of_threads_gives_the_same_list(lists, monkeypatch, seed):
    lens, most = random_lens(5)
    first, _ = made_list(lens, most)
    monkeypatch.setattr(lists, "seed", seed)
    assert made_list(lens, most)[0] == first


@pytest.mark.parametrize("case", FEW, ids=str)
def test_decode(lists, case):
    run(lists, case)
    assert [name.partition("[")[0] for name, _ in lists.launches[-3:]] == ["schedule", "decode", "merge"]


@pytest.mark.parametrize("name", NAMED)
def test_named(lists, name):
    run(lists, NAMED[name])


def test_the_cases_reach_every_cta_shape_and_number_of_columns(lists):
    plans = [plan_decode(case.problem, emulator.DEVICE) for case in (*FEW, *NAMED.values())]
    assert all(plan.bounds and plan.spec.schedule == "listed" for plan in plans)
    assert {plan.spec.column_tiles for plan in plans} == {1, 2} and max(plan.column_blocks for plan in plans) > 1


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_any_order_of_threads_gives_the_same_bits(lists, monkeypatch, seed):
    first = run(lists, HUGE_AND_SMALL)
    monkeypatch.setattr(lists, "seed", seed)
    again = run(lists, HUGE_AND_SMALL)
    assert all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(first, again, strict=True))
