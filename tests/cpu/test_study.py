"""The planner study: its shapes, and how losses are told."""

import json

import pytest
from cases import H100

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


def outcome(shape, planned_us, best_us):
    options = plan_options(study.problem_of(shape), H100)
    planned, best = options[0], options[1]
    tried = (search.Timed(best, best_us, 3), search.Timed(planned, planned_us, 3), search.Timed(options[2], 1.0, 1))
    result = tune.TuneResult(study.problem_of(shape), H100, best, planned, best_us, planned_us, tried, True, 1.0)
    return study.Outcome(shape, result)


def test_losses_are_told_as_they_are(monkeypatch):
    machine = {"device": "a GPU", "cupy": "0"}
    monkeypatch.setattr(study, "machine_record", lambda: machine)
    shapes = study.random_shapes(0, 3)
    outcomes = [outcome(shape, 100.0 + loss, 100.0) for shape, loss in zip(shapes, (0.0, 1.0, 8.0), strict=True)]
    assert study.summary(outcomes) == {"median_loss": pytest.approx(0.01), "worst_loss": pytest.approx(0.08)}
    record = json.loads(json.dumps(study.record(outcomes, 5, 0)))
    assert record["count"] == 5 and len(record["shapes"]) == 3 and record["device"] == "a GPU"
    assert [len(one["last_round"]) for one in record["shapes"]] == [2, 2, 2], "what left early was timed roughly"
    table = study.render(outcomes, 5, 0)
    assert "2 shapes were left out" in table.title and "median loss 1.00%, worst 8.00%" in table.title
