"""The command line, as a user meets it: in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cupy_fp8kv import info
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.jit import sources
from cupy_fp8kv.jit.device import has_gpu
from cupy_fp8kv.jit.spec import DecodeSpec, MergeSpec

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = ["--batch", "2", "--kv-len", "40", "--num-qo-heads", "4", "--num-kv-heads", "2", "--head-dim", "32"]


def nvrtc_problem():
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


needs_nvrtc = pytest.mark.skipif(nvrtc_problem() is not None, reason=f"needs NVRTC: {nvrtc_problem()}")


def run(*arguments):
    command = [sys.executable, "-m", "cupy_fp8kv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=120)


def succeeds(*arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_help_names_every_command_and_exit_code():
    text = succeeds("--help")
    assert all(word in text for word in ("demo", "info", "compile", "bench", "tune", "study", "exit codes"))
    for command in ("demo", "info", "compile", "bench", "tune", "study"):
        text = succeeds(command, "--help")
        assert f"python -m cupy_fp8kv {command}" in text and "examples:" in text and "130 Ctrl-C" in text


def test_version():
    assert re.fullmatch(r"cupy_fp8kv \d+\.\d+\.\d+\n", succeeds("--version"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["no-such-command"], "invalid choice"),
        (["demo", "--batch", "0"], "--batch"),
        (["demo", "--num-qo-heads", "3", "--num-kv-heads", "2"], "num_kv_heads"),
        (["demo", "--head-dim", "20"], "head_dim"),
        (["demo", "--kv-format", "e8m0"], "--kv-format"),
        (["compile", "--arch", "sm_70"], "sm_80"),
        (["compile", "--match", "no such kernel"], "--match"),
        (["bench", "--shapes", "no-such-shape"], "mha.b1.l1k"),
        (["tune", "--head-dim", "20"], "head_dim"),
        (["tune", "--num-qo-heads", "3", "--num-kv-heads", "2"], "num_kv_heads"),
        (["tune", "--kv-layout", "NDH"], "--kv-layout"),
        (["study", "--count", "0"], "--count"),
    ],
)
def test_usage_errors_are_2_and_name_the_argument(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_info_as_json():
    facts = json.loads(succeeds("info", "--json"))
    assert facts["sources"] == sources.digest() and facts["kv_formats"] == list(KV_FORMATS)
    assert facts["versions"]["numpy"] and facts["kernel_cache"]
    assert all(set(problem) == {"what", "mend"} for problem in facts["problems"])
    assert has_gpu() or any("NumPy backend" in problem["what"] for problem in facts["problems"])


def test_info_as_tables():
    text = succeeds("info")
    assert sources.digest() in text and "E4M3FN" in text


def test_info_counts_tuned_plans_and_tune_clears_them(monkeypatch, tmp_path):
    """In the folder of the kernel cache, which is moved; neither needs a GPU."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "cupy_fp8kv_tuned"
    assert json.loads(succeeds("info", "--json"))["tuned_plans"] == {"count": 0, "folder": str(folder)}
    folder.mkdir()
    for name in ("one.json", "two.json"):
        (folder / name).write_text("{}")
    assert f"2 in {folder}" in succeeds("info")
    assert succeeds("tune", "--clear") == f"removed 2 tuned plans from {folder}\n"
    assert list(folder.iterdir()) == [] and "removed 0" in succeeds("tune", "--clear")


def test_tune_prints_and_writes_what_it_found(monkeypatch, capsys, tmp_path):
    """The search apart, which needs a GPU."""
    from cupy_fp8kv import cli
    from cupy_fp8kv.jit import device
    from cupy_fp8kv.plan import DeviceInfo
    from cupy_fp8kv.tuning import report, search, store, study, tune
    from cupy_fp8kv.tuning.options import plan_options

    h100, asked = DeviceInfo("H100", 90, 132, 232448), []

    def tune_call(shape, progress):
        asked.append(shape)
        problem = study.problem_of(shape)
        options = plan_options(problem, h100)[:30]
        tried = [search.Timed(plan, 40.0 + index, 1) for index, plan in enumerate(options[1:])]
        tried = (*tried, search.Timed(options[0], 99.0, 1))
        return tune.TuneResult(problem, h100, options[1], options[0], 40.0, 99.0, tried, True, 1.0)

    monkeypatch.setattr(device, "cupy_problem", lambda: None)
    monkeypatch.setattr(report, "Filler", lambda: None)
    monkeypatch.setattr(report, "call_of", lambda shape, filler: shape)
    monkeypatch.setattr(report, "tune_call", tune_call)
    path = tmp_path / "tuned.json"
    sizes = ["--batch", "3", "--kv-len", "777", "--num-qo-heads", "12", "--num-kv-heads", "4", "--head-dim", "64"]
    assert cli.main(["tune", *sizes, "--kv-layout", "HND", "--q-format", "bf16", "--no-save"]) == 0
    assert store.files() == []
    assert cli.main(["tune", *sizes, "--kv-format", "e5m2", "--json", str(path)]) == 0
    (kept,) = store.files()
    assert [(s.batch, s.kv_len, s.num_qo_heads, s.num_kv_heads, s.head_dim) for s in asked] == [(3, 777, 12, 4, 64)] * 2
    assert [(s.q, s.k, s.v, s.kv_layout) for s in asked] == [
        ("bf16", "e4m3", "e4m3", "HND"), ("f16", "e5m2", "e5m2", "NHD")
    ]  # fmt: skip
    text = capsys.readouterr().out
    assert "planned" in text and "tuned" in text and "+147.5%" in text and str(kept) in text.replace("\n", "")
    record = json.loads(path.read_text())
    assert len(record["tried"]) == 30 and record["us"] == 40.0 and record["sources"] == sources.digest()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_demo_in_numpy(kv_format):
    text = succeeds("demo", "--backend", "numpy", "--kv-format", kv_format, *SMALL)
    assert "[2, 4, 32] fp16, [2, 40, 2, 32]" in text and "≤ 0.0005" in text


def test_a_wrong_result_is_1(monkeypatch, capsys):
    from cupy_fp8kv import cli, demo

    right = demo.batch_decode_with_padded_kv_cache
    monkeypatch.setattr(demo, "batch_decode_with_padded_kv_cache", lambda *a, **k: right(*a, **k) * 1.01)
    assert cli.main(["demo", "--backend", "numpy", *SMALL]) == 1
    assert "exceeds 0.0005" in capsys.readouterr().out


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["bench"], ["demo", "--backend", "cuda"], ["tune"], ["study"]])
def test_without_a_gpu_what_needs_one_is_1(arguments):
    done = run(*arguments)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert re.match(r"cupy_fp8kv: .*(no CUDA device|CuPy)", done.stderr), done.stderr


@needs_nvrtc
def test_compile(tmp_path):
    path = tmp_path / "record.json"
    text = succeeds("compile", "--arch", "sm_80,sm_90", "--match", "merge[out=f16]", "--json", str(path))
    assert "merge[out=f16]" in text and "sm_80" in text and "sm_90" in text
    record = json.loads(path.read_text())
    assert record["sources"] == sources.digest()
    assert [(row["arch"], row["spill_bytes"], row["error"]) for row in record["rows"]] == [(80, 0, ""), (90, 0, "")]
    assert all(row["registers"] > 0 for row in record["rows"])


@needs_nvrtc
def test_compile_error_is_1(monkeypatch, capsys):
    from cupy_fp8kv import cli, offline

    broken = DecodeSpec("f16", "e4m3", "e4m3", 24, 1, 1, 16, 1)
    monkeypatch.setattr(offline, "jobs", lambda *asked: [(MergeSpec("f16"), 80), (broken, 90)])
    assert cli.main(["compile", "--arch", "sm_80,sm_90"]) == 1
    said = capsys.readouterr()
    assert "2 kernels, 1 of them with errors or spills" in said.out and "error" in said.out
    assert f"{broken} for sm_90:" in said.err and "head_dim must be a multiple of 16" in said.err
    assert f"{MergeSpec('f16')} for" not in said.err


@needs_nvrtc
def test_entry_points_of_one_source_are_reported_one_by_one(tmp_path):
    path = tmp_path / "record.json"
    succeeds("compile", "--arch", "sm_90", "--match", "[values=float32 codes=e4m3]", "--json", str(path))
    rows = {row["spec"].partition("[")[0]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"amax", "scales", "quantize", "dequantize"} and not any(row["error"] for row in rows.values())
    # Compiled once, and yet each has figures of its own.
    assert len({row["seconds"] for row in rows.values()}) == 1 and len({row["registers"] for row in rows.values()}) > 1


@needs_nvrtc
@pytest.mark.parametrize(
    ("asked", "named", "rest"),
    [((), "sm_103,sm_120", "sm_80,sm_86,sm_89,sm_90,sm_100"), (("--arch", "sm_103"), "sm_103", None)],
)
def test_an_architecture_that_nvrtc_does_not_know_is_named(monkeypatch, capsys, asked, named, rest):
    """NVRTC before 12.9 knows no sm_103, before 12.8 no Blackwell: nothing is left out in silence."""
    from cupy_fp8kv import cli
    from cupy_fp8kv.jit import nvrtc

    monkeypatch.setattr(nvrtc, "known_archs", lambda: [70, 80, 86, 89, 90, 100])
    assert cli.main(["compile", *asked]) == 1
    said = capsys.readouterr()
    assert said.out == "" and f"does not compile for {named}: install the newest nvidia-cuda-nvrtc" in said.err
    assert (f"--arch {rest}\n" in said.err) if rest else "--arch" not in said.err


@needs_nvrtc
def test_interrupt_is_130_without_a_traceback():
    # Started in the background of a script, this process ignores the signal, and so would its child.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "import cupy_fp8kv.cli as cli; raise SystemExit(cli.main(['compile']))"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        first = process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert first.startswith("compiling ") and process.returncode == 130
    assert "interrupted" in rest and "Traceback" not in rest, rest


def test_importing_the_package_imports_no_command():
    code = (
        "import sys, cupy_fp8kv; print([m for m in ('rich', 'argparse', 'cupy', 'cupy_fp8kv.cli', 'cupy_fp8kv.info') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "rich" not in done.stdout and "cli" not in done.stdout and "cupy" not in done.stdout


FACTS = {
    "versions": {"cupy": "14.0.0"}, "cupy_wheels": {"cupy-cuda12x": "14.0.0"}, "cupy_problem": None, "nvrtc": "12.9",
    "driver_cuda": "12.8", "devices": [{"index": 0, "name": "a GPU", "arch": 90}], "kernel_cache": "~/cache",
}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "cache_writable", "nvrtc_wheels", "expected"),
    [
        ({}, True, {12: "12.9", 13: None}, []),
        ({"versions": {"cupy": None}, "cupy_wheels": {}, "nvrtc": None}, True, {12: None, 13: None}, ["not installed"]),
        ({"cupy_problem": "CuPy cannot be imported: X"}, True, {12: "1", 13: None}, ["cannot be imported"]),
        ({"devices": [], "cupy_problem": "no CUDA device"}, True, {12: "1", 13: None}, ["no usable GPU"]),
        ({"nvrtc": "13.0"}, True, {12: None, 13: "13.0"}, ["NVRTC is of CUDA 13.0"]),
        ({}, True, {12: "12.9", 13: "13.0"}, ["both installed"]),
        ({"cupy_wheels": {"cupy-cuda12x": "1", "cupy-cuda13x": "1"}}, True, {12: "1", 13: None}, ["several CuPy"]),
        (
            {"devices": [{"index": 1, "name": "old", "arch": 75}]},
            True,
            {12: "1", 13: None},
            ["device 1 (old) is sm_75"],
        ),
        ({}, False, {12: "1", 13: None}, ["~/cache cannot be written"]),
        ({"nvrtc": None}, True, {12: None, 13: None}, ["no NVRTC"]),
    ],
)
def test_what_is_wrong(facts, cache_writable, nvrtc_wheels, expected):
    found = info.problems({**FACTS, **facts}, cache_writable, nvrtc_wheels)
    assert len(found) == len(expected) and all(e in p["what"] for e, p in zip(expected, found, strict=True)), found
