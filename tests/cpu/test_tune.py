"""``tune`` and its parts that run kernels: on the emulator, with times that are made up."""

import ctypes
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulator
import numpy as np
import pytest
from cases import H100, Case, build
from emulator.checks import move, run
from test_tuning import PLAIN, another, choice, kept

import cupy_fp8kv
from cupy_fp8kv import dispatch
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.plan import plan_decode
from cupy_fp8kv.tuning import measure, store, tune
from cupy_fp8kv.tuning.options import plan_options

ROOT = Path(cupy_fp8kv.__file__).parent.parent

# In calls


CASE = Case(group=4, num_kv_heads=2, batch=2, kv_len=900, seed=6)


def tuned_on_the_emulator():
    plan = next(p for p in plan_options(CASE.problem, emulator.DEVICE) if p.spec.ctas_per_sm == 4 and p.splits == 2)
    assert choice(plan) != choice(plan_decode(CASE.problem, emulator.DEVICE))
    return plan


def launched(emulate):
    return [(name, grid) for name, grid in emulate.launches if name.startswith("decode")][-1]


def test_calls_use_a_tuned_plan_and_forget_it(emulate):
    plan, planned = tuned_on_the_emulator(), plan_decode(CASE.problem, emulator.DEVICE)
    run(emulate, CASE)
    assert launched(emulate) == (str(planned.spec), planned.grid)
    store.save(CASE.problem, emulator.DEVICE, kept(plan))
    run(emulate, CASE)
    assert launched(emulate) == (str(planned.spec), planned.grid), "a kind of call that is known is not planned again"
    dispatch.forget()
    run(emulate, CASE)
    assert launched(emulate) == (str(plan.spec), plan.grid)
    store.clear()
    dispatch.forget()
    run(emulate, CASE)
    assert launched(emulate) == (str(planned.spec), planned.grid)


def test_explain_tells_of_a_tuned_plan():
    q, cache = np.zeros((3, 16, 128), np.float16), np.zeros((3, 5000, 4, 128), np.uint8)
    assert cupy_fp8kv.explain(q, cache, cache, device=H100).plan == plan_decode(PLAIN, H100)
    store.save(PLAIN, H100, kept(another(PLAIN)))
    told = cupy_fp8kv.explain(q, cache, cache, device=H100)
    assert choice(told.plan) == choice(another(PLAIN)) and "tuned here" in str(told)


class Emulated:
    """A contest on the emulator: results are the kernels' own, times are made up."""

    best = None
    wrong = None

    def __init__(self, call):
        self.call, self.cold = call, True
        self.want = self._result(plan_decode(call.problem, emulator.DEVICE))

    def _result(self, plan):
        rows, dim = self.call.problem.batch * self.call.problem.num_qo_heads, self.call.problem.head_dim
        out, lse = move(np.full((rows, dim), np.nan, np.float16)), move(np.full(rows, np.nan, np.float32))
        values = measure._put(
            self.call.values, {measure._OUT: out.ctypes.data, measure._LSE: lse.ctypes.data}
        )  # fmt: skip
        strides = (self.call.problem.num_qo_heads * dim * 2, dim * 2)
        cuda.PreparedDecode(self.call.problem, 0, strides, plan).run(emulator.library, *values)
        if choice(plan) == self.wrong:
            out[3] *= 1.1
        return np.asarray(out).astype(np.float32), np.asarray(lse)

    def check(self, plan):
        if measure.wrong_rows(self._result(plan), self.want, 3e-3):
            raise RuntimeError(f"a plan is wrong: {plan.spec}")

    def alone(self, plan, replays, give_up_us):
        return 30.0 if choice(plan) == self.best else 40.0

    def in_turn(self, plans, replays):
        return [self.alone(plan, replays, 0.0) for plan in plans]


@pytest.fixture
def tuning(emulate, monkeypatch):
    """``tune`` on the emulator, over few options."""
    few = [plan_decode(CASE.problem, emulator.DEVICE), tuned_on_the_emulator()]
    monkeypatch.setattr(tune, "cupy_problem", lambda: None)
    monkeypatch.setattr(tune, "device_info", lambda index: emulator.DEVICE)
    monkeypatch.setattr(tune, "plan_options", lambda *_: few)
    monkeypatch.setattr(tune, "compile_plans", lambda *_: None)
    monkeypatch.setattr(tune, "GpuContest", Emulated)
    monkeypatch.setattr(Emulated, "best", choice(few[1]))
    return emulate


def arguments(case=CASE):
    moved = build(case).to(move)
    return moved.q.view, moved.k.view, moved.v.view


def test_tune_keeps_the_best_and_calls_use_it(tuning):
    plan, steps = tuned_on_the_emulator(), []
    run(tuning, CASE)  # known, and planned, before
    result = cupy_fp8kv.tune(*arguments(), progress=lambda *step: steps.append(step))
    assert choice(result.plan) == choice(plan) and result.plan is not result.planned
    assert (result.us, result.planned_us) == (30.0, 40.0) and result.gain == pytest.approx(1 / 3)
    assert result.problem == CASE.problem or result.problem.q_strides  # but for where q lies
    assert result.path in store.files() and steps[-1] == ("timing", 2, 2)
    run(tuning, CASE)
    assert launched(tuning) == (str(plan.spec), plan.grid)
    text = repr(result), str(result)
    assert "33.3% faster" in text[0] and "30.00 µs" in text[0] and "\n" not in text[0]
    assert str(plan.spec) in text[1] and str(result.path) in text[1] and "40.00 µs" in text[1]
    record = json.loads(json.dumps(result.record()))
    assert record["gain"] == pytest.approx(1 / 3) and [one["tuned"] for one in record["tried"]] == [True, False]


def test_tune_without_save_changes_nothing(tuning):
    planned = plan_decode(CASE.problem, emulator.DEVICE)
    result = cupy_fp8kv.tune(*arguments(), save=False)
    assert result.path is None and store.files() == [] and result.plan is not result.planned
    run(tuning, CASE)
    assert launched(tuning) == (str(planned.spec), planned.grid)


def test_what_gains_nothing_does_not_replace_the_planner(tuning, monkeypatch):
    monkeypatch.setattr(Emulated, "best", None)
    result = cupy_fp8kv.tune(*arguments())
    assert result.plan is result.planned and result.gain == 0 and "the planner's choice stays" in repr(result)
    assert choice(store.load(result.problem, emulator.DEVICE).plan) == choice(result.planned)


def test_a_wrong_plan_is_an_error_and_never_kept(tuning, monkeypatch):
    monkeypatch.setattr(Emulated, "wrong", Emulated.best)
    with pytest.raises(RuntimeError, match="a plan is wrong"):
        cupy_fp8kv.tune(*arguments())
    assert store.files() == []


def test_a_folder_that_cannot_be_written_is_a_warning(tuning, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "file" / "folder")
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        result = cupy_fp8kv.tune(*arguments())
    assert result.path is None and result.gain > 0


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"kv_layout": "NDH"}, ValueError, "kv_layout"), ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap"),
        ({"k_scale": "x"}, TypeError, "k_scale"), ({"pos_encoding_mode": "ALIBI"}, NotImplementedError, "ALIBI"),
        ({"kv_format": "f16"}, ValueError, "kv_format"),
    ],
)  # fmt: skip
def test_tune_checks_its_arguments_as_a_call_does(tuning, change, error, said):
    with pytest.raises(error, match=said):
        cupy_fp8kv.tune(*arguments(), **change)


@pytest.mark.parametrize("change", [{"kv_len": 0}, {"batch": 0}])
def test_nothing_to_read_is_nothing_to_tune(tuning, change):
    with pytest.raises(ValueError, match="nothing to tune"):
        cupy_fp8kv.tune(*arguments(dataclasses.replace(CASE, **change)))


def test_tune_wants_device_arrays(tuning):
    host = build(CASE)
    with pytest.raises(ValueError, match="q: expected an array on a CUDA device"):
        cupy_fp8kv.tune(host.q.view, host.k.view, host.v.view)


def test_tune_is_public_and_imported_when_asked_for():
    script = (
        "import sys, cupy_fp8kv; name = 'cupy_fp8kv.tuning.tune'; before = name in sys.modules; "
        "assert {'tune', 'TuneResult'} <= set(dir(cupy_fp8kv)); from cupy_fp8kv import *; "
        "print(before, name in sys.modules, tune.__module__, TuneResult.__name__, hasattr(cupy_fp8kv, 'tuned'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True", "cupy_fp8kv.tuning.tune", "TuneResult", "False"]


def test_tune_without_a_gpu():
    if not tune.cupy_problem():
        pytest.skip("there is a GPU")
    host = build(CASE)
    with pytest.raises(RuntimeError, match="tune needs a GPU to measure on: "):
        cupy_fp8kv.tune(host.q.view, host.k.view, host.v.view)


def test_a_call_is_taken_with_all_it_says(emulate):
    case = Case(group=3, num_kv_heads=2, batch=2, kv_len=60, layout="HND", window_left=17, soft_cap=30.0, v="e5m2")
    moved = build(case).to(move)
    k_scale = move(np.array([0.5, 2.0], np.float32))
    before = len(emulate.launches)
    call = measure.Call.padded(
        moved.q.view, moved.k.view, moved.v.view, "HND", window_left=17, logits_soft_cap=30.0, k_scale=k_scale,
        v_scale=0.25, sm_scale=0.125, kv_format=("e4m3", "e5m2"),
    )  # fmt: skip
    assert len(emulate.launches) == before, "nothing is launched"
    named = dict(zip(measure._FIELDS, (*call.values[:-1], *call.values[-1]), strict=False))
    assert (named["q"], named["k"], named["v"]) == tuple(x.view.ctypes.data for x in (moved.q, moved.k, moved.v))
    assert named["k_scale"] == k_scale.ctypes.data and named["k_scale_stride"] == 1 and named["out_scale"] == 0.25
    assert (named["soft_cap"], named["window_left"], named["logit_scale"]) == (30.0, 17, 0.125)
    assert named["out"] and named["lse"] and not named["kv_lens"] and call.device == 0
    assert call.problem.window == 18 and call.problem.v_format == "e5m2" and not call.problem.ragged


@pytest.mark.parametrize("view", ["contiguous", "padded", "transposed"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_extent_of_a_cache(emulate, view, layout):
    case = Case(group=1, num_kv_heads=3, batch=2, kv_len=7, head_dim=16, view=view, layout=layout, k="f16")
    moved = build(case).to(move)
    k = moved.k.view[:, ::-1]  # backwards along one axis
    call = measure.Call.padded(moved.q.view, k, moved.v.view, layout)
    low, high = measure._extent(call.problem, "k")
    addresses = [k.ctypes.data + int(np.dot(index, k.strides)) for index in np.ndindex(k.shape)]
    assert (k.ctypes.data + low, k.ctypes.data + high) == (min(addresses), max(addresses) + k.itemsize)


# Results held against each other


@pytest.mark.parametrize("at_a_time", [1, 48, 1 << 16])
def test_wrong_rows(monkeypatch, at_a_time):
    monkeypatch.setattr(measure, "_COMPARED_ELEMENTS", at_a_time)
    rng = np.random.default_rng(0)
    out, lse = rng.standard_normal((50, 16)).astype(np.float32), rng.standard_normal(50).astype(np.float32)
    out[3], lse[3] = np.nan, np.nan
    out[4], lse[4] = 0, -np.inf
    out[5, 2] = np.inf

    def wrong(change=None, change_lse=None):
        got, got_lse = out.copy(), lse.copy()
        for array, places in ((got, change), (got_lse, change_lse)):
            for place, value in (places or {}).items():
                array[place] = value
        return measure.wrong_rows((got, got_lse), (out, lse), 3e-3)

    assert wrong() == 0
    assert measure.wrong_rows((out * np.float32(1.001), lse), (out, lse), 3e-3) == 0
    assert measure.wrong_rows((out * np.float32(1.01), lse), (out, lse), 3e-3) > 40
    assert wrong({(7, 1): out[7, 1] + 0.1}) == 1
    assert wrong({(7, 1): np.nan}) == 1 and wrong({(3, 0): 0.0}) == 1, "NaN where it is wanted, and only there"
    assert wrong({(5, 2): np.nan}) == 0 and wrong({(5, 2): 60000.0}) == 1
    assert wrong({(4, 0): 1e-4}) == 0 and wrong({(4, 0): 0.1}) == 1
    assert (
        wrong(None, {4: -1000.0}) == 1 and wrong(None, {8: lse[8] + 0.01}) == 1 and wrong(None, {8: lse[8] + 1e-4}) == 0
    )
    assert wrong({7: out[8], 8: out[7]}) == 2, "rows that change places"


# Measuring: the contest itself, where what it asks of CuPy is made up and the kernels run on the emulator


class DeviceArray(np.ndarray):
    """A NumPy array that tells its address as CuPy's do."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))


class Memory:
    def __init__(self, size):
        self.size, self.array = size, move(np.zeros(size, np.uint8))
        self.ptr = self.array.ctypes.data


class Stream:
    ptr, launches = 0, 0

    def __init__(self, non_blocking):
        assert non_blocking, "other streams must not be waited for"

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass

    def begin_capture(self):
        pass

    def end_capture(self):
        return SimpleNamespace(launch=self._launch)

    def _launch(self, stream):
        type(self).launches += 1


class Runtime(emulator._Runtime):
    memcpyDeviceToDevice = 3  # noqa: N815
    free = 1 << 30
    l2 = 0

    def deviceSynchronize(self):  # noqa: N802
        pass

    def memGetInfo(self):  # noqa: N802
        return self.free, 1 << 34

    def getDeviceProperties(self, index):  # noqa: N802
        return {"l2CacheSize": self.l2}

    def memcpyAsync(self, to, origin, size, kind, stream):  # noqa: N802
        assert kind == 3
        ctypes.memmove(to, origin, size)


@pytest.fixture
def made_up_cupy(emulate, monkeypatch):
    runtime = Runtime()
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    cuda_ = SimpleNamespace(
        runtime=runtime, alloc=Memory, Memory=Memory, Stream=Stream, Event=lambda: event,
        get_current_stream=lambda device: SimpleNamespace(ptr=0), get_elapsed_time=lambda start, stop: 0.5,
    )  # fmt: skip
    cupy = SimpleNamespace(
        cuda=cuda_, empty=lambda shape, dtype: move(np.empty(shape, dtype)).view(DeviceArray), asnumpy=np.array,
    )  # fmt: skip
    monkeypatch.setattr(measure, "require_cupy", lambda: cupy)
    monkeypatch.setattr(measure, "device_info", lambda index: emulator.DEVICE)
    monkeypatch.setattr(measure, "_MOST_CALLS", 5)
    monkeypatch.setattr(Stream, "launches", 0)
    return runtime


def taken(case):
    moved = build(case).to(move)
    options = {"kv_format": (case.k, case.v), "window_left": case.window_left, "logits_soft_cap": case.soft_cap}
    return measure.Call.padded(moved.q.view, moved.k.view, moved.v.view, case.layout, **options)


@pytest.mark.parametrize("case", [
    Case(group=2, num_kv_heads=2, batch=2, kv_len=70),
    Case(group=3, num_kv_heads=2, batch=2, kv_len=50, view="padded", layout="HND", q="bf16", v="f16"),
    Case(group=1, num_kv_heads=3, batch=3, kv_len=40, view="transposed", window_left=9, soft_cap=20.0, head_dim=64),
], ids=str)  # fmt: skip
def test_a_contest_runs_every_plan_on_copies_of_the_caches(made_up_cupy, case):
    made_up_cupy.l2 = case.problem.kv_bytes  # five sets exceed it four times
    call = taken(case)
    contest = measure.GpuContest(call)
    assert len(contest._sets) == 5 and contest.cold
    # Each set is the call's, elsewhere.
    for index in (measure._K, measure._V):
        assert len({values[index] for values in contest._sets}) == 5
    prepared = contest._prepare(plan_decode(call.problem, emulator.DEVICE))
    for values in contest._sets[1:]:
        contest._out.fill(0x7FFF)
        prepared.run(contest._arena, *values)
        assert np.array_equal(contest._out, contest._want[0].view(np.uint16))

    options = plan_options(call.problem, emulator.DEVICE)
    some = [options[0], *options[1::6]]
    for plan in some:
        contest.check(plan)
    assert contest.alone(some[0], 4, math.inf) == pytest.approx(100.0) and Stream.launches == 1 + 4
    contest.alone(some[0], 4, 1.0)
    assert Stream.launches == 5 + 1 + 1, "one replay tells enough of what is too slow"
    assert contest.in_turn(some[:2], 3) == pytest.approx([100.0] * 2) and Stream.launches == 7 + 2 * (1 + 3)


def test_a_contest_notices_a_wrong_plan(made_up_cupy, monkeypatch):
    contest = measure.GpuContest(taken(CASE))
    result = contest._result
    monkeypatch.setattr(contest, "_result", lambda prepared: (1.01 * (found := result(prepared))[0], found[1]))
    with pytest.raises(RuntimeError, match=r"a plan is wrong, please report it: decode.* 16 of 16 rows"):
        contest.check(tuned_on_the_emulator())


def test_a_contest_does_without_copies_where_they_do_not_fit_or_are_not_needed(made_up_cupy):
    made_up_cupy.l2, made_up_cupy.free = CASE.problem.kv_bytes, 1000
    contest = measure.GpuContest(taken(CASE))
    assert len(contest._sets) == 1 and not contest.cold
    made_up_cupy.l2, made_up_cupy.free = CASE.problem.kv_bytes // 4, 1 << 30
    contest = measure.GpuContest(taken(CASE))
    assert len(contest._sets) == 1 and contest.cold
