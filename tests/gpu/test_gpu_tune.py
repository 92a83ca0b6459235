"""``tune`` on the device: what it finds is kept, used, right, and given up again."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from cases import Case, build
from gpu_support import assert_same_bits, cp, device, to_cupy, to_host

import cupy_fp8kv
from cupy_fp8kv import cli, dispatch
from cupy_fp8kv.jit import compiler
from cupy_fp8kv.tuning import measure, store, study, tune
from cupy_fp8kv.tuning.options import plan_options, spec_options

pytestmark = pytest.mark.gpu

#: Kinds of calls: split and not, layouts, views, formats, options, column blocks.
CASES = [
    Case(batch=2, kv_len=2000, group=4, num_kv_heads=2, head_dim=64, seed=2),
    Case(batch=40, kv_len=300, group=2, num_kv_heads=8, seed=4),
    Case(batch=3, kv_len=700, group=5, num_kv_heads=3, head_dim=80, layout="HND", view="padded", q="bf16", v="f16"),
    Case(batch=2, kv_len=900, group=24, num_kv_heads=2, k="bf16", v="bf16", view="transposed", window_left=500),
    Case(batch=2, kv_len=1500, group=7, num_kv_heads=4, k="e5m2", soft_cap=30.0, scales="head", seed=6),
    Case(batch=1, kv_len=4097, group=16, num_kv_heads=2, head_dim=256, v="e5m2", scales="scalar", seed=8),
]
SMALL = CASES[0]


@pytest.fixture(autouse=True)
def forget():
    dispatch.forget()
    yield
    dispatch.forget()


def few(monkeypatch, step=9):
    """A search over the planner's choice and every so many of the other options: enough to see, and soon done."""
    monkeypatch.setattr(tune, "plan_options", lambda *a: (found := plan_options(*a))[:1] + found[1::step])


def tuned(case, moved, **options):
    return cupy_fp8kv.tune(
        moved.q.view, moved.k.view, moved.v.view, case.layout, kv_format=(case.k, case.v),
        window_left=case.window_left, logits_soft_cap=case.soft_cap, **moved.scales, **options,
    )  # fmt: skip


def explained(case, moved):
    return cupy_fp8kv.explain(
        moved.q.view, moved.k.view, moved.v.view, case.layout, kv_format=(case.k, case.v),
        window_left=case.window_left, logits_soft_cap=case.soft_cap,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tune_finds_keeps_and_is_used(monkeypatch, case):
    few(monkeypatch)
    monkeypatch.setattr(tune, "_MIN_GAIN", -1.0)  # the first of the last round is taken, however little it gains
    arrays = build(case)
    moved = arrays.to(to_cupy)
    before = [to_host(placed.base) for placed in (moved.q, moved.k, moved.v)]
    arrays.check(*map(to_host, moved.call()))
    planned = explained(case, moved).plan

    result = tuned(case, moved)
    assert result.planned == planned and 0 < result.us <= result.planned_us and result.gain >= 0
    assert result.path in store.files() and json.dumps(result.record())
    assert result.cold and result.tried[0].rounds == max(one.rounds for one in result.tried) >= 2
    for placed, values in zip((moved.q, moved.k, moved.v), before, strict=True):
        assert_same_bits(placed.base, values, "inputs are only read")

    told = explained(case, moved)
    assert (told.plan.spec, told.plan.splits) == (result.plan.spec, result.plan.splits) and "tuned here" in str(told)
    out, lse = moved.call()
    arrays.check(to_host(out), to_host(lse))
    for again in (moved.call(), arrays.to(to_cupy).call()):
        assert_same_bits(again[0], out)
        assert_same_bits(again[1], lse, "lse")

    assert store.clear() == 1
    dispatch.forget()
    assert explained(case, moved).plan == planned
    arrays.check(*map(to_host, moved.call()))


def test_every_option_of_a_problem_is_right():
    """The whole search, nothing left out, on a problem with rings, splits and several waves."""
    case = Case(batch=4, kv_len=3000, group=8, num_kv_heads=4, seed=10)
    moved = build(case).to(to_cupy)
    result = tuned(case, moved, save=False)
    assert len(result.tried) == len(plan_options(result.problem, result.device)) > 30
    assert store.files() == [] and result.path is None
    if device().arch >= 90:
        assert {one.plan.spec.heads for one in result.tried} == {1, 2, 4}


def test_what_is_kept_changes_the_running_process():
    arrays = build(SMALL)
    moved = arrays.to(to_cupy)
    moved.call()
    (known,) = [one.run.__self__.plan for one in dispatch._prepared.values()]
    problem = explained(SMALL, moved).problem
    other = next(plan for plan in plan_options(problem, device()) if plan.splits not in (1, known.splits))
    store.save(problem, device(), store.Record(other, 1.0, 2.0, 3))
    moved.call()
    assert [one.run.__self__.plan.spec for one in dispatch._prepared.values()] == [known.spec], "not before it is told"
    dispatch.forget()
    arrays.check(*map(to_host, moved.call()))
    (now,) = [one.run.__self__.plan for one in dispatch._prepared.values()]
    assert (now.spec, now.splits) == (other.spec, other.splits)


def test_torch_tensors_are_tuned_and_share_the_plan_with_cupy(monkeypatch):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    few(monkeypatch, 25)
    monkeypatch.setattr(tune, "_MIN_GAIN", -1.0)
    arrays = build(SMALL)
    moved = arrays.to(lambda values: torch.from_numpy(values).cuda())
    result = tuned(SMALL, moved)
    assert (result.problem.batch, result.problem.kv_len) == (2, 2000) and result.path
    arrays.check(*map(to_host, moved.call()))
    assert explained(SMALL, arrays.to(to_cupy)).plan.spec == result.plan.spec


def test_a_wrong_result_is_an_error_and_nothing_is_kept(monkeypatch):
    few(monkeypatch)
    monkeypatch.setattr(measure, "_TOLERANCES", {"f16": 0.0, "bf16": 0.0})  # no two plans round alike
    with pytest.raises(RuntimeError, match="a plan is wrong"):
        tuned(SMALL, build(SMALL).to(to_cupy))
    assert store.files() == []


def test_nan_in_a_cache_is_no_wrong_result(monkeypatch):
    few(monkeypatch, 25)
    moved = build(SMALL).to(to_cupy)
    moved.v.view[1, 700, 0, 3] = 0x7F
    assert tuned(SMALL, moved, save=False).us > 0


def test_host_arrays_are_refused():
    arrays = build(SMALL)
    with pytest.raises(ValueError, match="q: expected an array on a CUDA device"):
        tuned(SMALL, arrays)


def test_memory_is_given_back(monkeypatch):
    few(monkeypatch, 40)
    moved = build(SMALL).to(to_cupy)
    tuned(SMALL, moved, save=False)
    cp.get_default_memory_pool().free_all_blocks()
    free = cp.cuda.runtime.memGetInfo()[0]
    for _ in range(3):
        tuned(SMALL, moved, save=False)
    cp.get_default_memory_pool().free_all_blocks()
    assert cp.cuda.runtime.memGetInfo()[0] > free - (64 << 20)


def test_many_kernels_are_compiled_side_by_side_and_once(monkeypatch):
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_modules", {})
    loads, original = [], compiler._load
    monkeypatch.setattr(compiler, "_load", lambda *arguments: loads.append(arguments[0]) or original(*arguments))
    specs = spec_options(dataclasses.replace(SMALL, head_dim=48).problem, device())[:8]
    done, found = [], []
    threads = [threading.Thread(target=lambda: found.append(compiler.load_all(specs, 0))) for _ in range(2)]
    for thread in threads:
        thread.start()
    kernels = compiler.load_all(specs, 0, lambda: done.append(1))
    for thread in threads:
        thread.join()
    assert [kernel.spec for kernel in kernels] == specs and len(done) == len(specs)
    assert sorted(map(str, loads)) == sorted(map(str, specs)) and len(found) == 2
    assert all(a is b for others in found for a, b in zip(others, kernels, strict=True))


def test_a_kernel_that_does_not_compile_is_told(monkeypatch):
    good = spec_options(SMALL.problem, device())[0]
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of 16"):
        compiler.load_all([good, dataclasses.replace(good, head_dim=24)], 0)


def test_the_command_line(monkeypatch, capsys, tmp_path):
    few(monkeypatch, 25)
    path = tmp_path / "tuned.json"
    sizes = ["--batch", "2", "--kv-len", "1000", "--num-qo-heads", "8", "--num-kv-heads", "2", "--head-dim", "64"]
    assert cli.main(["tune", *sizes, "--json", str(path)]) == 0
    text = capsys.readouterr().out
    (kept,) = store.files()
    assert "planned" in text and "tuned" in text and json.loads(path.read_text())["us"] > 0
    q = cp.zeros((2, 8, 64), np.float16)
    cache = cp.zeros((2, 1000, 2, 64), np.uint8)
    assert "tuned here" in str(cupy_fp8kv.explain(q, cache, cache)) and kept.exists()
    assert cli.main(["tune", "--clear"]) == 0 and store.files() == []


def test_the_study_of_two_shapes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(study, "_BYTES", (4e6, 8e6))
    monkeypatch.setattr(study, "_HEAD_DIMS", (64,))
    few(monkeypatch, 12)
    monkeypatch.setattr(study, "plan_options", tune.plan_options)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_modules", {})
    path = tmp_path / "study.json"
    assert cli.main(["study", "--count", "2", "--seed", "5", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    said = capsys.readouterr()
    assert len(record["shapes"]) == 2 and "median loss" in said.out and store.files() == []
    assert said.err.count("noise") == 2 and 0 < record["compiled"] == record["kernels"]
    assert 0 < record["compile_seconds"] < record["seconds"] and 0 < record["measure_seconds"] < record["seconds"]
    for shape in record["shapes"]:
        assert shape["cold"] and shape["loss"] == shape["planned_us"] / shape["best_us"] - 1
        assert shape["noise"] == abs(shape["planned_again_us"] / shape["planned_us"] - 1)
        assert len(shape["candidates"]) == shape["options"] > 1 and all(one["us"] > 0 for one in shape["candidates"])
        assert shape["loss"] == 0 or shape["planned"] != shape["best"]
    assert record["worst_loss"] == max(shape["loss"] for shape in record["shapes"])
