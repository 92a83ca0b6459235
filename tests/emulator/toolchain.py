"""Compilers of the emulated kernels: plain, for a debugger, with AddressSanitizer and UBSan, with ThreadSanitizer.

``EMULATOR_MODE`` chooses. The sanitizers' runtimes have to be in the process before Python is, which is what
``python tests/emulator MODE`` sees to.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_COMMON = ("-std=c++17", "-fPIC", "-w")
#: With sanitizers most of the time goes into compiling, and what is optimised away they do not see.
_SANITIZED = ("-O0", "-g1", "-fno-omit-frame-pointer")
#: The runtime sees every thread's memory. It is the same object in all modes.
_RUNTIME = ("g++", *_COMMON, "-O2", "-g", "-fcf-protection=none", "-fno-tree-loop-distribute-patterns")


@dataclass(frozen=True)
class Mode:
    """How kernels are compiled. ``preload``: what must be in the process first, as the compiler names it."""

    name: str
    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    preload: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def compiler(self) -> str:
        found = next((name for name in self.compilers if shutil.which(name)), None)
        if found is None:
            raise RuntimeError(f"the emulator's mode {self.name!r} needs one of {self.compilers} on PATH")
        return found

    @property
    def sanitized(self) -> bool:
        return bool(self.preload)

    def runtime_library(self) -> str:
        """The file to preload."""
        if self.compiler.startswith("clang"):
            resources = Path(_output(self.compiler, "-print-resource-dir"))
            machine = os.uname().machine
            # One folder for all targets, or one for each.
            places = (f"lib/*/{self.preload}-{machine}.so", f"lib/{machine}*/{self.preload}.so")
            found = next((path for place in places for path in sorted(resources.glob(place))), None)
        else:
            found = Path(_output(self.compiler, f"-print-file-name={self.preload}.so"))
        if found is None or not found.is_file():
            raise RuntimeError(f"{self.compiler} has no {self.preload}.so")
        return str(found.resolve())


MODES = {
    mode.name: mode
    for mode in (
        Mode("plain", ("g++",), ("-O1", "-fno-gnu-unique")),
        Mode("debug", ("g++",), ("-O0", "-g", "-fno-gnu-unique")),
        Mode(
            "address", ("g++",),
            (
                *_SANITIZED, "-fno-gnu-unique", "-fsanitize=address,undefined,bounds-strict",
                "-fsanitize-recover=address",
            ),
            "libasan",
            (
                # Python is not instrumented and never frees everything; reports are counted, not fatal.
                ("ASAN_OPTIONS", "detect_leaks=0:halt_on_error=0:detect_stack_use_after_return=0:suppress_equal_pcs=0"),
                ("UBSAN_OPTIONS", "print_stacktrace=0"),
            ),
        ),
        Mode(
            "thread", ("clang++-19", "clang++-20", "clang++-18"),
            (*_SANITIZED, "-fsanitize=thread"),
            "libclang_rt.tsan",
            (
                ("TSAN_OPTIONS", "exitcode=0:halt_on_error=0:report_thread_leaks=0:allow_addr2line=1"),
                # Its threads synchronise where TSan does not see it.
                ("OPENBLAS_NUM_THREADS", "1"),
            ),
        ),
    )
}  # fmt: skip


def current() -> Mode:
    name = os.environ.get("EMULATOR_MODE", "plain")
    if name not in MODES:
        raise ValueError(f"EMULATOR_MODE: expected one of {list(MODES)}, got {name!r}")
    mode = MODES[name]
    if mode.sanitized and Path(mode.runtime_library()).name not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(f"start the mode {name!r} as python tests/emulator {name} [pytest's arguments]")
    return mode


def environment(mode: Mode) -> dict[str, str]:
    """What a Python process needs to run kernels in this mode."""
    chosen = {**os.environ, "EMULATOR_MODE": mode.name}
    if mode.sanitized:
        # Python's own allocator would hide where its objects end.
        chosen |= {"LD_PRELOAD": mode.runtime_library(), "PYTHONMALLOC": "malloc", **dict(mode.environment)}
    return chosen


def _clean() -> dict[str, str]:
    # A compiler must not run under a sanitizer.
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, env=_clean()).stdout.strip()


@functools.cache
def _runtime_objects(folder: Path) -> tuple[str, ...]:
    here = Path(__file__).parent
    objects = []
    for name in ("runtime", "warp"):
        target = folder / f"{name}.o"
        _run([*_RUNTIME, "-c", str(here / f"{name}.cpp"), "-o", str(target)], name)
        objects.append(str(target))
    return tuple(objects)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_clean())
    if done.returncode:
        raise RuntimeError(f"{command[0]} cannot compile {what}:\n{done.stderr[:4000]}")


def build(text: str, target: Path, objects: Path, what: str, mode: Mode) -> None:
    """Compile ``text`` into the shared library ``target``, with the runtime that ``objects`` keeps."""
    source = target.with_suffix(".cpp")
    source.write_text(text, encoding="utf-8")
    command = [mode.compiler, *_COMMON, *mode.flags, "-shared", "-pthread", "-I", str(Path(__file__).parent)]
    _run([*command, str(source), *_runtime_objects(objects), "-o", str(target)], what)
