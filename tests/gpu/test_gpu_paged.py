"""Decode over pages against the float64 oracle, in the libraries, in captured graphs, and in pools of gigabytes.

The kernel always runs before the oracle, on memory that was NaN, and twice, for the same bits. ``--fuzz N`` runs N
random problems (100 by default), from ``--fuzz-seed`` on; a failing one has its seed in its name.
"""

import dataclasses
import time

import numpy as np
import oracle
import pytest
from cases import Case, Placed
from gpu_support import assert_same_bits, cp, device, planned, poison_pool, spin, to_cupy, to_host, warm_spin
from paged_cases import NO_PAGE, build_paged, paged, pairwise_paged, random_paged
from test_gpu_arrays import BUSY_MS, jax, to_torch, torch  # noqa: F401  fixtures

import cupy_fp8kv
from cupy_fp8kv import BatchDecodeWithPagedKVCacheWrapper, CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from cupy_fp8kv.formats import E4M3, KV_FORMATS
from cupy_fp8kv.jit import compiler
from cupy_fp8kv.plan import plan_decode, specs
from cupy_fp8kv.problem import Paging

pytestmark = pytest.mark.gpu

paged_decode = cupy_fp8kv.batch_decode_with_paged_kv_cache


def pytest_generate_tests(metafunc):
    if "fuzz_seed" in metafunc.fixturenames:
        first, count = metafunc.config.getoption("--fuzz-seed"), metafunc.config.getoption("--fuzz")
        metafunc.parametrize("fuzz_seed", range(first, first + count), ids=lambda seed: f"seed={seed}")


def run(case, arrays=None):
    """Check a case on the GPU and return its result."""
    arrays = arrays or build_paged(case)
    base = case.base
    heads = base.batch * base.group * base.num_kv_heads
    poison_pool(heads * base.head_dim * 2, heads * 4)
    moved = arrays.to(to_cupy)
    out, lse = moved.call()
    again = arrays.to(to_cupy).call()
    assert isinstance(out, cp.ndarray) and out.dtype == KV_FORMATS[base.q].dtype and lse.dtype == np.float32
    result, lse = to_host(out), to_host(lse)
    if base.given_out:
        assert_same_bits(out, moved.padded.out.view, "out")
        written = dataclasses.replace(moved.padded.out, base=to_host(moved.padded.out.base))
        assert_same_bits(written.outside, arrays.padded.out.outside, "memory around out")
    arrays.check(result, lse)
    assert_same_bits(again[0], result, "second out")
    assert_same_bits(again[1], lse, "second lse")
    return result, lse


@pytest.mark.parametrize("case", pairwise_paged(), ids=str)
def test_pairwise(case):
    run(case)


def test_fuzz(fuzz_seed):
    print(f"seed {fuzz_seed}")
    run(random_paged(fuzz_seed))


@pytest.mark.parametrize("table", ["csr", "blocks"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("group", [3, 5, 7])
def test_page_sizes(page_size, layout, table, group):
    run(paged(page_size, table=table, layout=layout, group=group, num_kv_heads=2, batch=6, kv_len=2000,
              lens=(2000, 0, 1, 64, 37, 1025), window_left=700 if group == 5 else -1, shared=group == 3,
              seed=page_size))  # fmt: skip


# Plans


def paged_problem(case):
    rows = 1 << (case.base.kv_len - 1).bit_length()
    return dataclasses.replace(case.base.problem, kv_len=rows, paging=Paging(case.page_size, 1, rows, 0), ragged=True)


@pytest.mark.parametrize("splits", [1, 2, 3, 17, 64, 257])
def test_any_number_of_splits(monkeypatch, splits):
    case = paged(16, group=5, num_kv_heads=2, batch=4, kv_len=700, lens=(700, 0, 1, 333), given_out=True, view="padded")
    arrays = build_paged(case)

    def change(plan):
        heads = 4 * 10 * splits if splits > 1 else 0
        return dataclasses.replace(
            plan, splits=splits, grid=plan.grid // plan.splits * splits, workspace_out=heads * 128 * 4,
            workspace_state=heads * 8,
        )  # fmt: skip

    with planned(monkeypatch, change) as plans:
        poison_pool(4 * 10 * 130 * 4 * splits)
        out, lse = arrays.to(to_cupy).call()
    assert [plan.splits for plan in plans] == [splits]
    arrays.check(to_host(out), to_host(lse))


def test_every_cta_shape_that_a_plan_may_choose(monkeypatch):
    case = paged(16, group=8, num_kv_heads=2, batch=3, kv_len=1000, lens=(1000, 17, 512))
    arrays = build_paged(case)
    for spec in specs(paged_problem(case), device().arch, device().shared_per_block):
        with planned(monkeypatch, lambda plan, spec=spec: dataclasses.replace(plan, spec=spec)) as plans:
            out, lse = arrays.to(to_cupy).call()
        assert plans[0].spec == spec and spec.layout == "paged"
        arrays.check(to_host(out), to_host(lse))


def test_long_requests_are_split_and_short_ones_of_a_full_batch_are_not():
    long = paged(16, group=4, num_kv_heads=2, batch=1, kv_len=60_000, lens=(59_999,), seed=1)
    full = paged(16, group=4, batch=600, kv_len=128, seed=2)
    plan = plan_decode(paged_problem(long), device())
    assert max(plan.splits, plan.shares) > 8
    assert plan_decode(paged_problem(full), device()).splits == 1
    for case in (long, full):
        run(case)


def test_strides_backwards():
    case = paged(8, form="pair", group=2, num_kv_heads=3, batch=2, kv_len=500, lens=(500, 133), seed=4)
    arrays = build_paged(case)
    pools = tuple(
        Placed(np.ascontiguousarray(pool.base[::-1, ::-1, ::-1]), (slice(None, None, -1),) * 3) for pool in arrays.pools
    )
    run(case, dataclasses.replace(arrays, pools=pools))


def test_tables_that_claim_too_many_rows_are_cut():
    case = paged(16, group=2, batch=3, kv_len=96, lens=(96, 64, 0), seed=6)
    arrays = build_paged(case)
    wrong = arrays.tables["last_page_len"].copy()
    wrong[0] = 2**31 - 1
    run(case, dataclasses.replace(arrays, tables=arrays.tables | {"last_page_len": wrong}))
    case = paged(16, table="blocks", group=2, batch=2, kv_len=96, lens=(96, 0), seed=6)
    arrays = build_paged(case)
    tables = {"block_tables": arrays.tables["block_tables"][:, :6].copy(),
              "kv_lens": np.array([2**31 - 1, -(2**31)], np.int32)}  # fmt: skip
    run(case, dataclasses.replace(arrays, tables=tables))


# Libraries


@pytest.mark.parametrize("form", ["one", "pair"])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "bf16"])
def test_torch_gives_cupys_bits(torch, form, fmt):  # noqa: F811
    case = paged(16, form, k=fmt, v=fmt, group=4, num_kv_heads=2, batch=3, kv_len=900, lens=(900, 0, 77), q="bf16")
    arrays = build_paged(case)
    want = run(case, arrays)
    typed = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(fmt)
    pools = tuple(dataclasses.replace(p, base=to_torch(torch, p.base, typed)) for p in arrays.pools)
    moved = dataclasses.replace(arrays.to(lambda array: to_torch(torch, array)), pools=pools)
    got = moved.call(kv_format=None)
    assert all(isinstance(array, torch.Tensor) and array.is_cuda for array in got)
    for ours, theirs in zip(got, want, strict=True):
        assert_same_bits(ours, theirs)


def test_jax_gives_cupys_bits(jax):  # noqa: F811
    case = paged(16, group=4, num_kv_heads=2, batch=3, kv_len=900, lens=(900, 0, 77))
    arrays = build_paged(case)
    want = run(case, arrays)
    got = arrays.to(lambda array: jax.device_put(array, jax.devices("gpu")[0])).call()
    for ours, theirs in zip(got, want, strict=True):
        assert isinstance(ours, jax.Array)
        assert_same_bits(np.asarray(ours), theirs)


@pytest.mark.parametrize("table", ["csr", "blocks"])
def test_host_arrays_run_on_the_gpu_and_come_back(table):
    case = paged(16, table=table, group=4, num_kv_heads=2, batch=3, kv_len=900, lens=(900, 0, 77), layout="HND")
    arrays = build_paged(case)
    out, lse = arrays.call(backend="cuda")
    assert type(out) is np.ndarray
    arrays.check(out, lse)
    if table == "blocks":
        return
    wrapper = BatchDecodeWithPagedKVCacheWrapper(None, "HND", backend="numpy")
    moved = arrays.to(to_cupy)
    plan_case(wrapper, case, moved)
    out, lse = wrapper.run_return_lse(moved.padded.q.view, moved.cache)
    assert isinstance(out, cp.ndarray)
    arrays.check(to_host(out), to_host(lse))


def test_tables_in_the_wrong_place_are_refused(torch):  # noqa: F811
    case = paged(16, group=2, batch=2, kv_len=60, lens=(60, 31))
    arrays = build_paged(case)
    moved, other = arrays.to(to_cupy), arrays.to(lambda array: to_torch(torch, array))
    for name in arrays.tables:
        with pytest.raises(TypeError, match=rf"^{name}: expected an array of cupy like q, got one of torch"):
            moved.call(**{name: other.tables[name]})
        with pytest.raises(TypeError, match=rf"^{name}: expected int32, got int64"):
            moved.call(**{name: moved.tables[name].astype(np.int64)})
        with pytest.raises(ValueError, match=rf"^{name}: expected a contiguous last axis"):
            moved.call(**{name: cp.repeat(moved.tables[name], 2)[::2]})
        host = {"q": arrays.padded.q.view, "k_cache": arrays.cache, "backend": "cuda"}
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
            paged_decode(**host, **(arrays.tables | {name: moved.tables[name].astype(np.float32)}))
    # Each may be on the host or the device.
    for name, values in arrays.tables.items():
        got = moved.call(**{name: values})
        arrays.check(*(to_host(array) for array in got))


def test_validation_on_the_device():
    case = paged(16, group=2, batch=3, kv_len=100, lens=(100, 0, 40), seed=1)
    moved = build_paged(case).to(to_cupy)
    moved.call(validate=True)
    wrong = moved.tables["indices"].copy()
    wrong[3 + 7] = NO_PAGE
    with pytest.raises(ValueError, match=rf"^indices: .* got {NO_PAGE} as page 0 of request 2"):
        moved.call(indices=wrong, validate=True)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        moved.call()
        stream.synchronize()
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match=r"^validate: "):
                moved.call(validate=True)
        finally:
            stream.end_capture()


# Wrappers


def plan_case(wrapper, case, moved, **changes):
    base = case.base
    arguments = {
        "num_qo_heads": base.group * base.num_kv_heads, "num_kv_heads": base.num_kv_heads, "head_dim": base.head_dim,
        "page_size": case.page_size, "window_left": base.window_left, "logits_soft_cap": base.soft_cap,
        "data_type": (base.k, base.v), "q_data_type": base.q, "indptr": None, "indices": None, "last_page_len": None,
    }  # fmt: skip
    wrapper.plan(**(arguments | moved.tables | changes))
    return wrapper


LONG = paged(16, group=4, num_kv_heads=2, batch=2, kv_len=5000, lens=(5000, 777), seed=3)
SHORT = paged(16, group=4, num_kv_heads=2, batch=2, kv_len=60, lens=(60, 31), seed=3)
BOTH = pytest.mark.parametrize("case", [SHORT, LONG], ids=["whole", "split"])


@BOTH
@pytest.mark.parametrize("where", ["device", "host", "mixed"])
def test_wrapper_with_its_own_and_with_the_callers_workspace(case, where):
    case = dataclasses.replace(case, where=where)
    arrays = build_paged(case)
    moved = arrays.to(to_cupy)
    needed = cupy_fp8kv.workspace_size(2, 8, 2, 128, data_type="e4m3")
    around = cp.full(needed + 512, 77, np.uint8)
    results = []
    for space in (None, around[256 : 256 + needed]):
        wrapper = plan_case(BatchDecodeWithPagedKVCacheWrapper(space), case, moved)
        results.append(wrapper.run_return_lse(moved.padded.q.view, moved.cache))
        arrays.check(*(to_host(array) for array in results[-1]))
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)
    assert (around[:256] == 77).all() and (around[256 + needed :] == 77).all()
    assert bool((around != 77).any()) == (case.base.kv_len == LONG.base.kv_len)
    if case.base.kv_len == LONG.base.kv_len:
        with pytest.raises(ValueError, match=r"^float_workspace_buffer: expected \d+ bytes or more"):
            plan_case(BatchDecodeWithPagedKVCacheWrapper(cp.zeros(1000, np.uint8)), case, moved)


def test_layers_share_a_plan(torch):  # noqa: F811
    """As a model does: one plan, many caches, tensors in and out, on a stream of the caller's."""
    case = paged(16, group=4, num_kv_heads=2, batch=4, kv_len=300, lens=(300, 1, 0, 64), where="host")
    layers = [build_paged(dataclasses.replace(case, base=dataclasses.replace(case.base, seed=0)))]
    for seed in range(1, 4):
        other = build_paged(dataclasses.replace(case, base=dataclasses.replace(case.base, seed=seed)))
        layers.append(other)
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for arrays in layers:
            moved = arrays.to(lambda array: to_torch(torch, array))
            pools = moved.pools[0].base.view(torch.float8_e4m3fn)
            plan_case(wrapper, case, moved, data_type=torch.float8_e4m3fn, q_data_type=torch.float16)
            out, lse = wrapper.forward_return_lse(moved.padded.q.view, pools)
            wrapper.end_forward()
            stream.synchronize()
            arrays.check(to_host(out), to_host(lse))


@BOTH
def test_neither_plan_nor_run_waits_for_the_device(case):
    warm_spin()
    arrays = build_paged(case)
    moved = arrays.to(to_cupy)
    space = cp.empty(cupy_fp8kv.workspace_size(2, 8, 2, 128, data_type="e4m3"), np.uint8)
    buffers = [cp.zeros(n, np.int32) for n in (3, 1000, 2)]
    wrappers = BatchDecodeWithPagedKVCacheWrapper(space), CUDAGraphBatchDecodeWithPagedKVCacheWrapper(space, *buffers)
    for wrapper in wrappers:
        plan_case(wrapper, case, moved).run_return_lse(moved.padded.q.view, moved.cache)
    cp.cuda.runtime.deviceSynchronize()
    spin(BUSY_MS)
    ahead = cp.cuda.get_current_stream().record()
    started = time.perf_counter()
    results = [plan_case(wrapper, case, moved).run_return_lse(moved.padded.q.view, moved.cache) for wrapper in wrappers]
    seconds = time.perf_counter() - started
    assert not ahead.done, "a call waited for the stream"
    assert seconds < BUSY_MS / 1000 / 4
    for result in results:
        arrays.check(*(to_host(array) for array in result))


# Capture once, replay with other lengths and tables

#: Lengths of replays, in pages that every table of the test has room for.
REPLAYS = ((4990, 31), (1, 5000), (0, 0), (16, 17), (5000, 4999))


def room_for(tables, rows=5000, page=16, batch=2):
    """Tables as long as any replay needs them, with the values of these in front."""
    pages = -(-rows // page)
    larger = {}
    for name, values in tables.items():
        shape = {"indices": (batch * pages + 8,), "block_tables": (batch, pages + 2)}.get(name, values.shape)
        larger[name] = np.full(shape, NO_PAGE, np.int32)
        larger[name][tuple(slice(n) for n in values.shape)] = values
    return larger


def pool_for(arrays, num_pages=700):
    """The pool with more pages of NaN behind."""
    pool = np.ascontiguousarray(arrays.pools[0].base)
    larger = np.full((num_pages, *pool.shape[1:]), 0xFF, np.uint8)
    larger[: len(pool)] = pool
    return larger


@pytest.mark.parametrize("table", ["csr", "blocks"])
def test_cupy_graphs_replay_with_other_lengths_and_tables(table):
    case = paged(16, table=table, group=4, num_kv_heads=2, batch=2, kv_len=5000, lens=(5000, 777), seed=3)
    arrays = build_paged(case)
    q, pool = to_cupy(arrays.padded.q.view), to_cupy(pool_for(arrays))
    tables = {name: to_cupy(value) for name, value in room_for(arrays.tables).items()}
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.runtime.deviceSynchronize()
    out = cp.empty_like(q)
    with stream:
        paged_decode(q, pool, **tables, out=out, return_lse=True)
        stream.synchronize()
        stream.begin_capture()
        _, lse = paged_decode(q, pool, **tables, out=out, return_lse=True)
        graph = stream.end_capture()
    kernels = len(compiler._kernels)
    for lens in ((5000, 777), *REPLAYS):
        other = build_paged(case, lens)
        q[...], pool[...] = to_cupy(other.padded.q.view), to_cupy(pool_for(other))
        for name, values in room_for(other.tables).items():
            tables[name][...] = to_cupy(values)
        cp.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        other.check(to_host(out), to_host(lse))
    assert len(compiler._kernels) == kernels


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_graph_wrapper_plans_and_replays(library, request):
    case = paged(16, group=4, num_kv_heads=2, batch=2, kv_len=5000, lens=(5000, 777), seed=3, where="host")
    arrays = build_paged(case)
    if library == "torch":
        torch_ = request.getfixturevalue("torch")

        def move(array):
            return to_torch(torch_, array)
    else:
        move = to_cupy
    q, pool = move(arrays.padded.q.view), move(pool_for(arrays))
    space = move(np.zeros(cupy_fp8kv.workspace_size(2, 8, 2, 128, data_type="e4m3"), np.uint8))
    buffers = [move(np.full(n, NO_PAGE, np.int32)) for n in (3, 700, 2)]
    wrapper = CUDAGraphBatchDecodeWithPagedKVCacheWrapper(space, *buffers)
    plan_case(wrapper, case, arrays)
    if library == "torch":
        side = torch_.cuda.Stream()
        with torch_.cuda.stream(side):
            wrapper.run_return_lse(q, pool)
        torch_.cuda.synchronize()
        graph = torch_.cuda.CUDAGraph()
        with torch_.cuda.graph(graph):
            out, lse = wrapper.run_return_lse(q, pool)
        replay = graph.replay
    else:
        stream = cp.cuda.Stream(non_blocking=True)
        cp.cuda.runtime.deviceSynchronize()
        with stream:
            wrapper.run_return_lse(q, pool)
            stream.synchronize()
            stream.begin_capture()
            out, lse = wrapper.run_return_lse(q, pool)
            graph = stream.end_capture()
        replay = lambda: graph.launch(stream)  # noqa: E731
    for lens in ((5000, 777), *REPLAYS):
        other = build_paged(case, lens)
        plan_case(wrapper, case, other)
        q[...], pool[...] = move(other.padded.q.view), move(pool_for(other))
        cp.cuda.runtime.deviceSynchronize()
        replay()
        cp.cuda.runtime.deviceSynchronize()
        other.check(to_host(out), to_host(lse))


def test_tables_of_the_host_are_refused_while_capturing():
    moved = build_paged(SHORT).to(to_cupy)
    host = build_paged(SHORT).tables
    moved.call()
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.runtime.deviceSynchronize()
    with stream:
        moved.call()
        stream.synchronize()
        stream.begin_capture()
        try:
            for name, value in host.items():
                with pytest.raises(RuntimeError, match=rf"^{name}: expected a device array, not one on the host"):
                    moved.call(**{name: value})
        finally:
            stream.end_capture()


# Pools of more than 2^31 elements


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["one", "pair"])
def test_large_pools(form, layout):
    """Pages at both ends of a pool of 5 GB, everything else NaN: neither elements nor bytes fit 32 bits."""
    case = paged(16, form, group=4, num_kv_heads=8, batch=3, kv_len=900, lens=(900, 0, 333), layout=layout, seed=5)
    arrays = build_paged(case)
    pools, small = [], arrays.pools
    elements = (5 << 30) // (1 if form == "one" else 2)
    cp.get_default_memory_pool().free_all_blocks()
    if cp.cuda.runtime.memGetInfo()[0] < 7 << 30:
        pytest.skip("needs 7 GiB of free device memory")
    num_pages = elements // (small[0].base[0].size) + 1
    used = small[0].base.shape[0]
    # Half of the pages stay where they are, the others move to the end.
    moves = np.where(np.arange(used) % 2, np.arange(used), num_pages - 1 - np.arange(used)).astype(np.int32)
    for pool in small:
        large = cp.full((num_pages, *pool.base.shape[1:]), 0xFF, np.uint8)
        large[cp.asarray(moves)] = cp.asarray(pool.base)
        pools.append(Placed(large))
    indices = arrays.tables["indices"]
    tables = arrays.tables | {
        "indices": np.where(indices == NO_PAGE, NO_PAGE, moves[np.minimum(indices, used - 1)]).astype(np.int32)
    }
    assert pools[0].base.size > 2**31 and moves.max() * np.int64(pools[0].base.strides[0]) > 2**31
    moved = dataclasses.replace(arrays, tables=tables).to(to_cupy)
    out, lse = dataclasses.replace(moved, pools=tuple(pools)).call()
    arrays.check(to_host(out), to_host(lse))
    del pools, large
    cp.get_default_memory_pool().free_all_blocks()


def test_one_page_of_more_than_2_31_bytes():
    """A pool of two pages of 2^21 + 16 rows: the second begins beyond 2^31 bytes, and its rows lie further on."""
    cp.get_default_memory_pool().free_all_blocks()
    if cp.cuda.runtime.memGetInfo()[0] < 7 << 30:
        pytest.skip("needs 7 GiB of free device memory")
    page, heads, window = (1 << 21) + 16, 8, 499
    rng = np.random.default_rng(0)
    q = oracle.random_query(rng, (1, 16, 128), np.float16)
    rows = oracle.random_cache(rng, (2, 1, window + 1, heads, 128), E4M3)
    pool = cp.full((2, page, heads, 128), 0xFF, np.uint8)
    last = page - 3
    pool[1, last - window - 1 : last] = cp.asarray(rows[0, 0])
    other = cp.full((2, page, heads, 128), 0xFF, np.uint8) if cp.cuda.runtime.memGetInfo()[0] > 5 << 30 else pool
    if other is pool:
        rows[1] = rows[0]
    else:
        other[1, last - window - 1 : last] = cp.asarray(rows[1, 0])
    out, lse = paged_decode(cp.asarray(q), pool, other, [0, 1], [1], [last], window_left=window, return_lse=True)
    ref = oracle.oracle(q, rows[0], rows[1], k_format=E4M3, v_format=E4M3, sm_scale=128**-0.5)
    oracle.assert_close(to_host(out), to_host(lse), *ref, np.float16)


# Warming up


def test_warmup_compiles_what_paged_calls_use():
    case = paged(16, head_dim=48, group=2, batch=2, kv_len=60, lens=(60, 31))
    assert isinstance(case.base, Case)
    told = cupy_fp8kv.warmup(head_dim=48, group_size=2, layout="paged")
    assert any(" paged" in name for name in told)
    kernels = len(compiler._kernels)
    run(case)
    assert len(compiler._kernels) == kernels
