"""``python tests/emulator MODE [pytest's arguments]``: the emulator's tests with the sanitizers of a mode."""

import os
import sys
from pathlib import Path

import toolchain

PARTS = ("", "_ring", "_schedule", "_even", "_options", "_paged", "_cache", "_bugs", "_ptx")
FILES = tuple(f"test_emulator{part}.py" for part in PARTS)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in toolchain.MODES:
        sys.exit(f"usage: python tests/emulator {{{','.join(toolchain.MODES)}}} [pytest's arguments]")
    mode = toolchain.MODES[arguments[0]]
    root = Path(__file__).resolve().parents[2]
    tests = [str(root / "tests" / "cpu" / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "--rootdir", str(root), *tests, *arguments[1:]]
    os.execve(sys.executable, command, toolchain.environment(mode))


if __name__ == "__main__":
    main(sys.argv[1:])
