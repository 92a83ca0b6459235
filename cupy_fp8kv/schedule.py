"""Which CTA reads which rows of a ragged batch: by a work list, or in equal shares of all rows.

A work list is made on the device by ``cuda_src/schedule.cu``. A CTA takes ``turn_rows`` rows at a time, so rows are
counted in turns. A chunk is an equal share of all turns, one for each of ``parts`` places on the device. A request
gets a part for each chunk that it has, of equal sizes; what is left over makes another part only if it is more than an
eighth of a chunk. So there are at most ``parts`` parts beyond one a request, which bounds grid, list and workspace
whatever the lengths are. Largest parts come first.

Equal shares are found by every CTA itself (``cuda_src/schedule/even.cuh``). The requests lie end to end on a line,
which is cut at any box of a ring, or where it is very long, at every second or fourth or eighth. Of a share's requests
only the first and the last may be cut, so it has two slots for partial results.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: Bytes of a ListHead, a SplitRequest and a ListEntry of schedule/listed.cuh.
RECORD_BYTES = 16
#: A list counts split requests and their parts in 16 bits each.
MOST_PARTS = 2**15 - 1
_BUCKETS = 32
_SLACK_SHARE = 8
_MOST_CHUNK = 2**30
_LANES = 32
#: Of what a lane sums up of a line of equal shares.
_LANE_BITS = 26
#: What it costs to begin and to end a request, in turns of a share.
TURNS_OF_A_REQUEST = 0.5


class ListEntry(NamedTuple):
    """Part ``split`` of ``splits`` of a request; its partial results go to ``slot`` if there are several."""

    request: int
    kv_len: int
    split: int
    splits: int
    slot: int


class SplitRequest(NamedTuple):
    """A request of several parts, whose partial results are in ``parts`` slots from ``slot`` on."""

    request: int
    slot: int
    parts: int


@dataclass(frozen=True)
class ListBounds:
    """How large the list of ``batch`` requests may become with ``parts`` parts beyond one for each request."""

    batch: int
    parts: int

    @property
    def entries(self) -> int:
        return self.batch + self.parts

    @property
    def split_requests(self) -> int:
        return min(self.batch, self.parts)

    @property
    def slots(self) -> int:
        """Parts of split requests: one for each request that is split, and those beyond."""
        return self.parts + self.split_requests

    @property
    def nbytes(self) -> int:
        return RECORD_BYTES * (1 + self.split_requests + self.entries)


def visible_rows(kv_len: int, window_left: int) -> int:
    """Rows that a query at the end of ``kv_len`` rows sees, as mask.cuh has it."""
    return kv_len if window_left < 0 else min(kv_len, window_left + 1)


def work_list(
    kv_lens: Sequence[int], *, window_left: int, turn_rows: int, parts: int, least_turns: int, threads: int = 1024
) -> tuple[list[ListEntry], list[SplitRequest]]:
    """The list that ``schedule.cu`` makes of these lengths with a CTA of ``threads``.

    A definition for tests and for reading; calls never run it.
    """
    turns = [-(-visible_rows(kv_len, window_left) // turn_rows) for kv_len in kv_lens]
    chunk = max(least_turns, min(-(-sum(turns) // parts), _MOST_CHUNK))
    slack = chunk // _SLACK_SHARE
    counts = [1 if n <= chunk + slack else (n - slack - 1) // chunk + 1 for n in turns]
    per_turn = np.float32(_BUCKETS) / np.float32(chunk + slack)

    def bucket(request: int) -> int:
        size = np.float32(turns[request]) / np.float32(counts[request])
        return max(0, _BUCKETS - 1 - int(size * per_turn))

    # A warp counts 32 neighbours of every round, and warps come one after the other.
    order = sorted(range(len(turns)), key=lambda request: (request % threads // 32, request // threads))
    slots: dict[int, int] = {}
    splits: list[SplitRequest] = []
    for request in order:
        if counts[request] > 1:
            slots[request] = splits[-1].slot + splits[-1].parts if splits else 0
            splits.append(SplitRequest(request, slots[request], counts[request]))
    entries = [
        ListEntry(request, kv_lens[request], split, counts[request], slots.get(request, 0) + split)
        for request in sorted(order, key=bucket)
        for split in range(counts[request])
    ]
    return entries, splits


def read_list(memory: np.ndarray, bounds: ListBounds) -> tuple[list[ListEntry], list[SplitRequest]]:
    """What ``schedule.cu`` left in ``memory``, the bytes of a list of these bounds."""
    head, splits, entries = np.split(memory.view(np.int32).reshape(-1, 4), (1, 1 + bounds.split_requests))
    count, split_count = (int(number) for number in head[0, :2])
    return (
        [
            ListEntry(request, kv_len, packed & 0xFFFF, packed >> 16 & 0xFFFF, slot)
            for request, kv_len, packed, slot in entries[:count].tolist()
        ],
        [SplitRequest(*split[:3]) for split in splits[:split_count].tolist()],
    )


class SharePart(NamedTuple):
    """Rows ``[begin, end)`` of a request, all that the query sees if ``is_whole``; otherwise results go to ``slot``."""

    request: int
    begin: int
    end: int
    slot: int
    is_whole: bool


def even_shares(
    kv_lens: Sequence[int],
    *,
    window_left: int,
    box_rows: int,
    shares: int,
    least_boxes: int,
    request_boxes: int,
    paged: bool = False,
) -> list[list[SharePart]]:
    """What each of ``shares`` places on the device does, as ``schedule/even.cuh`` finds it: the last may have nothing.

    The line is in units of a box, or of 2, 4, 8 … boxes where there are very many rows (:func:`_unit_rows`). A request
    has one unit at least, and weighs ``request_boxes`` more; over pages they begin at multiples of ``box_rows``. There
    are no more shares than have ``least_boxes`` units.

    Parts are listed in the order of the line. A CTA takes the last one second if the next share goes on with its
    request.

    A definition for tests and for reading; calls never run it.
    """
    spans = []  # of the rows of each request: the first visible one, where the first box begins, and the end
    for kv_len in kv_lens:
        begin = kv_len - visible_rows(kv_len, window_left)
        spans.append((begin, begin // box_rows * box_rows if paged else begin, kv_len))
    unit = _unit_rows([kv_len - first_row for _, first_row, kv_len in spans], box_rows, request_boxes)
    line = []  # request, where it begins, its units
    length = 0
    for request, (_, first_row, kv_len) in enumerate(spans):
        line.append((request, length, _units(kv_len - first_row, unit)))
        length += line[-1][-1] + request_boxes
    count = max(1, min(length // least_boxes, shares))
    each, longer = divmod(length, count)
    cuts = [each * share + min(share, longer) for share in range(count + 1)]
    found: list[list[SharePart]] = [[] for _ in range(shares)]
    for share, (first, last) in enumerate(itertools.pairwise(cuts)):
        for request, at, units in line:
            # The units of the request before and in this share.
            before, until = max(0, first - at), min(units, last - at)
            if before < until:
                begin, first_row, kv_len = spans[request]
                rows = (
                    first_row + before * unit if before else begin,
                    kv_len if until == units else first_row + until * unit,
                )
                slot = 2 * share + (before == 0)
                found[share].append(SharePart(request, *rows, slot, before == 0 and until == units))
    return found


def _units(rows: int, unit: int) -> int:
    return max(1, -(-rows // unit))


def _unit_rows(rows: Sequence[int], box_rows: int, request_boxes: int) -> int:
    """Rows of a unit of the line: of a box, doubled until each lane of a warp has a sum of less than 2^26.

    The sum of all is below 2^31 then. ``rows``: of each request, from its first box on. Each of 32 lanes sums up as
    many neighbours.
    """
    of_lane = -(-len(rows) // _LANES)
    unit = box_rows
    while any(
        sum(_units(n, unit) + request_boxes for n in rows[first : first + of_lane]) >> _LANE_BITS
        for first in range(0, len(rows), of_lane)
    ):
        unit *= 2
    return unit
