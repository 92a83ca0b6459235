"""The host bodies of the PTX functions against their definitions in NumPy.

tests/gpu/test_gpu_ptx.py holds the instructions against the host bodies, with the same kernels and inputs.
"""

import re

import emulator
import numpy as np
import pytest
from emulator.checks import move
from ptx_functions import FUNCTIONS, GRID

from cupy_fp8kv.jit import sources

COUNT = 65536 * (4 if emulator.toolchain.current().name == "plain" else 1)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_host_bodies_are_numpys(emulate, function):
    inputs = function.inputs(COUNT)
    out = move(np.zeros((COUNT, function.outs), np.uint32))
    emulate.call(function, GRID, move(inputs), out, COUNT)
    function.check(inputs, np.asarray(out))


#: They copy what a tensor map describes, which the driver makes: the ring's tests hold them against the oracle, here
#: and on a GPU.
NEED_A_MAP = {"copy_box", "copy_bytes", "barrier_arrive_expecting", "prefetch_tensor_map", "prefetch_box"}


def declared(text):
    return set(re.findall(r"^(?:DEVICE|template[^\n]*\nDEVICE) (?:constexpr )?\w+ (\w+)\(", text, re.M))


def test_every_ptx_function_has_a_host_body_and_a_test():
    real = declared(sources.FILES["base/ptx.cuh"])
    assert len(real) >= 20 and "mma_f16" in real and "load_once" in real
    assert declared((emulator.HERE / "ptx.cuh").read_text(encoding="utf-8")) == real
    called = {name for function in FUNCTIONS for name in re.findall(r"ptx::(\w+)", function.body)}
    assert called == real - NEED_A_MAP
