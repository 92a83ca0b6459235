"""Kernels that are kept on disk: a process that finds them needs no NVRTC, and computes the same bits."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_support import cp, device

import cupy_fp8kv
from cupy_fp8kv.jit import nvrtc

pytestmark = pytest.mark.gpu

ROOT = Path(cupy_fp8kv.__file__).parent.parent
#: A split request: a decode kernel (with a ring from sm_90 on) and a merge. Lengths add the schedule.
_PROCESS = """
import hashlib, sys
import numpy as np, cupy
import cupy_fp8kv
from cupy_fp8kv.jit import nvrtc
rng = np.random.default_rng(0)
q = cupy.asarray(rng.standard_normal((2, 32, 128)).astype(np.float16))
k, v = (cupy.asarray(rng.integers(0, 0x70, (2, 4096, 8, 128), dtype=np.uint8)) for _ in "kv")
lens = cupy.asarray(np.array([4096, 1000], np.int32))
found = [cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, v, kv_lens=one).get() for one in (None, lens)]
assert all(np.isfinite(one).all() and one.any() for one in found)
print(nvrtc.library() is not None, hashlib.sha256(b"".join(one.tobytes() for one in found)).hexdigest())
"""


def first_results(cache):
    """Whether NVRTC was loaded, and a digest of the results."""
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "CUPY_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded, digest = done.stdout.split()
    return loaded == "True", digest


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of kept kernels, and the digest of what they gave when they were compiled."""
    cache = tmp_path_factory.mktemp("cache")
    loaded, digest = first_results(cache)
    assert loaded
    return cache, digest


def test_a_second_process_needs_no_compiler(compiled):
    cache, digest = compiled
    files = {file: file.stat().st_mtime_ns for file in (cache / "cupy_fp8kv_kernels").iterdir()}
    assert len(files) >= 3 and all(file.suffix == ".cubin" for file in files)
    assert first_results(cache) == (False, digest)
    assert files == {file: file.stat().st_mtime_ns for file in (cache / "cupy_fp8kv_kernels").iterdir()}


def test_a_kernel_that_the_driver_refuses_is_compiled_again(compiled):
    """Whole, of this compiler, and of no use here: it is another architecture's."""
    cache, digest = compiled
    cubin, _ = nvrtc.compile_source('extern "C" __global__ void decode() {}', 80 if device().arch >= 90 else 90)
    for file in (cache / "cupy_fp8kv_kernels").iterdir():
        stamp = file.read_bytes().split(b"\n", 2)[1]
        rest = stamp + b"\n" + cubin
        file.write_bytes(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
    assert first_results(cache) == (True, digest)
    assert first_results(cache) == (False, digest)


def test_the_planner_is_told_what_the_runtime_says():
    index = cp.cuda.runtime.getDevice()
    properties = cp.cuda.runtime.getDeviceProperties(index)
    told = device()
    assert told.name == properties["name"].decode() and told.sm_count == properties["multiProcessorCount"]
    assert told.arch == 10 * properties["major"] + properties["minor"]
    assert told.shared_per_block == properties["sharedMemPerBlockOptin"]
