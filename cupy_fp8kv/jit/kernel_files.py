"""Compiled kernels on disk, found again without NVRTC.

CuPy keeps kernels too, but has NVRTC compile an empty program in every process to see whether it is still the same.
Loading it and that take longer than everything else of a first call. Here a file is named after what the kernel is made
of (source, options, architecture) and after every NVRTC in the places where CuPy looks for one; in the file stands
which of them compiled it. A file counts as long as that one is as it was. Anything else is compiled anew.

A file is written whole or not at all, so that any number of processes may compile at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from pathlib import Path

from . import nvrtc

_WINDOWS = sys.platform == "win32"
#: NVRTC of CUDA 12 and of CUDA 13, and the folders of their wheels.
_LIBRARIES = ("nvrtc64_120_0.dll", "nvrtc64_130_0.dll") if _WINDOWS else ("libnvrtc.so.12", "libnvrtc.so.13")
_WHEELS = ("nvidia/cuda_nvrtc/bin", "nvidia/cu13/bin") if _WINDOWS else ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib")
#: Variables that tell where CUDA is, and where libraries are.
_ROOTS = ("CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX")
_SEARCHED = "PATH" if _WINDOWS else "LD_LIBRARY_PATH"


def cache_folder() -> Path:
    """Where CuPy keeps compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def folder() -> Path:
    return cache_folder() / "cupy_fp8kv_kernels"


def name_of(source: str, arch: int) -> str:
    """The name of the file of ``source`` compiled for sm_``arch``, whether there is one or not."""
    made_of = "\0".join((source, *nvrtc.options(), str(arch), *_compilers()))
    return f"{hashlib.sha256(made_of.encode()).hexdigest()[:40]}.cubin"


def exists(name: str) -> bool:
    return (folder() / name).is_file()


@functools.cache
def _compilers() -> tuple[str, ...]:
    """Every NVRTC that CuPy may load, as it was when this process first asked: the one it loads stays the same."""
    wheels = zip(_WHEELS, _LIBRARIES, strict=True)
    paths = [os.path.join(root, *wheel) for wheel in wheels for root in sys.path]
    roots = filter(None, (*map(os.environ.get, _ROOTS), "/usr/local/cuda", sys.prefix))
    folders = [os.path.join(root, name) for root in roots for name in (("bin",) if _WINDOWS else ("lib64", "lib"))]
    folders += filter(None, os.environ.get(_SEARCHED, "").split(os.pathsep))
    paths += [os.path.join(folder, name) for folder in dict.fromkeys(folders) for name in _LIBRARIES]
    return tuple(filter(None, map(_stamp, paths)))


def _stamp(path: str) -> str:
    """Path, size and time of a file; empty if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{path} {found.st_size} {found.st_mtime_ns}"


def read(name: str) -> bytes | None:
    """The cubin in a file; None if there is none, it is damaged, or its compiler is no more."""
    if nvrtc.is_on("CUPY_CACHE_IN_MEMORY"):
        return None
    try:
        content = (folder() / name).read_bytes()
    except OSError:
        return None
    digest, _, rest = content.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        return None
    stamp, _, cubin = rest.partition(b"\n")
    compiler = stamp.decode()
    return cubin if not compiler or _stamp(compiler.rsplit(" ", 2)[0]) == compiler else None


def write(name: str, cubin: bytes) -> None:
    """Keep what the loaded NVRTC has compiled. A folder that cannot be written is no error: ``info`` tells of it."""
    library = nvrtc.library()
    stamp = _stamp(library) if library else ""
    # An NVRTC that was replaced after it was loaded must leave nothing for its successor.
    if nvrtc.is_on("CUPY_CACHE_IN_MEMORY") or (library and not stamp):
        return
    import tempfile  # here, because a program whose kernels are kept only reads

    rest = f"{stamp}\n".encode() + cubin
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder(), suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
            os.replace(temporary, folder() / name)
        except BaseException:
            os.unlink(temporary)
            raise
