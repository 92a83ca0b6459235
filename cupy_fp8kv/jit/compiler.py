"""Compilation: a specialisation in, a function on a device out, through CuPy RawModules and NVRTC.

Kernels are compiled when first used, each once whatever the threads, and kept on disk by CuPy under the whole inlined
source as the key.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .device import device_info, ensure_context, on_device, require_cupy
from .spec import DecodeSpec, Spec

OPTIONS = ("-std=c++17",)
#: Architectures that kernels are compiled for in CI. Any other from sm_80 on may work.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: Below this, a kernel may use shared memory without asking for it.
_FREE_SHARED_BYTES = 48 * 1024
#: A compilation that takes longer says what is going on.
_SILENT_SECONDS = 1.0

_lock = threading.Lock()
_modules: dict[str, Any] = {}
_kernels: dict[tuple[Spec, int], Kernel] = {}
#: Held by the thread that compiles a source. Different ones are compiled at the same time.
_compiling: dict[str, threading.Lock] = {}


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
    if missing:
        _load_side_by_side(missing, device, advance)
    return [load(spec, device) for spec in specs]


def _load_side_by_side(specs: Sequence[Spec], device: int, advance: Callable[[], object] | None) -> None:
    if len(specs) == 1:
        _load_once(specs[0], device, quiet=advance is not None)
        if advance:
            advance()
        return
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


def _load_once(spec: Spec, device: int, quiet: bool = False) -> Kernel:
    source = spec.source()
    with _lock:
        compiling = _compiling.setdefault(source, threading.Lock())
    with compiling:
        kernel = _kernels.get((spec, device))
        if kernel is None:
            kernel = _kernels[spec, device] = _load(spec, source, device, quiet)
    return kernel


def _load(spec: Spec, source: str, device: int, quiet: bool) -> Kernel:
    cupy = require_cupy()
    info = device_info(device)
    arch = info.arch
    module = _modules.get(source)
    if module is None:
        module = _modules[source] = cupy.RawModule(code=source, options=OPTIONS, backend="nvrtc")
    with on_device(cupy.cuda.runtime, device), nullcontext() if quiet else _Progress(spec, arch):
        try:
            raw = module.get_function(spec.entry)
            handle = raw.kernel.ptr
        except cupy.cuda.compiler.CompileException as error:
            raise RuntimeError(f"NVRTC cannot compile {spec} for sm_{arch}:\n{error.get_message()}") from error
        shared = most = spec.shared_bytes
        if isinstance(spec, DecodeSpec) and spec.stages:
            # Rings of more stages are the same function.
            most = info.shared_per_block
            # Half of an SM and a little: a CTA that starts while the kernel before it still runs must not join another
            # of its own, while SMs stay without one.
            shared = max(shared, info.shared_per_block // 2 if spec.ctas_per_sm == 1 else 0)
        if most > _FREE_SHARED_BYTES:
            raw.max_dynamic_shared_size_bytes = most
    return Kernel(spec, device, handle, spec.threads, shared, raw)


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


def cache_folder() -> Path:
    """Where CuPy keeps compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


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
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(spec.source(), "specialisation.cu", [], [])
    started = time.perf_counter()
    try:
        options = [*OPTIONS, "-ftz=true", f"-arch=sm_{arch}", "--ptxas-options=-v"]
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        seconds = time.perf_counter() - started
        return CompileReport(spec, arch, seconds, error=nvrtc.getProgramLog(program))
    else:
        seconds = time.perf_counter() - started
        log = _of_entry(nvrtc.getProgramLog(program), spec.entry)
        static = _number(r"(\d+) bytes smem", log)
        return CompileReport(
            spec, arch, seconds,
            registers=_number(r"Used (\d+) registers", log),
            spill_bytes=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
            stack_bytes=_number(r"(\d+) bytes stack frame", log),
            shared_bytes=static + spec.shared_bytes,
            cubin=nvrtc.getCUBIN(program),
        )  # fmt: skip
    finally:
        nvrtc.destroyProgram(program)


def _of_entry(log: str, entry: str) -> str:
    """The part of ptxas's report that is about one entry point."""
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(entry, log)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0
