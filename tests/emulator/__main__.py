"""``python tests/emulator MODE [pytest's arguments]``: the emulator's tests with the sanitizers of a mode."""

import os
import sys
from pathlib import Path

import toolchain

PARTS = ("", "_ring", "_schedule", "_even", "_options", "_paged", "_bugs")
#: What writes into caches and merges states, and single functions: their warps only wait for each other at barriers
#: for all, so ThreadSanitizer, which takes the longest, leaves them out.
MORE_FOR_ADDRESSES = ("_append", "_cache", "_ptx")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in toolchain.MODES:
        sys.exit(f"usage: python tests/emulator {{{','.join(toolchain.MODES)}}} [pytest's arguments]")
    mode = toolchain.MODES[arguments[0]]
    root = Path(__file__).resolve().parents[2]
    parts = PARTS if arguments[0] == "thread" else (*PARTS, *MORE_FOR_ADDRESSES)
    tests = [str(root / "tests" / "cpu" / f"test_emulator{part}.py") for part in parts]
    command = [sys.executable, "-m", "pytest", "--rootdir", str(root), *tests, *arguments[1:]]
    os.execve(sys.executable, command, toolchain.environment(mode))


if __name__ == "__main__":
    main(sys.argv[1:])
