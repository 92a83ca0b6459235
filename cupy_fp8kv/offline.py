"""Compiling many specialisations at once, without a GPU, on all cores."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any, cast

from rich.text import Text

from . import terminal
from .bench import limit
from .jit import processes, sources
from .jit.compiler import CompileReport, compile_offline
from .jit.covering import SETS
from .jit.spec import Spec

Job = tuple[Spec, int]


def jobs(name: str, archs: list[int], match: str = "") -> list[Job]:
    """The specialisations of a set that contain ``match``, for each architecture."""
    found = [(spec, arch) for arch in archs for spec in (*SETS[name](arch), *cast("tuple[Spec, ...]", limit.SPECS))]
    return [(spec, arch) for spec, arch in found if match in str(spec)]


def is_bad(report: CompileReport) -> bool:
    return bool(report.error or report.spill_bytes)


def _compile(job: Job) -> CompileReport:
    return replace(compile_offline(*job), cubin=b"")


def compile_all(wanted: list[Job]) -> tuple[list[CompileReport], float]:
    """The reports in the order of ``wanted``, and the wall time. terminal.CommandError if there is no NVRTC."""
    try:
        from cupy.cuda import nvrtc

        version = ".".join(map(str, nvrtc.getVersion()))
    except Exception as error:  # a missing or broken installation raises whatever it likes
        raise terminal.CommandError(
            f'compiling needs CuPy and NVRTC ({error}): pip install "cupy_fp8kv[cuda12]" (or cuda13)'
        ) from error
    cores = processes.workers(len(wanted))
    print(f"compiling {len(wanted)} kernels on {cores} cores with NVRTC {version}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with terminal.progress() as bar:
        task = bar.add_task("compiling", total=len(wanted))
        reports = processes.on_all_cores(_compile, wanted, lambda: bar.advance(task))
    return reports, time.perf_counter() - started


def _cell(report: CompileReport | None) -> Text:
    if report is None:
        return Text("")
    if report.error:
        return Text("error", style="red")
    if report.spill_bytes:
        return Text(f"{report.registers} spills {report.spill_bytes}", style="red")
    return Text(f"{report.registers} stack {report.stack_bytes}" if report.stack_bytes else str(report.registers))


def render(reports: list[CompileReport], archs: list[int], seconds: float, quiet: bool) -> Any:
    """A row for every specialisation and, below, what holds for each architecture; ``quiet``: only the bad rows."""
    by_spec: dict[Any, dict[int, CompileReport]] = {}
    for report in reports:
        by_spec.setdefault(report.spec, {})[report.arch] = report
    bad = sum(map(is_bad, reports))
    table = terminal.table(
        f"{len(reports)} kernels, {bad} of them with errors or spills", "specialisation", "shared B",
        *(f"sm_{arch}" for arch in archs), "seconds",
        caption=f"by architecture: registers, and bytes of spills and stack if any; {seconds:.0f} s in all",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    for spec, of_arch in by_spec.items():
        if quiet and not any(map(is_bad, of_arch.values())):
            continue
        shared = max(report.shared_bytes for report in of_arch.values())
        took = sum(report.seconds for report in of_arch.values())
        table.add_row(str(spec), str(shared), *(_cell(of_arch.get(arch)) for arch in archs), f"{took:.2f}")
    table.add_section()
    columns = [[report for report in reports if report.arch == arch] for arch in archs]
    largest = [str(max((report.registers for report in some), default=0)) for some in columns]
    table.add_row("most registers", "", *largest, "")
    wrong = [str(sum(map(is_bad, some))) for some in columns]
    table.add_row("errors and spills", "", *wrong, f"{sum(report.seconds for report in reports):.2f}")
    return table


def record(reports: list[CompileReport], seconds: float) -> dict[str, Any]:
    from cupy.cuda import nvrtc

    return {
        "nvrtc": ".".join(map(str, nvrtc.getVersion())), "sources": sources.digest(), "seconds": round(seconds, 1),
        "rows": [
            {
                "spec": str(report.spec), "arch": report.arch, "registers": report.registers,
                "shared_bytes": report.shared_bytes, "spill_bytes": report.spill_bytes,
                "stack_bytes": report.stack_bytes, "seconds": round(report.seconds, 3), "error": report.error,
            }
            for report in reports
        ],
    }  # fmt: skip
