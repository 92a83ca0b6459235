"""Plans that no planner takes but ``tune`` may, executed on the CPU."""

import emulator
import pytest
from cases import Case
from emulator.checks import run

from cupy_fp8kv.backends import cuda
from cupy_fp8kv.tuning.options import plan_options

MANY_HEADS = Case(group=3, num_kv_heads=8, kv_len=1100, seed=1)
#: By what is unusual about them: a case, and which of its options are meant.
UNUSUAL = {
    "narrow tiles for a wide group": (
        Case(group=12, num_kv_heads=2, batch=2, kv_len=300),
        lambda plan: plan.spec.column_tiles == 1 and plan.column_blocks == 2 and not plan.spec.stages,
    ),
    "small CTAs in several waves": (
        Case(group=2, num_kv_heads=5, batch=3, kv_len=2000, seed=2),
        lambda plan: plan.spec.ctas_per_sm == 4 and plan.grid > 2 * 4 * emulator.HOPPER.sm_count,
    ),
    "two rings an SM": (MANY_HEADS, lambda plan: plan.spec.ctas_per_sm == 2 and plan.spec.heads == 4),
    "four heads a ring": (MANY_HEADS, lambda plan: plan.spec.heads == 4 and plan.spec.stages == 4 and plan.splits > 1),
    "a long ring": (
        Case(group=1, num_kv_heads=1, batch=2, kv_len=3000, head_dim=64, v="e5m2", seed=3),
        lambda plan: plan.spec.stages >= 6,
    ),
    "a ring for column blocks": (
        Case(group=24, num_kv_heads=2, kv_len=700, head_dim=80, soft_cap=30.0, seed=4),
        lambda plan: plan.spec.stages and plan.column_blocks == 2,
    ),
    "a ring of long rows": (
        Case(group=5, num_kv_heads=2, kv_len=500, head_dim=256, window_left=333, seed=5),
        lambda plan: plan.spec.stages,
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_options_are_right(emulate, monkeypatch, name):
    case, is_meant = UNUSUAL[name]
    options = [plan for plan in plan_options(case.problem, emulator.HOPPER) if is_meant(plan)]
    assert options
    plan = options[len(options) // 2]
    monkeypatch.setattr(cuda, "plan_decode", lambda *_: plan)
    run(emulate, case)
    assert str(plan.spec) in [launched for launched, _ in emulate.launches[-2:]]
