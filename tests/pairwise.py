"""Pairwise covering: few cases in which every pair of values of two factors occurs together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Pair = tuple[str, Any, str, Any]


def pairs_of(case: Mapping[str, Any], names: Sequence[str]) -> set[Pair]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0, candidates: int = 8) -> list[dict[str, Any]]:
    """Cases that cover every pair, found greedily: always the same ones for the same factors and seed.

    A case starts from an uncovered pair; its other factors, in random order, take the value that covers most new pairs
    with those chosen already. The best of ``candidates`` such cases is kept.
    """
    rng = random.Random(seed)
    names = list(factors)
    order = {name: i for i, name in enumerate(names)}
    open_pairs = {
        (a, x, b, y): None for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }  # a dict keeps its order: a set of strings would not

    def pair(a: str, x: Any, b: str, y: Any) -> Pair:
        return (a, x, b, y) if order[a] < order[b] else (b, y, a, x)

    def grow(start: Pair) -> tuple[int, dict[str, Any]]:
        chosen, gain = {start[0]: start[1], start[2]: start[3]}, 1
        for name in rng.sample(names, len(names)):
            if name in chosen:
                continue
            new = {x: sum(pair(name, x, b, y) in open_pairs for b, y in chosen.items()) for x in factors[name]}
            best = max(new.values())
            chosen[name] = rng.choice([x for x in factors[name] if new[x] == best])
            gain += best
        return gain, {name: chosen[name] for name in names}

    cases = []
    while open_pairs:
        start = next(iter(open_pairs))
        _, case = max((grow(start) for _ in range(candidates)), key=lambda grown: grown[0])
        for covered in pairs_of(case, names):
            open_pairs.pop(covered, None)
        cases.append(case)
    return cases
