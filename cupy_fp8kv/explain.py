"""What a call would do, and doing the slow part of it ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import arrays
from .dispatch import check_call, common_library
from .formats import Q_DTYPES, dtype_name
from .formats import kv_format as format_called
from .jit import compiler
from .jit.device import device_info
from .jit.spec import MergeSpec, ScheduleSpec, Spec
from .layouts import LAYOUTS
from .plan import DeviceInfo, Plan, plan_decode, specs
from .problem import DecodeProblem, Paging, check_heads
from .tuning.store import tuned_plan


@dataclass(frozen=True)
class Explanation:
    """How a call would run. ``plan`` is None on the NumPy backend."""

    backend: str
    problem: DecodeProblem
    device: DeviceInfo | None
    plan: Plan | None

    def __str__(self) -> str:
        lines = [f"problem  {self.problem}", f"backend  {self.backend}"]
        if self.plan and self.device:
            plan = self.plan
            splits = "by a work list" if plan.bounds else "by equal shares" if plan.shares else plan.splits
            merges = ", then merge" if plan.most_merges(self.problem.batch) else ""
            merges = ", merged by the last CTA of a request" if plan.merges_inside else merges
            lines += [
                f"device   {self.device.name}, sm_{self.device.arch}, {self.device.sm_count} SMs",
                f"kernel   {plan.spec}",
                f"tile     {plan.spec.tile_rows} rows x {8 * plan.spec.column_tiles} query heads a warp, "
                f"{plan.spec.warps} warps a CTA, {plan.spec.ctas_per_sm} CTAs an SM, "
                f"{plan.spec.shared_bytes} bytes of shared memory",
                f"splits   {splits} (grid {plan.grid}, workspace {plan.workspace} bytes{merges})",
                f"because  {plan.reason}",
            ]
        return "\n".join(lines)


def explain(
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    *,
    logits_soft_cap: float | None = None,
    kv_format: Any = None,
    window_left: int = -1,
    kv_lens: Any = None,
    backend: str | None = None,
    device: DeviceInfo | None = None,
) -> Explanation:
    """Which kernel, tile and splits a decode call with these arrays would use, and why. Nothing is run.

    Parameters are those of :func:`batch_decode_with_padded_kv_cache`, or of :func:`single_decode_with_kv_cache` if q
    has two axes; of ``kv_lens`` it only matters whether there are any. ``device`` tells the plan for a device that is
    not there. Where :func:`tune` has found a plan, that is the one.
    """
    q, k, v = (arrays.adopt(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v")))
    library = common_library(q, k, v)
    facts = [library.facts(arrays.read(library, array, name)[1]) for name, array in (("q", q), ("k", k), ("v", v))]
    problem, cuda = check_call(
        *facts, batched=len(facts[0].shape) == 3, kv_layout=kv_layout, pos_encoding_mode=pos_encoding_mode,
        logits_soft_cap=logits_soft_cap, window_left=window_left, kv_format=kv_format, backend=backend,
        ragged=kv_lens is not None,
    )  # fmt: skip
    if backend == "numpy" or not (cuda or device):
        return Explanation("numpy", problem, None, None)
    device = device or device_info(max(facts[0].device, 0))
    return Explanation("cuda", problem, device, tuned_plan(problem, device) or plan_decode(problem, device))


def warmup(
    *,
    head_dim: int = 128,
    group_size: int = 1,
    q_dtype: Any = "float16",
    kv_format: Any = "e4m3",
    logits_soft_cap: bool = False,
    ragged: bool = False,
    layout: str = "padded",
    device: int = 0,
) -> list[str]:
    """Compile every kernel that decode calls of this kind may choose, on all cores, so that no later call has to.

    Not those that only :func:`tune` chooses, which have been compiled where it ran.

    Parameters
    ----------
    group_size : ``num_qo_heads / num_kv_heads``.
    kv_format : a format, or a pair (K, V).
    logits_soft_cap : whether calls will have a soft cap.
    ragged : whether calls will have ``kv_lens``; their kernels are compiled with the others then. Those over pages do.
    layout : ``"padded"`` or ``"paged"``, the caches of the calls.
    device : CUDA device index.

    Returns
    -------
    What was compiled (or found in the cache), as text.
    """
    name = dtype_name(q_dtype)
    if name not in Q_DTYPES:
        raise TypeError(f"q_dtype: expected {' or '.join(Q_DTYPES)}, got {name}")
    pair = kv_format if isinstance(kv_format, (tuple, list)) else (kv_format, kv_format)
    k_format, v_format = (format_called(one).name for one in pair)
    q_format = format_called(name).name
    check_heads(group_size, 1, head_dim)
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {' or '.join(map(repr, LAYOUTS))}, got {layout!r}")
    problem = DecodeProblem(
        1, 1, group_size, 1, head_dim, q_format, k_format, v_format, (0, 0), (0, 0, 0), (0, 0, 0),
        soft_cap=logits_soft_cap, ragged=ragged or layout == "paged",
        paging=Paging(1, 1, 1, 0) if layout == "paged" else None,
    )  # fmt: skip
    info = device_info(device)
    decodes = specs(problem, info.arch, info.shared_per_block)
    wanted: list[Spec] = [*decodes, *dict.fromkeys(map(MergeSpec.behind, decodes))]
    if any(spec.schedule == "listed" for spec in decodes):
        wanted.append(ScheduleSpec())
    return [str(kernel.spec) for kernel in compiler.load_all(wanted, device)]
