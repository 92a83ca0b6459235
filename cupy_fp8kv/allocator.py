"""Which pages belong to which request: a pool of pages, shared by forks and copied when one of them writes.

Plain Python over numbers of pages: it knows neither arrays nor layers' contents, and every operation either succeeds as
a whole or changes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free. Nothing has changed."""


@dataclass
class _Request:
    pages: list[int] = field(default_factory=list)
    lens: list[int] = field(default_factory=list)  # rows written, for each layer


class PageAllocator:
    """Requests of some layers over one pool of pages.

    A request has one list of pages for all layers. Layers are written one after the other, so each has a length of its
    own, and the pages reach as far as the longest.

    Parameters
    ----------
    num_pages, page_size, num_layers : positive integers.
    """

    def __init__(self, num_pages: int, page_size: int, num_layers: int = 1):
        for name, value in (("num_pages", num_pages), ("page_size", page_size), ("num_layers", num_layers)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_layers = num_layers
        self._requests: dict[Hashable, _Request] = {}
        self._users = [0] * num_pages
        # Taken from the end; lower pages first.
        self._free = list(range(num_pages))[::-1]
        #: Grows with every change of a page table.
        self.version = 0

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """In the order in which they came."""
        return tuple(self._requests)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_shared(self) -> int:
        """Pages that several requests have."""
        return sum(users > 1 for users in self._users)

    def users(self, page: int) -> int:
        """How many requests have a page."""
        return self._users[page]

    def pages(self, request: Hashable) -> tuple[int, ...]:
        return tuple(self._get(request).pages)

    def length(self, request: Hashable, layer: int = 0) -> int:
        return self._get(request).lens[layer]

    def lengths(self, requests: Iterable[Hashable], layer: int) -> list[int]:
        """:meth:`length` of several."""
        return [self._get(request).lens[layer] for request in requests]

    def __contains__(self, request: object) -> bool:
        return request in self._requests

    def allocate(self, request: Hashable) -> None:
        """A request without rows. ValueError if there is one of that name."""
        self._check_new(request)
        self._requests[request] = _Request(lens=[0] * self.num_layers)
        self.version += 1

    def extend(self, layer: int, counts: Sequence[tuple[Hashable, int]]) -> list[tuple[int, int]]:
        """Make room for ``n`` more rows of ``layer`` in each ``(request, n)``, and count them as written.

        Pages that other requests share and that these rows fall into are exchanged for new ones.

        Returns
        -------
        Pairs (source, target): what was in page ``source`` must be copied to ``target`` before anything is written.

        Raises
        ------
        OutOfPagesError
            If there are not enough pages for all of them. KeyError or ValueError for requests that are not there or
            come twice. Nothing has changed then.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer: expected a number from 0 to {self.num_layers - 1}, got {layer}")
        requests = [request for request, _ in counts]
        if len(set(requests)) != len(requests):
            raise ValueError(f"requests: expected each once, got {requests}")
        # All of it is found out first. Of several that leave one shared page, the last to go may keep it.
        page_size, users = self.page_size, self._users
        new_pages, leaving = 0, dict[int, int]()
        changes: list[tuple[_Request, int, int]] = []  # the new length, and pages for it
        copies: list[tuple[_Request, int]] = []
        for request, n in counts:
            state = self._get(request)
            if n < 0:
                raise ValueError(f"counts: expected numbers of rows >= 0, got {n} for request {request!r}")
            if not n:
                continue
            pages, start = state.pages, state.lens[layer]
            reach = -(-(start + n) // page_size)
            changes.append((state, start + n, reach))
            if reach > len(pages):
                new_pages += reach - len(pages)
            for index in range(start // page_size, min(reach, len(pages))):
                page = pages[index]
                if users[page] > 1 and users[page] - leaving.get(page, 0) > 1:
                    leaving[page] = leaving.get(page, 0) + 1
                    copies.append((state, index))
        needed = new_pages + len(copies)
        if needed > len(self._free):
            raise OutOfPagesError(
                f"{needed} pages are needed ({new_pages} new, {len(copies)} to copy shared ones to), and "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        pairs = []
        for state, index in copies:
            page = state.pages[index]
            users[page] -= 1
            state.pages[index] = self._take()
            pairs.append((page, state.pages[index]))
        for state, length, reach in changes:
            state.lens[layer] = length
            while len(state.pages) < reach:
                state.pages.append(self._take())
        if needed:
            self.version += 1
        return pairs

    def fork(self, request: Hashable, new: Hashable) -> None:
        """A request ``new`` with the rows of ``request``, in the same pages. It costs no page until one writes."""
        state = self._get(request)
        self._check_new(new)
        self._requests[new] = _Request(list(state.pages), list(state.lens))
        for page in state.pages:
            self._users[page] += 1
        self.version += 1

    def free(self, request: Hashable) -> None:
        """Forget a request; pages that no other one has are free again."""
        state = self._get(request)
        del self._requests[request]
        for page in reversed(state.pages):
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
        self.version += 1

    def restore(self, requests: Iterable[tuple[Hashable, Sequence[int], Sequence[int]]]) -> None:
        """Take over requests, (name, pages, lengths by layer) each, in an allocator that has none."""
        if self._requests:
            raise ValueError("restore: expected an allocator without requests")
        for name, pages, lens in requests:
            self._check_new(name)
            if any(not 0 <= page < self.num_pages for page in pages) or len(lens) != self.num_layers:
                raise ValueError(
                    f"restore: request {name!r} does not fit {self.num_pages} pages, {self.num_layers} layers"
                )
            if len(pages) != self._pages_for(max(lens)):
                raise ValueError(f"restore: request {name!r} has {len(pages)} pages for {max(lens)} rows")
            self._requests[name] = _Request(list(pages), list(lens))
            for page in pages:
                self._users[page] += 1
        self._free = [page for page in reversed(range(self.num_pages)) if not self._users[page]]
        self.version += 1

    def _get(self, request: Hashable) -> _Request:
        try:
            return self._requests[request]
        except KeyError:
            raise KeyError(f"request: {request!r} is not allocated") from None

    def _check_new(self, request: Hashable) -> None:
        if request in self._requests:
            raise ValueError(f"request: {request!r} is allocated already")

    def _pages_for(self, rows: int) -> int:
        return -(-rows // self.page_size)

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page
