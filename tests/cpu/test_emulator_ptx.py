"""The host bodies of the PTX functions against their definitions in NumPy.

tests/gpu/test_gpu_ptx.py holds the instructions against the host bodies, with the same kernels and inputs.
"""

import re

import emulator
import numpy as np
import pytest
from emulator.checks import move
from ptx_functions import FUNCTIONS, GRID

from cupy_fp8kv.jit import compiler, sources

COUNT = 65536 * (4 if emulator.toolchain.current().name == "plain" else 1)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_host_bodies_are_numpys(emulate, function):
    inputs = function.inputs(COUNT)
    out = move(np.zeros((COUNT, function.outs), np.uint32))
    emulate.call(function, GRID, move(inputs), out, COUNT)
    function.check(inputs, np.asarray(out))


def declared(text):
    return set(re.findall(r"^(?:DEVICE|template[^\n]*\nDEVICE) (?:constexpr )?\w+ (\w+)\(", text, re.M))


def test_every_ptx_function_has_a_host_body_and_a_test():
    real = declared(sources.FILES["base/ptx.cuh"])
    assert len(real) >= 20 and "mma_f16" in real and "load_once" in real
    assert declared((emulator.HERE / "ptx.cuh").read_text(encoding="utf-8")) == real
    called = {name for function in FUNCTIONS for name in re.findall(r"ptx::(\w+)", function.body)}
    assert called == real


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_their_kernels_compile_for_a_gpu(arch):
    """One source of all functions: what test_gpu_ptx.py compiles one by one."""
    pytest.importorskip("cupy")
    functions = [function for function in FUNCTIONS if function.arch <= arch]

    class All:
        entry = "kernel"
        shared_bytes = 0

        def source(self):
            header = functions[0].source().split("struct Params", 1)[0]
            bodies = [function.source().split("struct Params", 1)[1] for function in functions]
            return header + "".join(
                f"namespace kernel_{i} {{ struct Params{body.replace('void kernel', f'void kernel_{i}')} }}\n"
                for i, body in enumerate(bodies)
            )

    report = compiler.compile_offline(All(), arch)
    assert not report.error and report.cubin
