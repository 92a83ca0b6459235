"""What a planner knows of a device, and what it decides."""

from __future__ import annotations

from dataclasses import dataclass

from .jit.spec import DecodeSpec
from .problem import DecodeProblem
from .schedule import ListBounds

#: Bytes of partial results that no plan exceeds.
MAX_WORKSPACE = 16 << 20
#: Partial results that a thread of the last CTA of a request reads, eight at a time, before another kernel is faster.
MOST_PARTS_OF_A_THREAD = 24


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
    bounds: ListBounds | None = None  # of the work list, if one says who does what
    shares: int = 0  # equal ones of all rows, if every CTA finds its own
    merges_inside: bool = False  # whether CTAs tell each other their parts and the last of a request merges them

    @property
    def by_lengths(self) -> bool:
        """Whether lengths on the device decide who does what."""
        return self.bounds is not None or self.shares > 0

    def most_merges(self, batch: int) -> int:
        """Requests of ``batch`` that may have partial results for ``merge.cu``."""
        if self.merges_inside:
            return 0
        if self.shares:
            return self.shares - 1  # one at a cut
        return self.bounds.split_requests if self.bounds else batch * (self.splits > 1)

    @property
    def workspace(self) -> int:
        return self.workspace_out + self.workspace_state + self.workspace_list

    @property
    def workspace_list(self) -> int:
        return self.bounds.nbytes if self.bounds else 0


def partial_bytes(problem: DecodeProblem) -> int:
    """Bytes of a partial result of one request: a row of floats and a state for each column of each cache head."""
    return problem.num_kv_heads * problem.columns * (problem.head_dim * 4 + 8)


def told_bytes(problem: DecodeProblem) -> int:
    """The same of one that CTAs of a kernel tell each other: floats and a state for four, each with a tag beside."""
    return problem.num_kv_heads * problem.columns * problem.head_dim // 4 * (4 + 2) * 8


def finish_plan(
    problem: DecodeProblem,
    device: DeviceInfo,
    spec: DecodeSpec,
    blocks: int,
    splits: int,
    reason: str,
    bounds: ListBounds | None = None,
    shares: int = 0,
) -> Plan:
    """The plan that these choices make. RuntimeError if the device lacks the shared memory."""
    if spec.shared_bytes > device.shared_per_block:
        raise RuntimeError(f"{device.name}: {spec} needs {spec.shared_bytes} bytes of shared memory a CTA")
    teams = problem.num_kv_heads // spec.heads * blocks
    parts = problem.batch * splits
    slots = bounds.slots if bounds else 2 * shares if shares > 1 else parts if splits > 1 else 0
    columns = problem.num_kv_heads * problem.columns * slots
    items = (bounds.entries if bounds else shares or parts) * teams
    inside = shares > 1 and _merges_inside(problem, spec, shares)
    # One wave of CTAs that share SMs is placed less evenly then: 1 to 2 % slower on an H100, everything else faster.
    early = slots > 0 or spec.stages > 0 or items > spec.ctas_per_sm * device.sm_count
    return Plan(
        spec=spec, splits=splits, column_blocks=blocks, grid=items,
        workspace_out=slots * told_bytes(problem) if inside else columns * problem.head_dim * 4,
        workspace_state=0 if inside else columns * 8, early=early, reason=reason, bounds=bounds, shares=shares,
        merges_inside=inside,
    )  # fmt: skip


def _merges_inside(problem: DecodeProblem, spec: DecodeSpec, parts: int) -> bool:
    """Whether the last CTA of a request merges so many parts of it sooner than another kernel would."""
    # As in attention/parts.cuh: threads share the chunks of parts, or each takes all.
    tasks = spec.heads * min(problem.columns, 8 * spec.column_tiles) * problem.head_dim // 4
    return parts <= MOST_PARTS_OF_A_THREAD or -(-parts // 8) * tasks <= 32 * spec.warps


def fill(ctas: int, slots: int) -> float:
    """The share of the slots of all waves that ``ctas`` CTAs use."""
    return ctas / (max(1, -(-ctas // slots)) * slots)
