"""The time from starting Python to the first result, with an empty kernel cache and a full one, and of the import.

Each figure is the median of several processes. A process tells when it came how far by the monotonic clock, which all
processes of a machine share; its end is not waited for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import terminal
from ..jit import sources
from ..jit.device import cupy_problem
from .measure import machine_record

METHOD = (
    "wall time from starting Python, median of the processes; (a) and (b): one request of 1024 rows, 32 query heads on "
    "8 cache heads, CuPy arrays, until the result is on the host; the steps are what of it passed between two marks"
)
_SCRIPT = """
import json, time
marks = {"python": time.monotonic()}
def mark(step):
    marks[step] = time.monotonic()
import cupy_fp8kv
mark("import cupy_fp8kv")
if COMPUTE:
    import cupy
    mark("import cupy")
    q = cupy.zeros((1, 32, 128), "float16")
    k, v = (cupy.zeros((1, 1024, 8, 128), "uint8") for _ in "kv")
    cupy.cuda.get_current_stream().synchronize()
    mark("first arrays on the device")
    out = cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, v)
    mark("first call")
    assert not out.get().any()
    mark("result")
print(json.dumps(marks))
"""


@dataclass(frozen=True)
class Start:
    """Seconds: the median process, the fastest and the slowest, and the median of each step."""

    name: str
    what: str
    seconds: float
    low: float
    high: float
    processes: int
    steps: Mapping[str, float]


def _process(compute: bool, folder: Path, cache: str, **environment: str) -> dict[str, float]:
    """When a process came how far, in seconds from its start. ``folder`` holds bytecode and caches of kernels."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Bytecode is kept, as Python does by default, but not beside the sources.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    kept = {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "CUPY_CACHE_DIR": str(folder / cache)}
    command = [sys.executable, "-c", f"COMPUTE = {compute}\n{_SCRIPT}"]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**inherited, "PYTHONPATH": paths, **kept, **environment}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise terminal.CommandError(f"a process that should give a first result failed: {last}")
    return {step: at - began for step, at in json.loads(done.stdout).items()}


def _summary(name: str, what: str, runs: list[dict[str, float]]) -> Start:
    ends = sorted(max(run.values()) for run in runs)
    steps, before = {}, [0.0] * len(runs)
    for step in runs[0]:
        steps[step] = statistics.median(run[step] - start for run, start in zip(runs, before, strict=True))
        before = [run[step] for run in runs]
    return Start(name, what, statistics.median(ends), ends[0], ends[-1], len(runs), steps)


def run(processes: int = 7) -> list[Start]:
    """Measure all; without a GPU only the import."""
    found = []
    gpu = cupy_problem() is None
    with tempfile.TemporaryDirectory() as folder, terminal.progress() as bar:
        task = bar.add_task("start", total=processes * (3 if gpu else 1))

        def measured(name: str, what: str, compute: bool, caches: list[str], **environment: str) -> None:
            runs = []
            for cache in caches:
                runs.append(_process(compute, Path(folder), cache, **environment))
                bar.advance(task)
            found.append(_summary(name, what, runs))

        _process(gpu, Path(folder), "first")  # leaves its bytecode, and kernels for the warm ones
        if gpu:
            measured("cold", "empty kernel cache to the first result", True, [f"cold{i}" for i in range(processes)])
            measured("warm", "the same with the kernels in the cache", True, ["first"] * processes)
        measured("import", "import alone, no GPU visible", False, ["first"] * processes, CUDA_VISIBLE_DEVICES="")
    return found


def record(starts: list[Start]) -> dict[str, Any]:
    return {
        "suite": "start", **machine_record(), "sources": sources.digest(), "method": METHOD,
        "rows": [asdict(start) for start in starts],
    }  # fmt: skip


def render(record: Mapping[str, Any]) -> Any:
    """The table of a record. ValueError if it is not one."""
    try:
        where = record["device"] or "no GPU, so only the import"
        table = terminal.table(
            f"start: {where}, Python {record['python']}", "", "", "seconds", "fastest", "slowest", "of which", left=2,
            caption=record["method"],
        )  # fmt: skip
        table.columns[-1].justify = "left"
        for row in record["rows"]:
            steps = ", ".join(f"{step} {seconds:.3f}" for step, seconds in row["steps"].items())
            figures = (f"{row[column]:.3f}" for column in ("seconds", "low", "high"))
            table.add_row(row["name"], f"{row['what']}, {row['processes']} processes", *figures, steps)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a record of the benchmark: {type(error).__name__}: {error}") from error
    return table
