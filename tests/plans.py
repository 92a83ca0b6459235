"""What the tests of ``DecodePlan`` share on every backend: a case run through a plan."""

from __future__ import annotations

from typing import Any

from cases import Arrays

import cupy_fp8kv


def plan_of(arrays: Arrays, **changes: Any) -> cupy_fp8kv.DecodePlan:
    """A plan for the arrays of a case; not yet scheduled."""
    case = arrays.case
    options = {
        "ragged": case.kv_lens != "none", "kv_format": (case.k, case.v), "window_left": case.window_left,
        "logits_soft_cap": case.soft_cap, "lse_base": case.lse_base, "sm_scale": arrays.options["sm_scale"], **changes,
    }  # fmt: skip
    return cupy_fp8kv.DecodePlan(arrays.q.view, arrays.k.view, arrays.v.view, case.layout, **options)


def run_plan(plan: cupy_fp8kv.DecodePlan, arrays: Arrays) -> tuple[Any, Any]:
    """(out, lse) of the case's arrays."""
    return plan.run(
        arrays.q.view, arrays.k.view, arrays.v.view, out=arrays.out.view if arrays.out else None, return_lse=True,
        **arrays.scales,
    )  # fmt: skip
