"""Memory for partial results that is kept from call to call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class KeptWorkspaces(threading.local):
    """A thread's workspaces for the default stream: (bytes, memory, address) by device.

    An allocation costs as much as a launch. On the default stream, which can neither be captured nor destroyed, a
    thread's calls run in order and can share one.
    """

    def __init__(self) -> None:
        self._by_device: dict[int, tuple[int, Any, int]] = {}

    def workspace(self, nbytes: int, device: int, allocate: Callable[[int, int], tuple[Any, int]]) -> tuple[Any, int]:
        kept = self._by_device.get(device)
        if kept is None or kept[0] < nbytes:
            kept = self._by_device[device] = (nbytes, *allocate(nbytes, device))
        return kept[1], kept[2]
