"""Compilation: a specialisation in, a function on a device out, through CuPy and NVRTC.

Kernels are compiled when first used, each once whatever the threads, and kept on disk under the whole inlined source as
the key. Where all are there, NVRTC is not even loaded.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from . import kernel_files, nvrtc
from .device import device_info, driver, ensure_context, on_device, require_cupy
from .spec import DecodeSpec, Spec

#: Architectures that kernels are compiled for in CI. Any other from sm_80 on may work.
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120)
#: Below this, a kernel may use shared memory without asking for it.
_FREE_SHARED_BYTES = 48 * 1024
#: A compilation that takes longer says what is going on.
_SILENT_SECONDS = 1.0

_lock = threading.Lock()
#: By the name of the file that a module is kept in, and the device.
_modules: dict[tuple[str, int], Any] = {}
_kernels: dict[tuple[Spec, int], Kernel] = {}
#: By that name, held by the thread that loads or compiles the module. Different ones are compiled at the same time.
_loading: dict[str, threading.Lock] = {}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function loaded on a device, with what a launch needs."""

    spec: Spec
    device: int
    handle: int
    threads: int
    shared_bytes: int
    owner: Any  # keeps the module loaded


def load(spec: Spec, device: int) -> Kernel:
    """The kernel of ``spec`` on CUDA device ``device``; compiles it if no cache has it.

    RuntimeError with NVRTC's log and the specialisation if the compilation fails.
    """
    kernel = _kernels.get((spec, device))
    return kernel if kernel is not None else _load_once(spec, device)


def load_all(specs: Sequence[Spec], device: int, advance: Callable[[], object] | None = None) -> list[Kernel]:
    """:func:`load` for each, those that are missing at the same time on all cores: NVRTC works without Python's lock.

    ``advance`` is called once for each, in this thread. Whoever shows progress so is spared the messages.
    """
    missing = [spec for spec in dict.fromkeys(specs) if (spec, device) not in _kernels]
    if advance:
        for _ in range(len(specs) - len(missing)):
            advance()
    to_compile = [spec for spec in missing if not kernel_files.exists(_file(spec, device))]
    if len(to_compile) > 1:
        _load_side_by_side(to_compile, device, advance)
        missing = [spec for spec in missing if spec not in to_compile]
    for spec in missing:
        _load_once(spec, device, quiet=advance is not None)
        if advance:
            advance()
    return [load(spec, device) for spec in specs]


def _load_side_by_side(specs: Sequence[Spec], device: int, advance: Callable[[], object] | None) -> None:
    from concurrent.futures import ThreadPoolExecutor, as_completed  # costs milliseconds; a program may never compile

    runtime = require_cupy().cuda.runtime

    def load_one(spec: Spec) -> None:
        ensure_context(runtime, device)
        _load_once(spec, device, quiet=advance is not None)

    with ThreadPoolExecutor(min(len(specs), os.cpu_count() or 1)) as pool:
        try:
            for done in as_completed([pool.submit(load_one, spec) for spec in specs]):
                done.result()
                if advance:
                    advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@functools.cache
def _file(spec: Spec, device: int) -> str:
    """The name of the file that a compiled ``spec`` is kept in."""
    return kernel_files.name_of(spec.source(), device_info(device).arch)


def _load_once(spec: Spec, device: int, quiet: bool = False) -> Kernel:
    file = _file(spec, device)
    with _lock:
        loading = _loading.setdefault(file, threading.Lock())
    with loading:
        kernel = _kernels.get((spec, device))
        if kernel is None:
            kernel = _kernels[spec, device] = _load(spec, file, device, quiet)
    return kernel


def _load(spec: Spec, file: str, device: int, quiet: bool) -> Kernel:
    runtime = require_cupy().cuda.runtime
    info = device_info(device)
    ensure_context(runtime, device)
    with on_device(runtime, device):
        module = _modules.get((file, device))
        if module is None:
            module = _modules[file, device] = _kept_module(file) or _compiled_module(spec, file, info.arch, quiet)
        function = module.get_function(spec.entry)
        shared = most = spec.shared_bytes
        if isinstance(spec, DecodeSpec) and spec.stages:
            # Rings of more stages are the same function.
            most = info.shared_per_block
            # Half of an SM and a little: a CTA that starts while the kernel before it still runs must not join another
            # of its own, while SMs stay without one.
            shared = max(shared, info.shared_per_block // 2 if spec.ctas_per_sm == 1 else 0)
        if most > _FREE_SHARED_BYTES:
            driver().funcSetAttribute(function.ptr, driver().CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)
    return Kernel(spec, device, function.ptr, spec.threads, shared, function)


def _kept_module(file: str) -> Any:
    """The module in a file; None if there is none that this device and driver take."""
    cubin = kernel_files.read(file)
    if cubin is None:
        return None
    try:
        return _module(cubin)
    except driver().CUDADriverError:
        return None


def _compiled_module(spec: Spec, file: str, arch: int, quiet: bool) -> Any:
    with nullcontext() if quiet else _Progress(spec, arch):
        return _module(compile_to_file(spec, arch, file))


def compile_to_file(spec: Spec, arch: int, file: str) -> bytes:
    """The cubin of ``spec`` for a device of sm_``arch``, kept in ``file``. Needs NVRTC, but no GPU.

    RuntimeError with NVRTC's log and the specialisation if it does not compile.
    """
    try:
        cubin, _ = nvrtc.compile_source(spec.source(), nvrtc.nearest_arch(arch))
    except nvrtc.CompileError as error:
        raise RuntimeError(f"NVRTC cannot compile {spec} for sm_{arch}:\n{error}") from error
    kernel_files.write(file, cubin)
    return cubin


def _module(cubin: bytes) -> Any:
    module = require_cupy().cuda.Module()
    module.load(cubin)
    return module


class _Progress:
    """Says on stderr that a kernel is being compiled once that has taken longer than a second."""

    def __init__(self, spec: Spec, arch: int):
        self._timer = threading.Timer(_SILENT_SECONDS, self._say, (spec, arch))
        self._timer.daemon = True

    @staticmethod
    def _say(spec: Spec, arch: int) -> None:
        print(f"cupy_fp8kv: compiling {spec} for sm_{arch}; kept on disk for the next time", file=sys.stderr)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()


@dataclass(frozen=True)
class CompileReport:
    """What NVRTC and ptxas say of one specialisation on one architecture. ``error`` is empty if it compiled."""

    spec: Spec
    arch: int
    seconds: float
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    cubin: bytes = b""
    error: str = ""


def compile_offline(spec: Spec, arch: int) -> CompileReport:
    """Compile ``spec`` for sm_``arch`` with NVRTC alone: no GPU and no driver needed, nothing is cached."""
    return compile_module([spec], arch)[0]


def compile_module(specs: Sequence[Spec], arch: int) -> list[CompileReport]:
    """:func:`compile_offline` for entry points of one source, which is compiled once. They share the seconds."""
    started = time.perf_counter()
    cubin, log, error = b"", "", ""
    try:
        cubin, log = nvrtc.compile_source(specs[0].source(), arch, "--ptxas-options=-v")
    except nvrtc.CompileError as failure:
        error = str(failure)
    seconds = (time.perf_counter() - started) / len(specs)
    if error:
        return [CompileReport(spec, arch, seconds, error=error) for spec in specs]
    return [_report(spec, arch, seconds, cubin, _of_entry(log, spec.entry)) for spec in specs]


def _report(spec: Spec, arch: int, seconds: float, cubin: bytes, log: str) -> CompileReport:
    return CompileReport(
        spec, arch, seconds,
        registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        shared_bytes=_number(r"(\d+) bytes smem", log) + spec.shared_bytes,
        cubin=cubin,
    )  # fmt: skip


def _of_entry(log: str, entry: str) -> str:
    """The part of ptxas's report that is about one entry point."""
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(entry, log)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0
