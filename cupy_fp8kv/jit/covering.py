"""Which specialisations are compiled to know that all compile: what planners choose, pairwise over what decides it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .. import plan
from ..formats import FP8_FORMATS, KV_FORMATS
from ..layouts import LAYOUTS
from ..problem import MAX_HEAD_DIM, DecodeProblem, Paging
from ..ring_plans import RING_ARCH
from ..tuning.options import spec_options
from .spec import (
    SCHEDULES,
    AppendSpec,
    CheckTablesSpec,
    DecodeSpec,
    MergeSpec,
    MergeStatesSpec,
    PagesSpec,
    QuantizeSpec,
    ScheduleSpec,
    Spec,
)  # fmt: skip

_Q_FORMATS = ("f16", "bf16")
_HEAD_DIMS = tuple(range(16, MAX_HEAD_DIM + 1, 16))
_COMMON_HEAD_DIMS = (64, 128, 256)
_DEFAULT_FORMATS = ("e4m3",)
#: Group sizes by the column tiles they take.
_GROUPS = {1: range(1, 9), 2: range(9, 17)}
_VALUE_DTYPES = ("float16", "bfloat16", "float32")
#: Bytes that pages.cu moves at a time: of caches, and of scales beside them.
PAGE_WORDS = (16, 4)
_QUANTIZE_ENTRIES = ("amax", "scales", "quantize", "dequantize")
#: Shared memory that a CTA may ask for where it is most.
_MOST_SHARED = 227 << 10
#: Architectures like another whose whole covering set is compiled, with that one, and the set that is compiled for them
#: unless somebody asks for more. Measured with NVRTC 12.9 over the whole covering set, of which nothing spills.
#:
#: sm_86 differs from sm_89 in the conversion of FP8: of 219 kernels without it all but 4 take as many registers, those
#: at most 5 more or 2 fewer. (sm_80 is another matter: half of them take others there.) Nothing in sources and planners
#: tells sm_103 from sm_100: of 497 kernels all but 19 take as many registers, those at most 4 more or 2 fewer.
ALIKE = {86: (89, "conversions"), 103: (100, "defaults")}
#: From here on conversion is in hardware, and ``software_fp8`` another kernel: the one of older architectures, which
#: tests run on a newer one.
_HARDWARE_FP8_ARCH = 89
#: Of formats that convert in other ways there; the others' kernels read rows alike with the switch and without.
_SOFTWARE_FORMATS = ("e4m3",)


def _problem(
    q: str,
    k: str,
    v: str,
    head_dim: int,
    group_size: int,
    soft_cap: bool = False,
    layout: str = "padded",
    queries: int = 1,
) -> DecodeProblem:
    """A problem as an ordinary NHD cache of eight heads poses it, with lengths of their own for the requests.

    With ``queries``, ``group_size`` is that of all of them together.
    """
    group_size //= queries
    batch, rows, heads = 16, 4096, 8
    paging = Paging(16, 1, rows, 0) if layout == "paged" else None
    k_row, v_row = (heads * head_dim * KV_FORMATS[name].itemsize for name in (k, v))
    return DecodeProblem(
        batch, rows, heads * group_size, heads, head_dim, q, k, v, (heads * group_size * head_dim * 2, head_dim * 2),
        (rows * k_row, k_row, k_row // heads), (rows * v_row, v_row, v_row // heads), soft_cap,
        ragged=True, paging=paging, queries=queries,
    )  # fmt: skip


def pairwise(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few choices of one value a factor, such that any two values of two factors meet in one of them.

    Greedy and deterministic: each choice starts from the first pair that has not met yet and takes, factor by factor,
    the value that makes most new pairs (of equals the one whose pairs have met least).
    """
    names = list(factors)
    met = {
        ((a, x), (b, y)): 0 for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }  # fmt: skip
    chosen: list[dict[str, Any]] = []

    def gain(row: dict[str, Any], name: str, value: Any) -> tuple[int, int]:
        item, at = (name, value), names.index(name)
        counts = [met[(other, item) if names.index(other[0]) < at else (item, other)] for other in row.items()]
        return counts.count(0), -sum(counts)

    while start := next((pair for pair, count in met.items() if not count), None):
        row = dict(start)
        for name in names:
            if name not in row:
                gains = {value: gain(row, name, value) for value in factors[name]}
                row[name] = max(gains, key=gains.__getitem__)
        for pair in itertools.combinations(((name, row[name]) for name in names), 2):
            met[pair] += 1
        chosen.append(row)
    return chosen


def _takes_queries(k: str, v: str, head_dim: int) -> bool:
    return plan.takes_many_queries(head_dim, (KV_FORMATS[name].itemsize for name in (k, v)))


def _by_schedule(problem: DecodeProblem, arch: int) -> dict[str, list[DecodeSpec]]:
    found = plan.specs(problem, arch)
    return {name: [spec for spec in found if spec.schedule == name] for name in SCHEDULES}


def _pairwise_decode(arch: int) -> list[DecodeSpec]:
    ordinary = _by_schedule(_problem("f16", "e4m3", "e4m3", 128, 1), arch)
    factors: dict[str, Sequence[Any]] = {
        "head_dim": _HEAD_DIMS, "k": tuple(KV_FORMATS), "v": tuple(KV_FORMATS),
        "cta_shape": range(len(ordinary["uniform"])),
        # A schedule that there is none of would stand for others, and crowd out what they meet.
        "schedule": tuple(name for name, some in ordinary.items() if some),
        "q": _Q_FORMATS, "column_tiles": tuple(_GROUPS), "soft_cap": (False, True), "layout": tuple(LAYOUTS),
        "many_queries": (False, True),
    }  # fmt: skip
    found = []
    for index, row in enumerate(pairwise(factors)):
        groups = _GROUPS[row["column_tiles"]]
        group = groups[index % len(groups)]
        # Requests of padded caches have one row of q.
        several = (
            row["many_queries"] and row["layout"] == "paged" and _takes_queries(row["k"], row["v"], row["head_dim"])
        )
        queries = max(2, group) if several else 1
        problem = _problem(
            row["q"], row["k"], row["v"], row["head_dim"], max(group, queries), row["soft_cap"], row["layout"], queries
        )  # fmt: skip
        by_schedule = _by_schedule(problem, arch)
        # Work lists are of padded caches, equal shares of rows that are not too long.
        shapes = by_schedule[row["schedule"]] or by_schedule["uniform"]
        found.append(shapes[row["cta_shape"] % len(shapes)])
    return found


def _full_decode(pairs: Iterable[tuple[str, str]], head_dims: Sequence[int], arch: int) -> list[DecodeSpec]:
    """Every CTA shape of every combination; of those for which lengths decide, which compile much alike, one in turn.

    Over pages one too: straight to registers, where all shapes have the same, or of equal shares.
    """
    found = []
    per_pair = len(_Q_FORMATS) * len(head_dims) * len(_GROUPS)
    combinations = itertools.product(pairs, _Q_FORMATS, head_dims, _GROUPS.values())
    for index, ((k, v), q, head_dim, groups) in enumerate(combinations):
        shapes = _by_schedule(_problem(q, k, v, head_dim, groups[-1]), arch)
        by_lengths = [*shapes["listed"], *shapes["even"]]
        registers, rings = shapes["uniform"][:3], shapes["uniform"][3:]
        # Of E5M2, whose kernels compile like E4M3's, one of each in turn; rings, which read rows of all formats alike,
        # every second one for all but the most common.
        if (k, v) == ("e5m2", "e5m2"):
            registers, rings = registers[index % 3 :][:1], rings[index % max(1, len(rings)) :][:1]
        elif (k, v) != ("e4m3", "e4m3"):
            rings = rings[index % 2 :: 2]
        if (k, v) == ("bf16", "bf16"):  # which only differs from FP16 in how products are called
            registers = registers[index % 2 :: 2]
        found += [*registers, *rings, by_lengths[index % len(by_lengths)]]
        if q == "f16":
            paged = _by_schedule(_problem(q, k, v, head_dim, groups[-1], layout="paged"), arch)
            choices = [paged["uniform"][0], *paged["even"]]
            # Not the same one whenever a head dimension comes round.
            found.append(choices[(index + index // per_pair) % len(choices)])
            if _takes_queries(k, v, head_dim):
                shared = plan.specs(_problem(q, k, v, head_dim, groups[-1], layout="paged", queries=groups[-1]), arch)
                found += shared[-1 - index % 2 :][:1]
    return found


def _software_decode(arch: int) -> list[DecodeSpec]:
    """What tests run of the conversion without instructions on an architecture that has them; CTA shapes in turn.

    Common kernels only. No call of a user reaches the switch, and planners do not know what its kernels take: of E4M3
    keys with FP16 values of head dimension 240 and a soft cap some spill on sm_100 and sm_120.
    """
    if arch < _HARDWARE_FP8_ARCH:
        return []
    found = []
    combinations = itertools.product(_SOFTWARE_FORMATS, LAYOUTS, _GROUPS.values(), _COMMON_HEAD_DIMS)
    for index, (name, layout, groups, head_dim) in enumerate(combinations):
        q = _Q_FORMATS[index % len(_Q_FORMATS)]
        by_schedule = _by_schedule(_problem(q, name, name, head_dim, groups[-1], layout=layout), arch)
        kinds = [shapes for shapes in by_schedule.values() if shapes]
        shapes = kinds[index % len(kinds)]
        # The first go straight to registers, the last have rings.
        found.append(replace(shapes[-(index // len(kinds) % 2)], software_fp8=True))
    return found


def _others(arch: int) -> list[Spec]:
    merges: list[tuple[Any, ...]] = [("uniform",), ("listed",), ("uniform", "padded", True)]
    if arch >= RING_ARCH:
        merges += [*(("even", layout) for layout in LAYOUTS), ("even", "paged", True)]
    quantize = itertools.product(_QUANTIZE_ENTRIES, _VALUE_DTYPES, FP8_FORMATS)
    return [
        CheckTablesSpec(), ScheduleSpec(),
        *(MergeSpec(q, *one) for q in _Q_FORMATS for one in merges),
        *(QuantizeSpec(*chosen) for chosen in quantize),
        *(MergeStatesSpec(dtype) for dtype in _VALUE_DTYPES),
        *(PagesSpec(entry, word) for entry in ("copy_pages", "gather") for word in PAGE_WORDS),
        *(AppendSpec(dtype, stored) for dtype in _VALUE_DTYPES for stored in KV_FORMATS),
        *(AppendSpec.copying(itemsize) for itemsize in (1, 2)),
    ]  # fmt: skip


def covering_specs(arch: int) -> list[Spec]:
    """Every common specialisation, and for the rest each two properties together at least once."""
    same = [(name, name) for name in KV_FORMATS]
    decode = [*_full_decode(same, _COMMON_HEAD_DIMS, arch), *_pairwise_decode(arch), *_software_decode(arch)]
    return list(dict.fromkeys([*decode, *_others(arch)]))


def default_specs(arch: int) -> list[Spec]:
    """What planners choose where nobody asks for anything: E4M3, common head dimensions; and all other kernels."""
    same = [(name, name) for name in _DEFAULT_FORMATS]
    return list(dict.fromkeys([*_full_decode(same, _COMMON_HEAD_DIMS, arch), *_others(arch)]))


def conversions_specs(arch: int) -> list[Spec]:
    """Of the covering set what may convert FP8: decode of E4M3, as E5M2 is only moved into place, and all else."""
    return [
        spec
        for spec in covering_specs(arch)
        if not isinstance(spec, DecodeSpec) or any(name in _SOFTWARE_FORMATS for name in (spec.k, spec.v))
    ]


def all_formats_specs(arch: int) -> list[Spec]:
    """Every pair of formats of K and V at the common head dimensions."""
    pairs = itertools.product(KV_FORMATS, KV_FORMATS)
    return list(dict.fromkeys([*_full_decode(pairs, _COMMON_HEAD_DIMS, arch), *_others(arch)]))


def all_head_dims_specs(arch: int) -> list[Spec]:
    """Every head dimension, K and V in the same format."""
    same = [(name, name) for name in KV_FORMATS]
    return list(dict.fromkeys([*_full_decode(same, _HEAD_DIMS, arch), *_others(arch)]))


def options_specs(arch: int) -> list[Spec]:
    """What ``tune`` may choose, which planners mostly do not: at common head dimensions, K and V in the same format."""
    device = plan.DeviceInfo("any", arch, 132, _MOST_SHARED)
    found: list[DecodeSpec] = []
    for name, q, head_dim, groups in itertools.product(KV_FORMATS, _Q_FORMATS, _COMMON_HEAD_DIMS, _GROUPS.values()):
        found += spec_options(_problem(q, name, name, head_dim, groups[-1], False), device)
    # How many stages a ring has is not part of the kernel.
    return list(dict.fromkeys(replace(spec, stages=min(spec.stages, 3)) for spec in found))


#: Sets by the name that the command line knows them by.
SETS: dict[str, Callable[[int], list[Spec]]] = {
    "covering": covering_specs, "defaults": default_specs, "conversions": conversions_specs,
    "all-formats": all_formats_specs, "all-head-dims": all_head_dims_specs, "options": options_specs,
}  # fmt: skip


def usual_set(arch: int) -> str:
    """The set that is compiled where nobody asks for one."""
    return ALIKE[arch][1] if arch in ALIKE else "covering"
