"""Which tile, how many warps and how many splits: a pure function of the problem and the device.

What it rests on (measured on an H100): a decode kernel is as fast as the bytes it keeps in flight, 32 to 64 KB per SM;
one wave of CTAs that fills every SM beats any second, partly filled wave; splitting a request needs a second, small
kernel, so it is only done where the requests' heads alone do not fill the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from .formats import KV_FORMATS
from .jit.spec import DecodeSpec
from .plan_types import MAX_WORKSPACE, DeviceInfo, Plan, fill, finish_plan, partial_bytes
from .problem import MAX_HEAD_DIM, DecodeProblem
from .ring_plans import box_rows as box_rows  # for those who run plans
from .ring_plans import even_plan, even_specs, has_rings, ring_plan, ring_specs
from .schedule import MOST_PARTS, ListBounds

#: Query heads that one CTA can take: two tiles of eight columns.
MAX_COLUMNS = 16
#: Fragment registers with which 16 warps fit the registers of an SM without a spill, by the bytes of an element of K;
#: DecodeSpec.ahead knows for 8.
_FRAGMENTS_OF_16_WARPS = {"padded": {1: 108, 2: 108}, "paged": {1: 106, 2: 104}}
#: A warp's tile of K and V is doubled until it has this many bytes: 16 or 8 warps then keep 40 to 64 KB in flight.
_MIN_TILE_BYTES = {16: 2560, 8: 5120}
#: A last wave that fills less than this of its slots is avoided by splitting.
_MIN_FILL = 0.8
#: Splits shorter than this many rows are not worth a merge once every SM has work.
_MIN_SPLIT_ROWS = 256
#: Requests with lengths of their own get a work list where a CTA of equal shares would read so much (of the longest
#: request there may be): making the list takes 2 to 3 microseconds, in which a CTA of four warps reads 64 KB.
LISTED_LEAST_BYTES = 256 << 10
#: Shares that all rows are divided into, as a multiple of the CTAs that run at one time: more of them fill the device
#: better at the end, fewer merge less. From a simulation of an H100, not yet measured: lengths of all kinds lose 2.5 %
#: at 1.25, 3.5 % at 1, and 2.5 % at 1.5 but with one request of 131072 rows 4.5 %.
LISTED_WAVES = 1.25
#: A part of a request has at least so many rows, or a turn of its CTA.
LISTED_LEAST_ROWS = 256
#: CTAs are as small as they may be with no more parts of one request than this, which one CTA merges.
_MOST_PARTS_OF_ONE = 200


def takes_many_queries(head_dim: int, itemsizes: Iterable[int]) -> bool:
    """Whether requests over K and V of these bytes an element may have several rows of q.

    The kernels for several rows over 16-bit caches of the largest head_dim do not fit the registers of all
    architectures.
    """
    return head_dim < MAX_HEAD_DIM or max(itemsizes) == 1


def split_rows(begin: int, end: int, splits: int, warps: int, tile_rows: int) -> list[list[tuple[int, int]]]:
    """The ranges of rows that each split reads: the warps of all splits take turns over the tiles, as in decode.cu."""
    turn = warps * tile_rows
    return [
        [(first, min(first + turn, end)) for first in range(begin + split * turn, end, splits * turn)]
        for split in range(splits)
    ]


def _tile(problem: DecodeProblem) -> tuple[DecodeSpec, int]:
    """The kernel with as many warps as fit an SM, and how many CTAs share the query heads of one cache head."""
    for most_tiles in (MAX_COLUMNS // 8, 1):
        blocks = math.ceil(problem.columns / (8 * most_tiles))
        column_tiles = math.ceil(math.ceil(problem.columns / blocks) / 8)
        for warps in (16, 8):
            for subtiles in _subtiles(problem, warps, column_tiles):
                spec = DecodeSpec(
                    q=problem.q_format, k=problem.k_format, v=problem.v_format, head_dim=problem.head_dim,
                    column_tiles=column_tiles, subtiles=subtiles, warps=warps, ctas_per_sm=1,
                    many_queries=problem.queries > 1, soft_cap=problem.soft_cap, position=problem.position,
                    layout=problem.layout,
                )  # fmt: skip
                if fits_registers(spec):
                    return spec, blocks
    raise AssertionError(f"no tile fits {problem}")


def fits_registers(spec: DecodeSpec) -> bool:
    """Whether 16 or 8 warps, all that an SM has, load straight to registers without a spill."""
    if spec.warps == 16:
        return spec.fragment_registers[2] <= _FRAGMENTS_OF_16_WARPS[spec.layout][KV_FORMATS[spec.k].itemsize]
    return spec.ahead == 2 or (spec.ahead >= 0 and spec.subtiles == 1)


def _subtiles(problem: DecodeProblem, warps: int, column_tiles: int) -> list[int]:
    """Numbers of 16-row subtiles to try for a tile, the wanted one first."""
    wanted = next((n for n in (1, 2) if 16 * problem.row_bytes * n >= _MIN_TILE_BYTES[warps]), 4)
    return [n for n in (4, 2, 1) if n <= min(wanted, 4 // column_tiles if warps == 16 else 4)]


def specs(problem: DecodeProblem, arch: int, shared_per_block: int | None = None) -> list[DecodeSpec]:
    """Every specialisation that some batch, length, number of heads and device of ``arch`` may use for this kind of
    problem: straight to registers first, largest CTAs first; no rings if ``shared_per_block`` is too little.

    Rings are listed with their least number of stages, which is not part of the kernel.
    """
    spec, _ = _tile(problem)
    found = _cta_sizes(spec)
    if problem.ragged and not problem.paging:
        found += [replace(sized, schedule="listed") for sized in found]
    if has_rings(arch, shared_per_block):
        found += [] if problem.paging else ring_specs(spec)
        found += even_specs(spec, arch) if problem.ragged else []
    return found


def _cta_sizes(spec: DecodeSpec) -> list[DecodeSpec]:
    """The kernel with one, two and four CTAs to an SM, which share its warps."""
    return [replace(spec, warps=spec.warps // ctas, ctas_per_sm=ctas) for ctas in (1, 2, 4)]


def plan_decode(problem: DecodeProblem, device: DeviceInfo) -> Plan:
    """Choose how to run ``problem`` on ``device``."""
    spec, blocks = _tile(problem)
    with_ring = (even_plan if problem.ragged else ring_plan)(problem, device, spec, blocks)
    if with_ring:
        return with_ring
    uniform = _uniform_plan(problem, device, spec, blocks)
    # A single request is cut equally whatever its length is.
    if problem.ragged and not problem.paging and problem.batch > 1:
        longest = problem.rows_read // uniform.splits * spec.row_bytes
        if longest >= LISTED_LEAST_BYTES:
            return _listed_plan(problem, device, spec, blocks) or uniform
    return uniform


def _listed_plan(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int) -> Plan | None:
    """A plan whose work list is made of the lengths, or None if its workspace would be too large."""
    pieces = problem.num_kv_heads * blocks  # CTAs of a part
    for sized in reversed(_cta_sizes(spec)):
        slots = sized.ctas_per_sm * device.sm_count
        parts = min(max(1, int(LISTED_WAVES * slots) // pieces), MOST_PARTS)
        if parts <= _MOST_PARTS_OF_ONE:
            break
    most_slots = (MAX_WORKSPACE - ListBounds(problem.batch, parts).nbytes) // partial_bytes(problem)
    parts = min(parts, max(most_slots - problem.batch, most_slots // 2))
    if parts < 1:
        return None
    bounds = ListBounds(problem.batch, parts)
    reason = (
        f"lengths on the device decide: {bounds.entries} parts of {pieces} CTAs at most, for {slots} slots; "
        f"a request is split beyond its share of 1/{parts} of all rows"
    )
    return finish_plan(problem, device, replace(sized, schedule="listed"), blocks, 1, reason, bounds)


def least_turns(spec: DecodeSpec) -> int:
    """The shortest part that a work list makes, and the shortest of equal shares, in turns of a CTA."""
    return max(1, LISTED_LEAST_ROWS // spec.turn_rows)


def _uniform_plan(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int) -> Plan:
    """A plan that cuts every request into equally many parts."""
    full, half, quarter = _cta_sizes(spec)
    pieces = problem.batch * problem.num_kv_heads * blocks
    tiles = -(-problem.rows_read // full.tile_rows)
    sms = device.sm_count

    def splits_of(spec: DecodeSpec, slots: int) -> int:
        # One wave, and every warp of every split has a tile.
        return max(1, min(slots // pieces, tiles // spec.warps))

    splits = 1
    if pieces == 0:
        spec, reason = full, "nothing to do"
    elif pieces > 2 * sms:
        spec, slots = quarter, 4 * sms
        reason = f"{pieces} request heads on {slots} slots: small CTAs even out the end"
        waves = -(-pieces // slots)
        if waves > 1 and pieces < _MIN_FILL * waves * slots:
            bytes_of_split = problem.batch * partial_bytes(problem)
            most = min(16, problem.rows_read // _MIN_SPLIT_ROWS, MAX_WORKSPACE // bytes_of_split)
            splits = next((s for s in range(2, most + 1) if fill(pieces * s, slots) > 0.9), 1)
            if splits > 1:
                reason = f"{pieces} request heads alone would leave much of {waves} waves of {slots} slots empty"
    elif pieces > sms:
        spec, reason = half, f"{pieces} request heads on {2 * sms} slots, one wave"
    else:
        # Large CTAs need fewer of them and less merging; smaller ones fill what those would leave empty.
        choices = [(full, sms), (half, 2 * sms), (quarter, sms)]
        filled = [pieces * splits_of(spec, slots) / slots for spec, slots in choices]
        best = next(i for i, share in enumerate(filled) if share >= max(filled) - 0.1)
        spec, slots = choices[best]
        splits = splits_of(spec, slots)
        reason = f"{pieces} request heads in {splits} splits fill {filled[best]:.0%} of {slots} slots in one wave"
    return finish_plan(problem, device, spec, blocks, splits, reason)
