"""Planted bugs: what tests of every kernel share to show that the emulator notices them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cases import Case

from cupy_fp8kv.jit import sources

from . import Emulator, toolchain
from .checks import TAIL, run

PLAIN, ADDRESS, THREAD = "plain", "address", "thread"
MODE = toolchain.current().name


@dataclass(frozen=True)
class Bug:
    """``right`` of ``file`` becomes ``wrong``; ``check`` is a case or a function that must then fail in ``modes``."""

    name: str
    modes: tuple[str, ...]
    file: str
    right: str
    wrong: str
    check: Any = TAIL
    said: str = ""

    def __str__(self):
        return self.name


def each_of_this_mode(bugs: Sequence[Bug]) -> pytest.MarkDecorator:
    """Runs a test for every ``bug`` that the present mode has to notice."""
    return pytest.mark.parametrize("bug", [bug for bug in bugs if MODE in bug.modes or MODE == "debug"], ids=str)


def noticed(folder: Path, monkeypatch: pytest.MonkeyPatch, machine: Emulator, bug: Bug) -> str:
    """What is said of the kernel with the bug, which must compile and must fail."""
    text = sources.FILES[bug.file]
    assert bug.right in text, f"{bug.file} has changed: plant this bug elsewhere"
    fresh = Emulator(folder, machine.common)
    with fresh.installed(monkeypatch):
        monkeypatch.setitem(sources.FILES, bug.file, text.replace(bug.right, bug.wrong))
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            run(fresh, bug.check) if isinstance(bug.check, Case) else bug.check(fresh)
    said = str(caught.value)
    assert "cannot compile" not in said
    assert bug.said in said
    return said


def noticed_by_its_sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, machine: Emulator, bug: Bug) -> None:
    """The same, and by the sanitizer of the present mode, if that has one."""
    said = noticed(folder, monkeypatch, machine, bug)
    if MODE == THREAD:
        assert "ThreadSanitizer: data race" in said
    elif MODE == ADDRESS:
        assert "AddressSanitizer" in said
