"""Options, the search over them, and where tuned plans are kept: pure functions, files, and calls on the emulator."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import warnings

import numpy as np
import pytest
from cases import H100
from hypothesis import given, settings
from test_plan import ANY_DEVICE, DEVICES, PROBLEMS, RESERVED, problem

from cupy_fp8kv.jit import compiler, sources
from cupy_fp8kv.jit.covering import SETS
from cupy_fp8kv.plan import MAX_COLUMNS, MAX_WORKSPACE, plan_decode, split_rows
from cupy_fp8kv.problem import MOST_BOX_ROWS
from cupy_fp8kv.tuning import search, store, study
from cupy_fp8kv.tuning.options import plan_options, spec_options

PLAIN = problem(batch=3, kv_len=5000, num_kv_heads=4, group=4)


# Options


def choice(plan):
    return plan.spec, plan.splits


@settings(max_examples=150, deadline=None)
@given(PROBLEMS, ANY_DEVICE)
def test_every_option_is_a_plan_that_runs(problem, device):
    planned, options = plan_decode(problem, device), plan_options(problem, device)
    assert options[0] == planned
    assert len({choice(plan) for plan in options}) == len(options)
    if problem.ragged or not problem.rows_read:
        assert options == [planned]
    for plan in options[1:]:
        spec, tiles = plan.spec, math.ceil(problem.rows_read / plan.spec.turn_rows)
        pieces, left_over = divmod(plan.grid, plan.splits)
        assert not left_over and 1 <= plan.splits <= max(1, tiles) and plan.grid < 2**31
        assert pieces == problem.batch * problem.num_kv_heads // spec.heads * plan.column_blocks
        columns = 8 * spec.column_tiles
        assert columns <= MAX_COLUMNS
        assert (plan.column_blocks - 1) * columns < problem.group_size <= plan.column_blocks * columns
        assert plan.workspace <= MAX_WORKSPACE
        assert spec.ctas_per_sm * (spec.shared_bytes + RESERVED) <= device.shared_per_block + RESERVED
        assert (spec.q, spec.k, spec.v, spec.head_dim, spec.soft_cap) == (
            problem.q_format, problem.k_format, problem.v_format, problem.head_dim, problem.soft_cap
        )  # fmt: skip
        assert spec.ahead >= 0 and spec.threads <= 1024
        if spec.stages:
            assert device.arch >= 90 and problem.can_copy_boxes and spec.stages >= 2
            assert problem.num_kv_heads % spec.heads == 0 == spec.warps % spec.heads
            assert spec.turn_rows <= MOST_BOX_ROWS
        else:
            assert spec.heads == 1 and spec.warps * spec.ctas_per_sm in (8, 16)


@pytest.mark.parametrize("some", [
    PLAIN, problem(kv_len=1003, group=12), problem(batch=40, kv_len=700, num_kv_heads=8, head_dim=64),
    problem(kv_len=20_000, window=777),
], ids=str)  # fmt: skip
def test_options_cover_every_row_once(some):
    for plan in plan_options(some, H100):
        parts = split_rows(0, some.rows_read, plan.splits, plan.spec.warps // plan.spec.heads, plan.spec.tile_rows)
        ranges = sorted(itertools.chain(*parts))
        assert len(parts) == plan.splits and all(parts), "a split without rows only costs a merge"
        assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
        assert ranges[-1][1] == some.rows_read


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_the_planner_chooses_among_the_options(device):
    """Without being put there: the options' own rules give what the planner takes."""
    shapes = [*study.random_shapes(1, 60), *study.random_shapes(2, 60)]
    missing = []
    for shape in shapes:
        some = study.problem_of(shape)
        planned = plan_decode(some, device)
        if planned.spec not in spec_options(some, device):
            missing.append((shape, planned.spec))
    assert not missing


def test_options_are_many_but_not_too_many():
    for shape in study.random_shapes(3, 60):
        options = plan_options(study.problem_of(shape), H100)
        assert 5 <= len(options) <= 900
        assert len({spec.source() for spec in {plan.spec for plan in options}}) <= 60
    some = plan_options(problem(batch=16, kv_len=8192, num_kv_heads=8, group=4), H100)
    specs = {plan.spec for plan in some}
    assert {spec.heads for spec in specs if spec.stages} == {1, 2, 4}
    assert {spec.warps * spec.ctas_per_sm for spec in specs if not spec.stages} == {8, 16}
    assert {spec.ctas_per_sm for spec in specs} == {1, 2, 4} and {1, 2, 3, 4} <= {plan.splits for plan in some}
    sizes = {spec.stages * spec.stage_bytes * spec.ctas_per_sm for spec in specs if spec.stages}
    assert min(sizes) <= 48 << 10 and max(sizes) >= 96 << 10


def test_sets_of_specialisations_have_the_options():
    for arch in (80, 90):
        specs = SETS["options"](arch)
        assert len(set(specs)) == len(specs) > 200 and any(spec.stages for spec in specs) == (arch >= 90)
        device = dataclasses.replace(H100, arch=arch)
        wanted = spec_options(problem(batch=16, kv_len=4096, num_kv_heads=8, group=8), device)
        assert {spec.source() for spec in wanted} <= {spec.source() for spec in specs}


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_options_compile_without_spills(arch):
    """A sample of all; ``python -m cupy_fp8kv compile --set options`` has the rest."""
    pytest.importorskip("cupy")
    device = dataclasses.replace(H100, arch=arch)
    kinds = [
        problem(batch=4, kv_len=9000, num_kv_heads=8, group=group, head_dim=head_dim, q=q, k=k, v=v, soft_cap=soft_cap)
        for group, head_dim, q, k, v, soft_cap in (
            (8, 128, "f16", "e4m3", "e4m3", False), (16, 96, "bf16", "e4m3", "bf16", True),
            (12, 64, "f16", "e5m2", "e4m3", True), (4, 192, "bf16", "f16", "e5m2", False),
            (16, 256, "f16", "e4m3", "e4m3", True), (2, 80, "f16", "bf16", "bf16", False),
        )
    ]  # fmt: skip
    for index, some in enumerate(kinds):
        # Those with the most to keep in registers are the ones that could spill.
        specs = sorted(
            spec_options(some, device), key=lambda spec: -spec.fragment_registers[spec.ahead] * spec.ctas_per_sm
        )  # fmt: skip
        assert specs
        for spec in specs[index % 3 :: max(1, len(specs) // 4)]:
            report = compiler.compile_offline(spec, arch)
            assert not report.error and not report.spill_bytes, f"{spec}: {report.spill_bytes} bytes {report.error}"


# The search


class Fake:
    """A contest whose times are made up: ``times[choice]``, with noise that shrinks as replays grow."""

    def __init__(self, times, noise=0.0):
        self.times, self.noise, self.rng = times, noise, np.random.default_rng(0)
        self.checked, self.rounds, self.given_up = [], [], 0

    def check(self, plan):
        self.checked.append(choice(plan))

    def _time(self, plan, replays):
        return self.times[choice(plan)] * (1 + self.noise * self.rng.uniform(-1, 1) / replays**0.5)

    def alone(self, plan, replays, give_up_us):
        us = self._time(plan, replays)
        self.given_up += us > give_up_us
        return us

    def in_turn(self, plans, replays):
        self.rounds.append((len(plans), replays))
        return [self._time(plan, replays) for plan in plans]


def made_up(options, seed):
    rng = np.random.default_rng(seed)
    return {choice(plan): us for plan, us in zip(options, 50 + rng.permutation(len(options)), strict=True)}


@pytest.mark.parametrize("seed", range(5))
def test_search_finds_the_best(seed):
    options = plan_options(PLAIN, H100)
    contest = Fake(made_up(options, seed), noise=0.02)
    calls = []
    tried = search.search(options, contest, lambda: calls.append(1))
    assert contest.times[choice(tried[0].plan)] == 50
    assert sorted(map(str, contest.checked)) == sorted(str(choice(plan)) for plan in options), "all results are checked"
    assert len(tried) == len(calls) == len(options) and len({choice(one.plan) for one in tried}) == len(options)
    planned = next(one for one in tried if one.plan is options[0])
    assert planned.rounds == tried[0].rounds == max(one.rounds for one in tried), (
        "the planner's choice stays to the end"
    )
    counts, replays = zip(*contest.rounds, strict=True)
    assert list(counts) == sorted(counts, reverse=True) and counts[-1] <= 7
    assert list(replays) == sorted(replays) and contest.given_up > 0
    last = [one.us for one in tried if one.rounds == tried[0].rounds]
    assert last == sorted(last)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 30])
def test_search_of_few_options(count):
    options = plan_options(PLAIN, H100)[:count]
    contest = Fake(made_up(options, 0))
    tried = search.search(options, contest)
    assert len(tried) == count and contest.times[choice(tried[0].plan)] == 50 and tried[0].rounds >= 2


def test_search_stops_at_a_wrong_result():
    options = plan_options(PLAIN, H100)
    contest = Fake(made_up(options, 0))

    def check(plan):
        if plan is options[3]:
            raise RuntimeError("wrong")

    contest.check = check
    with pytest.raises(RuntimeError, match="wrong"):
        search.search(options, contest)


# What is kept


def kept(plan, us=40.0):
    return store.Record(plan, us, 44.0, 100)


def another(some, device=H100):
    """An option that is not the planner's choice."""
    planned = plan_decode(some, device)
    return next(plan for plan in plan_options(some, device) if plan.spec != planned.spec and plan.splits > 1)


def test_a_plan_comes_back(tuned_plans):
    plan = another(PLAIN)
    assert store.load(PLAIN, H100) is None and store.files() == []
    path = store.save(PLAIN, H100, kept(plan))
    assert path.parent == tuned_plans and store.files() == [path]
    found = store.load(PLAIN, H100)
    assert dataclasses.replace(found.plan, reason=plan.reason) == plan
    assert (found.us, found.planned_us, found.options) == (40.0, 44.0, 100)
    assert "40.00 µs" in found.plan.reason and "44.00 µs" in found.plan.reason
    assert store.tuned_plan(PLAIN, H100) == found.plan


def test_a_plan_is_for_one_problem_and_device():
    store.save(PLAIN, H100, kept(another(PLAIN)))
    for change in ({"kv_len": 5001}, {"batch": 4}, {"soft_cap": True}, {"window": 100}, {"k_format": "e5m2"},
                   {"k_strides": (1 << 20, 512, 128)}, {"ragged": True}):  # fmt: skip
        assert store.tuned_plan(dataclasses.replace(PLAIN, **change), H100) is None
    for change in ({"name": "H200"}, {"sm_count": 114}, {"arch": 100}, {"shared_per_block": 100_000}):
        assert store.tuned_plan(PLAIN, dataclasses.replace(H100, **change)) is None
    # Where q lies does not matter to a plan.
    assert store.tuned_plan(dataclasses.replace(PLAIN, q_strides=(64, 32)), H100) is not None


def test_requests_with_lengths_of_their_own_are_left_to_the_planner():
    ragged = dataclasses.replace(PLAIN, ragged=True)
    store.save(ragged, H100, kept(plan_decode(ragged, H100)))
    assert store.tuned_plan(ragged, H100) is None and plan_options(ragged, H100) == [plan_decode(ragged, H100)]


def test_the_last_of_two_stays():
    first, second = plan_options(PLAIN, H100)[5:7]
    assert store.save(PLAIN, H100, kept(first)) == store.save(PLAIN, H100, kept(second))
    assert choice(store.load(PLAIN, H100).plan) == choice(second) and len(store.files()) == 1


def edited(change):
    path = store.save(PLAIN, H100, kept(another(PLAIN)))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(version="0.0.0"), "other kernels"),
        (lambda c: c.update(sources="0123456789abcdef"), "other kernels"),
        (lambda c: c["problem"].update(batch=7), "another problem"),
        (lambda c: c["device"].update(sm_count=7), "another problem or device"),
        (lambda c: c["plan"].update(warps=1 << 20), "no option"),
        (lambda c: c["plan"].update(splits=10**9), "no option"),
        (lambda c: c["plan"].update(splits="2"), "no option"),
        (lambda c: c["plan"].pop("stages"), "not what tune writes"),
        (lambda c: c.update(plan=None), "not what tune writes"),
        (lambda c: c.update(us=[]), "not what tune writes"),
        (lambda c: c.update(options=float("inf")), "not what tune writes"),
        (lambda c: c.clear(), "not what tune writes"),
    ],
)
def test_what_does_not_fit_is_ignored_with_a_warning(change, said):
    path = edited(change)
    with pytest.warns(RuntimeWarning, match=said) as caught:
        assert store.tuned_plan(PLAIN, H100) is None
    assert str(path) in str(caught[0].message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"version": 1}', b"1e999"])
def test_what_cannot_be_read_is_ignored_with_a_warning(content):
    path = store.save(PLAIN, H100, kept(another(PLAIN)))
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert store.tuned_plan(PLAIN, H100) is None
    store.save(PLAIN, H100, kept(another(PLAIN)))
    assert store.tuned_plan(PLAIN, H100) is not None, "tuned again, it is whole"


def test_a_folder_in_the_place_of_a_file_is_ignored_with_a_warning():
    path = store.save(PLAIN, H100, kept(another(PLAIN)))
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert store.tuned_plan(PLAIN, H100) is None


def test_an_edited_source_makes_plans_outdated(monkeypatch):
    store.save(PLAIN, H100, kept(another(PLAIN)))
    monkeypatch.setitem(sources.FILES, "decode.cu", sources.FILES["decode.cu"] + "// changed\n")
    with pytest.warns(RuntimeWarning, match="tune again"):
        assert store.tuned_plan(PLAIN, H100) is None


def test_a_write_that_fails_leaves_what_was_there(monkeypatch, tuned_plans):
    first, second = plan_options(PLAIN, H100)[5:7]
    path = store.save(PLAIN, H100, kept(first))
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(store.json, "dump", fail)
        with pytest.raises(OSError, match="disk full"):
            store.save(PLAIN, H100, kept(second))
    assert path.read_bytes() == before and list(tuned_plans.iterdir()) == [path]


def _write_many(folder, which, count):
    store.folder = lambda: folder
    plan = plan_options(PLAIN, H100)[5 + which]
    for _ in range(count):
        store.save(PLAIN, H100, kept(plan))


def test_two_writers_and_a_reader(tuned_plans):
    plans = plan_options(PLAIN, H100)[5:7]
    store.save(PLAIN, H100, kept(plans[0]))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tuned_plans, which, 60)) for which in (0, 1)]
    for writer in writers:
        writer.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = set()
        while any(writer.is_alive() for writer in writers):
            seen.add(choice(store.load(PLAIN, H100).plan))
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0] and seen <= {choice(plan) for plan in plans}
    assert [path.suffix for path in tuned_plans.iterdir()] == [".json"], "nothing half written is left"


def test_clear(tuned_plans):
    assert store.clear() == 0
    store.save(PLAIN, H100, kept(another(PLAIN)))
    store.save(problem(), H100, kept(plan_decode(problem(), H100)))
    (tuned_plans / "left by a writer.tmp").write_text("{")
    assert store.clear() == 2 and list(tuned_plans.iterdir()) == []
