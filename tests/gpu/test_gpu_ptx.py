"""Each PTX function on the GPU against its host body and its definition: the emulator means what the instructions do.

Kernels and inputs are those of tests/cpu/test_emulator_ptx.py: 2^20 items each, which for functions of 16 bits are all
there are. Bits have to be equal, but for NaN where a result is a float, and for the two approximations and sums in a
tensor core, which keep to their stated error against the definition.
"""

import ctypes
import shutil

import emulator
import numpy as np
import pytest
from gpu_support import cp, device, to_host
from ptx_functions import FUNCTIONS, GRID, assert_same

from cupy_fp8kv.jit import compiler
from cupy_fp8kv.jit.launch import launch_kernel

pytestmark = pytest.mark.gpu

COUNT = 1 << 20


@pytest.fixture(scope="module")
def host_bodies(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.fail("needs g++ to compile the host bodies")
    return emulator.Emulator(tmp_path_factory.mktemp("emulator"))


def run_on_gpu(function, inputs):
    there, out = cp.asarray(inputs), cp.zeros((COUNT, function.outs), cp.uint32)
    kernel = compiler.load(function, cp.cuda.runtime.getDevice())
    block = (ctypes.c_ulonglong * 3)(there.data.ptr, out.data.ptr, COUNT)
    argument = (ctypes.c_void_p * 1)(ctypes.addressof(block))
    stream = cp.cuda.get_current_stream()
    launch_kernel()(
        kernel.handle, GRID, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes, stream.ptr, ctypes.addressof(argument), 0
    )
    stream.synchronize()
    return to_host(out)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_instructions_are_their_host_bodies(host_bodies, function):
    if device().arch < function.arch:
        pytest.skip(f"needs sm_{function.arch}")
    inputs = function.inputs(COUNT)
    on_gpu = run_on_gpu(function, inputs)
    function.check(inputs, on_gpu)
    on_cpu = emulator.allocate(COUNT * function.outs * 4).view(np.uint32).reshape(COUNT, function.outs)
    on_cpu[...] = 0
    host_bodies.call(function, GRID, inputs, on_cpu, COUNT)
    if function.error is None:
        assert_same(on_gpu, np.asarray(on_cpu), function.floats)
    else:
        function.check(inputs, np.asarray(on_cpu))
