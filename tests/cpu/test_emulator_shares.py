"""Equal shares as ``schedule/even.cuh`` finds them, held against their definition: a kernel that only says what it
would do. So a batch may have any number of rows, and a unit of the line more than one box."""

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
from emulator.bugs import PLAIN, Bug, each_of_this_mode, noticed
from emulator.checks import move
from even import random_shares

from cupy_fp8kv.jit import sources
from cupy_fp8kv.jit.params import STRUCTS, ParamBlock, divisors
from cupy_fp8kv.schedule import _unit_rows, even_shares

_WORK = ("request", "begin", "end", "slot", "is_whole", "kv_len", "first_row", "is_last", "parts", "first_part")


@dataclass(frozen=True)
class SharesKernel:
    """What every CTA does, one work after the other, and what merge.cu would merge at the cut behind it."""

    layout: str
    threads: int = 32
    shared_bytes: int = 16
    entry = "kernel"

    def source(self):
        lines = [f"using Layout = {self.layout.capitalize()}Layout;"]
        return sources.render("shares", [f"layout/{self.layout}.cuh"], lines, "schedule/even.cuh") + _KERNEL


_KERNEL = """
struct Params { const DecodeParams* decode; int* counts; int* works; int* merges; i64 most; };

extern "C" __global__ void kernel(const __grid_constant__ Params given) {
    const DecodeParams& p = *given.decode;
    const int share = static_cast<int>(blockIdx.x);
    const auto place = EvenSchedule::place(p, share);
    EvenSchedule::Works<Layout> works(p, place);
    int count = 0;
    for (Work work; works.next(work); count++) {
        PartRange parts = {0, 0, 0, 1};
        if (!work.is_whole) parts = works.parts();
        if (threadIdx.x || count == given.most) continue;
        const int values[] = {work.request, work.rows.begin, work.rows.end, work.part, work.is_whole, work.kv_len,
                              work.first_row, work.is_last, parts.count, parts.at(0)};
        for (int i = 0; i < 10; i++) given.works[(share * given.most + count) * 10 + i] = values[i];
    }
    if (threadIdx.x == 0) given.counts[share] = count;
    if (share == EvenSchedule::most_merges(p)) return;
    const Parts found = EvenSchedule::parts<Layout>(p, share);
    const int range[] = {found.request, found.range.count, found.range.count > 0 ? found.range.at(0) : 0,
                         found.range.count > 1 ? found.range.at(1) : 0};
    if (threadIdx.x == 0)
        for (int i = 0; i < 4; i++) given.merges[share * 4 + i] = range[i];
}
"""


def check(machine, lens, shares, *, window_left=-1, box_rows=32, least_boxes=8, request_boxes=8, paged=False):
    want = even_shares(
        lens, window_left=window_left, box_rows=box_rows, shares=shares, least_boxes=least_boxes,
        request_boxes=request_boxes, paged=paged,
    )  # fmt: skip
    most = max(map(len, want))
    kv_lens, counts = move(np.array(lens, np.int32)), move(np.zeros(shares, np.int32))
    works = move(np.zeros((shares, most, len(_WORK)), np.int32))
    merges = move(np.zeros((max(1, shares - 1), 4), np.int32))
    fields = dict.fromkeys([name for name, _ in STRUCTS["DecodeParams"][3:]], 0) | dict(
        kv_lens=kv_lens.ctypes.data, kv_len=2**31 - 1, window_left=window_left, batch=len(lens),
        columns=1, num_kv_heads=1, box_shift=box_rows.bit_length() - 1, request_boxes=request_boxes,
        **divisors(head_teams=1, column_blocks=1, shares=shares, least_boxes=least_boxes),
    )  # fmt: skip
    block = ParamBlock("DecodeParams", 1, **fields)  # after the maps and a first field
    kernel = SharesKernel("paged" if paged else "padded")
    machine.call(kernel, shares, ctypes.addressof(block._buffer), counts, works, merges, most)

    parts = {}
    for part in (part for of_share in want for part in of_share):
        parts.setdefault(part.request, []).append(part)
    for share, of_share in enumerate(want):
        # The part that the next share goes on with comes second.
        if len(of_share) > 1 and of_share[-1].end < lens[of_share[-1].request]:
            of_share = [of_share[0], of_share[-1], *of_share[1:-1]]
        assert counts[share] == len(of_share)
        for i, part in enumerate(of_share):
            got = dict(zip(_WORK, works[share, i].tolist(), strict=True))
            assert tuple(got.values())[:5] == tuple(part)
            assert got["kv_len"] == lens[part.request] and got["is_last"] == (i == len(of_share) - 1)
            first_row = part.begin // box_rows * box_rows if paged else part.begin
            assert got["first_row"] == first_row
            others = parts[part.request]
            assert got["parts"] == len(others) and (part.is_whole or got["first_part"] == others[0].slot)
    split = {request: of_request for request, of_request in parts.items() if len(of_request) > 1}
    found = {request: rest for request, *rest in merges.tolist() if rest[0] > 0} if shares > 1 else {}
    assert found == {r: [len(of), of[0].slot, of[1].slot] for r, of in split.items()}
    # Each is merged once.
    assert sum(count > 0 for _, count, *_ in merges.tolist()) == len(split) if shares > 1 else not split
    return want


@pytest.mark.parametrize("seed", range(24))
def test_any_lengths(emulate, seed):
    print(f"seed {seed}")
    lens, shares, least = random_shares(seed)
    check(emulate, lens, shares, window_left=(-1, 700)[seed % 2], box_rows=(32, 8, 16)[seed % 3], least_boxes=least,
          request_boxes=(4, 1)[seed % 2], paged=bool(seed // 2 % 2))  # fmt: skip


MOST = 2**31 - 2**24
HUGE = {
    "a lane": ([MOST], 132, 32, True, 32),
    "just as much as a lane holds": ([32 * (2**26 - 9)], 132, 32, True, 32),
    "a row more": ([32 * (2**26 - 9) + 1], 132, 32, True, 64),
    "one among many": ([5] * 40 + [MOST, 0, 17], 16, 8, True, 32),
    "each lane": ([MOST, MOST - 1, 1] * 40, 66, 16, False, 128),
    "all of the largest batch": ([MOST] * 8192, 9, 32, True, 2**13),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_units_of_several_boxes(emulate, name):
    lens, shares, box_rows, paged, unit = HUGE[name]
    assert _unit_rows(lens, box_rows, 8) == unit
    want = check(emulate, lens, shares, box_rows=box_rows, paged=paged)
    assert sum(part.end - part.begin for of_share in want for part in of_share) == sum(lens)


def test_windows_make_units_small_again(emulate):
    check(emulate, [MOST, MOST - 31, 5000, 100] * 20, 40, window_left=1000, box_rows=32, paged=True)


def several_boxes(machine):
    lens, shares, box_rows, paged, _ = HUGE["each lane"]
    check(machine, lens, shares, box_rows=box_rows, paged=paged)


def some(machine):
    check(machine, [3000, 0, 5, 4000, 100, 20, 7000], 5, box_rows=8, least_boxes=2, request_boxes=4, paged=True,
          window_left=3500)  # fmt: skip
    check(machine, [160, 96], 2, box_rows=8, least_boxes=1, request_boxes=4)  # 20 + 4 + 12 + 4, cut behind the 20


EVEN = "schedule/even.cuh"
BUGS = [
    Bug("a unit that does not grow", (PLAIN,), EVEN, "while (ptx::any(sum >> kLaneBits))", "while (false)",
        several_boxes),
    Bug("a unit that grows once", (PLAIN,), EVEN, "while (ptx::any(sum >> kLaneBits))",
        "if (ptx::any(sum >> kLaneBits))", several_boxes),
    Bug("units of a box where they are larger", (PLAIN,), EVEN, "const int shift = line_.shift(), before",
        "const int shift = p_.box_shift, before", several_boxes),
    Bug("what the next share goes on with last", (PLAIN,), EVEN, "if (number_++ == 1) {", "if (false) {", some),
    Bug("a request twice in a share", (PLAIN,), EVEN, "                    until_ = last.place;\n", "", some),
    Bug("the end of a request as its next part", (PLAIN,), EVEN,
        ">= static_cast<u32>(stretch.units)) go_on(stretch);", "> static_cast<u32>(stretch.units)) go_on(stretch);",
        some),
]  # fmt: skip


@each_of_this_mode(BUGS)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, machine, bug):
    noticed(tmp_path, monkeypatch, machine, bug)


@pytest.mark.parametrize("check_of_bugs", [several_boxes, some])
def test_checks_of_planted_bugs_pass_without_them(emulate, check_of_bugs):
    check_of_bugs(emulate)
