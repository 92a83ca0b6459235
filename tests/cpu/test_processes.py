"""Compilation in processes: each kernel once, into the file where it is looked for, and errors that arrive whole."""

import json
import os

import pytest

from cupy_fp8kv import terminal
from cupy_fp8kv.jit import kernel_files, processes
from cupy_fp8kv.jit.spec import MergeSpec, PagesSpec

#: Three sources of four kernels.
SPECS = [MergeSpec("f16"), MergeSpec("bf16"), PagesSpec("copy_pages", 16), PagesSpec("gather", 16)]


class Steps:
    """What ``compile_to_files`` tells of its progress."""

    def __init__(self):
        self.total, self.done = [], 0

    def __call__(self, total):
        self.total.append(total)
        return self.advance

    def advance(self):
        self.done += 1


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    return tmp_path / "cupy_fp8kv_kernels"


def test_each_source_is_compiled_once_and_found_again(kernels):
    steps = Steps()
    assert processes.compile_to_files(SPECS[:3], 90, steps) == (3, 3)
    names = {kernel_files.name_of(spec.source(), 90) for spec in SPECS[:3]}
    assert {path.name for path in kernels.iterdir()} == names and (steps.total, steps.done) == ([3], 3)
    assert all(kernel_files.read(name).startswith(b"\x7fELF") for name in names)
    assert processes.compile_to_files([*SPECS, *SPECS], 90, steps) == (3, 0), "the fourth has the source of the third"
    assert (steps.total, steps.done) == ([3, 0], 3)


def test_what_does_not_compile_is_told_with_its_log(kernels):
    with pytest.raises(RuntimeError, match=r"NVRTC cannot compile merge\[out=b?f16\] for sm_30:\n.*architecture"):
        processes.compile_to_files(SPECS[:2], 30, Steps())
    assert not kernels.exists() or not list(kernels.iterdir())


def test_kernels_that_are_kept_in_memory_are_left_to_their_process(kernels, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    steps = Steps()
    assert processes.compile_to_files(SPECS, 90, steps) == (3, 0) and steps.total == [0]


def test_results_come_in_order():
    steps = Steps()
    assert processes.on_all_cores(abs, [-3, 2, -1], steps.advance) == [3, 2, 1] and steps.done == 3
    assert processes.on_all_cores(abs, [], steps.advance) == []
    with pytest.raises(TypeError, match="bad operand"):
        processes.on_all_cores(abs, [1, "x"], steps.advance)


def test_records_are_written_whole(tmp_path):
    path = tmp_path / "record.json"
    terminal.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        terminal.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    terminal.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}


def test_records_go_into_pipes(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    terminal.write_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 1000)) == {"a": 1}
    os.close(reader)
