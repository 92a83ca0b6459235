"""Bad page tables, caches and plans: the exception's type, and a message that names what was expected and what came."""

import inspect
import re

import numpy as np
import pytest
from test_errors import Bad, each

import cupy_fp8kv
from cupy_fp8kv import BatchDecodeWithPagedKVCacheWrapper, CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from cupy_fp8kv.jit.device import has_gpu
from cupy_fp8kv.paged_problem import row_units
from cupy_fp8kv.pages import PagedSizes
from cupy_fp8kv.plan import DeviceInfo

paged_decode = cupy_fp8kv.batch_decode_with_paged_kv_cache

B, PAGES, PAGE, HQ, HKV, D = 3, 10, 16, 6, 3, 32
#: Requests of 40, 0 and 17 rows.
CSR = {"indptr": [0, 3, 3, 5], "indices": [7, 0, 3, 9, 1], "last_page_len": [8, 0, 1]}
BLOCKS = {"block_tables": [[7, 0, 3], [0, 0, 0], [9, 1, 0]], "kv_lens": [40, 0, 17]}
F16 = np.float16


def int32(values):
    return np.array(values, np.int32)


def pool(*shape, dtype=np.uint8):
    return np.zeros(shape or (PAGES, PAGE, HKV, D), dtype)


#: One row in the place of 2^30 a page.
LONG_PAGES = np.broadcast_to(pool(1, 1, HKV, D), (PAGES, 2**30, HKV, D))


def call(**arguments):
    good = {"q": np.ones((B, HQ, D), F16), "k_cache": pool(), "v_cache": pool(), "backend": "numpy"}
    if not {"block_tables", "kv_lens"} & set(arguments):
        good |= {name: int32(value) for name, value in CSR.items()}
    return paged_decode(**(good | arguments))


def call_blocks(**arguments):
    return call(**({name: int32(value) for name, value in BLOCKS.items()} | arguments))


def test_the_good_calls_are_good():
    assert call().shape == call_blocks().shape == (B, HQ, D)


@each({
    "indptr that decreases": Bad(ValueError, r"^indptr: ", "do not decrease", "got 2 after 3", "request 1",
                                 indptr=int32([0, 3, 2, 5])),
    "indptr below 0": Bad(ValueError, r"^indptr: ", ">= 0", "got -1 at 0", indptr=int32([-1, 3, 3, 5])),
    "indptr too long": Bad(ValueError, r"^indptr: ", "at most the 5 entries of indices", "got 6 at 3",
                           indptr=int32([0, 3, 3, 6])),
    "indptr of another batch": Bad(ValueError, r"^indptr: ", r"\[batch \+ 1\] = \[4\]", r"got \[5\]",
                                   indptr=int32([0, 3, 3, 5, 5])),
    "last_page_len of another batch": Bad(ValueError, r"^indptr: ", r"\[3\]", r"got \[4\]",
                                          last_page_len=int32([8, 1])),
    "q of another batch": Bad(ValueError, r"^q: ", "batch = 3 as in last_page_len", "got 2",
                              q=np.ones((2, HQ, D), F16)),
    "last_page_len 0": Bad(ValueError, r"^last_page_len: ", "from 1 to page_size = 16", "got 0 for request 2",
                           last_page_len=int32([8, 0, 0])),
    "last_page_len too large": Bad(ValueError, r"^last_page_len: ", "from 1 to page_size = 16", "got 17 for request 0",
                                   last_page_len=int32([17, 0, 1])),
    "last_page_len below 0": Bad(ValueError, r"^last_page_len: ", "got -4 for request 2",
                                 last_page_len=int32([8, 0, -4])),
    "a page that does not exist": Bad(ValueError, r"^indices: ", "from 0 to num_pages - 1 = 9", "got 10 as page 1",
                                      "of request 2", indices=int32([7, 0, 3, 9, 10])),
    "a page below 0": Bad(ValueError, r"^indices: ", "got -1 as page 0 of request 0", indices=int32([-1, 0, 3, 9, 1])),
    "indices with two axes": Bad(ValueError, r"^indices: ", "1 axis", r"\[1, 5\]", indices=int32([[7, 0, 3, 9, 1]])),
    "indices of floats": Bad(TypeError, r"^indices: ", "int32", "got float64", indices=np.zeros(5)),
    "indices beyond int32": Bad(ValueError, r"^indices: ", "int32 holds", indices=np.array([2**40, 0, 3, 9, 1])),
    "indptr of bools": Bad(TypeError, r"^indptr: ", "got bool", indptr=np.zeros(4, bool)),
    "indices that are none": Bad(TypeError, r"^indices: ", "expected an array", indices=object()),
    "no last_page_len": Bad(TypeError, r"^page table: ", "indptr, indices and last_page_len", "got indptr, indices$",
                            last_page_len=None),
    "nothing": Bad(TypeError, r"^page table: ", "got nothing", indptr=None, indices=None, last_page_len=None),
    "too many rows": Bad(ValueError, r"^indptr: ", "at most 2130706432 rows", "for request 0",
                         indptr=int32([0, 4, 4, 5]), k_cache=LONG_PAGES, v_cache=LONG_PAGES),
})  # fmt: skip
def test_tables(bad):
    bad.check(call)


@each({
    "batch": Bad(ValueError, r"^block_tables: ", "batch = 3", r"got \[2, 3\]",
                 block_tables=int32([[7, 0, 3], [0, 0, 0]])),
    "axes": Bad(ValueError, r"^block_tables: ", "2 axes", r"got shape \[3\]", block_tables=int32([7, 0, 3])),
    "kv_lens too long": Bad(ValueError, r"^kv_lens: ", "from 0 to max_pages \\* page_size = 48", "got 49 for request 2",
                            kv_lens=int32([40, 0, 49])),
    "kv_lens below 0": Bad(ValueError, r"^kv_lens: ", "got -1 for request 1", kv_lens=int32([40, -1, 17])),
    "a page that does not exist": Bad(ValueError, r"^block_tables: ", "got 10 as page 1 of request 2",
                                      block_tables=int32([[7, 0, 3], [0, 0, 0], [9, 10, 0]])),
    "no kv_lens": Bad(TypeError, r"^page table: ", "got block_tables$", kv_lens=None),
    "both forms": Bad(TypeError, r"^page table: ", "got indptr, indices, last_page_len, block_tables, kv_lens",
                      **{name: int32(value) for name, value in CSR.items()}),
})  # fmt: skip
def test_block_tables(bad):
    bad.check(call_blocks)


def test_entries_that_nobody_uses_may_be_anything():
    good = call()
    bad = 2**31 - 1
    tables = {"indptr": int32([2, 5, 5, 7]), "indices": int32([bad, -bad, 7, 0, 3, 9, 1, bad]),
              "last_page_len": int32([8, bad, 1])}  # fmt: skip
    np.testing.assert_array_equal(call(**tables), good)
    blocks = int32([[7, 0, 3, bad], [bad, bad, bad, -bad], [9, 1, bad, bad]])
    np.testing.assert_array_equal(call_blocks(block_tables=blocks), good)


@each({
    "one array of four axes": Bad(ValueError, r"^k_cache: ", "5 axes", "pair", "got one of shape", v_cache=None),
    "one array of three on the second axis": Bad(ValueError, r"^k_cache: ", r"\[num_pages, 2", r"\[10, 3, 16, 3, 32\]",
                                                 k_cache=pool(PAGES, 3, PAGE, HKV, D), v_cache=None),
    "K of five axes": Bad(ValueError, r"^k_cache: ", "4 axes", "got 5", k_cache=pool(PAGES, 2, PAGE, HKV, D)),
    "V of other pages": Bad(ValueError, r"^v_cache: ", "num_pages = 10 as in k_cache", "got 9",
                            v_cache=pool(9, PAGE, HKV, D)),
    "V of other page size": Bad(ValueError, r"^v_cache: ", "page_size = 16", "got 8", v_cache=pool(PAGES, 8, HKV, D)),
    "V of other heads": Bad(ValueError, r"^v_cache: ", "num_kv_heads = 3", "got 2", v_cache=pool(PAGES, PAGE, 2, D)),
    "head_dim": Bad(ValueError, r"^k_cache: ", "head_dim = 32 as in q", "got 48", k_cache=pool(PAGES, PAGE, HKV, 48),
                    v_cache=pool(PAGES, PAGE, HKV, 48)),
    "pages without rows": Bad(ValueError, r"^k_cache: ", "at least one row", k_cache=pool(PAGES, 0, HKV, D),
                              v_cache=pool(PAGES, 0, HKV, D)),
    "group": Bad(ValueError, r"^q: ", "multiple of num_kv_heads = 3", "got 7", q=np.ones((B, 7, D), F16)),
    "NHD given as HND": Bad(ValueError, r"^last_page_len: |^q: ", kv_layout="HND"),
    "layout": Bad(ValueError, r"^kv_layout: ", kv_layout="DNH"),
    "q dtype": Bad(TypeError, r"^q: ", "got float32", q=np.ones((B, HQ, D), np.float32)),
    "cache dtype": Bad(TypeError, r"^k_cache: ", "got float32", k_cache=pool(dtype=np.float32)),
    "last axis": Bad(ValueError, r"^v_cache: ", "contiguous last axis",
                     v_cache=pool(PAGES, PAGE, HKV, 2 * D)[..., ::2]),
    "kv_format": Bad(ValueError, "kv_format", kv_format="fp4"),
    "mode": Bad(NotImplementedError, "pos_encoding_mode", pos_encoding_mode="ROPE_LLAMA"),
    "soft cap": Bad(ValueError, "logits_soft_cap", "got -1", logits_soft_cap=-1.0),
    "window": Bad(TypeError, "window_left", window_left=1.5),
    "lse base": Bad(ValueError, "lse_base", lse_base="10"),
    "backend": Bad(ValueError, "backend", backend="opencl"),
    "scale": Bad(ValueError, r"^k_scale: ", r"\[num_kv_heads\] = \[3\]", k_scale=np.ones(2, np.float32)),
    "out": Bad(ValueError, r"^out: ", "shape", out=np.ones((B, HQ, 16), F16)),
    "another library": Bad(TypeError, "k_cache", "expected an array", k_cache="cache"),
})  # fmt: skip
def test_caches_and_options(bad):
    bad.check(call)


def test_libraries_must_agree():
    torch = pytest.importorskip("torch")
    moved = torch.from_numpy(pool())
    for arguments, said in (
        ({"v_cache": moved}, "^k_cache: expected K and V as arrays of one library"),
        ({"k_cache": moved, "v_cache": moved}, "^k_cache: expected an array of numpy like q, got one of torch"),
    ):
        with pytest.raises(TypeError, match=said):
            call(**arguments)
    # Page tables on the host may be of any.
    tables = {name: torch.tensor(value, dtype=torch.int32) for name, value in CSR.items()}
    np.testing.assert_array_equal(call(**tables), call())


# Pools of more than 2^31 units


def test_units_of_a_pool():
    sizes = PagedSizes(1000, 16, 8, 128, (), ())
    for strides, want in (
        ((16 * 1024, 1024, 128), (1024, 16, 1)),  # NHD
        ((16384, 128, 2048), (128, 128, 1)),  # HND
        ((2 * 16384, 1024, 128), (1024, 32, 1)),  # one array
        ((-16384, -1024, 128), (1024, -16, -1)),
        ((16 * 1056, 1056, 128), (1056, 16, 1)),
        ((0, 0, 128), (16, 0, 0)),
        ((1 << 24, 0, 128), (1 << 20, 16, 0)),
    ):
        assert row_units(strides, sizes, "k") == want
        unit, page, row = want
        assert (page * unit, row * unit) == strides[:2]


@pytest.mark.parametrize("strides", [(2**31, 128, 1), (2**40 + 16, 128, 1), (-(2**31), 128, 1)])
def test_pools_too_large_are_refused(strides):
    with pytest.raises(
        ValueError, match=r"^k: expected a pool whose rows are less than 2\^31 steps of \d+ bytes apart"
    ):
        row_units(strides, PagedSizes(2**20, 16, 8, 128, (), ()), "k")
    # Each row at a distance that 32 bits do not hold in bytes is fine.
    assert row_units((2**31, 1024, 1), PagedSizes(100, 16, 8, 128, (), ()), "k")[0] == 1024


# Wrappers

SIZES = {"num_qo_heads": HQ, "num_kv_heads": HKV, "head_dim": D, "page_size": PAGE}


def plan(wrapper=None, **arguments):
    wrapper = wrapper or BatchDecodeWithPagedKVCacheWrapper(None, backend="numpy")
    good = {name: int32(value) for name, value in CSR.items()} | SIZES | {"data_type": "e4m3"}
    wrapper.plan(**(good | arguments))
    return wrapper


@each({
    "no heads": Bad(ValueError, r"^num_qo_heads: ", "positive integer", "got 0", num_qo_heads=0),
    "heads": Bad(ValueError, "multiple of num_kv_heads = 4", "got 6", num_kv_heads=4),
    "head_dim": Bad(ValueError, "multiple of 16", "got 40", head_dim=40),
    "page_size": Bad(ValueError, r"^page_size: ", "positive integer", "got 0", page_size=0),
    "page_size of floats": Bad(ValueError, r"^page_size: ", "got 16.0", page_size=16.0),
    "a smaller page": Bad(ValueError, r"^last_page_len: ", "page_size = 4", "got 8 for request 0", page_size=4),
    "mode": Bad(NotImplementedError, "pos_encoding_mode", pos_encoding_mode="ALIBI"),
    "soft cap": Bad(ValueError, "logits_soft_cap", logits_soft_cap=-2.0),
    "window": Bad(TypeError, "window_left", window_left="all"),
    "sm_scale": Bad(TypeError, "sm_scale", sm_scale="1"),
    "data_type": Bad(ValueError, r"^data_type: ", "got float32", data_type="float32"),
    "data types": Bad(ValueError, r"^data_type: ", "pair", data_type=("e4m3", "e4m3", "e4m3")),
    "q_data_type": Bad(TypeError, r"^q_data_type: ", "got float8_e4m3fn", q_data_type="e4m3"),
    "indptr": Bad(ValueError, r"^indptr: ", "do not decrease", indptr=int32([0, 3, 2, 5])),
    "no table": Bad(TypeError, r"^page table: ", indices=None),
})  # fmt: skip
def test_plan(bad):
    bad.check(plan)


def test_run_without_a_plan():
    wrapper = BatchDecodeWithPagedKVCacheWrapper(None)
    for run in (wrapper.run, wrapper.run_return_lse, wrapper.forward, wrapper.forward_return_lse):
        with pytest.raises(RuntimeError, match=r"^BatchDecodeWithPagedKVCacheWrapper: call plan\(\) before run\(\)"):
            run(np.ones((B, HQ, D), F16), (pool(), pool()))


@each({
    "batch": Bad(ValueError, r"^q: ", "batch = 3 as in last_page_len", "got 2", q=np.ones((2, HQ, D), F16)),
    "query heads": Bad(ValueError, r"^q: ", r"\[\.\.\., 6, 32\] as planned", r"got \[3, 9, 32\]",
                       q=np.ones((B, 9, D), F16)),
    "head_dim": Bad(ValueError, r"^q: ", "as planned", q=np.ones((B, HQ, 64), F16)),
    "q type": Bad(TypeError, r"^q: ", "expected float16 as planned", q_data_type="float16",
                  q=np.ones((B, HQ, D), np.float32)),
    "page_size": Bad(ValueError, r"^paged_kv_cache: ", r"\[\.\.\., 16, 3, 32\] as planned", r"got \[10, 8, 3, 32\]",
                     cache=(pool(PAGES, 8, HKV, D),) * 2),
    "cache heads": Bad(ValueError, r"^paged_kv_cache: ", "as planned", cache=pool(PAGES, 2, PAGE, 2, D)),
    "cache type": Bad(TypeError, r"^paged_kv_cache: ", r"expected float8_e4m3fn as planned \(data_type\), got float16",
                      cache=pool(PAGES, 2, PAGE, HKV, D, dtype=F16)),
    "V type": Bad(TypeError, r"^paged_kv_cache: ", "got float16", cache=(pool(), pool(dtype=F16))),
    "too few pages": Bad(ValueError, r"^indices: ", "num_pages - 1 = 8", "got 9 as page 0 of request 2",
                         cache=pool(9, 2, PAGE, HKV, D)),
    "three arrays": Bad(ValueError, r"^paged_kv_cache: ", "pair", "got 3 arrays", cache=(pool(), pool(), pool())),
    "one array without K and V": Bad(ValueError, r"^paged_kv_cache: ", "5 axes", cache=pool()),
    "no array": Bad(TypeError, r"^paged_kv_cache: ", cache=None),
})  # fmt: skip
def test_a_plan_used_with_other_arrays(bad):
    def run(q=None, cache=None, **planned):
        q = np.ones((B, HQ, D), F16) if q is None else q
        if "cache" not in bad.arguments:
            cache = pool(), pool()
        plan(**planned).run(q, cache)

    bad.check(run)


def test_a_failed_plan_leaves_the_one_before():
    wrapper = plan()
    with pytest.raises(ValueError, match=r"^indptr"):
        plan(wrapper, indptr=int32([0, 3, 2, 5]))
    assert wrapper.run(np.ones((B, HQ, D), F16), (pool(), pool())).shape == (B, HQ, D)


def buffers(batch=B, room=8):
    return [np.zeros(n, np.int32) for n in (batch + 1, room, batch)]


def test_buffers_of_a_graph():
    names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
    for at, name in enumerate(names):
        for value, error in (
            (None, ValueError), (np.zeros(4, np.int64), TypeError), (np.zeros(8, np.int32)[::2], TypeError),
            (np.zeros((2, 2), np.int32), ValueError), ([0, 1, 2, 3], TypeError),
        ):  # fmt: skip
            given = buffers()
            given[at] = value
            with pytest.raises(error, match=rf"^{name}: "):
                BatchDecodeWithPagedKVCacheWrapper(None, "NHD", True, False, *given)
    read_only = buffers()
    read_only[1].flags.writeable = False
    with pytest.raises(TypeError, match=r"^paged_kv_indices_buffer: "):
        CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, *read_only)
    with pytest.raises(ValueError, match=r"^paged_kv_indptr_buffer: expected \[batch \+ 1\] = \[3\]"):
        CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, *buffers()[:2], np.zeros(2, np.int32))


def test_buffers_of_jax_cannot_be_written():
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(TypeError, match=r"^paged_kv_indptr_buffer: jax arrays cannot be written"):
        CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, *(jnp.asarray(buffer) for buffer in buffers()))


def test_plans_that_a_graphs_buffers_do_not_hold():
    def graph(**sizes):
        return CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, *buffers(**sizes), backend="numpy")

    with pytest.raises(
        ValueError, match=r"^last_page_len: expected batch = 2 as in paged_kv_last_page_len_buffer, got 3"
    ):
        plan(graph(batch=2))
    with pytest.raises(ValueError, match=r"^indices: expected at most the 4 entries of paged_kv_indices_buffer, got 5"):
        plan(graph(room=4))
    none = dict.fromkeys(CSR)
    with pytest.raises(ValueError, match=r"^block_tables: "):
        plan(graph(), **none, **{name: int32(value) for name, value in BLOCKS.items()})
    assert plan(graph()).run(np.ones((B, HQ, D), F16), (pool(), pool())).shape == (B, HQ, D)


@pytest.mark.parametrize("layout", ["nhd", None, 3])
def test_layouts(layout):
    with pytest.raises(ValueError, match=r"^kv_layout: "):
        BatchDecodeWithPagedKVCacheWrapper(None, layout)


def test_workspaces_that_are_none():
    with pytest.raises(TypeError, match=r"^float_workspace_buffer: "):
        BatchDecodeWithPagedKVCacheWrapper("128 MB")
    wrapper = plan()
    with pytest.raises(TypeError, match=r"^float_workspace_buffer: "):
        wrapper.reset_workspace_buffer(7)
    wrapper.reset_workspace_buffer(np.zeros(10, np.uint8), np.zeros(10, np.uint8))


@each({
    "batch": Bad(ValueError, r"^batch_size: ", "got 0", batch_size=0),
    "heads": Bad(ValueError, "multiple of num_kv_heads = 4", num_kv_heads=4),
    "max_kv_len": Bad(ValueError, r"^max_kv_len: ", "got -1", max_kv_len=-1),
    "data_type": Bad(ValueError, r"^data_type: ", data_type="int4"),
})  # fmt: skip
def test_workspace_size(bad):
    def size(**arguments):
        h100 = DeviceInfo("H100", 90, 132, 232448)
        good = {"batch_size": 4, "num_qo_heads": HQ, "num_kv_heads": HKV, "head_dim": D, "device": h100}
        return cupy_fp8kv.workspace_size(**(good | arguments))

    assert size() > 0
    bad.check(size)


@pytest.mark.skipif(has_gpu(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu():
    for function in (call, call_blocks):
        with pytest.raises(RuntimeError, match=r"^backend: cuda was asked for"):
            function(backend="cuda")
    with pytest.raises(RuntimeError, match=r"^backend: "):
        plan(BatchDecodeWithPagedKVCacheWrapper(None, backend="cuda")).run(np.ones((B, HQ, D), F16), (pool(), pool()))
    with pytest.raises(RuntimeError, match="the CUDA backend cannot run"):
        cupy_fp8kv.workspace_size(4, HQ, HKV, D)


def positional(function):
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [name for name, p in inspect.signature(function).parameters.items() if p.kind == kinds]
    return ", ".join(name for name in found if name != "self")


def test_positional_order_is_flashinfers():
    wrapper = BatchDecodeWithPagedKVCacheWrapper
    assert positional(wrapper) == (
        "float_workspace_buffer, kv_layout, use_cuda_graph, use_tensor_cores, paged_kv_indptr_buffer, "
        "paged_kv_indices_buffer, paged_kv_last_page_len_buffer"
    )
    assert positional(wrapper.plan) == (
        "indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode, "
        "window_left, logits_soft_cap, data_type, q_data_type, sm_scale, rope_scale, rope_theta"
    )
    assert wrapper.begin_forward is wrapper.plan
    assert re.match("q, paged_kv_cache, q_scale, k_scale, v_scale", positional(wrapper.run))
    assert positional(wrapper.run_return_lse) == "q, paged_kv_cache, q_scale, k_scale, v_scale"
    forward = (
        "q, paged_kv_cache, pos_encoding_mode, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale, "
        "rope_scale, rope_theta"
    )
    assert positional(wrapper.forward) == positional(wrapper.forward_return_lse) == forward
    assert positional(CUDAGraphBatchDecodeWithPagedKVCacheWrapper) == (
        "workspace_buffer, indptr_buffer, indices_buffer, last_page_len_buffer, kv_layout, use_tensor_cores"
    )
    assert positional(wrapper.reset_workspace_buffer) == "float_workspace_buffer, int_workspace_buffer"
    assert positional(paged_decode).startswith("q, k_cache, v_cache, indptr, indices, last_page_len, kv_layout")
