"""Memory for partial results that is kept from call to call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

#: Streams that a thread keeps workspaces for before it lets go of all of them.
MOST_STREAMS = 8


class KeptWorkspaces(threading.local):
    """A thread's workspaces by device and stream: bytes, memory, address.

    An allocation costs as much as a launch. A thread's calls on one stream run in order and can share a workspace, as
    long as they are not captured: a graph writes its workspace whenever it is replayed. The default stream can be
    neither captured nor destroyed. Another stream may get the handle of one that was destroyed with work to do: for
    those, ``keeps`` says of memory whether its allocator would have given it to that stream, too.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[int, Any, int]] = {}

    def workspace(
        self,
        nbytes: int,
        device: int,
        stream: int,
        allocate: Callable[[int, int], tuple[Any, int]],
        keeps: Callable[[Any], bool],
    ) -> tuple[Any, int]:
        kept = self._kept
        found = kept.get((device, stream))
        if found is not None and found[0] >= nbytes:
            return found[1], found[2]
        if found is not None:
            # It goes back first, so that what follows on the stream can have its memory.
            del kept[device, stream], found
        elif len(kept) >= MOST_STREAMS:
            kept.clear()
        memory, address = allocate(nbytes, device)
        if not stream or keeps(memory):
            kept[device, stream] = nbytes, memory, address
        return memory, address

    def take(self, nbytes: int, device: int, stream: int) -> tuple[int, Any, int] | None:
        """What is kept for a stream, if it is large enough; it is kept no longer."""
        found = self._kept.get((device, stream))
        return self._kept.pop((device, stream)) if found is not None and found[0] >= nbytes else None
