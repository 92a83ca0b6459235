"""Memory for partial results that is kept from call to call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

#: Streams that a thread keeps workspaces for before it lets go of all of them.
MOST_STREAMS = 8


class _Thread(threading.local):
    """What a thread keeps: bytes, and memory and address, by device and stream."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], tuple[int, tuple[Any, int]]] = {}


class KeptWorkspaces:
    """A thread's workspaces, one for each stream.

    An allocation costs as much as a launch. A thread's calls on one stream run in order and can share a workspace, as
    long as they are not captured: a graph writes its workspace whenever it is replayed. The default stream can be
    neither captured nor destroyed. Another stream may get the handle of one that was destroyed with work to do: for
    those, ``keeps`` says of memory whether its allocator would have given it to that stream, too.

    ``allocate`` takes bytes and device, and returns memory and its address.
    """

    def __init__(self, allocate: Callable[[int, int], tuple[Any, int]], keeps: Callable[[Any], bool]):
        self._allocate = allocate
        self._keeps = keeps
        self._thread = _Thread()

    def workspace(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        kept = self._thread.kept
        found = kept.get((device, stream))
        if found is not None and found[0] >= nbytes:
            return found[1]
        if found is not None:
            # It goes back first, so that what follows on the stream can have its memory.
            del kept[device, stream], found
        elif len(kept) >= MOST_STREAMS:
            kept.clear()
        made = self._allocate(nbytes, device)
        if not stream or self._keeps(made[0]):
            kept[device, stream] = nbytes, made
        return made

    def take(self, nbytes: int, device: int, stream: int) -> tuple[int, tuple[Any, int]] | None:
        """What is kept for a stream and its bytes, if they are enough; it is kept no longer."""
        kept = self._thread.kept
        found = kept.get((device, stream))
        return kept.pop((device, stream)) if found is not None and found[0] >= nbytes else None
