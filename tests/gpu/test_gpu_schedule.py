"""Work lists made on the device, and plans that are scheduled once for many runs: against definition and oracle.

What does not say otherwise is run with a list and, where there is a copy engine, in equal shares.
"""

import dataclasses
import time

import cases
import numpy as np
import pytest
from cases import Case, build
from gpu_support import assert_same_bits, cp, device, spin, to_cupy, to_host, warm_spin
from listed import HUGE_AND_SMALL, LENS, LONG, NAMED, listed_cases, lists_everywhere, random_lens, without_even_shares
from plans import plan_of, run_plan
from test_gpu_decode import run

import cupy_fp8kv
from cupy_fp8kv.arrays import cupy_library
from cupy_fp8kv.backends.cuda import PreparedDecode
from cupy_fp8kv.jit import compiler
from cupy_fp8kv.jit.spec import ScheduleSpec
from cupy_fp8kv.plan import MAX_WORKSPACE, least_turns, plan_decode
from cupy_fp8kv.schedule import read_list, visible_rows, work_list

pytestmark = pytest.mark.gpu


@pytest.fixture
def lists(monkeypatch):
    with lists_everywhere(monkeypatch):
        yield


@pytest.fixture(params=["listed", "even"])
def schedule(request, monkeypatch):
    """How LONG is run."""
    if request.param == "listed":
        with without_even_shares(monkeypatch):
            yield "listed"
    elif device().arch >= 90:
        yield "even"
    else:
        pytest.skip(f"sm_{device().arch} has no copy engine")


def made_list(lens, most, window_left=-1, num_kv_heads=8):
    """The work list of some lengths below ``most``: what the kernel makes, and what it is defined to be."""
    case = Case(batch=len(lens), kv_len=most, num_kv_heads=num_kv_heads, kv_lens="device", window_left=window_left)
    prepared = PreparedDecode(case.problem, cp.cuda.runtime.getDevice(), (0, 0))
    bounds, spec = prepared.plan.bounds, prepared.plan.spec
    memory, kv_lens = cp.full(bounds.nbytes, 0xFF, np.uint8), cp.asarray(lens, np.int32)
    prepared.schedule(cupy_library(), kv_lens.data.ptr, window_left, memory.data.ptr)
    want = work_list(
        np.clip(lens, 0, most).tolist(), window_left=window_left, turn_rows=spec.turn_rows, parts=bounds.parts,
        least_turns=least_turns(spec), threads=ScheduleSpec.of_batch(len(lens)).threads,
    )  # fmt: skip
    return read_list(cp.asnumpy(memory), bounds), want


# The list


@pytest.mark.parametrize("seed", range(40))
def test_the_list_is_as_defined(lists, seed):
    print(f"seed {seed}")
    lens, most = random_lens(seed)
    made, want = made_list(lens, most, (-1, -1, 300)[seed % 3], (1, 2, 8, 32)[seed % 4])
    assert made == want


@pytest.mark.parametrize("batch", [1025, 4096, 65_536, 70_001])
def test_the_list_of_a_large_batch(lists, batch):
    lens = np.random.default_rng(batch).integers(0, 5000, batch).astype(np.int32)
    lens[7] = 20_000_000
    made, want = made_list(lens.tolist(), 20_000_000)
    assert made == want and len(made[1]) >= 1


def test_lengths_out_of_bounds_are_cut(lists):
    made, want = made_list((2**31 - 1, -5, 70, -(2**31)), 900)
    assert made == want


# Decode and merge


@pytest.mark.parametrize("case", listed_cases(), ids=str)
def test_listed(lists, case):
    assert case.plan(device()).bounds
    run(case)


@pytest.mark.parametrize("name", NAMED)
def test_named(lists, name):
    run(NAMED[name])


@pytest.mark.parametrize("seed", range(30))
def test_random_lengths(lists, seed):
    print(f"seed {seed}")
    lens, _ = random_lens(seed)
    lens = [n % 2001 for n in lens[:12]]
    case = Case(
        batch=len(lens), kv_len=2000, num_kv_heads=1 + seed % 2, group=1 + seed % 8, kv_lens="device",
        lens=tuple(lens), window_left=(-1, 700)[seed % 2], head_dim=(64, 128, 256)[seed % 3], seed=seed,
    )  # fmt: skip
    run(case)


def test_as_planned(schedule):
    plan = LONG.plan(device())
    assert plan.spec.schedule == schedule and plan.by_lengths and plan.workspace <= MAX_WORKSPACE
    for lens in LENS[:2]:
        run(dataclasses.replace(LONG, lens=lens))


def test_a_hundred_runs_give_the_same_bits(schedule):
    moved = build(dataclasses.replace(LONG, lens=LENS[0])).to(to_cupy)
    want = moved.call()
    for _ in range(100):
        for a, b in zip(moved.call(), want, strict=True):
            assert bool((a.view(np.uint8) == b.view(np.uint8)).all())


def test_a_request_does_not_see_its_neighbours(monkeypatch):
    """The batch in another order: with a list the same bits, in that order. Equal shares are cut elsewhere then."""
    with without_even_shares(monkeypatch):
        check_neighbours()


def check_neighbours():
    moved = build(dataclasses.replace(LONG, lens=LENS[0])).to(to_cupy)
    out, lse = moved.call()
    order = cp.asarray(np.random.default_rng(0).permutation(LONG.batch))
    permuted = dataclasses.replace(
        moved, q=cases.Placed(moved.q.view[order]), k=cases.Placed(moved.k.view[order]),
        v=cases.Placed(moved.v.view[order]), kv_lens=moved.kv_lens[order],
    )  # fmt: skip
    got_out, got_lse = permuted.call()
    assert_same_bits(got_out, out[order], "out")
    assert_same_bits(got_lse, lse[order], "lse")


def test_calls_that_follow_each_other_closely(schedule):
    """Lists and partial results of neighbouring calls, which start early, do not get mixed up."""
    arrays = [build(dataclasses.replace(LONG, lens=lens, seed=i)).to(to_cupy) for i, lens in enumerate(LENS)]
    wanted = [one.call() for one in arrays]
    cp.cuda.runtime.deviceSynchronize()
    for _ in range(20):
        got = [one.call() for one in arrays]
        for pair, want in zip(got, wanted, strict=True):
            for a, b in zip(pair, want, strict=True):
                assert bool((a.view(np.uint8) == b.view(np.uint8)).all())


def test_without_programmatic_launches_the_same(schedule, monkeypatch):
    from cupy_fp8kv import dispatch
    from cupy_fp8kv.jit import launch

    moved = build(dataclasses.replace(LONG, lens=LENS[0])).to(to_cupy)
    want = moved.call()
    with monkeypatch.context() as patch:
        patch.setattr(launch, "driver_function", lambda name, arguments: None)
        patch.setattr(dispatch, "_prepared", {})
        got = moved.call()
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


# One graph for all lengths


def full(case, seed):
    """Arrays without NaN, for lengths that change."""
    return build(dataclasses.replace(case, kv_lens="none", lens=None, seed=seed, given_out=True))


def check_lengths(arrays, lens, out, lse):
    options = {**arrays.options, "kv_lens": np.array(lens, np.int32)}
    dataclasses.replace(arrays, options=options).check(to_host(out), to_host(lse))


@pytest.mark.parametrize("planned", [False, True], ids=["call", "plan"])
def test_one_graph_serves_all_lengths(schedule, planned):
    layers = [full(LONG, seed) for seed in range(2 if planned else 1)]
    moved = [arrays.to(to_cupy) for arrays in layers]
    lens = cp.full(LONG.batch, 5, np.int32)
    plan = plan_of(moved[0], ragged=True) if planned else None
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.runtime.deviceSynchronize()

    def step():
        if plan is None:
            return [one.call(kv_lens=lens) for one in moved]
        plan.schedule(lens)
        return [run_plan(plan, one) for one in moved]

    with stream:
        step()
        stream.synchronize()
        stream.begin_capture()
        results = step()
        graph = stream.end_capture()
    kernels = len(compiler._kernels)
    for lengths in (*LENS, LENS[0]):
        lens[...] = cp.asarray(lengths, np.int32)
        for out, lse in results:
            out.fill(cp.nan)
            lse.fill(cp.nan)
        cp.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        for arrays, one, (out, lse) in zip(layers, moved, results, strict=True):
            check_lengths(arrays, lengths, out, lse)
            eager = dataclasses.replace(one, out=None).call(kv_lens=lens)
            assert_same_bits(out, eager[0], "out")
            assert_same_bits(lse, eager[1], "lse")
    assert len(compiler._kernels) == kernels, "other lengths compiled something"


def test_a_graph_without_a_schedule_uses_what_the_plan_has(schedule):
    arrays = full(LONG, 1)
    moved = arrays.to(to_cupy)
    plan = plan_of(moved, ragged=True)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.runtime.deviceSynchronize()
    with stream:
        plan.schedule(LENS[0])
        run_plan(plan, moved)
        stream.synchronize()
        stream.begin_capture()
        out, lse = run_plan(plan, moved)
        with pytest.raises(RuntimeError, match="kv_lens: expected a device array, not one on the host"):
            plan.schedule(LENS[0])
        graph = stream.end_capture()
        for lengths in LENS[:3]:
            plan.schedule(lengths)
            graph.launch(stream)
            stream.synchronize()
            check_lengths(arrays, lengths, out, lse)


def test_a_graph_of_torch_serves_all_lengths(schedule):
    torch = pytest.importorskip("torch")
    arrays = full(LONG, 2)
    moved = arrays.to(lambda values: torch.from_numpy(np.ascontiguousarray(values)).cuda())
    lens = torch.full((LONG.batch,), 5, dtype=torch.int32, device="cuda")
    plan = plan_of(moved, ragged=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plan.schedule(lens)
        run_plan(plan, moved)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.schedule(lens)
        out, lse = run_plan(plan, moved)
    for lengths in LENS:
        lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        check_lengths(arrays, lengths, out, lse)


# Plans


@pytest.mark.parametrize("case", [LONG, dataclasses.replace(LONG, batch=1, window_left=999)], ids=["long", "uniform"])
def test_lengths_are_taken_in_by_schedule_alone(schedule, case):
    arrays = full(case, 4)
    moved = arrays.to(to_cupy)
    plan = plan_of(moved, ragged=True)
    first = list(LENS[0][: case.batch])
    lens = cp.asarray(first, np.int32)
    plan.schedule(lens)
    lens[...] = 7
    out, lse = run_plan(plan, moved)
    check_lengths(arrays, first, out, lse)
    plan.schedule(lens)
    check_lengths(arrays, [7] * case.batch, *run_plan(plan, moved))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_plans_of_other_libraries(schedule, name):
    arrays = build(dataclasses.replace(LONG, lens=LENS[0]))
    want = arrays.to(to_cupy).call()
    if name == "torch":
        torch = pytest.importorskip("torch")
        moved = arrays.to(lambda values: torch.from_numpy(np.ascontiguousarray(values)).cuda())
    else:
        jax = pytest.importorskip("jax")
        if jax.default_backend() != "gpu":
            pytest.skip("JAX has no GPU here")
        moved = arrays.to(jax.numpy.asarray)
    plan = plan_of(moved, sm_scale=None)
    plan.schedule(moved.kv_lens)
    for _ in range(2):
        got = run_plan(plan, moved)
        assert_same_bits(got[0], want[0], "out")
        assert_same_bits(got[1], want[1], "lse")


def test_a_plan_never_waits_for_the_device(schedule):
    warm_spin()
    arrays = build(dataclasses.replace(LONG, lens=LENS[0]))
    moved = arrays.to(to_cupy)
    plan = plan_of(moved)
    plan.schedule(moved.kv_lens)
    run_plan(plan, moved)
    cp.cuda.runtime.deviceSynchronize()
    spin(200.0)
    ahead = cp.cuda.get_current_stream().record()
    started = time.perf_counter()
    plan.schedule(moved.kv_lens)
    result = run_plan(plan, moved)
    seconds = time.perf_counter() - started
    assert not ahead.done, "the plan waited for the stream"
    assert seconds < 0.05
    arrays.check(*(to_host(array) for array in result))


def test_schedule_and_run_on_the_callers_stream(schedule):
    warm_spin()
    arrays = full(LONG, 5)
    moved = arrays.to(to_cupy)
    plan = plan_of(moved, ragged=True)
    lens, target = cp.asarray(LENS[0], np.int32), cp.zeros(LONG.batch, np.int32)
    cp.cuda.runtime.deviceSynchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        spin(50.0)
        target[...] = lens
        plan.schedule(target)
        target[...] = 0
        out, lse = run_plan(plan, moved)
        stream.synchronize()
    check_lengths(arrays, LENS[0], out, lse)


def test_a_plan_for_shapes_runs_without_compiling(schedule):
    plan = cupy_fp8kv.DecodePlan.for_shapes(12, 8192, 8, 2, 128, ragged=True)
    kernels = len(compiler._kernels)
    moved = build(dataclasses.replace(LONG, lens=LENS[0])).to(to_cupy)
    plan.schedule(moved.kv_lens)
    out = plan.run(moved.q.view, moved.k.view, moved.v.view)
    assert len(compiler._kernels) == kernels
    assert_same_bits(out, cupy_fp8kv.batch_decode_with_padded_kv_cache(
        moved.q.view, moved.k.view, moved.v.view, kv_lens=moved.kv_lens))  # fmt: skip
    assert {"listed": "by a work list", "even": "by equal shares"}[schedule] in str(plan)


def test_memory_does_not_grow():
    moved = build(dataclasses.replace(HUGE_AND_SMALL, given_out=True)).to(to_cupy)
    pool = cp.get_default_memory_pool()
    plan = plan_of(moved)
    plan.schedule(moved.kv_lens)
    run_plan(plan, moved)
    before = pool.used_bytes()
    for _ in range(50):
        plan.schedule(moved.kv_lens)
        run_plan(plan, moved)
    assert pool.used_bytes() == before


def test_warmup_of_ragged_calls(schedule):
    compiled = cupy_fp8kv.warmup(head_dim=128, group_size=4, ragged=True)
    known = {str(spec) for spec, _ in compiler._kernels}
    moved = build(dataclasses.replace(LONG, lens=LENS[0])).to(to_cupy)
    moved.call()
    new = {str(spec) for spec, _ in compiler._kernels} - known
    # A CTA of another size is the same module.
    assert all(name.startswith("schedule") for name in new)
    kinds = {kind for kind in ("listed", "even") if any(f" {kind}" in name for name in compiled)}
    assert kinds == {"listed", "even"} if device().arch >= 90 else {"listed"}


def test_rows_of_a_window_alone_count(lists):
    lens = [100_000, 50, 20, 100_000]
    made, want = made_list(lens, 100_000, window_left=99)
    assert made == want and visible_rows(100_000, 99) == 100
    assert plan_decode(dataclasses.replace(LONG, window_left=99).problem, device()).bounds
