"""Compilation in processes on all cores, for commands that compile hundreds of kernels.

Threads do for the kernels of a call (``compiler.load_all``). Processes share no memory for which compilations could
wait, but each starts Python and loads NVRTC, and spawning them runs a program's main module again, which a library must
not do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from . import kernel_files, nvrtc
from .compiler import compile_to_file
from .spec import Spec

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def workers(jobs: int) -> int:
    """How many processes so many jobs get."""
    return max(1, min(os.cpu_count() or 1, jobs))


def on_all_cores(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], advance: Callable[[], object]
) -> list[_Result]:
    """``function`` of each job, in their order; ``advance`` is called after each. The first error ends them all."""
    if not jobs:
        return []
    # Ctrl-C reaches all processes of a terminal; workers inherit that they ignore it, and this one ends them.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool = ProcessPoolExecutor(workers(len(jobs)), mp_context=multiprocessing.get_context("spawn"))
        futures = [pool.submit(function, job) for job in jobs]
    finally:
        signal.signal(signal.SIGINT, previous)
    try:
        for done in as_completed(futures):
            done.result()
            advance()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def compile_to_files(specs: Iterable[Spec], arch: int, start: Callable[[int], Callable[[], object]]) -> tuple[int, int]:
    """Compile what of ``specs`` no file holds for sm_``arch``, each source once; loading them is fast from then on.

    ``start`` is told how many there are to compile, and gives what is called after each. Returns how many sources there
    are, and how many were compiled: none where kernels are not kept in files.
    """
    by_file = {kernel_files.name_of(spec.source(), arch): spec for spec in specs}
    missing = [(spec, arch, file) for file, spec in by_file.items() if not kernel_files.exists(file)]
    if nvrtc.is_on("CUPY_CACHE_IN_MEMORY"):
        missing = []
    on_all_cores(_compile, missing, start(len(missing)))
    return len(by_file), len(missing)


def _compile(job: tuple[Any, int, str]) -> None:
    # The name comes from the process that will look for the file.
    compile_to_file(*job)
