"""The page allocator under a state machine: what requests read is what was written to them, whatever they share."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from cupy_fp8kv.allocator import OutOfPagesError, PageAllocator


class Machine(RuleBasedStateMachine):
    """The model keeps the rows of each request and layer as lists; memory holds what the allocator says they become."""

    requests = Bundle("requests")

    @initialize(
        num_pages=st.integers(1, 12), page_size=st.integers(1, 5), num_layers=st.integers(1, 3)
    )  # fmt: skip
    def start(self, num_pages, page_size, num_layers):
        self.allocator = PageAllocator(num_pages, page_size, num_layers)
        self.memory = [[[None] * page_size for _ in range(num_pages)] for _ in range(num_layers)]
        self.rows = {}
        self.names = self.tokens = 0

    def name(self):
        self.names += 1
        return self.names

    @rule(target=requests)
    def allocate(self):
        name = self.name()
        self.allocator.allocate(name)
        self.rows[name] = [[] for _ in self.memory]
        return name

    @rule(target=requests, request=requests)
    def fork(self, request):
        free, name = self.allocator.num_free, self.name()
        self.allocator.fork(request, name)
        self.rows[name] = [list(rows) for rows in self.rows[request]]
        assert self.allocator.num_free == free and self.allocator.pages(name) == self.allocator.pages(request)
        return name

    @rule(target=requests, request=consumes(requests))
    def free(self, request):
        self.allocator.free(request)
        del self.rows[request]
        assert request not in self.allocator
        return multiple()

    @rule(chosen=st.lists(st.tuples(requests, st.integers(0, 7)), max_size=4, unique_by=lambda x: x[0]), data=st.data())
    def append(self, chosen, data):
        layer = data.draw(st.integers(0, len(self.memory) - 1))
        before = self.state()
        try:
            copies = self.allocator.extend(layer, chosen)
        except OutOfPagesError:
            assert self.state() == before, "something changed"
            return
        targets = [target for _, target in copies]
        assert len(set(targets)) == len(targets) and not {source for source, _ in copies} & set(targets)
        for of_layer in self.memory:
            for source, target in copies:
                of_layer[target] = list(of_layer[source])
        for request, n in chosen:
            pages, start = self.allocator.pages(request), len(self.rows[request][layer])
            assert self.allocator.length(request, layer) == start + n
            for position in range(start, start + n):
                self.tokens += 1
                self.rows[request][layer].append(self.tokens)
                page = pages[position // self.allocator.page_size]
                assert self.allocator.users(page) == 1, "a shared page is written"
                self.memory[layer][page][position % self.allocator.page_size] = self.tokens

    def state(self):
        return (
            [
                (name, self.allocator.pages(name), [self.allocator.length(name, i) for i in range(len(self.memory))])
                for name in self.allocator.requests
            ],
            self.allocator.num_free,
            self.allocator.version,
        )

    @invariant()
    def every_request_reads_its_rows(self):
        page_size = self.allocator.page_size
        assert self.allocator.requests == tuple(self.rows)
        for request, layers in self.rows.items():
            pages = self.allocator.pages(request)
            assert len(pages) == -(-max(map(len, layers)) // page_size) and len(set(pages)) == len(pages)
            for of_layer, rows in zip(self.memory, layers, strict=True):
                assert [of_layer[pages[i // page_size]][i % page_size] for i in range(len(rows))] == rows

    @invariant()
    def every_page_is_counted(self):
        used = [page for request in self.rows for page in self.allocator.pages(request)]
        counts = [used.count(page) for page in range(self.allocator.num_pages)]
        assert [self.allocator.users(page) for page in range(self.allocator.num_pages)] == counts
        assert self.allocator.num_free == counts.count(0)
        assert self.allocator.num_shared == sum(count > 1 for count in counts)

    @invariant()
    def it_can_be_restored(self):
        ours = self.allocator
        other = PageAllocator(ours.num_pages, ours.page_size, ours.num_layers)
        saved = self.state()[0]
        other.restore(saved)
        assert other.requests == ours.requests and other.num_free == ours.num_free
        assert all(other.pages(name) == pages for name, pages, _ in saved)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_the_last_of_those_that_share_keeps_the_page():
    allocator = PageAllocator(3, 4)
    allocator.allocate("a")
    allocator.extend(0, [("a", 6)])
    allocator.fork("a", "b")
    assert allocator.extend(0, [("a", 1), ("b", 1)]) == [(1, 2)]
    assert allocator.pages("a") == (0, 2) and allocator.pages("b") == (0, 1)
    assert allocator.extend(0, [("a", 1), ("b", 1)]) == [], "nothing is shared any more"


def test_errors():
    allocator = PageAllocator(2, 4, 2)
    allocator.allocate("a")
    with pytest.raises(ValueError, match=r"^request: 'a' is allocated already"):
        allocator.allocate("a")
    with pytest.raises(ValueError, match=r"^request: 'a' is allocated already"):
        allocator.fork("a", "a")
    for call in (
        lambda: allocator.free("b"),
        lambda: allocator.fork("b", "c"),
        lambda: allocator.extend(0, [("b", 1)]),
    ):
        with pytest.raises(KeyError, match=r"request: 'b' is not allocated"):
            call()
    with pytest.raises(ValueError, match=r"^layer: expected a number from 0 to 1, got 2"):
        allocator.extend(2, [("a", 1)])
    with pytest.raises(ValueError, match=r"^requests: expected each once"):
        allocator.extend(0, [("a", 1), ("a", 1)])
    with pytest.raises(ValueError, match=r"^counts: expected numbers of rows >= 0, got -1 for request 'a'"):
        allocator.extend(0, [("a", -1)])
    with pytest.raises(OutOfPagesError, match=r"^3 pages are needed \(3 new, 0 to copy .*\), and 2 of 2 are free"):
        allocator.extend(0, [("a", 9)])
    assert allocator.pages("a") == () and allocator.num_free == 2
    for sizes in ((0, 4), (4, 0), (4, 4, 0)):
        with pytest.raises(ValueError, match="expected a positive number, got 0"):
            PageAllocator(*sizes)
    with pytest.raises(TypeError, match=r"^page_size: expected an integer, got 4\.0"):
        PageAllocator(4, 4.0)
    with pytest.raises(ValueError, match=r"^restore: expected an allocator without requests"):
        allocator.restore([])
    with pytest.raises(ValueError, match=r"^restore: request 'x' has 1 pages for 5 rows"):
        PageAllocator(2, 4).restore([("x", [0], [5])])
    with pytest.raises(ValueError, match=r"^restore: request 'x' does not fit 2 pages"):
        PageAllocator(2, 4).restore([("x", [2], [4])])
