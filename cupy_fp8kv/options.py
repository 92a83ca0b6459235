"""Options of the decode calls that are numbers or names, checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import scales

LSE_UNITS = {"2": 1.0, "e": math.log(2.0)}


def as_key(window_left: Any, logits_soft_cap: Any, kv_format: Any) -> tuple[int, float | None, Any]:
    """Options in the types of a key: values that compare equal to a checked one must not pass as it."""
    if type(window_left) is not int or not -1 <= window_left < 2**31:
        window_left = integer(window_left, "window_left")
    if logits_soft_cap is not None and type(logits_soft_cap) is not float:
        logits_soft_cap = scales.number(logits_soft_cap, "logits_soft_cap")
    return window_left, logits_soft_cap, tuple(kv_format) if isinstance(kv_format, list) else kv_format


def integer(value: Any, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    # Beyond any length, and what 32 bits hold.
    return max(-1, min(int(value), 2**31 - 1))


def check_lse_base(lse_base: Any) -> None:
    if not isinstance(lse_base, str) or lse_base not in LSE_UNITS:
        raise ValueError(f"lse_base: expected '2' or 'e', got {lse_base!r}")
