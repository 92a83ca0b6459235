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
from .schedule import MOST_PARTS, ListBounds


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
    bounds: ListBounds | None = None  # of the work list, if lengths on the device decide who does what

    @property
    def workspace(self) -> int:
        return self.workspace_out + self.workspace_state + self.workspace_list

    @property
    def workspace_list(self) -> int:
        return self.bounds.nbytes if self.bounds else 0


#: Query heads that one CTA can take: two tiles of eight columns.
MAX_COLUMNS = 16
#: Fragment registers with which 16 warps fit the registers of an SM without a spill, by the bytes of an element of K;
#: DecodeSpec.ahead knows for 8.
_FRAGMENTS_OF_16_WARPS = {"padded": {1: 108, 2: 108}, "paged": {1: 106, 2: 104}}
#: A warp's tile of K and V is doubled until it has this many bytes: 16 or 8 warps then keep 40 to 64 KB in flight.
_MIN_TILE_BYTES = {16: 2560, 8: 5120}
#: A last wave that fills less than this of its slots is avoided by splitting.
_MIN_FILL = 0.8


@dataclass(frozen=True)
class RingTeam:
    """What a CTA with a ring is: so many neighbouring cache heads, which NHD puts side by side, and warps."""

    heads: int
    warps: int
    ctas_per_sm: int
    least_stages: int
    one_wave: bool = False  # whether it reads whole requests that all have a place at one time
    waves: bool = False  # whole requests in turn
    splits_from: float = math.inf  # parts of requests, where an SM reads so many bytes or more


#: Rings in shared memory, filled by the copy engine: on an H100 2 to 6 % faster than loads into registers. The first
#: that fits is taken. Splits by pairs of heads need twice the merging, so they are for what is large.
RING_TEAMS = (
    RingTeam(1, 8, 1, 3, one_wave=True), RingTeam(2, 8, 1, 3, one_wave=True, splits_from=1.5e6),
    RingTeam(2, 4, 2, 3, one_wave=True, waves=True), RingTeam(1, 4, 1, 6, splits_from=0),
)  # fmt: skip
#: The same where a row of K and one of V have more than 256 bytes.
WIDE_RING_TEAMS = (RingTeam(1, 4, 1, 4, one_wave=True, waves=True, splits_from=0),)
_WIDE_ROW_BYTES = 256
_MOST_RING_ROW_BYTES = 512  # longer ones were not measured
#: Bytes that all rings of the device together should have in flight. Less leaves memory idle; with more, CTAs fall out
#: of step, and what is read at one time no longer lies close together: 2 % slower at 8 MB, 4 % at 16 MB, whether 72 or
#: 256 CTAs share it.
_RING_BYTES_IN_FLIGHT = 6.4e6
_MOST_STAGES = 6
#: Rows of a request below which starting and ending a CTA costs more than a ring gains, where requests are not split.
RING_ROWS = 1024
#: The share of the places of one wave below which a request is split rather than read by rings with more in flight,
#: and the share that every one of several waves must fill.
MIN_RING_FILL = 0.5
MIN_RING_WAVE_FILL = 0.9
_MOST_FRAGMENTS = 150  # registers of a thread for fragments; 288 threads have 224 in all
#: Bytes of a warp's share of a box.
_RING_TILE_BYTES = 2048
#: The least architecture that has the copy engine, and the shared memory of those of its devices that were measured.
RING_ARCH = 90
_RING_SHARED_BYTES = 160 << 10
#: Bytes of partial results that no plan exceeds.
MAX_WORKSPACE = 16 << 20
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
                    soft_cap=problem.soft_cap, position=problem.position, layout=problem.layout,
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
    may_have_ring = arch >= RING_ARCH and not problem.paging
    rings = [_ring(spec, team) for team in _ring_teams(spec)] if may_have_ring else []
    if shared_per_block is not None and shared_per_block < _RING_SHARED_BYTES:
        rings = []
    may_have_list = problem.ragged and not problem.paging
    listed = [replace(sized, schedule="listed") for sized in _cta_sizes(spec)] if may_have_list else []
    return [*_cta_sizes(spec), *listed, *(ring for ring in rings if ring)]


def _ring_teams(spec: DecodeSpec) -> tuple[RingTeam, ...]:
    """The teams that a ring may be for, by the length of the rows."""
    if spec.row_bytes > _MOST_RING_ROW_BYTES:
        return ()
    return WIDE_RING_TEAMS if spec.row_bytes > _WIDE_ROW_BYTES else RING_TEAMS


def _ring(spec: DecodeSpec, team: RingTeam) -> DecodeSpec | None:
    """The kernel with a ring for ``team``, or None where it does not fit the registers."""
    key_bytes = 16 * spec.head_dim * KV_FORMATS[spec.k].itemsize
    for subtiles in (4, 2, 1):
        ring = replace(
            spec, warps=team.warps, ctas_per_sm=team.ctas_per_sm, subtiles=subtiles, heads=team.heads,
            stages=team.least_stages,
        )  # fmt: skip
        fits = subtiles * key_bytes <= _RING_TILE_BYTES and ring.turn_rows <= MOST_BOX_ROWS
        if (fits or subtiles == 1) and ring.fragment_registers[0] <= _MOST_FRAGMENTS:
            return ring
    return None


def _ring_plan(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int) -> Plan | None:
    """A plan with a ring, or None where registers do as well."""
    if device.arch < RING_ARCH or device.shared_per_block < _RING_SHARED_BYTES:
        return None
    # A CTA of several heads would make the longest of unequal requests last longer; column blocks read rows again, and
    # were not measured.
    if problem.ragged or problem.paging or blocks > 1 or not problem.can_copy_boxes:
        return None
    team, splits = _ring_team(problem, device, spec)
    if team is None:
        return None
    ctas = problem.batch * problem.num_kv_heads // team.heads * splits
    places = team.ctas_per_sm * device.sm_count
    ring = _ring(spec, team)
    if ring is None:
        return None
    # Rather some more than less.
    stages = math.ceil(_RING_BYTES_IN_FLIGHT / (min(ctas, places) * ring.stage_bytes) - 0.2)
    ring = replace(ring, stages=min(max(stages, team.least_stages), _MOST_STAGES))
    pairs = f" in teams of {team.heads}" if team.heads > 1 else ""
    pieces = ctas // splits
    reason = f"{pieces} request heads{pairs} in {splits} splits: rings on {ctas} of {places} places"
    return finish_plan(problem, device, ring, blocks, splits, reason)


def _ring_team(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec) -> tuple[RingTeam | None, int]:
    """Who reads a request with rings, and in how many splits; None: registers do as well."""
    sms = device.sm_count
    teams = [team for team in _ring_teams(spec) if problem.num_kv_heads % team.heads == 0]
    if problem.rows_read >= RING_ROWS:
        for team in teams:
            ctas, places = problem.batch * problem.num_kv_heads // team.heads, team.ctas_per_sm * sms
            if team.one_wave and MIN_RING_FILL * places <= ctas <= places:
                return team, 1
            if team.waves and ctas > places and _fill(ctas, places) >= MIN_RING_WAVE_FILL:
                return team, 1
    if spec.column_tiles > 1:
        return None, 1  # splits were not measured
    for team in teams:
        ring = _ring(spec, team)
        pieces = problem.batch * problem.num_kv_heads // team.heads
        if ring and pieces and problem.kv_bytes >= team.splits_from * sms:
            splits = min(sms // pieces, -(-problem.rows_read // ring.turn_rows))
            if splits > 1:
                return team, splits
    return None, 1


def _cta_sizes(spec: DecodeSpec) -> list[DecodeSpec]:
    """The kernel with one, two and four CTAs to an SM, which share its warps."""
    return [replace(spec, warps=spec.warps // ctas, ctas_per_sm=ctas) for ctas in (1, 2, 4)]


def plan_decode(problem: DecodeProblem, device: DeviceInfo) -> Plan:
    """Choose how to run ``problem`` on ``device``."""
    spec, blocks = _tile(problem)
    with_ring = _ring_plan(problem, device, spec, blocks)
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
    slot_bytes = problem.num_qo_heads * (problem.head_dim * 4 + 8)
    most_slots = (MAX_WORKSPACE - ListBounds(problem.batch, parts).nbytes) // slot_bytes
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
    """The shortest part that a work list makes, in turns of a CTA."""
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
    return finish_plan(problem, device, spec, blocks, splits, reason)


def finish_plan(
    problem: DecodeProblem,
    device: DeviceInfo,
    spec: DecodeSpec,
    blocks: int,
    splits: int,
    reason: str,
    bounds: ListBounds | None = None,
) -> Plan:
    """The plan that these choices make. RuntimeError if the device lacks the shared memory."""
    if spec.shared_bytes > device.shared_per_block:
        raise RuntimeError(f"{device.name}: {spec} needs {spec.shared_bytes} bytes of shared memory a CTA")
    shares = problem.batch * splits if splits > 1 else 0
    heads = problem.num_qo_heads * (bounds.slots if bounds else shares)
    requests = bounds.entries if bounds else problem.batch * splits
    items = requests * (problem.num_kv_heads // spec.heads) * blocks
    # One wave of CTAs that share SMs is placed less evenly then: 1 to 2 % slower on an H100, everything else faster.
    early = splits > 1 or bounds is not None or spec.stages > 0 or items > spec.ctas_per_sm * device.sm_count
    return Plan(
        spec=spec, splits=splits, column_blocks=blocks, grid=items,
        workspace_out=heads * problem.head_dim * 4, workspace_state=heads * 8, early=early, reason=reason,
        bounds=bounds,
    )  # fmt: skip


def _fill(ctas: int, slots: int) -> float:
    """The share of the slots of all waves that ``ctas`` CTAs use."""
    return ctas / (max(1, -(-ctas // slots)) * slots)
