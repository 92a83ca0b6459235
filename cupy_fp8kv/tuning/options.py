"""Every sensible plan of a problem: what ``tune`` searches, and what the planner's choice is judged against.

Pure, like the planner. An option is a specialisation that fits the device and the registers, and a number of splits.
What is known to be slow everywhere is left out, so that a search takes seconds: tiles of other shapes than these, and
grids that leave more than half of the SMs idle without need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..jit.spec import DecodeSpec
from ..plan import MAX_WORKSPACE, DeviceInfo, Plan, finish_plan, fits_registers, plan_decode
from ..problem import MOST_BOX_ROWS, DecodeProblem
from ..ring_plans import RING_ARCH

#: Warps of an SM that load straight to registers, and into how many CTAs they are cut.
_REGISTER_WARPS = (16, 8)
_CTAS_PER_SM = (1, 2, 4)
_SUBTILES = (1, 2, 4)
#: Warps of a CTA with a ring, and CTAs of an SM; cache heads of a CTA; stages, which need no kernel of their own.
_RING_SHAPES = ((8, 1), (4, 1), (4, 2))
_RING_HEADS = (1, 2, 4)
_RING_STAGES = (3, 4, 5, 6)
#: Registers that a thread of a ring needs beside its fragments: on sm_90 with rows of K and V of up to so many bytes
#: together, and otherwise. Measured with NVRTC 12.9 on sm_90, sm_100 and sm_120.
_SHORT_ROW_BYTES = 256
_OTHER_RING_REGISTERS = {True: 18, False: 56}
#: What the system takes of an SM's shared memory for each CTA.
_RESERVED_SHARED = 1024
#: Wider groups are not tried as tiles of eight columns if those of sixteen fit, and rings never: every tile reads the
#: rows again.
_MOST_NARROW_GROUP = 32
#: Up to so many splits in one wave all numbers are tried, beyond it those that leave the CTAs equal work.
_ALL_SPLITS = 12
#: Second and further waves: no more of them, and no shorter splits.
_MOST_WAVES = 4
_MIN_ROWS_BEYOND_A_WAVE = 256
_MIN_FILL_BEYOND_A_WAVE = 0.9
_MOST_SPLITS_BEYOND_A_WAVE = 16
#: A CTA may read so many bytes alone while others idle: less than a merge takes.
_FEW_BYTES = 1 << 20


def plan_options(problem: DecodeProblem, device: DeviceInfo) -> list[Plan]:
    """The planner's choice, then every other plan worth measuring: other specialisations, other numbers of splits.

    Requests with lengths of their own have only the planner's: how long such a call takes depends on the lengths,
    which a plan does not know.
    """
    chosen = plan_decode(problem, device)
    if problem.ragged or not problem.batch or not problem.rows_read:
        return [chosen]
    others = (
        _plan(problem, device, spec, splits)
        for spec in spec_options(problem, device)
        for splits in split_options(problem, device, spec)
        if (spec, splits) != (chosen.spec, chosen.splits)
    )
    return [chosen, *(plan for plan in others if plan.workspace <= MAX_WORKSPACE)]


def _plan(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec, splits: int) -> Plan:
    ctas = _pieces(problem, spec) * splits
    slots = device.sm_count * spec.ctas_per_sm
    return finish_plan(problem, device, spec, _blocks(problem, spec), splits, f"an option: {ctas} CTAs, {slots} slots")


def _blocks(problem: DecodeProblem, spec: DecodeSpec) -> int:
    """CTAs that share the query heads of a cache head."""
    return -(-problem.group_size // (8 * spec.column_tiles))


def _pieces(problem: DecodeProblem, spec: DecodeSpec) -> int:
    """CTAs without splits."""
    return problem.batch * problem.num_kv_heads // spec.heads * _blocks(problem, spec)


# Specialisations


def spec_options(problem: DecodeProblem, device: DeviceInfo) -> list[DecodeSpec]:
    """The kernels that fit the problem, the registers and the device: straight to registers first, then rings."""
    base = replace(plan_decode(problem, device).spec, heads=1, stages=0, schedule="uniform")
    registers: list[DecodeSpec] = []
    rings: list[DecodeSpec] = []
    for column_tiles in (2, 1) if problem.group_size > 8 else (1,):
        tile = replace(base, column_tiles=column_tiles)
        if not registers or problem.group_size <= _MOST_NARROW_GROUP:
            registers += _register_specs(tile)
        if not rings and device.arch >= RING_ARCH and problem.can_copy_boxes:
            rings += _ring_specs(tile, problem.num_kv_heads, device.arch)
    return [spec for spec in registers + rings if _fits_shared_memory(spec, device)]


def _fits_shared_memory(spec: DecodeSpec, device: DeviceInfo) -> bool:
    """Whether an SM holds as many CTAs as the specialisation counts on."""
    each = spec.shared_bytes + _RESERVED_SHARED
    return spec.ctas_per_sm * each <= device.shared_per_block + _RESERVED_SHARED


def _register_specs(tile: DecodeSpec) -> Iterator[DecodeSpec]:
    for all_warps in _REGISTER_WARPS:
        for subtiles in _SUBTILES:
            whole = replace(tile, subtiles=subtiles, warps=all_warps, ctas_per_sm=1)
            if fits_registers(whole):
                yield from (replace(whole, warps=all_warps // ctas, ctas_per_sm=ctas) for ctas in _CTAS_PER_SM)


def _ring_specs(tile: DecodeSpec, num_kv_heads: int, arch: int) -> Iterator[DecodeSpec]:
    for warps, ctas in _RING_SHAPES:
        for subtiles in _SUBTILES:
            for heads in _RING_HEADS:
                if num_kv_heads % heads or warps % heads:
                    continue
                one = replace(tile, subtiles=subtiles, warps=warps, ctas_per_sm=ctas, heads=heads, stages=1)
                if one.turn_rows > MOST_BOX_ROWS or one.fragment_registers[0] > _most_ring_fragments(one, arch):
                    continue
                yield from (replace(one, stages=stages) for stages in _RING_STAGES)


def _most_ring_fragments(spec: DecodeSpec, arch: int) -> int:
    # Registers are handed out to four warps at a time, in steps of eight a thread.
    warps = -(-spec.threads // 32 * spec.ctas_per_sm // 4) * 4
    return 65536 // (32 * warps) // 8 * 8 - _OTHER_RING_REGISTERS[arch < 100 and spec.row_bytes <= _SHORT_ROW_BYTES]


# Splits


def split_options(problem: DecodeProblem, device: DeviceInfo, spec: DecodeSpec) -> list[int]:
    """Numbers of CTAs that may share a request, ascending."""
    pieces = _pieces(problem, spec)
    slots = device.sm_count * spec.ctas_per_sm
    turns = -(-problem.rows_read // spec.turn_rows)
    in_a_wave = min(slots // pieces, turns)
    found = {1, *_in_a_wave(in_a_wave, turns)}
    # The planner gives every warp of every split a tile.
    found.add(min(in_a_wave, problem.rows_read // spec.turn_rows))
    found |= _beyond_a_wave(pieces, slots, problem.rows_read // _MIN_ROWS_BEYOND_A_WAVE)
    busy = min(pieces * max(1, in_a_wave), device.sm_count)
    alone = problem.rows_read * spec.heads * spec.row_bytes <= _FEW_BYTES
    return sorted(
        splits for splits in found if 1 <= splits <= turns and (2 * pieces * splits > busy or (splits == 1 and alone))
    )


def _in_a_wave(most: int, turns: int) -> Iterator[int]:
    """Splits that one wave has places for."""
    if most <= _ALL_SPLITS:
        yield from range(1, most + 1)
        return
    yield from (most, most // 2)
    # The fewest splits of which none takes more turns: with fewer the same wait, with more only more to merge.
    shortest = -(-turns // most)
    yield from (-(-turns // length) for length in range(shortest, shortest + 4))


def _beyond_a_wave(pieces: int, slots: int, most: int) -> set[int]:
    """Splits that take several waves and fill the last one well."""
    most = min(most, max(_MOST_SPLITS_BEYOND_A_WAVE, _MOST_WAVES * slots // pieces))
    full = {waves * slots // pieces for waves in range(2, _MOST_WAVES + 1)}
    filling = [
        splits
        for splits in range(2, min(most, _MOST_SPLITS_BEYOND_A_WAVE) + 1)
        if pieces * splits > max(slots, _MIN_FILL_BEYOND_A_WAVE * slots * -(-pieces * splits // slots))
    ]
    return {splits for splits in full if 1 < splits <= most} | set(filling[:3])
