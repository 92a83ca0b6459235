"""Where tuned plans are kept: one JSON file a problem and device, beside the kernels that CuPy keeps.

A file is written whole or not at all, so that any number of processes may tune at once; of two that tune the same
problem the last one stays. What cannot be read, or was measured on other kernels, is ignored with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..jit import sources
from ..jit.kernel_files import cache_folder
from ..plan import DeviceInfo, Plan
from ..problem import DecodeProblem
from .options import plan_options

#: What of a specialisation a plan chooses; the rest follows from the problem.
_CHOSEN = ("column_tiles", "subtiles", "warps", "ctas_per_sm", "heads", "stages")
#: What of a problem does not matter to a plan.
_IGNORED = ("q_strides",)


@dataclass(frozen=True)
class Record:
    """A tuned plan and what was measured: microseconds of it and of the planner's choice, and of how many options."""

    plan: Plan
    us: float
    planned_us: float
    options: int


def folder() -> Path:
    return cache_folder() / "cupy_fp8kv_tuned"


def files() -> list[Path]:
    """One for each tuned plan, whether it can be read or not."""
    return sorted(folder().glob("*.json"))


def _path(problem: DecodeProblem, device: DeviceInfo) -> Path:
    key = json.dumps([_facts(problem), asdict(device)], sort_keys=True)
    return folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _facts(problem: DecodeProblem) -> dict[str, Any]:
    facts = {name: value for name, value in asdict(problem).items() if name not in _IGNORED}
    # As they come back from JSON.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}


def _measured_on() -> dict[str, str]:
    from .. import __version__

    return {"version": __version__, "sources": sources.digest()}


def save(problem: DecodeProblem, device: DeviceInfo, record: Record) -> Path:
    """Keep a tuned plan; OSError if the folder cannot be written."""
    import tempfile  # here, because what decode calls import only reads

    path = _path(problem, device)
    choice = {name: getattr(record.plan.spec, name) for name in _CHOSEN}
    content = {
        **_measured_on(), "problem": _facts(problem), "device": asdict(device),
        "plan": {**choice, "splits": record.plan.splits},
        "us": record.us, "planned_us": record.planned_us, "options": record.options,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return path


def load(problem: DecodeProblem, device: DeviceInfo) -> Record | None:
    """The tuned plan of a problem on a device, or None. Never raises: what is wrong with a file is a warning."""
    path = _path(problem, device)
    try:
        return _read(path, problem, device)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, _UnusableError) as error:
        why = str(error)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        why = f"is not what tune writes ({type(error).__name__}: {error})"
    warnings.warn(f"cupy_fp8kv: a tuned plan is ignored: {path} {why}", RuntimeWarning, stacklevel=2)
    return None


class _UnusableError(Exception):
    """What is wrong with a file that is whole."""


def _read(path: Path, problem: DecodeProblem, device: DeviceInfo) -> Record:
    content = json.loads(path.read_text(encoding="utf-8"))
    measured_on = _measured_on()
    if {name: content[name] for name in measured_on} != measured_on:
        raise _UnusableError("was measured with other kernels than these; tune again")
    if content["problem"] != _facts(problem) or content["device"] != asdict(device):
        raise _UnusableError("is about another problem or device")
    choice, splits = {name: content["plan"][name] for name in _CHOSEN}, content["plan"]["splits"]
    us, planned_us, count = float(content["us"]), float(content["planned_us"]), int(content["options"])
    for plan in plan_options(problem, device):
        if plan.splits == splits and choice == {name: getattr(plan.spec, name) for name in _CHOSEN}:
            reason = f"tuned here: the best of {count} options, {us:.2f} µs against {planned_us:.2f} µs as planned"
            return Record(replace(plan, reason=reason), us, planned_us, count)
    raise _UnusableError("names a plan that is no option")


def tuned_plan(problem: DecodeProblem, device: DeviceInfo) -> Plan | None:
    """The plan that ``tune`` found, which goes before the planner's, or None."""
    record = None if problem.ragged else load(problem, device)
    return None if record is None else record.plan


def clear() -> int:
    """Remove all tuned plans; how many there were. OSError for what cannot be removed."""
    found = files()
    for path in found:
        path.unlink(missing_ok=True)
    for path in folder().glob("*.tmp"):  # of writers that were killed
        path.unlink(missing_ok=True)
    return len(found)
