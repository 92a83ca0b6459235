"""Equal shares of all rows: decode and merge that find theirs by themselves, over padded caches and over pages."""

import dataclasses

import emulator
import numpy as np
import pytest
from emulator.bugs import MODE, PLAIN, Bug, each_of_this_mode, noticed
from emulator.checks import run
from even import NAMED, even_cases, even_everywhere, even_paged_cases
from paged_cases import paged
from test_emulator_paged import run as run_paged

from cupy_fp8kv import plan_types
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.plan import DeviceInfo

#: Sanitizers take ten times as long.
COUNT = 20 if MODE in (PLAIN, "debug") else 4
FEW = even_cases()[:: max(1, len(even_cases()) // COUNT)]
FEW_PAGED = [case for case in even_paged_cases() if case.base.kv_len * case.base.batch <= 2000]
FEW_PAGED = FEW_PAGED[:: max(1, len(FEW_PAGED) // COUNT)]
SMS = (2, 5, 40) if MODE in (PLAIN, "debug") else (5,)


@pytest.fixture
def on_sms(emulate, monkeypatch):
    """Says how many SMs there are."""
    # Undone before what `emulate` has set.
    with monkeypatch.context() as patch:

        def choose(count):
            device = DeviceInfo("emulated", 90, count, emulator.HOPPER.shared_per_block)
            patch.setattr(cuda, "device_info", lambda index: device)

        choose(6)
        yield choose


@pytest.fixture
def even(emulate, on_sms, monkeypatch):
    with even_everywhere(monkeypatch):
        yield emulate


def launched(machine):
    return [name for name, _ in machine.launches]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_decode(even, on_sms, case):
    on_sms(case.num_kv_heads * (1 + case.seed % 5))
    run(even, case)
    assert any(" even" in name for name in launched(even)[-2:])


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize("name", NAMED)
def test_named(even, on_sms, name, sms):
    on_sms(sms * NAMED[name].num_kv_heads)
    run(even, NAMED[name])
    assert any(" even" in name for name in launched(even)[-2:])


@pytest.mark.parametrize("case", FEW_PAGED, ids=str)
def test_pages(even, on_sms, case):
    on_sms(case.base.num_kv_heads * (1 + case.base.seed % 5))
    run_paged(even, case)
    assert any(" even" in name for name in launched(even)[-2:])


@pytest.mark.parametrize("window_left", [-1, 0, 40, 130])
@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
def test_windows_that_begin_within_a_page(even, page_size, window_left):
    case = paged(page_size, group=5, num_kv_heads=2, batch=5, kv_len=400, lens=(400, 0, 133, 64, 257),
                 window_left=window_left, seed=page_size)  # fmt: skip
    run_paged(even, case)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_any_order_of_threads_gives_the_same_bits(even, monkeypatch, seed):
    first = run(even, NAMED["cuts"])
    monkeypatch.setattr(even, "seed", seed)
    again = run(even, NAMED["cuts"])
    assert all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(first, again, strict=True))


# Planted bugs


CUTS = dataclasses.replace(NAMED["cuts"], group=4)
CUT_PAGES = paged(16, group=4, batch=3, kv_len=400, lens=(400, 17, 257), window_left=250, seed=13)


def shares(machine):
    """Requests that begin, end or do both in one of 5 shares; one is longer than a share."""
    with pytest.MonkeyPatch.context() as patch, even_everywhere(patch):
        patch.setattr(cuda, "device_info", lambda index: dataclasses.replace(emulator.HOPPER, sm_count=5))
        run(machine, CUTS)


def one_share(machine):
    """All requests by one CTA."""
    with pytest.MonkeyPatch.context() as patch, even_everywhere(patch):
        patch.setattr(cuda, "device_info", lambda index: dataclasses.replace(emulator.HOPPER, sm_count=1))
        run(machine, CUTS)


def shares_and_merge(machine):
    """The same where another kernel merges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_types, "MOST_PARTS_OF_A_THREAD", 0)
        shares(machine)


def shares_of_pages(machine):
    """The same over pages, with a window that begins within one."""
    with pytest.MonkeyPatch.context() as patch, even_everywhere(patch):
        patch.setattr(cuda, "device_info", lambda index: dataclasses.replace(emulator.HOPPER, sm_count=5))
        run_paged(machine, CUT_PAGES)


BUGS = [
    Bug(
        "rows of a page before those of a share", (PLAIN,), "mask.cuh", "(!FROM_BEFORE || row >= begin)", "true",
        shares_of_pages,
    ),
    Bug(
        "a cut one box early", (PLAIN,), "schedule/even.cuh", "return shares_.begin(place_.part + 1);",
        "return shares_.begin(place_.part + 1) - 1;", shares,
    ),
    Bug(
        "two parts of a share in one slot", (PLAIN,), "schedule/even.cuh",
        "2 * place_.part + (is_begun ? 0 : 1)", "2 * place_.part", shares,
    ),
    Bug(
        "a part left out of the merge", (PLAIN,), "schedule/even.cuh",
        "shares.of_place(at + boxes - 1) - first + 1}", "shares.of_place(at + boxes - 1) - first}", shares_and_merge,
    ),
    Bug(
        "a part left out by the last CTA", (PLAIN,), "schedule/even.cuh",
        "shares.of_place(at + boxes - 1) - first + 1}", "shares.of_place(at + boxes - 1) - first}", shares,
    ),
    Bug(
        "a box of a page not begun", (PLAIN,), "layout/paged.cuh", "row >> p.box_shift << p.box_shift", "row",
        shares_of_pages,
    ),
    Bug(
        "a work written over before it is done", (PLAIN,), "attention/work_queue.cuh",
        "if (number >= kSlots) ptx::barrier_wait", "if (false) ptx::barrier_wait", one_share,
    ),
    Bug(
        "boxes expected that a share does not have", (PLAIN,), "decode.cu", "rows * row_bytes, lane,",
        "kTurnRows * row_bytes, lane,", shares, "deadlock",
    ),
]  # fmt: skip


@each_of_this_mode(BUGS)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, machine, bug):
    noticed(tmp_path, monkeypatch, machine, bug)


@pytest.mark.parametrize("check", [shares, one_share, shares_and_merge, shares_of_pages])
def test_checks_of_planted_bugs_pass_without_them(emulate, check):
    check(emulate)
