"""Equal shares of all rows: decode and merge that find theirs by themselves, against the oracle and at full size."""

import dataclasses

import numpy as np
import pytest
from cases import Case, build
from even import NAMED, even_cases, even_everywhere, even_paged_cases
from gpu_support import assert_same_bits, cp, device, spin, to_cupy, to_host, warm_spin
from listed import LENS, LONG, random_lens
from paged_cases import build_paged, paged
from test_gpu_decode import run
from test_gpu_paged import run as run_paged

import cupy_fp8kv
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.plan import MAX_WORKSPACE, plan_decode

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def has_copy_engine():
    if device().arch < 90:
        pytest.skip(f"sm_{device().arch} has no copy engine")


@pytest.fixture
def even(monkeypatch):
    with even_everywhere(monkeypatch):
        yield


def on_sms(monkeypatch, count):
    """Plans for a device of so many SMs, which leave some of a larger one idle."""
    some = dataclasses.replace(device(), sm_count=count)
    monkeypatch.setattr(cuda, "device_info", lambda index: some)


@pytest.mark.parametrize("case", even_cases(), ids=str)
def test_even(even, case):
    assert case.plan(device()).shares
    run(case)


@pytest.mark.parametrize("sms", [1, 2, 5, 13, 60])
@pytest.mark.parametrize("name", NAMED)
def test_named(even, monkeypatch, name, sms):
    on_sms(monkeypatch, sms * NAMED[name].num_kv_heads)
    run(NAMED[name])


@pytest.mark.parametrize("case", even_paged_cases(), ids=str)
def test_pages(even, case):
    run_paged(case)


@pytest.mark.parametrize("window_left", [-1, 0, 40, 130, 700])
@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
def test_windows_that_begin_within_a_page(even, page_size, window_left):
    run_paged(paged(page_size, group=5, num_kv_heads=2, batch=5, kv_len=4000, lens=(4000, 0, 133, 64, 2570),
                    window_left=window_left, seed=page_size))  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_random_lengths(even, monkeypatch, seed):
    print(f"seed {seed}")
    lens, _ = random_lens(seed)
    lens = [n % 2001 for n in lens[: (12, 12, 300)[seed % 3]]]
    on_sms(monkeypatch, (2, 17, 132)[seed % 3] * (1 + seed % 2))
    case = Case(
        batch=len(lens), kv_len=2000, num_kv_heads=1 + seed % 2, group=1 + seed % 8, kv_lens="device",
        lens=tuple(lens), window_left=(-1, 700)[seed % 2], head_dim=(16, 64, 128, 256)[seed % 4], seed=seed,
    )  # fmt: skip
    run(case)


def test_as_planned():
    plan = LONG.plan(device())
    assert plan.shares and plan.spec.stages and plan.workspace <= MAX_WORKSPACE
    for lens in LENS:
        run(dataclasses.replace(LONG, lens=lens))


def test_lengths_that_change_on_the_stream_before_every_call():
    """Kernels start early here, and may read lengths only when what wrote them has ended."""
    moved = build(dataclasses.replace(LONG, lens=LENS[0])).to(to_cupy)
    each = [cp.asarray(lens, np.int32) for lens in LENS]
    want = []
    for lens in each:
        moved.kv_lens[...] = lens
        cp.cuda.runtime.deviceSynchronize()
        want.append([to_host(array) for array in moved.call()])
    warm_spin()
    got = []
    with cp.cuda.Stream(non_blocking=True):
        spin(20)
        for _ in range(10):
            for lens in each:
                moved.kv_lens[...] = lens
                got.append(moved.call())
        cp.cuda.get_current_stream().synchronize()
    for i, results in enumerate(got):
        for array, expected in zip(results, want[i % len(want)], strict=True):
            assert_same_bits(array, expected, f"call {i}")


def test_one_graph_serves_all_lengths():
    moved = build(dataclasses.replace(LONG, lens=LENS[0])).to(to_cupy)
    want = []
    for lens in LENS:
        moved.kv_lens[...] = cp.asarray(lens, np.int32)
        want.append([to_host(array) for array in moved.call()])
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        moved.call()
        stream.begin_capture()
        captured = moved.call()
        graph = stream.end_capture()
        for lens, expected in zip(LENS, want, strict=True):
            moved.kv_lens[...] = cp.asarray(lens, np.int32)
            graph.launch(stream)
            stream.synchronize()
            for array, values in zip(captured, expected, strict=True):
                assert_same_bits(array, values, f"lengths {lens}")


def test_page_tables_that_cannot_be_read_nothing_outside_the_pool(even):
    """Page numbers on the device cannot be checked before the launch; the copy engine leaves out what is not there."""
    case = paged(16, group=4, num_kv_heads=2, batch=3, kv_len=400, lens=(400, 17, 256), seed=5)
    arrays = build_paged(case).to(to_cupy)
    arrays.tables["indices"][...] = 0x3FFFFFF0
    out, lse = arrays.call()
    cp.cuda.runtime.deviceSynchronize()
    assert bool(cp.isfinite(out.astype(np.float32)).all()) and out.shape == (3, 8, 128)
    # Rows of zeros: every weight is the same, so that a row of n has a sum of n.
    np.testing.assert_allclose(to_host(lse), np.log2([[400.0], [17.0], [256.0]]).repeat(8, 1), rtol=1e-5)


def test_a_cache_of_more_than_2_to_the_31_elements():
    """The longest request begins beyond 2^31 elements; a second one beside it ends in the middle of a turn."""
    if cp.cuda.Device().mem_info[0] < 12 << 30:
        pytest.skip("needs 12 GB of device memory")
    batch, rows, heads, dim = 3, 800_000, 8, 128
    q = cp.random.standard_normal((batch, 4 * heads, dim), dtype=np.float32).astype(np.float16)
    k, v = (cp.random.randint(0, 0x50, (batch, rows, heads, dim), dtype=np.uint8) for _ in "kv")
    lens = cp.asarray([70_001, 129, 800_000], np.int32)
    assert plan_decode(
        Case(group=4, num_kv_heads=heads, batch=batch, kv_len=rows, kv_lens="device").problem, device()
    ).shares  # fmt: skip
    got = cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, v, kv_lens=lens)
    for b, n in enumerate(lens.tolist()):
        alone = cupy_fp8kv.batch_decode_with_padded_kv_cache(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n])
        np.testing.assert_allclose(
            to_host(got[b].astype(np.float32)), to_host(alone[0].astype(np.float32)), atol=2e-3, rtol=2e-3
        )  # fmt: skip
