"""Plans with rings in shared memory, which the copy engine fills: for equal requests, or for equal shares of all rows.

Pure functions, like the rest of the planner. On an H100 rings are 2 to 6 % faster than loads into registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .formats import KV_FORMATS
from .jit.spec import DecodeSpec
from .plan_types import MAX_WORKSPACE, DeviceInfo, Plan, fill, finish_plan, told_bytes
from .problem import MOST_BOX_ROWS, DecodeProblem


@dataclass(frozen=True)
class RingTeam:
    """What a CTA with a ring is: so many neighbouring cache heads, which NHD puts side by side, and warps."""

    heads: int
    warps: int
    ctas_per_sm: int
    least_stages: int
    one_wave: bool = False  # whether it reads whole requests that all have a place at one time
    waves: bool = False  # whole requests in turn
    waves_of_few: bool = False  # the same where all caches have few bytes
    for_blocks: bool = False  # only where CTAs share the columns of a cache head
    splits_from: float = math.inf  # parts of requests, where an SM reads so many bytes or more


#: The first that fits is taken. Splits by pairs of heads need twice the merging, so they are for what is large.
RING_TEAMS = (
    RingTeam(1, 8, 1, 3, one_wave=True), RingTeam(2, 8, 1, 3, one_wave=True, splits_from=1.5e6),
    RingTeam(2, 4, 2, 3, one_wave=True, waves=True), RingTeam(1, 4, 2, 3, one_wave=True),
    RingTeam(1, 4, 1, 6, splits_from=0),
)  # fmt: skip
#: The same for two tiles of columns, whose products take so long that warps without work count for more.
WIDE_GROUP_RING_TEAMS = (
    RingTeam(1, 8, 1, 3, one_wave=True), RingTeam(4, 4, 2, 5, waves=True, for_blocks=True),
    RingTeam(1, 4, 2, 3, one_wave=True, waves_of_few=True), RingTeam(2, 4, 2, 3, waves=True),
    RingTeam(2, 8, 1, 3, splits_from=1.5e6), RingTeam(1, 4, 1, 6, splits_from=0),
)  # fmt: skip
#: The same where a row of K and one of V have more than 256 bytes.
WIDE_RING_TEAMS = (
    RingTeam(1, 4, 1, 4, one_wave=True), RingTeam(1, 4, 2, 3, one_wave=True),
    RingTeam(1, 4, 1, 4, waves=True, splits_from=0),
)  # fmt: skip
_WIDE_ROW_BYTES = 256
_MOST_RING_ROW_BYTES = 512  # longer ones were not measured
#: Bytes that all rings of the device together should have in flight. Less leaves memory idle; with more, CTAs fall out
#: of step, and what is read at one time no longer lies close together: 2 % slower at 8 MB, 4 % at 16 MB, whether 72 or
#: 256 CTAs share it.
_RING_BYTES_IN_FLIGHT = 6.4e6
#: Less where the length of a row is not a power of two: rows of 80 and 96 bytes lost 12 to 20 % at 7 MB, 5 % at 4.8.
_UNEVEN_BYTES_IN_FLIGHT = 5.6e6
_LEAST_STAGES, _MOST_STAGES = 3, 6
_ENOUGH_STAGES = 5  # for a request of no more turns
#: Rows of a request below which starting and ending a CTA costs more than a ring gains, where requests are not split
#: and the caches are larger than so many bytes. Smaller ones never get that far: random shapes of 110 rows and more and
#: 7 to 53 MB were 3 to 50 % faster with rings, whatever the share of the last wave that they fill, one of 29 rows 23 %.
RING_ROWS = 1024
_LEAST_RING_ROWS = 16
_FEW_BYTES = 100e6
#: The share of the places of one wave below which a request is split rather than read by rings with more in flight,
#: and the share that every one of several waves must fill, for one tile of columns and for two.
MIN_RING_FILL = 0.5
MIN_SHORT_RING_FILL = 0.4
MIN_RING_WAVE_FILL = 0.9
MIN_WIDE_GROUP_WAVE_FILL = 0.8
#: Turns that a request has at least where a turn is as long as it may be.
_LEAST_TURNS = 4
#: What a CTA reads in a second where memory has more to give (of 8 warps, or 4 with rows twice as long), what memory
#: gives, and what it takes longer if requests are split.
_CTA_RATE = 45e9
_MEMORY_RATE = 3.0e12
_MERGE_SECONDS = 2.2e-6
#: Registers of a thread for fragments, by the CTAs of an SM: 288 threads of one, and 160 of each of two, have 168.
_MOST_FRAGMENTS = {1: 150, 2: 120}
#: Bytes of a warp's share of a box.
_RING_TILE_BYTES = 2048
#: The least architecture that has the copy engine, and the shared memory of those of its devices that were measured.
RING_ARCH = 90
_RING_SHARED_BYTES = 160 << 10
#: Rings that stay for an equal share of the rows of all requests, where a share of a full batch is as large as this.
EVEN_LEAST_BYTES = 48 << 10
#: Over pages, bytes of all caches below which, for each share that a request has, equal parts of requests without a
#: ring are faster: parts take their time to merge. On an H100, with 32/8 heads, shares were slower for 1 request of
#: 17 MB by 28 % and of 34 MB by 8 %, for 4 requests of 8 MB by 12 %; faster for 16 requests of 8 MB by 8 %.
_EVEN_BYTES_A_PART = 2.2e6
EVEN_TEAMS = (RingTeam(1, 8, 1, 4), RingTeam(2, 8, 1, 4))
WIDE_EVEN_TEAMS = (RingTeam(1, 4, 1, 4),)
#: Every CTA sums up all lengths, some 5 microseconds for a thousand requests: of more than this a list is made.
_MOST_EVEN_REQUESTS = 8192
#: The first team that fits is taken, of pairs of heads where there are so many, unless another keeps so much more of
#: the device busy. Measured on an H100: 2 % faster with 32 heads, 2 to 14 % slower with 8.
_MANY_HEADS = 16
_EVEN_FILL_GAIN = 0.05
#: Rows of a box: fewer are copied less efficiently, more read more beyond the end of a request. Pages have whole boxes.
_EVEN_BOX_ROWS = 32
LEAST_BOX_ROWS = 8
#: Boxes of so few rows arrive later: with a stage more, pages of 16 were 1 % faster on an H100.
_SMALL_BOX_ROWS = 16


def ring_specs(spec: DecodeSpec) -> list[DecodeSpec]:
    """``spec`` with every ring that a plan may choose for equal requests, of the least number of stages."""
    rings = [ring for ring in (_ring(spec, team) for team in _ring_teams(spec)) if ring]
    # Two teams may come to the same kernel.
    found = [replace(one, stages=_LEAST_STAGES) for ring in rings for one in (ring, replace(ring, subtiles=1))]
    return list(dict.fromkeys(found))


def even_specs(spec: DecodeSpec, arch: int) -> list[DecodeSpec]:
    """The same for equal shares, on a device of ``arch``."""
    return [ring for _, ring in _even_rings(spec)] if arch >= RING_ARCH else []


def has_rings(arch: int, shared_per_block: int | None) -> bool:
    """Whether a device has the copy engine, and, if that is known, the shared memory."""
    return arch >= RING_ARCH and (shared_per_block is None or shared_per_block >= _RING_SHARED_BYTES)


def _ring_teams(spec: DecodeSpec) -> tuple[RingTeam, ...]:
    """The teams that a ring may be for, by the length of the rows and the tiles of columns."""
    if spec.row_bytes > _MOST_RING_ROW_BYTES:
        return ()
    if spec.row_bytes > _WIDE_ROW_BYTES:
        return WIDE_RING_TEAMS
    return WIDE_GROUP_RING_TEAMS if spec.column_tiles > 1 else RING_TEAMS


def _ring(spec: DecodeSpec, team: RingTeam) -> DecodeSpec | None:
    """The kernel with a ring for ``team``, or None where it does not fit the registers."""
    key_bytes = 16 * spec.head_dim * KV_FORMATS[spec.k].itemsize
    if spec.many_queries:
        key_bytes = max(key_bytes, 16 * spec.head_dim * KV_FORMATS[spec.v].itemsize)
    for subtiles in (4, 2, 1):
        ring = replace(
            spec, warps=team.warps, ctas_per_sm=team.ctas_per_sm, subtiles=subtiles, heads=team.heads,
            stages=team.least_stages,
        )  # fmt: skip
        # Products take longer than bytes for many queries: a fragment of q is used for more rows.
        most = _RING_TILE_BYTES * (2 if spec.many_queries else 1)
        fits = subtiles * key_bytes <= most and ring.turn_rows <= MOST_BOX_ROWS
        if (fits or subtiles == 1) and ring.fragment_registers[0] <= _MOST_FRAGMENTS[team.ctas_per_sm]:
            return ring
    return None


def _may_have_ring(problem: DecodeProblem, device: DeviceInfo) -> bool:
    return has_rings(device.arch, device.shared_per_block) and problem.can_copy_boxes


def _for_rows(ring: DecodeSpec, rows: int) -> DecodeSpec:
    """``ring``, or one with the shortest turns for requests of so few rows."""
    return ring if rows >= _LEAST_TURNS * ring.turn_rows else replace(ring, subtiles=1)


def _reads_alone(problem: DecodeProblem, ctas: int) -> bool:
    """Whether so few CTAs for whole requests are done sooner than more that share them."""
    alone = problem.kv_bytes / min(ctas * _CTA_RATE, _MEMORY_RATE)
    return alone <= problem.kv_bytes / _MEMORY_RATE + _MERGE_SECONDS


def _fitting(ring: DecodeSpec, device: DeviceInfo) -> DecodeSpec | None:
    """``ring`` with as many of its stages as its share of an SM's shared memory holds; None if these are too few."""
    room = device.shared_per_block // ring.ctas_per_sm - replace(ring, stages=0).shared_bytes
    stages = min(ring.stages, room // (ring.stage_bytes + 16))
    return replace(ring, stages=stages) if stages >= _LEAST_STAGES else None


def _stages(ring: DecodeSpec, team: RingTeam, ctas: int) -> int:
    """Boxes of a ring of which so many fill at one time; rather some more than less."""
    uneven = ring.head_dim & (ring.head_dim - 1)
    wanted, least_part = (_UNEVEN_BYTES_IN_FLIGHT, 0.4) if uneven else (_RING_BYTES_IN_FLIGHT, 0.2)
    stages = math.ceil(wanted / (ctas * ring.stage_bytes) - least_part)
    return min(max(stages, team.least_stages), _MOST_STAGES)


def ring_plan(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int) -> Plan | None:
    """A plan with a ring, or None where registers do as well."""
    if not _may_have_ring(problem, device) or (blocks > 1 and not _is_short(problem)):
        return None  # column blocks read rows again, which was only measured for short requests
    team, splits = _ring_team(problem, device, spec, blocks)
    if team is None:
        return None
    ctas = problem.batch * problem.num_kv_heads // team.heads * blocks * splits
    places = team.ctas_per_sm * device.sm_count
    ring = _ring(spec, team)
    if ring is None:
        return None
    rows = problem.rows_read // splits
    ring = _for_rows(ring, rows)
    # In several waves, those that begin find the memory busy. No ring is longer than what it is for.
    stages = team.least_stages if ctas > places else _stages(ring, team, ctas)
    ring = _fitting(replace(ring, stages=min(stages, max(_ENOUGH_STAGES, -(-rows // ring.turn_rows)))), device)
    if ring is None:
        return None
    pairs = f" in teams of {team.heads}" if team.heads > 1 else ""
    pieces = ctas // splits
    reason = f"{pieces} request heads{pairs} in {splits} splits: rings on {ctas} of {places} places"
    return finish_plan(problem, device, ring, blocks, splits, reason)


def _is_short(problem: DecodeProblem) -> bool:
    return _LEAST_RING_ROWS <= problem.rows_read < RING_ROWS and problem.kv_bytes <= _FEW_BYTES


def _ring_team(
    problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int
) -> tuple[RingTeam | None, int]:
    """Who reads a request with rings, and in how many splits; None: registers do as well."""
    sms = device.sm_count
    teams = [
        team
        for team in _ring_teams(spec)
        if problem.num_kv_heads % team.heads == 0 and (blocks > 1 or not team.for_blocks) and _ring(spec, team)
    ]
    is_short = _is_short(problem)
    least_wave_fill = MIN_WIDE_GROUP_WAVE_FILL if spec.column_tiles > 1 else MIN_RING_WAVE_FILL
    # A split of a short request is shorter still.
    least_fill = MIN_SHORT_RING_FILL if is_short else MIN_RING_FILL
    if problem.rows_read >= RING_ROWS or is_short:
        for team in teams:
            ctas, places = problem.batch * problem.num_kv_heads // team.heads * blocks, team.ctas_per_sm * sms
            fills = ctas >= least_fill * places or (team is teams[0] and ctas and _reads_alone(problem, ctas))
            if team.one_wave and ctas <= places and fills:
                return team, 1
            if team.waves and ctas > places and (is_short or fill(ctas, places) >= least_wave_fill):
                return team, 1
            if team.waves_of_few and ctas > places and problem.kv_bytes <= _FEW_BYTES:
                return team, 1
    for team in teams:
        ring = _ring(spec, team)
        pieces = problem.batch * problem.num_kv_heads // team.heads * blocks
        if ring and pieces and problem.kv_bytes >= team.splits_from * sms:
            splits = min(sms // pieces, -(-problem.rows_read // ring.turn_rows))
            if splits > 1:
                return team, splits
    return None, 1


def box_rows(problem: DecodeProblem, spec: DecodeSpec) -> int:
    """Rows of the boxes that a ring is filled with: a power of two that divides those of a turn and of a page."""
    if spec.schedule != "even":
        return spec.turn_rows
    whole = problem.paging.page_size & -problem.paging.page_size if problem.paging else _EVEN_BOX_ROWS
    return min(whole, spec.turn_rows, _EVEN_BOX_ROWS)


def _even_rings(spec: DecodeSpec) -> list[tuple[RingTeam, DecodeSpec]]:
    """Rings for equal shares, by their teams."""
    if spec.row_bytes > _MOST_RING_ROW_BYTES:
        return []
    teams = WIDE_EVEN_TEAMS if spec.row_bytes > _WIDE_ROW_BYTES else EVEN_TEAMS
    rings = ((team, _ring(spec, team)) for team in teams)
    return [(team, replace(ring, schedule="even")) for team, ring in rings if ring]


def even_plan(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, blocks: int) -> Plan | None:
    """A plan with a ring on every SM that goes through one equal share of all rows, or None where there is none."""
    if not _may_have_ring(problem, device) or blocks > 1 or problem.kv_bytes < EVEN_LEAST_BYTES * device.sm_count:
        return None
    if (problem.batch == 1 and not problem.paging) or problem.batch > _MOST_EVEN_REQUESTS:
        return None  # a single request is cut equally whatever its length is
    wanted = 2 if problem.num_kv_heads >= _MANY_HEADS else 1
    most_shares = MAX_WORKSPACE // (2 * told_bytes(problem))  # a share may have two partial results
    chosen: tuple[DecodeSpec, int, int] | None = None
    filled = 0.0
    for team, ring in sorted(_even_rings(spec), key=lambda one: one[0].heads != wanted):
        if problem.num_kv_heads % team.heads or box_rows(problem, ring) < LEAST_BOX_ROWS:
            continue
        teams, places = problem.num_kv_heads // team.heads, team.ctas_per_sm * device.sm_count
        shares = min(places // teams, most_shares)
        share_of_places = shares * teams / places
        more = box_rows(problem, ring) <= _SMALL_BOX_ROWS
        stages = _stages(ring, team, shares * teams) + more if shares else 0
        fitting = _fitting(replace(ring, stages=stages), device)
        if fitting is None:
            continue
        if share_of_places > filled + (_EVEN_FILL_GAIN if chosen else MIN_RING_FILL):
            chosen, filled = (fitting, teams, shares), share_of_places
    if chosen is None:
        return None
    ring, teams, shares = chosen
    if problem.paging and problem.kv_bytes * problem.batch < _EVEN_BYTES_A_PART * shares:
        return None
    reason = (
        f"lengths decide: {shares} equal shares of all rows for {teams} teams of cache heads, a ring on "
        f"{shares * teams} of {ring.ctas_per_sm * device.sm_count} places"
    )
    return finish_plan(problem, device, ring, blocks, 1, reason, shares=shares)
