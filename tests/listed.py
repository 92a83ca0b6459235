"""Decode cases for work lists, which a planner only makes where requests may be long."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
from cases import FACTORS, Case
from pairwise import pairwise

from cupy_fp8kv import dispatch, plan

_FACTORS = {
    **FACTORS,
    "group": (1, 2, 3, 4, 5, 7, 8, 12),
    "kv_len": (1, 17, 600, 1000),
    "window_left": (-1, 0, 100),
    "batch": (2, 3, 7),
    "kv_lens": ("device", "host"),
}
#: Whose CTA shape is as the number of cache heads says: several parts of one request, and merges.
HUGE_AND_SMALL = Case(group=3, num_kv_heads=2, batch=9, kv_len=2000, kv_lens="device",
                      lens=(3, 0, 64, 2000, 1, 63, 65, 7, 17), view="padded", given_out=True, seed=1)  # fmt: skip
#: Long enough for a list, or for equal shares, by itself on any device; and lengths for it.
LONG = Case(group=4, num_kv_heads=2, batch=12, kv_len=8192, kv_lens="device", seed=3)
LENS = (
    (8192, 16, 300, 0, 4000, 1, 17, 900, 6000, 64, 65, 2500), (8192,) * 12, (0,) * 12, (0,) * 11 + (1,),
    (8192,) + (40,) * 11,
)  # fmt: skip
NAMED = {
    "huge_and_small": HUGE_AND_SMALL,
    "equal": Case(group=5, num_kv_heads=1, batch=4, kv_len=700, kv_lens="device", lens=(700,) * 4, seed=2),
    "empty_of_all": Case(group=7, batch=5, kv_len=700, kv_lens="device", lens=(0,) * 5, seed=3),
    "many": Case(group=2, batch=300, kv_len=40, head_dim=16, kv_lens="device",
                 lens=(*random.Random(4).choices((0, 1, 15, 16, 17, 40), k=299), 40), seed=4),
    "windows": Case(group=4, num_kv_heads=3, batch=4, kv_len=1500, window_left=600, kv_lens="device",
                    lens=(1500, 20, 900, 601), seed=5),
    "wide_group": Case(group=12, batch=3, kv_len=900, head_dim=64, kv_lens="device", lens=(900, 5, 300), seed=6),
    "column_blocks": Case(group=33, batch=2, kv_len=600, kv_lens="device", lens=(17, 600), seed=7),
}  # fmt: skip


@contextmanager
def without_even_shares(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, ragged batches are planned as on devices without a copy engine."""
    with patch.context() as inside:
        inside.setattr(plan, "even_plan", lambda *_: None)
        inside.setattr(dispatch, "_prepared", {})
        yield


@contextmanager
def lists_everywhere(patch: pytest.MonkeyPatch, least_rows: int = 16) -> Iterator[None]:
    """Inside, requests with lengths of their own go through a work list however short they are, in parts as short."""
    with without_even_shares(patch), patch.context() as inside:
        inside.setattr(plan, "LISTED_LEAST_BYTES", 0)
        inside.setattr(plan, "LISTED_LEAST_ROWS", least_rows)
        yield


@cache
def listed_cases() -> list[Case]:
    """Any two values of two options together."""
    return [Case(**chosen, seed=seed) for seed, chosen in enumerate(pairwise(_FACTORS))]


@cache
def random_lens(seed: int) -> tuple[tuple[int, ...], int]:
    """Lengths of a batch and their bound: few or many, equal, spread evenly or by orders of magnitude."""
    rng = random.Random(seed)
    batch, most = rng.choice([2, 3, 31, 32, 33, 64, 300, 1500]), rng.choice([1, 100, 5000, 200_000])
    kinds = {
        "even": lambda: rng.randint(0, most), "equal": lambda: most, "none": lambda: 0,
        "orders": lambda: int(most ** rng.random()), "one": lambda: rng.choice([most] + [min(most, 50)] * batch),
    }  # fmt: skip
    one = kinds[rng.choice(list(kinds))]
    return tuple(one() for _ in range(batch)), most
