"""From a specialisation to a loaded kernel, on a device that is not there: once each, side by side, kept on disk."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import cupy_fp8kv
from cupy_fp8kv.jit import compiler, kernel_files, nvrtc
from cupy_fp8kv.jit.spec import AppendSpec, DecodeSpec, MergeSpec, MergeStatesSpec, QuantizeSpec

ROOT = Path(cupy_fp8kv.__file__).parent.parent
SPEC = DecodeSpec("f16", "e4m3", "e5m2", 128, 1, 1, 16, 1)
SPECS = (
    SPEC, dataclasses.replace(SPEC, schedule="listed"), MergeSpec("bf16"), MergeStatesSpec("float16"),
    QuantizeSpec("quantize", "float32", "e4m3"), AppendSpec("float16", "e5m2"),
)  # fmt: skip


@pytest.fixture
def made_up_device(monkeypatch, tmp_path):
    """compiler.load on a device that is not there: gives what to call with what compiles the source of a kernel."""

    class Module:
        def load(self, cubin):
            self.cubin = cubin

        def get_function(self, entry):
            return SimpleNamespace(ptr=1, module=self, entry=entry)

    class FakeCupy:
        class cuda:
            runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda index: None)

    FakeCupy.cuda.Module = Module
    fake_driver = SimpleNamespace(
        CUDADriverError=ZeroDivisionError, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        funcSetAttribute=lambda function, attribute, value: None,
    )  # fmt: skip
    monkeypatch.setattr(compiler, "require_cupy", lambda: FakeCupy)
    monkeypatch.setattr(compiler, "driver", lambda: fake_driver)
    monkeypatch.setattr(compiler, "device_info", lambda index: type("Info", (), {"arch": 90}))
    monkeypatch.setattr(compiler, "_file", compiler._file.__wrapped__)
    monkeypatch.setattr(nvrtc, "nearest_arch", lambda arch: arch)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    for memo in ("_kernels", "_modules", "_loading"):
        monkeypatch.setattr(compiler, memo, {})

    def with_compiler(compile_text):
        def compile_source(source, arch):
            compile_text(source)
            return source.encode(), ""

        monkeypatch.setattr(nvrtc, "compile_source", compile_source)

    return with_compiler


def forget_kernels():
    """As in another process: what is on disk stays."""
    compiler._kernels.clear()
    compiler._modules.clear()


def test_the_error_of_a_load_has_log_and_specialisation(made_up_device):
    log = 'cuda_src/base/ptx.cuh(12): error: expected a ";"'
    failing = [True]

    def compile_text(source):
        if failing[0] and "// decode[" in source:
            raise nvrtc.CompileError(log)

    made_up_device(compile_text)
    for load in (compiler.load, lambda spec, device: compiler.load_all([spec, MergeSpec("f16")], device)):
        with pytest.raises(RuntimeError) as caught:
            load(SPEC, 0)
        assert log in str(caught.value) and str(SPEC) in str(caught.value) and "sm_90" in str(caught.value)
        assert (SPEC, 0) not in compiler._kernels, "a failure must not be remembered as a kernel"
    failing[0] = False
    assert compiler.load(SPEC, 0).handle == 1, "nor may it stay a failure"


def test_different_kernels_are_compiled_at_the_same_time(made_up_device, monkeypatch):
    monkeypatch.setattr(compiler.os, "cpu_count", lambda: 3)
    some = list(SPECS[:3])
    together = threading.Barrier(len(some))
    made_up_device(lambda source: together.wait(timeout=20))
    kernels = compiler.load_all([*some, SPEC], 0)
    assert [kernel.spec for kernel in kernels] == [*some, SPEC] and kernels[0] is kernels[-1]
    assert compiler.load_all(some, 0) == kernels[:-1], "and once"


def test_progress_takes_the_place_of_messages(made_up_device, monkeypatch, capsys):
    monkeypatch.setattr(compiler, "_SILENT_SECONDS", 0.01)
    made_up_device(lambda source: time.sleep(0.1))
    told = []
    compiler.load_all(SPECS, 0, lambda: told.append(threading.current_thread()))
    assert told == [threading.current_thread()] * len(SPECS) and not capsys.readouterr().err
    forget_kernels()
    for file in kernel_files.folder().iterdir():
        file.unlink()
    compiler.load_all(SPECS, 0)
    said = capsys.readouterr().err
    assert all(str(spec) in said for spec in SPECS)


def test_one_kernel_is_compiled_once_by_many_threads(made_up_device):
    compiled, at_once = [], threading.Barrier(8)
    made_up_device(lambda source: compiled.append(source) or time.sleep(0.05))
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda _: at_once.wait() is not None and compiler.load(SPEC, 0), range(8)))
    assert len(compiled) == 1 and len(set(map(id, kernels))) == 1


@pytest.fixture
def loads(monkeypatch):
    """Loading is made up: gives the list of what is loaded."""
    found = []

    def load(spec, file, device, quiet):
        found.append((spec, device, quiet))
        if spec.head_dim == 24:
            raise RuntimeError("does not compile")
        return compiler.Kernel(spec, device, len(found), spec.threads, spec.shared_bytes, None)

    runtime = type("runtime", (), {"getDevice": staticmethod(lambda: 0), "setDevice": staticmethod(lambda index: None)})
    fake = type("cupy", (), {"cuda": type("cuda", (), {"runtime": runtime})})
    monkeypatch.setattr(compiler, "require_cupy", lambda: fake)
    monkeypatch.setattr(compiler, "_load", load)
    monkeypatch.setattr(compiler, "_file", lambda spec, device: f"{spec}.cubin")
    monkeypatch.setattr(compiler, "_kernels", {})
    return found


def test_many_kernels_are_loaded_once_each_and_in_order(loads):
    wanted = [dataclasses.replace(SPEC, head_dim=16 * n) for n in (8, 3, 5, 3, 8, 1)]
    done = []
    kernels = compiler.load_all(wanted, 0, lambda: done.append(1))
    assert [kernel.spec for kernel in kernels] == wanted and len(done) == len(wanted)
    assert len(loads) == len(set(wanted)) and all(quiet for *_, quiet in loads)
    assert compiler.load(wanted[0], 0) is kernels[0] is kernels[4] and len(loads) == len(set(wanted))
    assert compiler.load_all([], 0) == []


def test_one_of_many_kernels_that_does_not_compile_is_the_error(loads):
    wanted = [dataclasses.replace(SPEC, head_dim=head_dim) for head_dim in (64, 24, 32)]
    with pytest.raises(RuntimeError, match="does not compile"):
        compiler.load_all(wanted, 0)
    assert wanted[1] not in {spec for spec, _ in compiler._kernels}


def test_slow_compilations_say_so(capsys, monkeypatch):
    monkeypatch.setattr(compiler, "_SILENT_SECONDS", 0.01)
    with compiler._Progress(SPEC, 90) as _:
        time.sleep(0.2)
    said = capsys.readouterr()
    assert str(SPEC) in said.err and "sm_90" in said.err and not said.out
    with compiler._Progress(SPEC, 90):
        pass
    assert not capsys.readouterr().err


# On disk


@pytest.fixture
def compiled(made_up_device):
    """The sources that were compiled, in their order."""
    found = []
    made_up_device(found.append)
    return found


def only_file():
    (file,) = kernel_files.folder().iterdir()
    return file


def test_what_is_kept_is_not_compiled_again(compiled, monkeypatch):
    compiler.load_all(SPECS, 0)
    assert len(compiled) == len(SPECS) == len(list(kernel_files.folder().iterdir()))
    forget_kernels()
    monkeypatch.setattr(compiler, "_load_side_by_side", None)
    told = []
    kernels = compiler.load_all(SPECS, 0, lambda: told.append(1))
    assert len(compiled) == len(SPECS) == len(told)
    assert [kernel.owner.module.cubin.decode() for kernel in kernels] == [spec.source() for spec in SPECS]


def test_some_that_are_kept_and_some_that_are_not(compiled):
    compiler.load_all(SPECS[:2], 0)
    forget_kernels()
    told = []
    kernels = compiler.load_all(SPECS, 0, lambda: told.append(1))
    assert [kernel.spec for kernel in kernels] == list(SPECS) and len(compiled) == len(SPECS) == len(told)


def test_several_devices_compile_once(compiled):
    with ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(lambda device: compiler.load(SPEC, device), range(4)))
    assert len(compiled) == 1 and [kernel.device for kernel in kernels] == [0, 1, 2, 3]
    assert len({id(kernel.owner.module) for kernel in kernels}) == 4, "a module is of one device"


def test_specialisations_of_one_source_share_a_module(compiled):
    entries = [dataclasses.replace(SPECS[4], entry=entry) for entry in ("amax", "scales", "quantize")]
    kernels = compiler.load_all(entries, 0)
    assert len(compiled) == 1 and len({id(kernel.owner.module) for kernel in kernels}) == 1
    assert [kernel.owner.entry for kernel in kernels] == ["amax", "scales", "quantize"]


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "text"])
def test_a_damaged_file_is_compiled_again(compiled, damage):
    compiler.load(SPEC, 0)
    whole = only_file().read_bytes()
    flipped = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]
    only_file().write_bytes({"empty": b"", "cut": whole[:-1], "bit": flipped, "text": b"\xff not a kernel"}[damage])
    forget_kernels()
    compiler.load(SPEC, 0)
    assert len(compiled) == 2 and only_file().read_bytes() == whole


def test_what_the_driver_refuses_is_compiled_again(compiled, monkeypatch):
    compiler.load(SPEC, 0)
    forget_kernels()
    whole, refused = compiler._module, []

    def module(cubin):
        if not refused:
            refused.append(cubin)
            raise compiler.driver().CUDADriverError
        return whole(cubin)

    monkeypatch.setattr(compiler, "_module", module)
    assert compiler.load(SPEC, 0).handle == 1 and len(compiled) == 2 and refused


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A file that NVRTC is said to have been loaded from."""
    file = tmp_path / "libnvrtc.so.12"
    file.write_text("12.9")
    monkeypatch.setattr(nvrtc, "library", lambda: str(file))
    return file


@pytest.mark.parametrize("change", ["nothing", "size", "time", "gone"])
def test_another_compiler_compiles_again(compiled, library, change):
    compiler.load(SPEC, 0)
    if change == "size":
        library.write_text("12.9.1")
    elif change == "time":
        os.utime(library, ns=(0, 0))
    elif change == "gone":
        library.unlink()
    forget_kernels()
    compiler.load(SPEC, 0)
    assert len(compiled) == (1 if change == "nothing" else 2)


def test_a_compiler_that_was_replaced_leaves_nothing(compiled, monkeypatch):
    monkeypatch.setattr(nvrtc, "library", lambda: "/lib/libnvrtc.so.12 (deleted)")
    assert compiler.load(SPEC, 0).handle == 1
    assert not kernel_files.folder().exists()


def test_the_name_tells_what_a_kernel_is_made_of(monkeypatch):
    names = [kernel_files.name_of("source", 90)]
    assert kernel_files.name_of("source", 90) == names[0]
    names += [kernel_files.name_of("other source", 90), kernel_files.name_of("source", 80)]
    monkeypatch.setenv("CUPY_CUDA_COMPILE_WITH_DEBUG", "1")
    names.append(kernel_files.name_of("source", 90))
    monkeypatch.setattr(kernel_files, "_compilers", lambda: ("libnvrtc.so.12 1 2",))
    names.append(kernel_files.name_of("source", 90))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("place", ["wheel", "CUDA_PATH", "LD_LIBRARY_PATH"])
def test_a_compiler_is_noticed_where_cupy_looks(monkeypatch, tmp_path, place):
    found = kernel_files._compilers.__wrapped__
    folder = tmp_path / {"wheel": "nvidia/cuda_nvrtc/lib", "CUDA_PATH": "lib64", "LD_LIBRARY_PATH": ""}[place]
    folder.mkdir(parents=True, exist_ok=True)
    if place == "wheel":
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.setenv(place, str(tmp_path))
    before = found()
    (folder / "libnvrtc.so.12").write_text("12.9")
    assert (added := set(found()) - set(before)) and str(folder / "libnvrtc.so.12") in added.pop()
    between = found()
    (folder / "libnvrtc.so.12").write_text("12.9.1")
    assert len({before, between, found()}) == 3


def test_nothing_is_kept_in_memory_only(compiled, monkeypatch):
    compiler.load(SPEC, 0)
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    only_file().rename(kernel_files.folder() / "moved")
    for _ in range(2):
        forget_kernels()
        compiler.load(SPEC, 0)
    assert len(compiled) == 3 and only_file().name == "moved"
    only_file().rename(kernel_files.folder() / compiler._file(SPEC, 0))
    forget_kernels()
    compiler.load(SPEC, 0)
    assert len(compiled) == 4, "nor read"


def test_a_folder_that_cannot_be_written_is_no_error(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    assert compiler.load(SPEC, 0).handle == 1 and len(compiled) == 1


def test_a_failed_write_leaves_nothing(made_up_device, monkeypatch):
    def full(*paths):
        raise OSError("no space")

    monkeypatch.setattr(kernel_files.os, "replace", full)
    kernel_files.write("name", b"cubin")
    assert not list(kernel_files.folder().iterdir())


def test_many_may_write_one_file(made_up_device):
    cubins = [bytes([i]) * 200_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda cubin: kernel_files.write("name", cubin), cubins))
    assert kernel_files.read("name") in cubins and only_file().name == "name"


_PROCESS = """
import sys
from types import SimpleNamespace
from cupy_fp8kv.jit import compiler, nvrtc
from cupy_fp8kv.jit.spec import MergeSpec

class Module:
    def load(self, cubin):
        assert cubin[:4] == b"\x7fELF"
    def get_function(self, entry):
        return SimpleNamespace(ptr=1)

runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda index: None)
compiler.require_cupy = lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Module=Module))
compiler.driver = lambda: SimpleNamespace(CUDADriverError=ZeroDivisionError)
compiler.device_info = lambda index: SimpleNamespace(arch=90)
compiler.load_all([MergeSpec("f16"), MergeSpec("bf16")], 0)
print(nvrtc.library() is not None, "cupy" in sys.modules, "concurrent.futures" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system what is loaded")
def test_a_second_process_loads_neither_nvrtc_nor_threads(tmp_path):
    pytest.importorskip("cupy")
    told = [
        subprocess.run(
            [sys.executable, "-c", _PROCESS], capture_output=True, text=True, check=True, cwd=ROOT,
            env={**os.environ, "CUPY_CACHE_DIR": str(tmp_path)},
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    assert told == [["True"] * 3, ["False"] * 3]
    assert len(list((tmp_path / "cupy_fp8kv_kernels").iterdir())) == 2


@pytest.mark.parametrize(("arch", "nearest"), [(90, 90), (89, 89), (88, 87), (103, 100), (121, 120), (130, 130)])
def test_the_nearest_architecture(monkeypatch, arch, nearest):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy.cuda.nvrtc, "getSupportedArchs", lambda: (80, 86, 87, 89, 90, 100, 120))
    assert nvrtc.nearest_arch(arch) == nearest
