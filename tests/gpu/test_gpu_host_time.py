"""How long an eager call keeps the host, warm and outside of any capture: ours beside the peers that are installed.

    python -m pytest tests/gpu/test_gpu_host_time.py --benchmark-only

prints the table and holds our medians to their limits. In an ordinary test run the calls are timed, too, but on
machines that nobody chose for it, so only their results are judged.
"""

import numpy as np
import pytest
from gpu_support import cp

import cupy_fp8kv
from cupy_fp8kv.bench import peers
from cupy_fp8kv.bench.inputs import Filler, InputSets
from cupy_fp8kv.bench.report import TOLERANCES
from cupy_fp8kv.bench.suites import Shape

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.gpu

#: Kernels that take much less than the host needs for a call: calls that fill the queue are timed at the device's pace.
#: One launches once, one twice.
SHAPES = {"whole": Shape("whole", 4, 32, 8, 8), "split": Shape("split", 1, 1024, 32, 8)}
#: Microseconds of host time that a call which launches once may take.
LIMITS_US = {"cupy, out=": 10.0, "cupy": 12.0, "torch": 15.0, "plan": 7.0}
#: Everything is half as slow again for some 30 ms at a time, torch's calls too, where the machine has other things to
#: do; NumPy's idle BLAS threads look for work so long, too, after a result was checked. Rounds for ten times that.
CALLS, ROUNDS = 100, 300


@pytest.fixture(scope="module")
def sets():
    filler = Filler()
    return {name: InputSets.of(shape, filler, 2) for name, shape in SHAPES.items()}


def timed(benchmark, call, given):
    """Time ``call``; its result."""
    benchmark.group = f"host time, {given.shape.name}"
    cp.cuda.runtime.deviceSynchronize()
    out = benchmark.pedantic(call, iterations=CALLS, rounds=ROUNDS, warmup_rounds=3)
    cp.cuda.runtime.deviceSynchronize()
    return out


def check_limit(benchmark, request, name, shape):
    benchmark.extra_info["limit_us"] = LIMITS_US[name]
    if request.config.getoption("benchmark_only") and shape == "whole":
        median = benchmark.stats.stats.median * 1e6
        assert median <= LIMITS_US[name], f"{name}: {median:.1f} µs of host time"


def check_error(given, out):
    assert given.error_of(out) <= TOLERANCES["f16"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["cupy, out=", "cupy"])
def test_cupy(benchmark, request, sets, shape, name):
    given = sets[shape]
    q, (k, v), out = given.qs[-1], given.caches[-1], given.outs[-1]
    decode = cupy_fp8kv.batch_decode_with_padded_kv_cache
    call = (lambda: decode(q, k, v, out=out)) if name == "cupy, out=" else (lambda: decode(q, k, v))
    result = timed(benchmark, call, given)
    check_error(given, cp.asnumpy(result))
    check_limit(benchmark, request, name, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_torch(benchmark, request, sets, shape):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    given = sets[shape]
    tensors = peers.TorchInputs(torch, given)
    q, k, v = tensors.qs[-1], tensors.ks[-1], tensors.vs[-1]
    result = timed(benchmark, lambda: cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, v), given)
    assert isinstance(result, torch.Tensor)
    check_error(given, result.cpu().numpy())
    check_limit(benchmark, request, "torch", shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_plan(benchmark, request, sets, shape):
    given = sets[shape]
    q, (k, v), out = given.qs[-1], given.caches[-1], given.outs[-1]
    plan = cupy_fp8kv.DecodePlan(q, k, v)
    timed(benchmark, lambda: plan.run(q, k, v, out=out), given)
    check_error(given, cp.asnumpy(out))
    check_limit(benchmark, request, "plan", shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers(benchmark, request, sets, shape, peer):
    if not request.config.getoption("benchmark_only"):
        pytest.skip("peers are timed with --benchmark-only: some compile for minutes")
    torch = pytest.importorskip("torch")
    if not peer.importable or not torch.cuda.is_available():
        pytest.skip(f"{peer.module} is not installed, or torch has no CUDA")
    given = sets[shape]
    try:
        call = peer.prepare(peers.TorchInputs(torch, given))
        first = call(1)
    except (peers.UnsupportedError, ImportError) as error:
        pytest.skip(str(error))
    assert first.numel() == np.prod(given.outs[0].shape)
    result = timed(benchmark, lambda: call(1), given)
    assert given.error_of(result.float().reshape(given.outs[0].shape).cpu().numpy()) <= peer.tolerance
