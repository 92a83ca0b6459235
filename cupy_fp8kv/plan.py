"""Which tile, how many warps and how many splits: a pure function of the problem and the device.

What it rests on (measured on an H100): a decode kernel is as fast as the bytes it keeps in flight, 32 to 64 KB per SM;
one wave of CTAs that fills every SM beats any second, partly filled wave; splitting a request needs a second, small
kernel, so it is only done where the requests' heads alone do not fill the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

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
    early: bool  # whether CTAs may be placed while the kernel before this call still runs
    reason: str

    @property
    def workspace(self) -> int:
        return self.workspace_out + self.workspace_state


#: Query heads that one CTA can take: two tiles of eight columns.
MAX_COLUMNS = 16
#: Fragment registers with which 16 warps fit the registers of an SM without a spill; DecodeSpec.ahead knows for 8.
_FRAGMENTS_OF_16_WARPS = 108
#: A warp's tile of K and V is doubled until it has this many bytes: 16 or 8 warps then keep 40 to 64 KB in flight.
_MIN_TILE_BYTES = {16: 2560, 8: 5120}
#: A last wave that fills less than this of its slots is avoided by splitting.
_MIN_FILL = 0.8


class Use(Enum):
    """What a ring is for: how CTAs share the device decides how much a ring should have in flight."""

    ONE_WAVE = "one wave"  # a CTA an SM; CTAs of neighbouring heads stay in step while little is in flight
    WAVES = "waves"  # several CTAs an SM, one after another
    SPLIT = "split"  # several CTAs share a request


#: Cache heads of a CTA by the use of a ring, best first: in NHD neighbouring heads are read together. Measured on an
#: H100: 2 to 5 % faster than loads into registers in one wave, 1 % in several, up to 10 % where a request is split.
RING_TEAMS = ((Use.ONE_WAVE, 1), (Use.ONE_WAVE, 2), (Use.ONE_WAVE, 4), (Use.WAVES, 2), (Use.SPLIT, 2), (Use.SPLIT, 1))
#: Bytes of a ring. Where CTAs stay in step, 96 KB are 1 to 2 % slower than 64.
_RING_BYTES = {
    (Use.ONE_WAVE, 1): 64 << 10, (Use.ONE_WAVE, 2): 64 << 10, (Use.ONE_WAVE, 4): 64 << 10, (Use.WAVES, 2): 96 << 10,
    (Use.SPLIT, 2): 128 << 10, (Use.SPLIT, 1): 64 << 10,
}  # fmt: skip
#: Rows of a request below which starting and ending a CTA costs more than a ring gains, where requests are not split;
#: in several waves, and with results of several query heads to bring together, twice as many.
RING_ROWS = 1024
#: Bytes of an SM from which on a split request is read in teams of two heads, which need twice the merging.
RING_TEAM_BYTES = 1.5e6
_RING_STAGES = 2  # at least
_MOST_RING_ROW_BYTES = 256  # of K and V together: longer rows were measured without gain
_MOST_FRAGMENTS = 150  # registers of a thread for fragments; 288 threads have 224 in all
#: A ring has its SM for itself: this share of them must have one, in every wave.
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
    for most_tiles in (MAX_COLUMNS // 8, 1):
        blocks = math.ceil(problem.group_size / (8 * most_tiles))
        column_tiles = math.ceil(math.ceil(problem.group_size / blocks) / 8)
        for warps in (16, 8):
            for subtiles in _subtiles(problem, warps, column_tiles):
                spec = DecodeSpec(
                    q=problem.q_format, k=problem.k_format, v=problem.v_format, head_dim=problem.head_dim,
                    column_tiles=column_tiles, subtiles=subtiles, warps=warps, ctas_per_sm=1,
                    soft_cap=problem.soft_cap, position=problem.position,
                )  # fmt: skip
                fits_16 = spec.fragment_registers[2] <= _FRAGMENTS_OF_16_WARPS
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
    rings = (_ring(spec, use, heads) for use, heads in RING_TEAMS) if arch >= _RING_ARCH else ()
    fitting = (ring for ring in rings if ring and ring.shared_bytes <= (shared_per_block or ring.shared_bytes))
    return [*_cta_sizes(spec), *dict.fromkeys(fitting)]


def _ring(spec: DecodeSpec, use: Use, heads: int) -> DecodeSpec | None:
    """The kernel with a ring for ``heads`` neighbouring cache heads, or None where none was found to be faster."""
    if spec.row_bytes > _MOST_RING_ROW_BYTES or (use == Use.SPLIT and spec.column_tiles > 1):
        return None
    most = _RING_BYTES[use, heads]
    for subtiles in (4, 2, 1):
        ring = replace(spec, warps=_RING_WARPS, ctas_per_sm=1, subtiles=subtiles, heads=heads, stages=_RING_STAGES)
        fits = ring.stages * ring.stage_bytes <= most and ring.turn_rows <= MOST_BOX_ROWS
        if fits and ring.fragment_registers[0] <= _MOST_FRAGMENTS:
            return replace(ring, stages=most // ring.stage_bytes)
    return None


def _ring_plan(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int) -> Plan | None:
    """A plan with a ring, or None where registers do as well."""
    # A CTA of several heads would make the longest of unequal requests last longer; column blocks read rows again, and
    # were not measured.
    if device.arch < _RING_ARCH or problem.ragged or blocks > 1 or not problem.can_copy_boxes:
        return None
    sms = device.sm_count
    for use, heads in RING_TEAMS:
        ring = _ring(spec, use, heads)
        if problem.num_kv_heads % heads or ring is None or ring.shared_bytes > device.shared_per_block:
            continue
        pieces = problem.batch * problem.num_kv_heads // heads
        splits = 1
        if use == Use.SPLIT:
            turns = -(-problem.rows_read // ring.turn_rows)
            splits = min(sms // max(pieces, 1), turns)
            enough = splits > 1 and (heads == 1 or problem.kv_bytes >= RING_TEAM_BYTES * sms)
            enough = enough and (splits == turns or pieces * splits >= MIN_RING_FILL * sms)
        else:
            waves = use == Use.WAVES
            enough = waves == (pieces > sms) and _fill(pieces, sms) >= MIN_RING_FILL
            enough = enough and problem.rows_read >= RING_ROWS * (2 if waves and problem.group_size > 1 else 1)
        if enough:
            teams = f" in teams of {heads}" if heads > 1 else ""
            filled = min(pieces * splits, sms)
            reason = f"{pieces} request heads{teams} in {splits} splits: a ring on {filled} of {sms} SMs ({use.value})"
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
    # One wave of CTAs that share SMs is placed less evenly then: 1 to 2 % slower on an H100, everything else faster.
    early = splits > 1 or spec.stages > 0 or items > spec.ctas_per_sm * device.sm_count
    return Plan(
        spec=spec, splits=splits, column_blocks=blocks, grid=items,
        workspace_out=heads * problem.head_dim * 4, workspace_state=heads * 8, early=early,
        reason=reason,
    )  # fmt: skip


def _fill(ctas: int, slots: int) -> float:
    """The share of the slots of all waves that ``ctas`` CTAs use."""
    return ctas / (max(1, -(-ctas // slots)) * slots)
