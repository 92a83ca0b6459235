"""Which tile, how many warps and how many splits: a pure function of the problem and the device.

What it rests on (measured on an H100): a decode kernel is as fast as the bytes it keeps in flight, 32 to 64 KB per SM;
one wave of CTAs that fills every SM beats any second, partly filled wave; splitting a request needs a second, small
kernel, so it is only done where the requests' heads alone do not fill the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .formats import KV_FORMATS
from .jit.spec import DecodeSpec
from .problem import DecodeProblem


@dataclass(frozen=True)
class DeviceInfo:
    """What the planner knows of a device."""

    name: str
    arch: int  # 90 for sm_90
    sm_count: int
    shared_per_block: int  # bytes, with opt-in


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
#: A tile of 16 rows of K and V with fewer bytes than this is doubled, to keep enough bytes in flight.
_MIN_TILE_BYTES = 3072
#: A second wave that fills less than this of the device is avoided by splitting.
_MIN_FILL = 0.8
#: Splits shorter than this many rows are not worth a merge once every SM has work.
_MIN_SPLIT_ROWS = 256


def split_rows(begin: int, end: int, splits: int, tile_rows: int) -> list[tuple[int, int]]:
    """The rows of each split: whole tiles, the first splits one longer. The same formula as ``RowRange::part``."""
    tiles = -(-(end - begin) // tile_rows)
    each, longer = divmod(tiles, splits)
    parts = []
    for index in range(splits):
        first = index * each + min(index, longer)
        last = first + each + (index < longer)
        parts.append((min(end, begin + first * tile_rows), min(end, begin + last * tile_rows)))
    return parts


def _columns(problem: DecodeProblem) -> tuple[int, int]:
    """(tiles of eight columns per CTA, CTAs that share the query heads of one cache head), evenly filled."""
    blocks = math.ceil(problem.group_size / MAX_COLUMNS)
    return math.ceil(math.ceil(problem.group_size / blocks) / 8), blocks


def _subtiles(problem: DecodeProblem) -> int:
    row_bytes = problem.head_dim * (KV_FORMATS[problem.k_format].itemsize + KV_FORMATS[problem.v_format].itemsize)
    subtiles = 1
    while 16 * row_bytes * subtiles < _MIN_TILE_BYTES and subtiles < 4:
        subtiles *= 2
    return subtiles


def _spec(problem: DecodeProblem, warps: int, ctas_per_sm: int) -> DecodeSpec:
    return DecodeSpec(
        q=problem.q_format, k=problem.k_format, v=problem.v_format, head_dim=problem.head_dim,
        column_tiles=_columns(problem)[0], subtiles=_subtiles(problem), warps=warps, ctas_per_sm=ctas_per_sm,
        soft_cap=problem.soft_cap, position=problem.position,
    )  # fmt: skip


def warps_per_sm(spec: DecodeSpec) -> int:
    """Warps whose registers fit an SM: 16, 12 or 8, from what the fragments need beside some 40 for everything else."""
    steps = spec.head_dim // 16
    k_bytes, v_bytes = KV_FORMATS[spec.k].itemsize, KV_FORMATS[spec.v].itemsize
    accumulators = 4 * steps * spec.column_tiles
    keys = spec.subtiles * 2 * steps * k_bytes
    values = spec.subtiles * 4 * -(-steps * v_bytes // 2)
    query = 0 if spec.query_shared else 2 * steps * spec.column_tiles * spec.query_terms
    registers = accumulators + keys + values + query
    if registers <= 96:
        return 16
    return 12 if registers <= 128 else 8


def cta_shapes(problem: DecodeProblem) -> list[tuple[int, int]]:
    """(warps, CTAs per SM) that a plan may choose, largest first."""
    warps = warps_per_sm(_spec(problem, 16, 1))
    return [(warps, 1), (warps // 2, 2), (warps // 4, 1)]


def specs(problem: DecodeProblem) -> list[DecodeSpec]:
    """Every specialisation that some batch and length of this problem may use."""
    return [_spec(problem, *shape) for shape in cta_shapes(problem)]


def plan_decode(problem: DecodeProblem, device: DeviceInfo) -> Plan:
    """Choose how to run ``problem`` on ``device``."""
    _, blocks = _columns(problem)
    pieces = problem.batch * problem.num_kv_heads * blocks
    rows = problem.rows_read
    tiles = -(-rows // (16 * _subtiles(problem)))
    sms = device.sm_count
    (full, _), (half, _), (quarter, _) = cta_shapes(problem)

    def capped(splits: int, warps: int) -> int:
        # Every warp of every split should have a tile.
        return max(1, min(splits, tiles // warps))

    if pieces >= 2 * sms:
        warps, ctas, slots = half, 2, 2 * sms
        splits = 1
        fill = _fill(pieces, slots)
        reason = f"{pieces} request heads fill {slots} slots in {-(-pieces // slots)} waves"
        if fill < _MIN_FILL:
            most = max(1, rows // _MIN_SPLIT_ROWS)
            splits = next((s for s in range(2, min(16, most) + 1) if _fill(pieces * s, slots) > 0.9), 1)
            if splits > 1:
                reason = f"{pieces} request heads would leave {1 - fill:.0%} of the slots of their waves empty"
    elif pieces > sms:
        warps, ctas, splits = half, 2, 1
        reason = f"{pieces} request heads on {2 * sms} slots, one wave"
    else:
        one, two = capped(sms // pieces, full), capped(2 * sms // pieces, half)
        four = capped(sms // pieces, quarter)
        fill_one, fill_two = pieces * one / sms, pieces * two / (2 * sms)
        if one == sms // pieces and fill_one >= fill_two - 0.1:
            warps, ctas, splits = full, 1, one
            reason = f"{pieces} request heads on {sms} SMs, one wave of the largest CTAs"
        elif two == 2 * sms // pieces:
            warps, ctas, splits = half, 2, two
            reason = f"{pieces} request heads fill {2 * sms} slots better than {sms}, one wave"
        elif four > one:
            warps, ctas, splits = quarter, 1, four
            reason = f"{tiles} tiles a request: small CTAs spread them over the SMs"
        else:
            warps, ctas, splits = full, 1, one
            reason = f"{tiles} tiles a request, one for every warp"
    heads = problem.batch * problem.num_qo_heads * splits if splits > 1 else 0
    return Plan(
        spec=_spec(problem, warps, ctas), splits=splits, column_blocks=blocks, grid=pieces * splits,
        workspace_out=heads * problem.head_dim * 4, workspace_state=heads * 8, reason=reason,
    )  # fmt: skip


def _fill(ctas: int, slots: int) -> float:
    """The share of the slots of all waves that `ctas` CTAs use."""
    return ctas / (-(-ctas // slots) * slots)
