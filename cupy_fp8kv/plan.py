"""Which tile, how many warps and how many splits: a pure function of the problem and the device.

What it rests on (measured on an H100): a decode kernel is as fast as the bytes it keeps in flight, 32 to 64 KB per SM;
one wave of CTAs that fills every SM beats any second, partly filled wave; splitting a request needs a second, small
kernel, so it is only done where the requests' heads alone do not fill the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .formats import KV_FORMATS
from .jit.spec import DecodeSpec
from .problem import MOST_BOX_ROWS, DecodeProblem


@dataclass(frozen=True)
class DeviceInfo:
    """What the planner knows of a device."""

    name: str
    arch: int  # 90 for sm_90
    sm_count: int
    shared_per_block: int  # bytes, with opt-in

    def __post_init__(self) -> None:
        if self.arch < 80:
            raise RuntimeError(f"{self.name} is sm_{self.arch}; cupy_fp8kv needs sm_80 or later")


@dataclass(frozen=True)
class Plan:
    """How a problem is run: ``spec`` on ``grid`` CTAs, ``splits`` of them sharing the rows of a request."""

    spec: DecodeSpec
    splits: int
    column_blocks: int
    grid: int
    workspace_out: int  # bytes of partial results, 0 without splits
    workspace_state: int
    reason: str

    @property
    def workspace(self) -> int:
        return self.workspace_out + self.workspace_state


#: Query heads that one CTA can take: two tiles of eight columns.
MAX_COLUMNS = 16
#: Fragment registers with which 16 warps fit the registers of an SM without a spill, by the bytes of an element of K;
#: DecodeSpec.ahead knows for 8.
_FRAGMENTS_OF_16_WARPS = {"padded": {1: 108, 2: 108}, "paged": {1: 106, 2: 104}}
#: A warp's tile of K and V is doubled until it has this many bytes: 16 or 8 warps then keep 40 to 64 KB in flight.
_MIN_TILE_BYTES = {16: 2560, 8: 5120}
#: A last wave that fills less than this of its slots is avoided by splitting.
_MIN_FILL = 0.8
#: A ring in shared memory, filled by the copy engine, reads long requests 1 to 3 % faster than loads into registers;
#: in short ones its start costs as much. Measured on an H100 where an SM reads 0.5 to 4 MB, of 512 to 131072 rows:
#: equal at 1024 rows and 1 MB.
RING_BYTES_PER_SM = 1e6
RING_ROWS = 2048
#: Cache heads of a CTA, and whether several CTAs share a request, best first: neighbouring heads are read together, but
#: no split is better still.
RING_TEAMS = ((1, False), (2, False), (4, False), (2, True))
#: Bytes of a ring, by whether several CTAs share a request. Where none do, CTAs with few bytes in flight stay in step
#: and read neighbouring heads at one time: 96 KB are 1 to 2 % slower there.
_RING_BYTES = {False: 64 << 10, True: 128 << 10}
_RING_STAGES = 2
_MOST_RING_ROW_BYTES = 256  # of K and V together: longer rows were measured without gain
_MOST_FRAGMENTS = 150  # registers of a thread for fragments; 288 threads have 224 in all
#: A ring has its SM for itself: this share of them must have one, in one wave.
MIN_RING_FILL = 0.9
#: Warps that work on what a ring brings, and the least architecture that has the copy engine.
_RING_WARPS = 8
_RING_ARCH = 90
#: Bytes of partial results that no plan exceeds.
MAX_WORKSPACE = 16 << 20
#: Splits shorter than this many rows are not worth a merge once every SM has work.
_MIN_SPLIT_ROWS = 256


def split_rows(begin: int, end: int, splits: int, warps: int, tile_rows: int) -> list[list[tuple[int, int]]]:
    """The ranges of rows that each split reads: the warps of all splits take turns over the tiles, as in decode.cu."""
    turn = warps * tile_rows
    return [
        [(first, min(first + turn, end)) for first in range(begin + split * turn, end, splits * turn)]
        for split in range(splits)
    ]


def _tile(problem: DecodeProblem) -> tuple[DecodeSpec, int]:
    """The kernel with as many warps as fit an SM, and how many CTAs share the query heads of one cache head."""
    most_of_16 = _FRAGMENTS_OF_16_WARPS[problem.layout][KV_FORMATS[problem.k_format].itemsize]
    for most_tiles in (MAX_COLUMNS // 8, 1):
        blocks = math.ceil(problem.group_size / (8 * most_tiles))
        column_tiles = math.ceil(math.ceil(problem.group_size / blocks) / 8)
        for warps in (16, 8):
            for subtiles in _subtiles(problem, warps, column_tiles):
                spec = DecodeSpec(
                    q=problem.q_format, k=problem.k_format, v=problem.v_format, head_dim=problem.head_dim,
                    column_tiles=column_tiles, subtiles=subtiles, warps=warps, ctas_per_sm=1,
                    soft_cap=problem.soft_cap, position=problem.position, layout=problem.layout,
                )  # fmt: skip
                fits_16 = spec.fragment_registers[2] <= most_of_16
                if fits_16 if warps == 16 else spec.ahead == 2 or (spec.ahead >= 0 and subtiles == 1):
                    return spec, blocks
    raise AssertionError(f"no tile fits {problem}")


def _subtiles(problem: DecodeProblem, warps: int, column_tiles: int) -> list[int]:
    """Numbers of 16-row subtiles to try for a tile, the wanted one first."""
    row_bytes = problem.head_dim * (KV_FORMATS[problem.k_format].itemsize + KV_FORMATS[problem.v_format].itemsize)
    wanted = next((n for n in (1, 2) if 16 * row_bytes * n >= _MIN_TILE_BYTES[warps]), 4)
    return [n for n in (4, 2, 1) if n <= min(wanted, 4 // column_tiles if warps == 16 else 4)]


def specs(problem: DecodeProblem, arch: int, shared_per_block: int | None = None) -> list[DecodeSpec]:
    """Every specialisation that some batch, length, number of heads and device of ``arch`` may use for this kind of
    problem: straight to registers first, largest CTAs first. Given ``shared_per_block``, only rings that fit it."""
    spec, _ = _tile(problem)
    may_have_ring = arch >= _RING_ARCH and not problem.paging
    rings = (_ring(spec, heads, split) for heads, split in RING_TEAMS) if may_have_ring else ()
    fitting = (ring for ring in rings if ring and ring.shared_bytes <= (shared_per_block or ring.shared_bytes))
    return [*_cta_sizes(spec), *fitting]


def _ring(spec: DecodeSpec, heads: int, split: bool) -> DecodeSpec | None:
    """The kernel with a ring for ``heads`` neighbouring cache heads, or None where none was found to be faster."""
    if spec.row_bytes > _MOST_RING_ROW_BYTES or (split and spec.column_tiles > 1):
        return None
    for subtiles in (4, 2, 1):
        ring = replace(
            spec, warps=_RING_WARPS, ctas_per_sm=1, subtiles=subtiles, heads=heads, stages=_RING_STAGES
        )  # fmt: skip
        fits = ring.stages * ring.stage_bytes <= _RING_BYTES[split] and ring.turn_rows <= MOST_BOX_ROWS
        if fits and ring.fragment_registers[0] <= _MOST_FRAGMENTS:
            return ring
    return None


def _ring_plan(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int) -> Plan | None:
    """A plan with a ring, or None where registers do as well."""
    sms = device.sm_count
    if device.arch < _RING_ARCH or problem.rows_read < RING_ROWS or problem.kv_bytes < RING_BYTES_PER_SM * sms:
        return None
    # A CTA of several heads would make the longest of unequal requests last longer; column blocks read rows again, and
    # were not measured.
    if problem.ragged or problem.paging or blocks > 1 or not problem.can_copy_boxes:
        return None
    for heads, may_split in RING_TEAMS:
        ring = _ring(spec, heads, may_split)
        if problem.num_kv_heads % heads or ring is None or ring.shared_bytes > device.shared_per_block:
            continue
        pieces = problem.batch * problem.num_kv_heads // heads
        turns = max(1, -(-problem.rows_read // ring.turn_rows))
        splits = min(sms // pieces, turns) if may_split else 1
        if splits and MIN_RING_FILL * sms <= pieces * splits <= sms:
            teams = f" in teams of {heads}" if heads > 1 else ""
            reason = f"{pieces} request heads{teams} in {splits} splits: a ring on {pieces * splits} of {sms} SMs"
            return _finish(problem, device, ring, blocks, splits, reason)
    return None


def _cta_sizes(spec: DecodeSpec) -> list[DecodeSpec]:
    """The kernel with one, two and four CTAs to an SM, which share its warps."""
    return [replace(spec, warps=spec.warps // ctas, ctas_per_sm=ctas) for ctas in (1, 2, 4)]


def plan_decode(problem: DecodeProblem, device: DeviceInfo) -> Plan:
    """Choose how to run ``problem`` on ``device``."""
    spec, blocks = _tile(problem)
    with_ring = _ring_plan(problem, device, spec, blocks)
    if with_ring:
        return with_ring
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
            bytes_of_split = problem.batch * problem.num_qo_heads * (problem.head_dim * 4 + 8)
            most = min(16, problem.rows_read // _MIN_SPLIT_ROWS, MAX_WORKSPACE // bytes_of_split)
            splits = next((s for s in range(2, most + 1) if _fill(pieces * s, slots) > 0.9), 1)
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
    return _finish(problem, device, spec, blocks, splits, reason)


def _finish(
    problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int, splits: int, reason: str
) -> Plan:
    """The plan that these choices make. RuntimeError if the device lacks the shared memory."""
    if spec.shared_bytes > device.shared_per_block:
        raise RuntimeError(f"{device.name}: {spec} needs {spec.shared_bytes} bytes of shared memory a CTA")
    heads = problem.batch * problem.num_qo_heads * splits if splits > 1 else 0
    items = problem.batch * problem.num_kv_heads // spec.heads * blocks * splits
    return Plan(
        spec=spec, splits=splits, column_blocks=blocks, grid=items,
        workspace_out=heads * problem.head_dim * 4, workspace_state=heads * 8, reason=reason,
    )  # fmt: skip


def _fill(ctas: int, slots: int) -> float:
    """The share of the slots of all waves that ``ctas`` CTAs use."""
    return ctas / (-(-ctas // slots) * slots)
