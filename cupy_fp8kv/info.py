"""What this machine has, as far as the package cares, and what is wrong with it."""

from __future__ import annotations

import importlib
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, terminal
from .formats import KV_FORMATS
from .jit import sources
from .jit.device import cupy_problem
from .jit.kernel_files import cache_folder
from .jit.nvrtc import library as nvrtc_library
from .positions import POSITION_MODES
from .tuning import store

_CUPY_WHEEL = re.compile(r"cupy(-cuda\d+x|-rocm.*)?")
#: NVIDIA's wheels that CuPy may load NVRTC from, by CUDA's major version.
_NVRTC_WHEELS = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}
_RUNTIME_WHEELS = {
    "nvidia-cuda-runtime-cu12": "nvidia/cuda_runtime/include",
    "nvidia-cuda-runtime": "nvidia/cu13/include",
}
_OLDEST_ARCH = 80


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cupy_wheels() -> dict[str, str]:
    """Installed distributions of CuPy, of which there should be one."""
    found = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if _CUPY_WHEEL.fullmatch(name):
            found[name] = distribution.version
    return found


def _cuda_version(number: int) -> str | None:
    """12080 as "12.8"; None for 0, which is what CUDA says where there is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _short(path: str | Path | None) -> str | None:
    """A path with ~ for the home folder."""
    if path is None:
        return None
    text, home = str(path), str(Path.home())
    return "~" + text[len(home) :] if text == home or text.startswith(home + os.sep) else text


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _include_path(cuda_path: str | None) -> str | None:
    """The folder of CUDA's headers: the toolkit's, or the runtime wheel's."""
    if cuda_path and (Path(cuda_path) / "include").is_dir():
        return str(Path(cuda_path) / "include")
    for name, folder in _RUNTIME_WHEELS.items():
        try:
            path = Path(str(metadata.distribution(name).locate_file(folder)))
        except metadata.PackageNotFoundError:
            continue
        if path.is_dir():
            return str(path)
    return None


def _attempt(function: Any, *arguments: Any) -> Any:
    """What a question to CUDA gives, or None where it cannot be asked: without a driver most raise."""
    try:
        return function(*arguments)
    except Exception:
        return None


def _devices(runtime: Any) -> list[dict[str, Any]]:
    devices = []
    for index in range(_attempt(runtime.getDeviceCount) or 0):
        properties = runtime.getDeviceProperties(index)
        devices.append({
            "index": index, "name": properties["name"].decode(), "arch": 10 * properties["major"] + properties["minor"],
            "sm_count": properties["multiProcessorCount"], "memory_bytes": properties["totalGlobalMem"],
            "l2_bytes": properties["l2CacheSize"],
        })  # fmt: skip
    return devices


def gather() -> dict[str, Any]:
    """Everything ``info`` shows, as JSON takes it. Imports CuPy, and neither torch nor JAX."""
    wheels = _cupy_wheels()
    facts: dict[str, Any] = {
        "versions": {
            "cupy_fp8kv": __version__, "python": platform.python_version(), "numpy": _version("numpy"),
            "ml_dtypes": _version("ml_dtypes"), "rich": _version("rich"), "cupy": next(iter(wheels.values()), None),
            "torch": _version("torch"), "jax": _version("jax"),
        },
        "cupy_wheels": wheels,
        "cupy_problem": cupy_problem(),
        "nvrtc": None, "nvrtc_library": None, "driver_cuda": None, "runtime_cuda": None, "devices": [],
        "include_path": None,
        "kernel_cache": _short(cache_folder()),
        "tuned_plans": {"count": len(store.files()), "folder": _short(store.folder())},
        "cuda_src": _short(sources.ROOT),
        "sources": sources.digest(),
        "kv_formats": list(KV_FORMATS),
        "pos_encoding_modes": list(POSITION_MODES),
    }  # fmt: skip
    if (cupy := _attempt(importlib.import_module, "cupy")) is not None:
        runtime = cupy.cuda.runtime
        facts["versions"]["cupy"] = cupy.__version__
        # Asking for the version is what loads the library.
        nvrtc = _attempt(lambda: cupy.cuda.nvrtc.getVersion())
        facts["nvrtc"] = nvrtc and ".".join(map(str, nvrtc))
        facts["nvrtc_library"] = nvrtc and _short(nvrtc_library())
        facts["driver_cuda"] = _cuda_version(_attempt(runtime.driverGetVersion) or 0)
        facts["runtime_cuda"] = _cuda_version(_attempt(runtime.runtimeGetVersion) or 0)
        facts["devices"] = _devices(runtime)
        facts["include_path"] = _short(_include_path(_attempt(cupy.cuda.get_cuda_path)))
    facts["problems"] = problems(facts, _writable(cache_folder()), {n: _version(w) for n, w in _NVRTC_WHEELS.items()})
    return facts


def _major(version: str | None) -> int | None:
    return int(version.split(".")[0]) if version else None


def problems(facts: dict[str, Any], cache_writable: bool, nvrtc_wheels: dict[int, str | None]) -> list[dict[str, str]]:
    """What is wrong (``what``) and how to mend it (``mend``). ``nvrtc_wheels``: installed versions by CUDA's major."""
    found: list[dict[str, str]] = []

    def add(what: str, mend: str) -> None:
        found.append({"what": what, "mend": mend})

    driver, nvrtc = _major(facts["driver_cuda"]), _major(facts["nvrtc"])
    wheels = facts["cupy_wheels"]
    if facts["versions"]["cupy"] is None:
        add(
            "CuPy is not installed: everything runs on the NumPy backend",
            'pip install "cupy_fp8kv[cuda12]" (or cuda13, as the driver is) for a GPU',
        )
    elif facts["cupy_problem"] and "cannot be imported" in facts["cupy_problem"]:
        add(facts["cupy_problem"], "reinstall the CuPy wheel that fits the driver; see also the kernel cache below")
    elif not facts["devices"]:
        add(
            f"no usable GPU: everything runs on the NumPy backend ({facts['cupy_problem']})",
            "nothing, if there is no GPU; otherwise install or update NVIDIA's driver",
        )
    if len(wheels) > 1:
        add(f"several CuPy wheels are installed: {', '.join(wheels)}", "pip uninstall all of them, then install one")
    if facts["versions"]["cupy"] and nvrtc is None:
        add("CuPy finds no NVRTC: kernels cannot be compiled", "pip install nvidia-cuda-nvrtc-cu12 (CUDA 13: -nvrtc)")
    if driver and nvrtc and nvrtc > driver:
        add(
            f"NVRTC is of CUDA {facts['nvrtc']}, the driver of CUDA {facts['driver_cuda']}: kernels may not load",
            f"pip install the cuda{driver} extra instead, or update the driver",
        )
    if all(nvrtc_wheels.values()) and len(wheels) == 1:
        name = next(iter(wheels))
        add(
            f"wheels of CUDA 12 and of CUDA 13 are both installed; CuPy here is {name} and uses NVRTC {facts['nvrtc']}",
            f"if these do not fit, uninstall the other's {' or '.join(_NVRTC_WHEELS.values())}",
        )
    for device in facts["devices"]:
        if device["arch"] < _OLDEST_ARCH:
            add(
                f"device {device['index']} ({device['name']}) is sm_{device['arch']}; kernels need sm_{_OLDEST_ARCH}",
                'pass backend="numpy", or choose another device with CUDA_VISIBLE_DEVICES',
            )
    if not cache_writable:
        add(
            f"the kernel cache {facts['kernel_cache']} cannot be written: kernels are compiled in every process",
            "point CUPY_CACHE_DIR to a folder that can be",
        )
    return found


def render(facts: dict[str, Any]) -> list[Any]:
    """The tables of ``info``."""
    main = terminal.table("cupy_fp8kv", "", "", left=2)
    main.show_header = False
    for name, version in facts["versions"].items():
        main.add_row(name, version or "not installed")
    for label, key in (
        ("NVRTC", "nvrtc"), ("NVRTC library", "nvrtc_library"), ("driver's CUDA", "driver_cuda"),
        ("runtime's CUDA", "runtime_cuda"), ("CUDA headers", "include_path"), ("kernel cache", "kernel_cache"),
        ("kernel sources", "cuda_src"), ("sources' digest", "sources"),
    ):  # fmt: skip
        main.add_row(label, facts[key] or "none")
    main.add_row("tuned plans", "{count} in {folder}".format(**facts["tuned_plans"]))
    main.add_row("KV formats", ", ".join(f"{name} ({KV_FORMATS[name].title})" for name in facts["kv_formats"]))
    main.add_row("position modes", ", ".join(facts["pos_encoding_modes"]))
    for device in facts["devices"]:
        main.add_row(
            f"device {device['index']}",
            f"{device['name']}, sm_{device['arch']}, {device['sm_count']} SMs, {device['memory_bytes'] / 1e9:.1f} GB, "
            f"L2 {device['l2_bytes'] / 1e6:.0f} MB",
        )
    if not facts["devices"]:
        main.add_row("devices", "none")
    if not facts["problems"]:
        return [main, "Nothing is wrong."]
    wrong = terminal.table("To mend", "what", "how", left=2)
    for problem in facts["problems"]:
        wrong.add_row(problem["what"], problem["mend"])
    return [main, wrong]
