"""The search: all options roughly, then fewer and fewer of them with more care.

Successive halving (Jamieson and Talwalkar, 2016) with one addition: the planner's choice stays to the end, so that
gain and loss are told from figures taken in turn with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..plan import Plan

#: Of a round's options this share comes into the next one, which replays each so many times more often.
_KEPT = 4
_MORE_REPLAYS = 3
_FIRST_REPLAYS = 3
#: What the last round compares beside the planner's choice, and how often.
_FINALISTS = 6
_FINAL_REPLAYS = 61
#: How many of the best are measured afresh, and how often.
_JUDGED = 3
_JUDGED_REPLAYS = 101


class Contest(Protocol):
    """Where plans are run."""

    def check(self, plan: Plan) -> None:
        """RuntimeError if the plan's result is wrong."""

    def alone(self, plan: Plan, replays: int, give_up_us: float) -> float:
        """Microseconds a call, of few replays; of one if that takes longer than ``give_up_us``."""

    def in_turn(self, plans: Sequence[Plan], replays: int) -> list[float]:
        """Microseconds a call of each plan, whose replays alternate."""


@dataclass(frozen=True)
class Timed:
    """A plan with the microseconds a call took in the last of the rounds that it took part in."""

    plan: Plan
    us: float
    rounds: int


def search(options: Sequence[Plan], contest: Contest, advance: Callable[[], object] = lambda: None) -> list[Timed]:
    """Every option with its time, those of the last round first, each round's best first.

    The first option, the planner's choice, takes part in every round. ``advance`` is called once for each option.
    """
    timed: dict[int, Timed] = {}
    best = float("inf")
    for index, plan in enumerate(options):
        contest.check(plan)
        us = contest.alone(plan, _FIRST_REPLAYS, 2 * best)
        best = min(best, us)
        timed[index] = Timed(plan, us, 1)
        advance()

    kept, replays, rounds = list(timed), _FIRST_REPLAYS, 1
    while True:
        last = len(kept) // _KEPT <= _FINALISTS
        count = _FINALISTS if last else len(kept) // _KEPT
        kept = sorted(kept, key=lambda index: timed[index].us)[:count]
        kept = [0, *(index for index in kept if index)]
        replays = max(replays, _FINAL_REPLAYS) if last else replays * _MORE_REPLAYS
        rounds += 1
        for index, us in zip(kept, contest.in_turn([options[index] for index in kept], replays), strict=True):
            timed[index] = Timed(options[index], us, rounds)
        if last:
            return sorted(timed.values(), key=lambda one: (-one.rounds, one.us))


@dataclass(frozen=True)
class Verdict:
    """The planner's choice against the best option, in turns that had no part in finding it.

    In microseconds a call; ``again_us`` is the planner's choice a second time, in the same turns.
    """

    best: Plan
    best_us: float
    planned_us: float
    again_us: float

    @property
    def loss(self) -> float:
        """How much longer the planner's choice takes: 0.02 for 2 %. Noise may make it negative."""
        return self.planned_us / self.best_us - 1

    @property
    def noise(self) -> float:
        """What two measurements of one plan differ by, as a share: no smaller loss means anything."""
        return abs(self.again_us / self.planned_us - 1)


def judge(tried: Sequence[Timed], planned: Plan, contest: Contest) -> Verdict:
    """Measure the best of a search and the planner's choice afresh.

    The fastest of many that were timed with noise looks faster than it is. So the best few are measured again to choose
    the best of them, which may be the planner's, and once more to tell its time.
    """
    last = [one.plan for one in tried if one.rounds == tried[0].rounds and one.plan is not planned]
    few = [planned, *last[:_JUDGED]]
    times = contest.in_turn(few, _JUDGED_REPLAYS)
    best = few[times.index(min(times))]
    if best is planned:
        us, again = contest.in_turn([planned, planned], _JUDGED_REPLAYS)
        return Verdict(planned, us, us, again)
    us, best_us, again = contest.in_turn([planned, best, planned], _JUDGED_REPLAYS)
    return Verdict(best, best_us, us, again)
