"""The planner study: its shapes, its verdicts, the order of its work, and how losses are told."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from cases import H100
from test_tuning import PLAIN, Fake, choice, made_up

from cupy_fp8kv import cli, terminal
from cupy_fp8kv.tuning import search, study, tune
from cupy_fp8kv.tuning.options import plan_options

# The study


def test_shapes_of_the_study():
    shapes = study.random_shapes(0, 200)
    assert shapes[:40] == study.random_shapes(0, 40) and study.random_shapes(1, 40) != shapes[:40]
    assert [shape.name for shape in shapes[:2]] == ["0.0", "0.1"]
    for shape in shapes:
        some = study.problem_of(shape)
        assert 3.5e6 < some.kv_bytes == shape.kv_bytes < 1.1e9 and some.kv_len >= 15 and some.can_copy_boxes
        assert (some.batch, some.group_size) == (shape.batch, shape.num_qo_heads // shape.num_kv_heads)
    assert {shape.head_dim for shape in shapes} >= {64, 128, 256} and len({shape.num_kv_heads for shape in shapes}) > 8
    assert max(shape.batch for shape in shapes) > 150 and min(shape.batch for shape in shapes) == 1
    assert max(shape.kv_len for shape in shapes) > 100_000


# Verdicts


@pytest.mark.parametrize("seed", range(3))
def test_the_verdict_is_on_the_best_and_the_planned(seed):
    options = plan_options(PLAIN, H100)
    contest = Fake(made_up(options, seed))
    tried = search.search(options, contest)
    before = len(contest.rounds)
    verdict = search.judge(tried, options[0], contest)
    assert contest.times[choice(verdict.best)] == verdict.best_us == 50
    planned_us = contest.times[choice(options[0])]
    assert (verdict.planned_us, verdict.again_us, verdict.noise) == (planned_us, planned_us, 0)
    assert verdict.loss == pytest.approx(planned_us / 50 - 1)
    assert [count for count, _ in contest.rounds[before:]] == [4, 3], "the few, then the best and the planned twice"


def test_a_planner_that_is_right_loses_nothing_whatever_the_noise():
    options = plan_options(PLAIN, H100)
    contest = Fake({**made_up(options, 0), choice(options[0]): 40.0}, noise=0.02)
    verdict = search.judge(search.search(options, contest), options[0], contest)
    assert verdict.best is options[0] and verdict.loss == 0 < verdict.noise < 0.01


def test_noise_is_no_loss():
    """Among many equal plans the fastest of a search is the luckiest. Measured afresh its luck is gone."""
    options = plan_options(PLAIN, H100)
    lucky, fresh = [], []
    for seed in range(40):
        contest = Fake(dict.fromkeys(map(choice, options), 50.0), noise=0.2)
        contest.rng = np.random.default_rng(seed)
        tried = search.search(options, contest)
        planned_us = next(one.us for one in tried if one.plan is options[0])
        lucky.append(planned_us / min(one.us for one in tried if one.rounds == tried[0].rounds) - 1)
        fresh.append(search.judge(tried, options[0], contest).loss)
    assert np.mean(lucky) > 0.01 and abs(np.mean(fresh)) < 0.003


def test_the_verdict_on_the_only_option():
    (planned,) = options = plan_options(PLAIN, H100)[:1]
    contest = Fake(made_up(options, 0))
    verdict = search.judge(search.search(options, contest), planned, contest)
    assert verdict.best is planned and verdict.loss == 0 and verdict.best_us == 50


# The run


@pytest.fixture
def made_up_study(monkeypatch):
    """The study with times that are made up; what it does, in order."""
    did = []
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    runtime = SimpleNamespace(getDevice=lambda: 0)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), get_default_memory_pool=lambda: pool)

    def searched(shape, progress):
        did.append(shape.name)
        problem = study.problem_of(shape)
        options = plan_options(problem, H100)
        contest = Fake(made_up(options, 0))
        tried = tuple(search.search(options, contest))
        planned_us = next(one.us for one in tried if one.plan is options[0])
        result = tune.TuneResult(problem, H100, tried[0].plan, options[0], 50.0, planned_us, tried, True, 1.0)
        return result, contest

    def compile_to_files(specs, arch, start):
        sources = {spec.source() for spec in specs}
        did.append(("compile", arch, len(sources)))
        return len(sources), 7

    monkeypatch.setattr(study, "require_cupy", lambda: cupy)
    monkeypatch.setattr("cupy_fp8kv.jit.device.cupy_problem", lambda: None)
    monkeypatch.setattr(study, "device_info", lambda index: H100)
    monkeypatch.setattr(study, "machine_record", lambda: {"device": "a GPU", "cupy": "0"})
    monkeypatch.setattr(study, "Filler", lambda: None)
    monkeypatch.setattr(study, "call_of", lambda shape, filler: shape)
    monkeypatch.setattr(study, "compile_to_files", compile_to_files)
    monkeypatch.setattr(study, "load_all", lambda specs, device, advance: did.append("load"))
    monkeypatch.setattr(study, "searched", searched)
    return did


def test_all_kernels_are_compiled_before_the_first_shape(made_up_study):
    seen = []
    found = study.run(0, 3, 1000, lambda so_far: seen.append(len(so_far.outcomes)))
    problems = map(study.problem_of, study.random_shapes(0, 3))
    kernels = {plan.spec.source() for problem in problems for plan in plan_options(problem, H100)}
    assert made_up_study == [("compile", 90, len(kernels) + 1), "load", "0.0", "0.1", "0.2"]
    assert seen == [1, 2, 3] and (found.kernels, found.compiled) == (len(kernels) + 1, 7)
    assert 0 < found.compile_seconds < found.seconds


def test_the_record_is_written_after_each_shape(made_up_study, monkeypatch, tmp_path, capsys):
    path = tmp_path / "study.json"
    wanted, told = study.searched, []

    def stop_at_the_third(shape, progress):
        if shape.name == "0.2":
            raise terminal.CommandError("cut off")
        told.append(json.loads(path.read_text())["shapes"] if path.exists() else [])
        return wanted(shape, progress)

    monkeypatch.setattr(study, "searched", stop_at_the_third)
    assert cli.main(["study", "--count", "4", "--json", str(path)]) == 1
    record = json.loads(path.read_text())
    assert [len(shapes) for shapes in told] == [0, 1] and len(record["shapes"]) == 2 and record["count"] == 4
    lines = capsys.readouterr().err.splitlines()
    assert "kernels, 7 of them compiled" in lines[0] and "cut off" in lines[-1]
    assert lines[1].startswith("0.0: 3 × 3872, 18/3 heads of 128: planned") and lines[2].startswith("0.1: ")
    assert list(tmp_path.iterdir()) == [path]


def test_shapes_that_no_time_is_left_for(made_up_study):
    with pytest.raises(terminal.CommandError, match="no shape was searched in -1 seconds"):
        study.run(0, 2, -1)


def test_losses_are_told_as_they_are(made_up_study):
    found = study.run(0, 3, 1000)
    for outcome, loss, noise in zip(found.outcomes, (0.0, 0.01, 0.08), (0.001, 0.002, 0.004), strict=True):
        planned_us = 100 * (1 + loss)
        verdict = dataclasses.replace(
            outcome.verdict, best_us=100.0, planned_us=planned_us, again_us=planned_us * (1 + noise)
        )
        found.outcomes[found.outcomes.index(outcome)] = dataclasses.replace(outcome, verdict=verdict)
    found.count = 5
    told = {"median_loss": 0.01, "worst_loss": 0.08, "median_noise": 0.002, "worst_noise": 0.004}
    assert found.summary() == pytest.approx(told)
    table = study.render(found)
    assert "2 shapes were left out" in table.title and "median loss 1.00%, worst 8.00%" in table.title

    record = json.loads(json.dumps(study.record(found)))
    assert record["count"] == 5 and len(record["shapes"]) == 3 and record["device"] == "a GPU"
    assert record["seconds"] >= record["measure_seconds"] >= 0 and record["compile_seconds"] >= 0
    for shape, one in zip(study.random_shapes(0, 3), record["shapes"], strict=True):
        options = plan_options(study.problem_of(shape), H100)
        assert (one["batch"], one["kv_len"], one["kv_bytes"]) == (shape.batch, shape.kv_len, shape.kv_bytes)
        times = {}
        for candidate in one["candidates"]:
            us, rounds = candidate.pop("us"), candidate.pop("rounds")
            times[tuple(candidate.items())] = us
            assert rounds >= 1
        assert len(times) == one["options"] == len(options), "every option, and no two alike"
        assert min(times.values()) == 50 == times[tuple(one["best"].items())]
        planned, spec = one["planned"], options[0].spec
        assert tuple(planned.items()) in times and (planned["splits"], planned["grid"]) == (
            options[0].splits, options[0].grid,
        )  # fmt: skip
        assert [planned[name] for name in ("columns", "rows", "warps", "ctas_per_sm", "heads", "stages")] == [
            8 * spec.column_tiles, 16 * spec.subtiles, spec.warps, spec.ctas_per_sm, spec.heads, spec.stages,
        ]  # fmt: skip
