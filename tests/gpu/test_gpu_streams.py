"""Workspaces that are kept from call to call: one for each stream of a thread, none between eager calls and graphs."""

import dataclasses
import threading

import numpy as np
import pytest
from cases import Case, build
from gpu_support import assert_same_bits, cp, device, to_cupy

import cupy_fp8kv
from cupy_fp8kv.kept_workspaces import MOST_STREAMS

pytestmark = pytest.mark.gpu
decode = cupy_fp8kv.batch_decode_with_padded_kv_cache
#: Long enough for its kernels to still run while the host makes the next calls.
LONG = Case(group=4, num_kv_heads=8, batch=2, kv_len=20000)


@pytest.fixture(scope="module")
def several():
    """Calls of one kind with distinct data, which all need a workspace: (q, k, v) and the result of each."""
    assert LONG.plan(device()).splits > 1
    found = []
    for seed in range(3):
        moved = build(dataclasses.replace(LONG, seed=seed)).to(to_cupy)
        views = moved.q.view, moved.k.view, moved.v.view
        found.append((views, decode(*views)))
    cp.cuda.runtime.deviceSynchronize()
    return found


def wrong(got, several):
    return [i for i, out in got if bool((out.view(np.uint16) != several[i][1].view(np.uint16)).any())]


def test_more_streams_than_are_kept_at_the_same_time(several):
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(MOST_STREAMS + 2)]
    got = []
    for turn in range(30):
        for s, stream in enumerate(streams):
            i = (turn + s) % len(several)
            with stream:
                got.append((i, decode(*several[i][0])))
    cp.cuda.runtime.deviceSynchronize()
    assert not wrong(got, several)


def test_threads_that_share_a_stream(several):
    stream, got, barrier = cp.cuda.Stream(non_blocking=True), [], threading.Barrier(3)

    def work(i):
        barrier.wait()
        with stream:
            got.extend((i, decode(*several[i][0])) for _ in range(60))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cp.cuda.runtime.deviceSynchronize()
    assert len(got) == 180 and not wrong(got, several)


def test_eager_calls_beside_a_graph_of_the_same_stream(several):
    """The graph replays on another stream, while eager calls run on the one that it was captured on."""
    stream, other = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    (views, want), (eager, _), _ = several
    out = cp.empty_like(want)
    with stream:
        decode(*views, out=out)
        decode(*eager)
        stream.synchronize()
        stream.begin_capture()
        for _ in range(4):
            decode(*views, out=out)
        graph = stream.end_capture()
        for _ in range(20):
            out.fill(0)
            stream.synchronize()
            graph.launch(other)
            got = [(1, decode(*eager)) for _ in range(8)]
            cp.cuda.runtime.deviceSynchronize()
            assert_same_bits(out, want)
            assert not wrong(got, several)


def test_a_capture_takes_the_workspace_of_the_call_before(several):
    """In a mode that forbids a capture to allocate; twice on one stream."""
    stream, out = cp.cuda.Stream(non_blocking=True), cp.empty_like(several[0][1])
    views, want = several[0]
    graphs = []
    with stream:
        for _ in range(2):
            decode(*views, out=out)
            stream.synchronize()
            stream.begin_capture(cp.cuda.runtime.streamCaptureModeGlobal)
            decode(*views, out=out)
            graphs.append(stream.end_capture())
        for graph in graphs:
            out.fill(0)
            graph.launch(stream)
            stream.synchronize()
            assert_same_bits(out, want)


def test_a_stream_keeps_one_workspace(several):
    pool, views = cp.get_default_memory_pool(), several[0][0]
    out = cp.empty_like(several[0][1])
    with cp.cuda.Stream(non_blocking=True) as stream:
        decode(*views, out=out)
        before = pool.used_bytes()
        for _ in range(20):
            decode(*views, out=out)
        assert pool.used_bytes() == before
        stream.synchronize()


def test_an_allocator_without_a_pool_by_handles(several):
    """What cudaMallocAsync gives belongs to a stream, not to a handle: it is freed with the call."""
    if not cp.cuda.runtime.deviceGetAttribute(cp.cuda.runtime.cudaDevAttrMemoryPoolsSupported, 0):
        pytest.skip("this device has no memory pools")
    got, streams = [], [cp.cuda.Stream(non_blocking=True) for _ in range(20)]
    with cp.cuda.using_allocator(cp.cuda.malloc_async):
        for turn, stream in enumerate(streams):
            i = turn % len(several)
            with stream:
                got.append((i, decode(*several[i][0])))
        cp.cuda.runtime.deviceSynchronize()
        assert not wrong(got, several)
        got.clear()
