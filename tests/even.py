"""Decode cases for equal shares of all rows, which a planner only takes where requests may be long."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
from cases import FACTORS, Case
from listed import NAMED as LISTED
from paged_cases import FACTORS as PAGED_FACTORS
from paged_cases import PagedCase, paged
from pairwise import pairwise

from cupy_fp8kv import dispatch, plan, ring_plans

_FACTORS = {
    **FACTORS,
    "group": (1, 2, 3, 4, 5, 7, 8, 12, 16),
    "kv_len": (1, 17, 600, 1000),
    "window_left": (-1, 0, 100),
    "batch": (2, 3, 7),
    "num_kv_heads": (1, 2, 3, 4, 8),
    "k": ("e4m3", "e5m2", "e4m3", "f16", "bf16"),
    "v": ("e4m3", "e4m3", "e5m2", "f16", "bf16"),
    "kv_lens": ("device", "host"),
}
_PAGED_FACTORS = {
    **PAGED_FACTORS,
    "page_size": (16, 32, 48, 64, 80, 256, 512),
    "group": (1, 3, 4, 5, 7, 8, 12),
    "k": _FACTORS["k"],
    "v": _FACTORS["v"],
    "batch": (1, 2, 5, 9),
    "num_kv_heads": (1, 2, 3, 4),
}
NAMED = {name: case for name, case in LISTED.items() if name != "column_blocks"} | {
    # Requests that begin, end or do both in a share; shares within one request; and more requests than lanes.
    "one": Case(group=4, num_kv_heads=2, batch=2, kv_len=1500, kv_lens="device", lens=(1333, 0), seed=11),
    "cuts": Case(group=8, num_kv_heads=1, batch=9, kv_len=2000, kv_lens="device",
                 lens=(2000, 0, 128, 127, 129, 1999, 0, 1, 640), given_out=True, seed=12),
    "wide": Case(group=16, num_kv_heads=2, head_dim=96, batch=5, kv_len=900, kv_lens="device",
                 lens=(900, 5, 300, 0, 77), seed=13),
    "long_rows": Case(group=4, num_kv_heads=2, batch=4, kv_len=900, k="f16", v="f16", kv_lens="device",
                      lens=(900, 5, 300, 250), seed=14),
}  # fmt: skip


@contextmanager
def even_everywhere(patch: pytest.MonkeyPatch, least_rows: int = 16) -> Iterator[None]:
    """Inside, requests with lengths of their own are read in equal shares however short they are."""
    with patch.context() as inside:
        inside.setattr(ring_plans, "EVEN_LEAST_BYTES", 0)
        inside.setattr(ring_plans, "MIN_RING_FILL", 0.0)
        inside.setattr(ring_plans, "_EVEN_BYTES_A_PART", 0)
        inside.setattr(plan, "LISTED_LEAST_ROWS", least_rows)
        inside.setattr(dispatch, "_prepared", {})
        yield


def _has_ring(case: Case) -> bool:
    spec, blocks = plan._tile(case.problem)
    return blocks == 1 and bool(ring_plans.even_specs(spec, 90))


@cache
def even_cases() -> list[Case]:
    """Any two values of two options together, as far as rings take them."""
    found = [Case(**chosen, seed=seed) for seed, chosen in enumerate(pairwise(_FACTORS))]
    return [case for case in found if _has_ring(case)]


@cache
def even_paged_cases() -> list[PagedCase]:
    """The same over pages of whole boxes."""
    found = [paged(**chosen, seed=seed) for seed, chosen in enumerate(pairwise(_PAGED_FACTORS))]
    return [case for case in found if _has_ring(case.base)]


@cache
def random_shares(seed: int) -> tuple[tuple[int, ...], int, int]:
    """Lengths of a batch, and numbers of shares and of turns that one has at least."""
    rng = random.Random(seed)
    batch, most = rng.choice([1, 2, 31, 32, 33, 64, 300, 1500]), rng.choice([1, 100, 5000, 200_000])
    kinds = (lambda: rng.randint(0, most), lambda: most, lambda: 0, lambda: int(most ** rng.random()))
    one = rng.choice(kinds)
    return tuple(one() for _ in range(batch)), rng.choice([1, 2, 7, 16, 132]), rng.choice([1, 2, 9])
