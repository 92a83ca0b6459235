"""compute-sanitizer over a small set of calls: no access outside an allocation, no misaligned one, no race."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).with_name("memcheck_cases.py")
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def sanitizer():
    found = shutil.which("compute-sanitizer") or next((place for place in PLACES if os.access(place, os.X_OK)), None)
    return found or pytest.skip(f"compute-sanitizer is neither on PATH nor at {' nor '.join(PLACES)}")


def run(*command):
    tests = SCRIPT.parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), *sys.path])}
    command = [*command, sys.executable, str(SCRIPT)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_the_script_itself():
    """Without the tool: the same calls succeed, each array in an allocation of its own."""
    done = run()
    assert done.returncode == 0 and re.search(r"ran \d\d calls", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tool", "summary"),
    [
        (("memcheck", "--report-api-errors", "no"), "ERROR SUMMARY: 0 errors"),
        (("racecheck",), "RACECHECK SUMMARY: 0 hazards"),
    ],
    ids=["memcheck", "racecheck"],
)
def test_no_errors(tool, summary):
    done = run(sanitizer(), "--error-exitcode", "9", "--tool", *tool)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and summary in said and re.search(r"ran \d\d calls", said), said[-4000:]
