"""NVRTC: a source in, machine code out. Needs CuPy, but neither a GPU nor a driver."""

from __future__ import annotations

import os
from pathlib import Path


class CompileError(Exception):
    """A source that does not compile; the message is NVRTC's log."""


def options() -> tuple[str, ...]:
    """What every kernel is compiled with. CuPy's switch for debug information counts here too."""
    debug = ("--device-debug", "--generate-line-info")
    return ("-std=c++17", "-ftz=true", *(debug if is_on("CUPY_CUDA_COMPILE_WITH_DEBUG") else ()))


def is_on(variable: str) -> bool:
    """Whether a switch of CuPy's is on, as CuPy reads it."""
    return os.environ.get(variable) == "1"


def compile_source(source: str, arch: int, *more: str) -> tuple[bytes, str]:
    """The cubin for sm_``arch`` and NVRTC's log; ``more``: further options. CompileError if it does not compile."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "specialisation.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*options(), f"-arch=sm_{arch}", *more])
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise CompileError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


def nearest_arch(arch: int) -> int:
    """The newest architecture that NVRTC knows and a device of sm_``arch`` runs; ``arch`` itself if there is none."""
    return max((one for one in known_archs() if one // 10 == arch // 10 and one <= arch), default=arch)


def known_archs() -> list[int]:
    """What NVRTC compiles for: 90 for sm_90."""
    from cupy.cuda import nvrtc

    return [int(one) for one in nvrtc.getSupportedArchs()]


def library() -> str | None:
    """The file that NVRTC was loaded from; None if it is not loaded, and where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(maxsplit=5)[5] for line in lines if "/libnvrtc.so" in line), None)
