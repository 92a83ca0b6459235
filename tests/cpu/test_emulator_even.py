"""Equal shares of all rows: decode and merge that find theirs by themselves, over padded caches and over pages."""

import dataclasses
from collections import Counter

import emulator
import numpy as np
import pytest
from cases import Case, build
from emulator.bugs import MODE, PLAIN, THREAD, Bug, each_of_this_mode, noticed
from emulator.checks import move, run
from even import NAMED, even_cases, even_everywhere, even_paged_cases
from paged_cases import paged
from test_emulator_paged import run as run_paged

from cupy_fp8kv import dispatch, plan_types
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.plan import DeviceInfo, least_turns
from cupy_fp8kv.ring_plans import box_rows
from cupy_fp8kv.schedule import TURNS_OF_A_REQUEST, even_shares

#: Sanitizers take ten times as long.
IS_SANITIZED = MODE not in (PLAIN, "debug")
COUNT = 4 if IS_SANITIZED else 20
FEW = even_cases()[:: max(1, len(even_cases()) // COUNT)]
FEW_PAGED = [case for case in even_paged_cases() if case.base.kv_len * case.base.batch <= 2000]
FEW_PAGED = FEW_PAGED[:: max(1, len(FEW_PAGED) // COUNT)]
SMS = (5,) if IS_SANITIZED else (2, 5, 40)


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


# Requests of many parts


#: A chunk of parts is 8; threads share chunks where they are enough for them, and merge.cu merges where they are not.
#: With the number of SMs: parts of the longest request at least, and whether CTAs merge.
MANY = {
    "few columns": (Case(head_dim=16, batch=2, kv_len=20_000, lens=(20_000, 300), kv_lens="device"), 40, 32, True),
    "16 columns": (Case(head_dim=16, group=16, batch=2, kv_len=9000, lens=(9, 9000), kv_lens="device"), 30, 25, True),
    "all parts a thread": (Case(group=8, batch=3, kv_len=5000, lens=(9, 5000, 150), kv_lens="device"), 20, 16, True),
    "pairs of heads": (Case(head_dim=16, num_kv_heads=16, batch=2, kv_len=6000, lens=(6000, 40), kv_lens="device"),
                       8 * 12, 9, True),
    "too many": (Case(head_dim=64, group=16, batch=2, kv_len=8000, lens=(8000, 60), kv_lens="device"), 30, 25, False),
    "a single request": (paged(32, head_dim=16, batch=1, kv_len=16_000, lens=(15_999,)), 33, 30, True),
}  # fmt: skip


def run_many(machine, name, given=None):
    case, sms, least, inside = MANY[name]
    patch = pytest.MonkeyPatch()
    with patch.context() as inner, even_everywhere(inner):
        device = dataclasses.replace(emulator.HOPPER, sm_count=sms)
        inner.setattr(cuda, "device_info", lambda index: device)
        base = case if isinstance(case, Case) else case.base
        before = len(machine.launches)
        results = run(machine, case, given) if base is case else run_paged(machine, case, given)
        (prepared,) = (one.kernels for one in dispatch._prepared.values())
    plan, problem = prepared.plan, prepared.problem
    rows = box_rows(problem, plan.spec)
    shares = even_shares(
        base.lens, window_left=-1, box_rows=rows, shares=plan.shares, paged=base is not case,
        least_boxes=least_turns(plan.spec) * plan.spec.turn_rows // rows,
        request_boxes=round(TURNS_OF_A_REQUEST * plan.spec.turn_rows / rows),
    )  # fmt: skip
    assert max(Counter(part.request for of_share in shares for part in of_share).values()) >= least
    assert plan.merges_inside is inside and any("merge" in one for one, _ in machine.launches[before:]) is not inside
    assert plan.spec.heads == (2 if name == "pairs of heads" else 1)
    return results


@pytest.mark.parametrize("name", ["16 columns"] if IS_SANITIZED else MANY)
def test_many_parts_have_the_same_bits_in_any_order(emulate, monkeypatch, name):
    results = []
    for seed in (0, 3):
        monkeypatch.setattr(emulate, "seed", seed)
        results.append([array.view(np.uint8) for array in run_many(emulate, name)])
    assert all(np.array_equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


TAG = 0x1234_5678


def one_workspace(machine, fill, case, sms, calls=2):
    """Calls with other data, one after the other, in one workspace: no word keeps a tag. ``fill(words, head_dim)``."""
    with pytest.MonkeyPatch.context() as patch, even_everywhere(patch):
        device = dataclasses.replace(emulator.HOPPER, sm_count=sms)
        patch.setattr(cuda, "device_info", lambda index: device)
        patch.setattr(cuda, "_new_tag", lambda: TAG)
        spaces, before = [], []

        def workspace(nbytes, *_):
            if not spaces:
                spaces.append(move(np.zeros(nbytes, np.uint8)))
                fill(spaces[0].view(np.uint64), case.head_dim)
                before.append(np.array(spaces[0].view(np.uint64)))
            assert spaces[0].nbytes == nbytes
            return spaces[0], spaces[0].ctypes.data

        patch.setattr(emulator.library, "workspace", workspace)
        for seed in range(calls):
            run(machine, case, build(dataclasses.replace(case, seed=seed)))
            (words,) = (np.asarray(space).view(np.uint64) for space in spaces)
            assert not (words >> np.uint64(32) == TAG)[words != before[0]].any(), "a tag was left"
        (prepared,) = dispatch._prepared.values()
        assert prepared.kernels.plan.merges_inside


def random_words(words, head_dim):
    words[...] = np.random.default_rng(5).integers(0, 2**64, words.size, np.uint64)


def ones(words, head_dim):
    words[...] = 2**64 - 1


def all_but_one(which):
    """Words with a tag, but for one of each four dimensions."""

    def fill(words, head_dim):
        at = np.arange(words.size) % (3 * head_dim // 2)
        kind = at // (head_dim // 2) * 2 + at % 2
        words[...] = np.where(kind == which, 0, TAG << 32 | 0x3F80_0000)

    fill.__name__ = f"all_but_{which}"
    return fill


#: Few parts, of which CTAs read all; and more, of which they read a sample first.
FEW_PARTS = Case(head_dim=32, group=5, batch=2, kv_len=900, lens=(900, 70), kv_lens="device")
SPACES = {"few": (FEW_PARTS, 3), "sampled": (NAMED["cuts"], 12), "many": MANY["few columns"][:2]}


FILLS = [random_words, all_but_one(3)] if IS_SANITIZED else [ones, random_words, *map(all_but_one, (0, 3, 5))]


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: fill.__name__)
@pytest.mark.parametrize("name", ["few", "sampled"] if IS_SANITIZED else SPACES)
def test_any_workspace_and_again(emulate, name, fill):
    one_workspace(emulate, fill, *SPACES[name])


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
        patch.setattr(plan_types, "_merges_inside", lambda *_: False)
        shares(machine)


def shares_of_pages(machine):
    """The same over pages, with a window that begins within one."""
    with pytest.MonkeyPatch.context() as patch, even_everywhere(patch):
        patch.setattr(cuda, "device_info", lambda index: dataclasses.replace(emulator.HOPPER, sm_count=5))
        run_paged(machine, CUT_PAGES)


def again(machine):
    """Twice in one workspace, which first holds tags by chance."""
    for which in range(6):
        one_workspace(machine, all_but_one(which), FEW_PARTS, 3)


WORK_QUEUE = "attention/work_queue.cuh"
TOLD = "attention/told_parts.cuh"
BUGS = [
    Bug(
        "tags that stay", (PLAIN,), "attention/parts.cuh", "number++) source.clear(parts.at(number));", "number++);",
        again,
    ),
    Bug("a part of which nothing is there", (PLAIN,), TOLD, "return wrong == 0;", "return true;", shares),
    *(
        Bug(
            f"a part of which word {i} is missing", (PLAIN,), TOLD, "wrong |= tag_of(raw.words[i]) ^ tag_;",
            f"if (i != {i}) wrong |= tag_of(raw.words[i]) ^ tag_;", again,
        ) for i in range(6)
    ),
    Bug(
        "a work written over while a warp reads it", (PLAIN, THREAD), WORK_QUEUE, "(&entry.free, 32 * WARPS)",
        "(&entry.free, 32)", one_share,
    ),
    Bug(
        "queries in the place of others", (PLAIN,), WORK_QUEUE, "copy(entry.queries, &entry.filled);",
        "copy(entries_[(number + 1) % SLOTS].queries, &entry.filled);", one_share,
    ),
    Bug(
        "queries that are not waited for", (PLAIN,), WORK_QUEUE, "ptx::barrier_arrive_expecting(&entry.filled, bytes);",
        "ptx::barrier_arrive(&entry.filled);", one_share,
    ),
    Bug(
        "parts handed over before they are stored", (PLAIN,), "decode.cu",
        "attend(p, work, entry.queries, turn, ring, here, shared);\n        if (p.tag && !work.is_whole) {",
        "if (p.tag && !work.is_whole && !work.is_last) queue.hand_over(handed_over, work, here);\n"
        "        attend(p, work, entry.queries, turn, ring, here, shared);\n"
        "        if (p.tag && !work.is_whole && work.is_last) {", shares,
    ),
    Bug(
        "parts that are not waited for", (PLAIN,), WORK_QUEUE, "            ptx::barrier_wait(&stored.by_all, 0);\n",
        "", shares,
    ),
    Bug(
        "parts that one warp has stored", (PLAIN,), WORK_QUEUE, "ptx::barrier_init(&stored.by_all, WARPS);",
        "ptx::barrier_init(&stored.by_all, 1);", shares,
    ),
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
        "shares.of_place(at + units - 1) - first + 1}", "shares.of_place(at + units - 1) - first}", shares_and_merge,
    ),
    Bug(
        "a part left out by the last CTA", (PLAIN,), "schedule/even.cuh",
        "shares.of_place(at + units - 1) - first + 1}", "shares.of_place(at + units - 1) - first}", shares,
    ),
    Bug(
        "a box of a page not begun", (PLAIN,), "layout/paged.cuh", "row >> p.box_shift << p.box_shift", "row",
        shares_of_pages,
    ),
    Bug(
        "a work written over before it is done", (PLAIN,), "attention/work_queue.cuh",
        "if (number >= SLOTS) ptx::barrier_wait", "if (false) ptx::barrier_wait", one_share,
    ),
    Bug(
        "boxes expected that a share does not have", (PLAIN,), "decode.cu", "rows * row_bytes, lane_,",
        "kTurnRows * row_bytes, lane_,", shares, "deadlock",
    ),
]  # fmt: skip


@each_of_this_mode(BUGS)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, machine, bug):
    noticed(tmp_path, monkeypatch, machine, bug)


@pytest.mark.parametrize("check", [shares, one_share, shares_and_merge, shares_of_pages, again])
def test_checks_of_planted_bugs_pass_without_them(emulate, check):
    check(emulate)
