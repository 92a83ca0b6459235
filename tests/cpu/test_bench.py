"""The benchmark without a GPU: suites, reports, tables, figures, and the time to start."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cupy_fp8kv import cli, terminal
from cupy_fp8kv.bench import measure, plot, start, suites, table
from cupy_fp8kv.bench.operations import OPERATIONS
from cupy_fp8kv.bench.report import CacheRow, PeerFigure, PeerInfo, Report, Row
from cupy_fp8kv.bench.suites import Shape
from cupy_fp8kv.formats import KV_FORMATS

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "notebooks" / "results"
SHAPE = Shape("gqa4.b2", 2, 64, 8, 2, 32)


def row(shape=SHAPE, us=20.0, **more):
    return Row(shape, shape.kv_bytes, 16.0, "read_limit[…]", us, us - 1, us + 1, 9.0, 3e-4, **more)


@pytest.fixture
def report():
    infos = {
        "fi-cc": PeerInfo("CUDA cores", "FlashInfer", "flashinfer-python 1.0"),
        "fi-tc": PeerInfo("tensor cores", "FlashInfer", "flashinfer-python 1.0"),
        "fa3": PeerInfo("pages", "FlashAttention-3", "vllm 1.0"),
    }
    first = {
        "fi-cc": PeerFigure(40.0, 50.0, 3e-4),
        "fi-tc": PeerFigure(32.0, 60.0, 3e-4),
        "fa3": PeerFigure(reason="no luck"),
    }
    second = {"fi-cc": PeerFigure(reason="no such case", skipped=True), "fi-tc": PeerFigure(64.0, 70.0, 3e-4)}
    machine = {"device": "a GPU", "arch": 90, "cupy": "14.0.0", "driver_cuda": "13.0", "python": "3.12.3"}
    rows = (row(peers=first, fp16_us=38.0), row(dataclasses.replace(SHAPE, name="gqa4.b9"), 32.0, peers=second))
    return Report("decode", machine, "0123456789abcdef", "how", rows, infos)


def text_of(renderables):
    console = terminal.console()
    with console.capture() as captured:
        for part in renderables:
            console.print(part)
    return captured.get()


# Suites


def test_the_ragged_suite():
    shapes = {shape.name: shape for shape in suites.SUITES["ragged"]}
    log_uniform = shapes["ragged.gqa4.b64"]
    assert len(log_uniform.kv_lens) == 64 and 16 <= min(log_uniform.kv_lens) < max(log_uniform.kv_lens) <= 16384
    logarithms = np.log(np.array(log_uniform.kv_lens) / 16) / np.log(1024)
    assert abs(np.median(logarithms) - 0.5) < 0.1 and len(set(log_uniform.kv_lens)) > 50
    long = shapes["long.gqa4.b64"]
    assert sorted(long.kv_lens) == [512] * 63 + [131072] and (long.num_qo_heads, long.num_kv_heads) == (32, 8)
    assert long.kv_bytes == (131072 + 63 * 512) * 8 * 128 * 2 and long.cache_shape == (64, 131072, 8, 128)


def test_the_paged_suite():
    shapes = {shape.name: shape for shape in suites.SUITES["paged"]}
    names = ("gqa4.b64.l4k", "mha.b16.l1k", "gqa4.b16.l4k", "gqa4.b128.l1k", "mha.b64.l1k", "gqa8.b16.l8k")
    for name in (*names, "ragged.gqa4.b64", "long.gqa4.b64"):
        assert {shapes[f"{name}.p{page}"].page_size for page in (16, 64)} == {16, 64}
    assert {shape.page_size for shape in shapes.values()} == {1, 5, 16, 64}
    padded = {shape.name: shape for suite in ("decode", "ragged") for shape in suites.SUITES[suite]}
    for shape in shapes.values():
        same = padded[shape.unpaged_name]
        assert (shape.kv_bytes, shape.lengths) == (same.kv_bytes, same.lengths)
        assert sum(shape.page_counts) == shape.cache_shape[0] >= sum(shape.lengths) / shape.page_size
        assert (shape.kv_layout == "HND") == shape.name.endswith(".hnd")
    assert shapes["gqa4.b64.l4k.p16.hnd"].cache_shape == (64 * 256, 8, 16, 128)
    assert shapes["gqa4.b64.l4k.p5"].cache_shape == (64 * 820, 5, 8, 128)


def test_every_shape_is_a_call():
    for suite, shapes in suites.SUITES.items():
        assert len({shape.name for shape in shapes}) == len(shapes)
        for shape in shapes:
            assert len(shape.lengths) == shape.batch and max(shape.lengths) <= shape.kv_len, (suite, shape)
            assert shape.num_qo_heads % shape.num_kv_heads == 0 and {shape.q, shape.k, shape.v} <= set(KV_FORMATS)
    assert suites.BASES["formats"] in {shape.name for shape in suites.SUITES["formats"]}
    groups = {shape.num_qo_heads // shape.num_kv_heads for shape in suites.SUITES["formats"]}
    assert {3, 4, 5, 6, 7} <= groups


def test_the_command_line_knows_every_suite(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--suite", "no-such-suite"])
    said = capsys.readouterr().err
    known = said.split("choose from")[1]
    assert all(suite in known for suite in (*suites.SUITES, "cache", "start"))


# Reports


def test_a_report_is_its_record(report):
    assert Report.of(json.loads(json.dumps(report.record()))) == report
    ragged = dataclasses.replace(report, rows=(row(dataclasses.replace(SHAPE, kv_lens=(3, 64))),))
    assert Report.of(json.loads(json.dumps(ragged.record()))) == ragged
    paged = dataclasses.replace(ragged, rows=(row(ragged.rows[0].shape.in_pages(5, "HND")),))
    assert Report.of(json.loads(json.dumps(paged.record()))) == paged
    found = paged.record()["rows"][0]
    assert {"shape": "gqa4.b2", "page_size": 5, "kv_layout": "HND", "of_limit": 0.8}.items() <= found.items()
    record = report.record()
    assert record["rows"][0]["fraction"] == 0.8 and record["rows"][0]["fp16_speedup"] == 1.9
    assert record["rows"][0]["peers"]["fi-tc"]["us"] == 32.0


@pytest.mark.parametrize("path", sorted(RECORDS.glob("h100-*.json")), ids=lambda path: path.stem)
def test_stored_records_show_themselves(path, capsys):
    record = json.loads(path.read_text(encoding="utf-8"))
    suite = record.get("suite")
    code = cli.main(["bench", "--from", str(path)])
    said = capsys.readouterr()
    if suite == "start" or "tolerances" in record:  # what bench writes
        assert code == 0 and suite in said.out and "H100" in said.out
    else:
        assert code == 1 and "is not a record of bench" in said.err and str(path) in said.err


@pytest.mark.skipif(not RECORDS.is_dir(), reason="a source distribution has no records")
def test_the_table_in_the_readme_is_that_of_the_record():
    report = Report.of(json.loads((RECORDS / "h100-decode.json").read_text(encoding="utf-8")))
    assert table.markdown(report) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"suite": "decode"}', '{"suite": "decode", "rows": 3}', '{"suite": "start"}']
)
def test_what_is_no_record_is_named(text, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(text)
    assert cli.main(["bench", "--from", str(path)]) == 1
    assert "record.json is not a record of bench" in capsys.readouterr().err
    assert cli.main(["bench", "--from", str(tmp_path / "absent.json")]) == 1
    assert "absent.json" in capsys.readouterr().err


# Suite cache


@pytest.fixture
def cache_report(report):
    rows = (
        CacheRow("append.f16.b64", "append", 2000, 1000, 4.0, "cudaMemcpyAsync", 5.0, 4.9, 5.2, 12.0, 0.0, 0.0),
        CacheRow("prefix.a", "a", 10**9, 0, 90.0, "read", 100.0, 99.0, 101.0, 9.0, 3e-4, 1e-3),
        CacheRow("prefix.b", "b", 10**6, 0, 20.0, "read", 40.0, 39.0, 41.0, 9.0, 3e-4, 1e-3, "prefix.a"),
    )
    compared = tuple(measure.held_against_each_other(rows))
    return dataclasses.replace(report, suite="cache", rows=compared, peers={})


def test_a_report_of_suite_cache_is_its_record(cache_report):
    record = cache_report.record()
    assert Report.of(json.loads(json.dumps(record))) == cache_report and not cache_report.wrong
    first, alone, shared = record["rows"]
    assert (first["nbytes"], first["gb_per_second"], first["fraction"], first["times_faster"]) == (3000, 0.6, 0.8, None)
    assert alone["times_faster"] is None and (shared["times_faster"], shared["against"]) == (2.5, "prefix.a")
    for name, error in (("append.f16.b64", 1e-9), ("prefix.a", 2e-3), ("prefix.b", float("nan"))):
        rows = tuple(dataclasses.replace(one, error=error) if one.name == name else one for one in cache_report.rows)
        assert dataclasses.replace(cache_report, rows=rows).wrong
    assert measure.held_against_each_other(cache_report.rows[2:])[0].times_faster is None, "what was not measured"


def test_the_tables_of_suite_cache(cache_report):
    lines = [" ".join(line.split()) for line in text_of(table.render(cache_report)).splitlines()]
    assert "│ append.f16.b64 │ append │ 0.0 │ 4.00 │ 5.00 │ 0.800 │ 1 │ 12.0 │ - │ 0.0e+00 │" in lines
    assert "│ prefix.b │ b │ 1.0 │ 20.00 │ 40.00 │ 0.500 │ 25 │ 9.0 │ 2.50 │ 3.0e-04 │" in lines
    lines = table.markdown(cache_report).splitlines()
    assert lines[-1] == "| `prefix.b` | b | 1.0 MB | 20.0 µs | 40.0 µs | 0.500 | 25 | 9 µs | 2.50 |"
    assert len({line.count("|") for line in lines}) == 1


def test_a_record_of_suite_cache_is_shown_in_part(cache_report, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot, "check", lambda path: None)
    path, part = tmp_path / "record.json", tmp_path / "part.json"
    terminal.write_json(path, cache_report.record())
    assert cli.main(["bench", "--from", str(path), "--shapes", "prefix.b", "--json", str(part), "--markdown"]) == 0
    assert capsys.readouterr().out.count("`prefix") == 1
    assert Report.of(json.loads(part.read_text(encoding="utf-8"))).rows == cache_report.rows[2:]
    for arguments in (["--plot", str(tmp_path / "x.png")], ["--peers", "torch"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", "--from", str(path), *arguments])
        assert stopped.value.code == 2
        assert "--plot, --peers: suite cache has no shapes to draw and no peers" in capsys.readouterr().err


def test_the_operations_of_suite_cache():
    known = {one.name: one for one in OPERATIONS}
    assert len(known) == len(OPERATIONS)
    append = known["append.token.l8k"]
    assert append.read_bytes == 2 * 8192 * 8 * 128 * 2 and append.written_bytes == 2 * 8192 * 8 * (128 + 4)
    assert known["append.codes.b256"].read_bytes == known["append.codes.b256"].written_bytes == 2 * 256 * 8 * 128
    assert known["merge_states.n8k.s4"].read_bytes == 4 * 8192 * 32 * (2 * 128 + 4)
    own = 2 * 64 * 256 * 8 * 128
    assert known["shared_prefix.wrapper"].read_bytes == known["shared_prefix.tables"].read_bytes == own * 3 // 2
    assert known["shared_prefix.copies"].read_bytes == own * (8192 + 256) // 256
    assert {one.against for one in OPERATIONS} == {"", "shared_prefix.copies"}


# Tables


def test_tables_of_ours_and_of_peers(report):
    ours, theirs = (line.split() for line in text_of(table.render(report)).splitlines() if "│ gqa4.b2 " in line)
    assert [word for word in ours if word != "│"][:6] == ["gqa4.b2", "0.0", "16.00", "20.00", "0.800", "1"]
    assert " ".join(theirs) == "│ gqa4.b2 │ 20.0 0.80 │ 40.0 0.40 │ 32.0 0.50 │ x │"
    text = text_of(table.render(report))
    second = " ".join([line for line in text.splitlines() if "│ gqa4.b9 " in line][1].split())
    assert second == "│ gqa4.b9 │ 32.0 0.50 │ - │ 64.0 0.25 │ - │"
    assert "fa3 failed on gqa4.b2: no luck" in text and "no such case" not in text
    joined = " ".join(text.split())
    assert "│ host µs, median │ 9 │ 50 │ 65 │ - │" in joined
    assert "fi-tc: tensor cores (flashinfer-python 1.0)" in joined


def test_plans_have_columns_where_a_run_had_plans(report):
    planned = (dataclasses.replace(report.rows[0], plan_us=18.0, plan_host_us=6.5), report.rows[1])
    text = text_of(table.render(dataclasses.replace(report, rows=planned, peers={})))
    lines = [" ".join(line.split()) for line in text.splitlines() if "gqa4.b" in line]
    assert "│ 9.0 │ 18.00 │ 0.889 │ 6.5 │ 3.0e-04 │" in lines[0] and "│ 9.0 │ - │ - │ - │ 3.0e-04 │" in lines[1]
    assert "plan" not in text_of(table.render(report))


def test_formats_are_held_against_e4m3(report):
    rows = tuple(row(dataclasses.replace(SHAPE, name=name), us) for name, us in (("e5m2", 25.0), ("e4m3", 20.0)))
    formats = dataclasses.replace(report, suite="formats", rows=rows, peers={})
    text = text_of(table.render(formats))
    assert "to e4m3's" in text and any("e5m2" in line and "0.800" in line for line in text.splitlines())
    assert "| 0.640 | 0.800 |" in table.markdown(formats)
    alone = dataclasses.replace(formats, rows=rows[:1])
    assert "to e4m3's" not in text_of(table.render(alone)), "without the row there is nothing to hold against"


def test_markdown_has_the_fastest_of_each_family(report):
    lines = table.markdown(report).splitlines()
    assert lines[0].endswith("| against fp16 | host | FlashInfer |"), "who has no time has no column"
    assert lines[2].endswith("| 0.800 | 1.90 | 9 µs | 0.50 |") and lines[3].endswith("| 0.500 | - | 9 µs | 0.25 |")
    assert len({line.count("|") for line in lines}) == 1
    ragged = dataclasses.replace(report, rows=(row(dataclasses.replace(SHAPE, kv_lens=(3, 64))),), peers={})
    assert "2 × 3…64, 8/2, 32 |" in table.markdown(ragged)
    paged = dataclasses.replace(ragged, rows=(row(SHAPE.in_pages(16)),))
    assert "2 × 64, 8/2, 32, pages of 16 |" in table.markdown(paged)


# The figure


def test_bars_are_fractions(report):
    pytest.importorskip("matplotlib")
    axes = plot.draw(report).axes[0]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"cupy_fp8kv": [0.8, 0.5], "FlashInfer, fastest of 2": [0.5, 0.25]}
    assert [label.get_text().split(",")[0] for label in axes.get_yticklabels()] == ["gqa4.b2", "gqa4.b9"]
    assert [text.get_text() for text in axes.texts] == ["0.80", "0.50", "0.50", "0.25"]
    places = [bar.get_y() for bars in axes.containers for bar in bars]
    assert len(set(places)) == 4, "bars do not cover each other"


def test_a_plot_of_a_record(report, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    record, figure = tmp_path / "record.json", tmp_path / "figure.png"
    terminal.write_json(record, report.record())
    assert cli.main(["bench", "--from", str(record), "--plot", str(figure), "--shapes", "gqa4.b2"]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "gqa4.b2" in said and "gqa4.b9" not in said
    assert cli.main(["bench", "--from", str(record), "--plot", str(tmp_path / "figure.xyz")]) == 1
    assert "--plot: " in capsys.readouterr().err
    assert cli.main(["bench", "--from", str(record), "--plot", str(tmp_path / "absent" / "figure.png")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_without_matplotlib_only_a_plot_fails(report, tmp_path, capsys, monkeypatch):
    path = tmp_path / "record.json"
    terminal.write_json(path, report.record())
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--from", str(path), "--quick"]) == 0
    assert cli.main(["bench", "--plot", str(tmp_path / "figure.png"), "--from", str(path)]) == 1
    assert 'pip install "cupy_fp8kv[plot]"' in capsys.readouterr().err


def test_a_record_is_shown_in_part(report, tmp_path, capsys):
    path, part = tmp_path / "record.json", tmp_path / "part.json"
    terminal.write_json(path, report.record())
    assert cli.main(["bench", "--from", str(path), "--peers", "fi", "--shapes", "gqa4.b9", "--json", str(part)]) == 0
    shown = Report.of(json.loads(part.read_text(encoding="utf-8")))
    assert list(shown.peers) == ["fi-cc", "fi-tc"] and [one.shape.name for one in shown.rows] == ["gqa4.b9"]
    assert list(shown.rows[0].peers) == ["fi-cc", "fi-tc"]
    with pytest.raises(SystemExit):
        cli.main(["bench", "--from", str(path), "--shapes", "mha"])
    assert "it has gqa4.b2, gqa4.b9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "flashattention"], "--peers: no peer's name starts with 'flashattention'; there are torch-fp16"),
        (["--suite", "start", "--plot", "x.png"], "suite start has no shapes"),
        (["--suite", "start", "--markdown"], "suite start has no shapes"),
        (["--suite", "cache", "--plot", "x.png"], "suite cache has no shapes to draw and no peers"),
        (["--suite", "cache", "--peers", "torch"], "suite cache has no shapes to draw and no peers"),
        (["--suite", "cache", "--shapes", "prepend"], "no shape of suite cache starts with prepend; it has append."),
        (["--suite", "paged", "--shapes", "p16"], "no shape of suite paged starts with p16; it has gqa4.b64.l4k.p16,"),
    ],
)
def test_usage_errors(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(plot, "check", lambda path: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_wrong_result_is_1(report, tmp_path, capsys):
    wrong = dataclasses.replace(report, rows=(dataclasses.replace(report.rows[0], error=float("nan")),))
    terminal.write_json(tmp_path / "wrong.json", wrong.record())
    assert cli.main(["bench", "--from", str(tmp_path / "wrong.json")]) == 1
    assert "nan" in capsys.readouterr().out


# Start


def test_the_import_is_timed_without_a_gpu(monkeypatch):
    monkeypatch.setattr(start, "cupy_problem", lambda: "no CUDA device")
    (found,) = start.run(processes=2)
    assert found.name == "import" and found.processes == 2 and list(found.steps) == ["python", "import cupy_fp8kv"]
    assert 0 < found.low <= found.seconds <= found.high and found.seconds <= sum(found.steps.values()) * 1.5
    assert found.steps["import cupy_fp8kv"] > 0.01


def test_steps_add_up():
    runs = [{"python": 1.0, "import": 3.0, "result": 9.0}, {"python": 2.0, "import": 3.0, "result": 7.0}]
    found = start._summary("cold", "what", [*runs, {"python": 1.5, "import": 3.5, "result": 8.0}])
    assert (found.seconds, found.low, found.high) == (8.0, 7.0, 9.0)
    assert found.steps == {"python": 1.5, "import": 2.0, "result": 4.5}


def test_a_start_that_fails_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(start, "_SCRIPT", "raise RuntimeError('no result')")
    with pytest.raises(terminal.CommandError, match="no result"):
        start._process(False, tmp_path, "cache")


def test_suite_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(start, "cupy_problem", lambda: "no CUDA device")
    real = start.run
    monkeypatch.setattr(start, "run", lambda: real(processes=1))
    path = tmp_path / "start.json"
    assert cli.main(["bench", "--suite", "start", "--json", str(path)]) == 0
    first = capsys.readouterr().out
    assert cli.main(["bench", "--from", str(path)]) == 0
    assert capsys.readouterr().out == first and "import cupy_fp8kv" in first
