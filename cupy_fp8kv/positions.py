"""Position encodings by their name in FlashInfer. A mode is one header in ``cuda_src/position/``."""

from __future__ import annotations

#: Modes that exist, with the header and C++ type of each.
POSITION_MODES = {"NONE": ("none", "NoPosition")}
_PLANNED = ("ROPE_LLAMA", "ALIBI")


def check_pos_encoding_mode(mode: str) -> str:
    """Return ``mode``; NotImplementedError for one that FlashInfer has and we do not yet, ValueError otherwise."""
    known = isinstance(mode, str)
    if known and mode in POSITION_MODES:
        return mode
    if known and mode in _PLANNED:
        raise NotImplementedError(
            f"pos_encoding_mode: {mode!r} is not implemented yet; rotate q and the keys beforehand and pass 'NONE'"
        )
    names = ", ".join(map(repr, (*POSITION_MODES, *_PLANNED)))
    raise ValueError(f"pos_encoding_mode: expected one of {names}, got {mode!r}")
