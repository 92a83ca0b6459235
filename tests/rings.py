"""Decode cases for the kernel with a ring in shared memory, which a planner only chooses for long requests."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
from cases import FACTORS, Case
from pairwise import pairwise

from cupy_fp8kv import plan
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.plan import DeviceInfo, Plan
from cupy_fp8kv.problem import DecodeProblem

_FACTORS: dict[str, tuple[Any, ...]] = {
    **FACTORS,
    "head_dim": (*range(16, 129, 16), 192, 256),
    "group": (1, 2, 3, 5, 7, 8),
    "kv_len": (1, 63, 64, 65, 300, 1000),
    "k": ("e4m3", "e5m2", "e4m3", "f16", "bf16"),
    "v": ("e4m3", "e4m3", "e5m2", "f16", "bf16"),
    "batch": (1, 2, 3),
    "num_kv_heads": (1, 2, 3, 4, 8),
}


def ring_plan(case: Case, device: DeviceInfo) -> Plan:
    """The plan of a case with a ring however short its requests are; which, and in how many splits, the seed says."""
    problem = dataclasses.replace(case.problem, ragged=False)
    _, blocks = plan._tile(problem)
    rings = [ring for ring in plan.specs(problem, 90, device.shared_per_block) if ring.stages]
    rings = [ring for ring in rings if problem.num_kv_heads % ring.heads == 0]
    if not rings:
        return plan.plan_decode(problem, device)
    ring = rings[case.seed % len(rings)]
    ring = dataclasses.replace(ring, stages=ring.stages + case.seed % 3)
    splits = min(1 + case.seed % 4, -(-problem.rows_read // ring.turn_rows))
    return plan.finish_plan(problem, device, ring, blocks, max(1, splits), "a ring")


def take_ring(patch: pytest.MonkeyPatch, case: Case, device: DeviceInfo) -> None:
    """The CUDA backend runs this case with a ring, whatever its strides."""

    def choose(problem: DecodeProblem, _: DeviceInfo) -> Plan:
        assert problem.can_copy_boxes
        return ring_plan(case, device)

    patch.setattr(cuda, "plan_decode", choose)


@cache
def ring_cases(device: DeviceInfo) -> list[Case]:
    """Any two values of two options together, as far as a ring takes them."""
    found = [Case(**chosen, seed=seed) for seed, chosen in enumerate(pairwise(_FACTORS))]
    return [case for case in found if ring_plan(case, device).spec.stages]
