"""Compiling many specialisations at once, without a GPU, on all cores."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

from rich.text import Text

from . import terminal
from .bench import limit
from .jit import nvrtc, processes, sources
from .jit.compiler import CompileReport, compile_module
from .jit.covering import SETS, usual_set
from .jit.spec import Spec

Job = tuple[Spec, int]


def jobs(name: str | None, archs: list[int], match: str = "") -> list[Job]:
    """The specialisations of a set (None: the usual one of each) that contain ``match``, for each architecture."""
    found: list[tuple[Any, int]] = []
    for arch in archs:
        found += [(spec, arch) for spec in (*SETS[name or usual_set(arch)](arch), *limit.SPECS)]
    return [(spec, arch) for spec, arch in found if match in str(spec)]


def is_bad(report: CompileReport) -> bool:
    return bool(report.error or report.spill_bytes)


def _compile(job: tuple[list[Spec], int]) -> list[CompileReport]:
    return [replace(report, cubin=b"") for report in compile_module(*job)]


def _version() -> str:
    """NVRTC's; terminal.CommandError if there is none."""
    try:
        from cupy.cuda import nvrtc

        return ".".join(map(str, nvrtc.getVersion()))
    except Exception as error:  # a missing or broken installation raises whatever it likes
        raise terminal.CommandError(
            f'compiling needs CuPy and NVRTC ({error}): pip install "cupy_fp8kv[cuda12]" (or cuda13)'
        ) from error


def _check_known(archs: list[int], version: str) -> None:
    """terminal.CommandError that names the architectures that NVRTC does not compile for: none is left out unsaid."""
    known = nvrtc.known_archs()
    unknown, rest = (
        ",".join(f"sm_{arch}" for arch in archs if (arch in known) is is_known) for is_known in (False, True)
    )
    if unknown:
        raise terminal.CommandError(
            f"NVRTC {version} does not compile for {unknown}: install the newest nvidia-cuda-nvrtc-cu12 (CUDA 13: "
            f"nvidia-cuda-nvrtc)" + (f", or leave them out: --arch {rest}" if rest else "")
        )


def compile_all(wanted: list[Job]) -> tuple[list[CompileReport], float]:
    """The reports in the order of ``wanted``, and the wall time.

    terminal.CommandError if there is no NVRTC, or one that does not know an architecture.
    """
    version = _version()
    _check_known(list(dict.fromkeys(arch for _, arch in wanted)), version)
    modules: dict[tuple[str, int], list[int]] = {}
    for index, (spec, arch) in enumerate(wanted):
        modules.setdefault((spec.source(), arch), []).append(index)
    cores = processes.workers(len(modules))
    print(f"compiling {len(wanted)} kernels on {cores} cores with NVRTC {version}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    compilations = [([wanted[index][0] for index in indices], arch) for (_, arch), indices in modules.items()]
    with terminal.progress() as bar:
        task = bar.add_task("compiling", total=len(modules))
        found = processes.on_all_cores(_compile, compilations, lambda: bar.advance(task))
    reports = {
        index: report
        for indices, of_module in zip(modules.values(), found, strict=True)
        for index, report in zip(indices, of_module, strict=True)
    }
    return [reports[index] for index in range(len(wanted))], time.perf_counter() - started


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
