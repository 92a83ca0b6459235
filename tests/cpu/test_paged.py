"""Decode over pages on the NumPy backend: what it means, in every library, by the plain function and the wrappers."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from paged_cases import FACTORS, build_paged, paged, pairwise_paged, random_paged
from pairwise import pairs_of, pairwise
from test_arrays import LIBRARIES, TO, bits, kind

import cupy_fp8kv as flashinfer
from cupy_fp8kv import BatchDecodeWithPagedKVCacheWrapper, CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from cupy_fp8kv.backends import paged_reference, reference
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.page_tables import read_page_tables
from cupy_fp8kv.plan import DeviceInfo, plan_decode
from cupy_fp8kv.problem import Paging

H100 = DeviceInfo("H100", 90, 132, 232448)


# The definition


@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 17, 64, 256])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 64, 200])
def test_gathered_pages_are_the_rows(page_size, rows):
    rng = np.random.default_rng(rows)
    count = -(-rows // page_size)
    cache = rng.standard_normal((count + 4, page_size, 2, 16)).astype(np.float32)
    pages = rng.permutation(count + 4)[: count + 2]
    want = [cache[pages[r // page_size], r % page_size] for r in range(rows)]
    got = paged_reference.gather_rows(cache, pages, rows)
    np.testing.assert_array_equal(got, np.array(want).reshape(rows, 2, 16))


@pytest.mark.parametrize("compute_dtype", [np.float32, np.float64])
def test_pages_are_attention_over_their_rows_to_the_bit(compute_dtype):
    arrays = build_paged(paged(3, form="pair", k="f16", v="f16", group=2, num_kv_heads=2, batch=4, kv_len=50,
                               lens=(50, 0, 1, 33), shared=True, seed=4))  # fmt: skip
    q, k, v = arrays.padded.host
    tables = read_page_tables(3, **arrays.tables)
    options = {**arrays.padded.options, "compute_dtype": compute_dtype}
    want = reference.attention(q, k, v, **options)
    options.pop("kv_lens")
    pools = [pool.view for pool in arrays.pools]
    got = paged_reference.paged_attention(q, *pools, tables.pages_of_requests(), tables.kv_lens(), **options)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("case", [*pairwise_paged()[::2], *map(random_paged, range(40))], ids=str)
def test_cases_on_numpy(case):
    arrays = build_paged(case)
    before = [pool.base.copy() for pool in arrays.pools]
    tables = {name: value.copy() for name, value in arrays.tables.items()}
    out, lse = arrays.call(backend="numpy")
    assert out.dtype == KV_FORMATS[case.base.q].dtype and lse.dtype == np.float32
    arrays.check(out, lse)
    for pool, base in zip(arrays.pools, before, strict=True):
        np.testing.assert_array_equal(pool.base.view(np.uint8), base.view(np.uint8))
    for name, values in tables.items():
        np.testing.assert_array_equal(arrays.tables[name], values)


def test_pairs_are_covered():
    covered = set()
    for case in pairwise(FACTORS):
        covered |= pairs_of(case, list(FACTORS))
    names = list(FACTORS)
    every = {(a, x, b, y) for i, a in enumerate(names) for b in names[i + 1 :] for x in FACTORS[a] for y in FACTORS[b]}
    assert covered == every
    assert random_paged(3) == random_paged(3) != random_paged(4)


@pytest.mark.parametrize("view", FACTORS["view"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["one", "pair"])
@pytest.mark.parametrize("table", ["csr", "blocks"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
def test_every_form(page_size, table, form, layout, view):
    case = paged(page_size, form, table, layout=layout, view=view, group=3, num_kv_heads=2, batch=4, kv_len=70,
                 lens=(70, 0, 1, 64), head_dim=32, shared=True, seed=page_size)  # fmt: skip
    arrays = build_paged(case)
    arrays.check(*arrays.call(backend="numpy"))


def test_what_may_not_be_read_is_nan():
    """The cases mean something: a page, a row or an entry too many shows."""
    case = paged(16, group=2, batch=2, kv_len=40, lens=(40, 20), seed=1)
    arrays = build_paged(case)
    arrays.check(*arrays.call(backend="numpy"))
    tables = dict(arrays.tables)
    for changes in (
        {"last_page_len": np.array([9, 4], np.int32)}, {"last_page_len": np.array([8, 3], np.int32)},
        {"indptr": tables["indptr"] - [0, 1, 1]}, {"v_scale": 2.0}, {"window_left": 30}, {"lse_base": "e"},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            arrays.check(*arrays.call(backend="numpy", **changes))


# Libraries


@LIBRARIES
@pytest.mark.parametrize("form", ["one", "pair"])
@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize("table", ["csr", "blocks"])
def test_every_library(library, form, fmt, table):
    case = paged(16, form, table, k=fmt, v=fmt, group=2, num_kv_heads=2, batch=3, kv_len=40, lens=(40, 0, 17),
                 head_dim=32, seed=5)  # fmt: skip
    arrays = build_paged(case)
    want = arrays.call(backend="numpy")
    typed = dataclasses.replace(
        arrays, pools=tuple(dataclasses.replace(p, base=p.base.view(KV_FORMATS[fmt].dtype)) for p in arrays.pools)
    )
    got = typed.to(TO[library]).call(backend="numpy")
    for ours, theirs in zip(got, want, strict=True):
        assert kind(ours) == library and bits(ours) == bits(theirs)


@pytest.mark.parametrize("values", [list, tuple, lambda x: x.astype(np.int64), lambda x: x[::1]])
def test_tables_may_be_lists_or_any_integers(values):
    arrays = build_paged(paged(16, group=2, batch=2, kv_len=40, lens=(40, 20), seed=1))
    tables = {name: values(value) if values not in (list, tuple) else values(value.tolist())
              for name, value in arrays.tables.items()}  # fmt: skip
    arrays.check(*arrays.call(backend="numpy", **tables))


def test_an_empty_batch_and_an_empty_pool():
    q, pool = np.zeros((0, 4, 32), np.float16), np.zeros((3, 2, 16, 2, 32), np.uint8)
    none = np.zeros(0, np.int32)
    out = flashinfer.batch_decode_with_paged_kv_cache(q, pool, None, [0], none, none, backend="numpy")
    assert out.shape == (0, 4, 32)
    out, lse = flashinfer.batch_decode_with_paged_kv_cache(
        np.ones((2, 4, 32), np.float16), pool[:0], None, [0, 0, 0], none, [0, 0], backend="numpy", return_lse=True
    )
    assert not out.any() and np.isneginf(lse).all()


# Wrappers


def planned(wrapper, case, tables, **changes):
    base = case.base
    return wrapper.plan(
        tables["indptr"], tables["indices"], tables["last_page_len"], base.group * base.num_kv_heads,
        base.num_kv_heads, base.head_dim, case.page_size,
        **{"window_left": base.window_left, "logits_soft_cap": base.soft_cap, "data_type": (base.k, base.v),
           "q_data_type": base.q} | changes,
    )  # fmt: skip


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["one", "pair"])
def test_wrappers(library, layout, form, graph):
    case = paged(16, form, layout=layout, k="e5m2", v="e5m2", group=3, num_kv_heads=2, batch=3, kv_len=60, seed=2,
                 lens=(60, 0, 31), head_dim=64, window_left=40, soft_cap=20.0, scales="head", q="bf16")  # fmt: skip
    to = TO[library]
    space = to(np.zeros(1 << 12, np.uint8))
    if graph:
        buffers = [to(np.zeros(n, np.int32)) for n in (4, 40, 3)]
        wrapper = CUDAGraphBatchDecodeWithPagedKVCacheWrapper(space, *buffers, layout, backend="numpy")
    else:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(space, layout, backend="numpy")
    assert wrapper.is_cuda_graph_enabled == graph and wrapper.use_tensor_cores is False
    for lens in ((60, 0, 31), (1, 16, 48)):
        arrays = build_paged(case, lens)
        moved = arrays.to(to)
        planned(wrapper, case, moved.tables)
        scales = moved.padded.scales
        for _layer in range(2):
            out, lse = wrapper.run_return_lse(moved.padded.q.view, moved.cache, **scales)
            assert kind(out) == library == kind(lse)
            want = arrays.call(backend="numpy", lse_base="2")
            assert bits(out) == bits(want[0]) and bits(lse) == bits(want[1])
            assert bits(wrapper.run(moved.padded.q.view, moved.cache, **scales)) == bits(out)
        wrapper.end_forward()


def test_forward_has_options_of_its_own():
    case = paged(16, group=2, batch=2, kv_len=60, lens=(60, 31), window_left=10, soft_cap=5.0, seed=2)
    arrays = build_paged(dataclasses.replace(case, base=dataclasses.replace(case.base, window_left=-1, soft_cap=None)))
    wrapper = BatchDecodeWithPagedKVCacheWrapper(None, backend="numpy")
    wrapper.begin_forward(*arrays.tables.values(), 2, 1, 128, 16, "NONE", 10, 5.0, data_type="e4m3", sm_scale=0.5)
    q, cache = arrays.padded.q.view, arrays.cache
    planned_out = wrapper.run(q, cache)
    np.testing.assert_array_equal(
        planned_out, arrays.call(backend="numpy", window_left=10, logits_soft_cap=5.0, sm_scale=0.5)[0]
    )
    want = arrays.call(backend="numpy", q_scale=2.0, k_scale=0.5, v_scale=3.0)
    for got in (
        wrapper.forward_return_lse(q, cache, "NONE", 2.0, 0.5, 3.0),
        (wrapper.forward(q, cache, "NONE", 2.0, 0.5, 3.0), want[1]),
        wrapper.forward_return_lse(q, cache, q_scale=2.0, k_scale=0.5, v_scale=3.0, window_left=-1),
    ):
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    # The plan stays as it was.
    np.testing.assert_array_equal(wrapper.run(q, cache), planned_out)


@pytest.mark.parametrize(
    ("data_type", "fmt"),
    [
        ("float16", "f16"), ("fp16", "f16"), (np.float16, "f16"), (np.dtype(np.float16), "f16"), ("bfloat16", "bf16"),
        (ml_dtypes.bfloat16, "bf16"), ("e4m3", "e4m3"), ("float8_e4m3fn", "e4m3"), (ml_dtypes.float8_e4m3fn, "e4m3"),
        (ml_dtypes.float8_e5m2, "e5m2"), ("fp8_e5m2", "e5m2"), ("uint8", "e4m3"), (np.uint8, "e4m3"),
        (KV_FORMATS["e5m2"], "e5m2"),
    ],
    ids=str,
)  # fmt: skip
def test_data_types(data_type, fmt):
    case = paged(16, k=fmt, v=fmt, group=2, batch=2, kv_len=40, lens=(40, 20), seed=1)
    arrays = build_paged(case)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(None, backend="numpy")
    planned(wrapper, case, arrays.tables, data_type=data_type, q_data_type="float16")
    arrays.check(*wrapper.run_return_lse(arrays.padded.q.view, arrays.cache))


def test_data_types_of_torch():
    torch = pytest.importorskip("torch")
    for fmt, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16)):
        case = paged(16, k=fmt, v=fmt, q="bf16", group=2, batch=2, kv_len=40, lens=(40, 20), seed=1)
        arrays = build_paged(case)
        moved = arrays.to(TO["torch"])
        wrapper = BatchDecodeWithPagedKVCacheWrapper(None, backend="numpy")
        planned(wrapper, case, moved.tables, data_type=dtype, q_data_type=torch.bfloat16)
        cache = moved.cache.view(dtype)
        out, lse = wrapper.run_return_lse(moved.padded.q.view, cache)
        arrays.check(out.view(torch.int16).numpy().view(ml_dtypes.bfloat16), lse.numpy())


def test_q_data_type_follows_data_type():
    case = paged(16, k="bf16", v="bf16", q="f16", group=2, batch=2, kv_len=40, lens=(40, 20), seed=1)
    arrays = build_paged(case)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(None, backend="numpy")
    planned(wrapper, case, arrays.tables, q_data_type=None, data_type="bfloat16")
    with pytest.raises(TypeError, match=r"^q: expected bfloat16 as planned \(q_data_type\), got float16"):
        wrapper.run(arrays.padded.q.view, arrays.cache)


def test_the_plan_has_a_copy_of_tables_on_the_host():
    case = paged(16, group=2, batch=2, kv_len=40, lens=(40, 20), seed=1)
    arrays = build_paged(case)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(None, backend="numpy")
    given = {name: value.copy() for name, value in arrays.tables.items()}
    planned(wrapper, case, given)
    for value in given.values():
        value[:] = -1
    arrays.check(*wrapper.run_return_lse(arrays.padded.q.view, arrays.cache))


def test_block_tables_in_a_wrapper():
    case = paged(16, table="blocks", group=2, batch=2, kv_len=40, lens=(40, 20), seed=1)
    arrays = build_paged(case)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(None, backend="numpy")
    wrapper.plan(None, None, None, 2, 1, 128, 16, data_type="e4m3", **arrays.tables)
    out = np.empty_like(arrays.padded.q.view)
    result = wrapper.run(arrays.padded.q.view, arrays.cache, out=out)
    assert result is out
    np.testing.assert_array_equal(out, arrays.call(backend="numpy")[0])


# What a program for FlashInfer looks like


def test_a_program_for_flashinfer():
    torch = pytest.importorskip("torch")
    num_layers, num_qo_heads, num_kv_heads, head_dim, max_num_pages, page_size = 2, 8, 2, 64, 128, 16
    workspace_buffer = torch.empty(1 << 16, dtype=torch.uint8)
    decode_wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace_buffer, "NHD")
    batch_size = 7
    kv_page_indices = torch.arange(max_num_pages).int()
    kv_page_indptr = torch.tensor([0, 17, 29, 44, 48, 66, 100, 128], dtype=torch.int32)
    kv_last_page_len = torch.tensor([1, 7, 14, 4, 3, 1, 16], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    kv_cache_at_layer = [
        torch.randn(
            max_num_pages, 2, page_size, num_kv_heads, head_dim, dtype=torch.float32, generator=generator
        ).half()
        for _ in range(num_layers)
    ]
    decode_wrapper.plan(
        kv_page_indptr, kv_page_indices, kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", data_type=torch.float16,
    )  # fmt: skip
    for cache in kv_cache_at_layer:
        q = torch.randn(batch_size, num_qo_heads, head_dim, generator=generator).half()
        o = decode_wrapper.run(q, cache)
        for b in range(batch_size):
            length = (kv_page_indptr[b + 1] - kv_page_indptr[b] - 1) * page_size + kv_last_page_len[b]
            rows = cache[kv_page_indptr[b] : kv_page_indptr[b + 1]].float()
            k, v = (rows[:, i].reshape(-1, num_kv_heads, head_dim)[:length] for i in (0, 1))
            k, v = (x.repeat_interleave(num_qo_heads // num_kv_heads, 1) for x in (k, v))
            p = torch.softmax(torch.einsum("hd,lhd->hl", q[b].float(), k) / head_dim**0.5, -1)
            torch.testing.assert_close(o[b].float(), torch.einsum("hl,lhd->hd", p, v), rtol=2e-3, atol=2e-3)


# Planning


def test_kinds_of_calls_are_few_as_requests_grow():
    kinds = set()
    for n in range(1, 3000, 7):
        pages = -(-n // 16)
        tables = read_page_tables(16, [0, pages], np.arange(pages), [(n - 1) % 16 + 1])
        assert n <= tables.kind[0]
        kinds.add(tables.kind)
    assert len(kinds) < 10


@pytest.mark.parametrize("batch", [1, 3, 16, 40, 200])
@pytest.mark.parametrize("num_kv_heads", [1, 8, 32])
def test_the_workspace_for_any_length_is_enough_for_each(batch, num_kv_heads):
    most = flashinfer.workspace_size(batch, 4 * num_kv_heads, num_kv_heads, 128, data_type="e4m3", device=H100)
    needed = [
        flashinfer.workspace_size(
            batch, 4 * num_kv_heads, num_kv_heads, 128, data_type="e4m3", max_kv_len=n, device=H100
        )
        for n in (1, 100, 1000, 4096, 30_000, 1_000_000)
    ]
    assert needed == sorted(needed) and needed[-1] <= most


@pytest.mark.parametrize(
    ("page_size", "k_strides", "has_ring"),
    [
        (16, (16384, 1024, 128), True), (48, (49152, 1024, 128), True), (1, (1024, 1024, 128), False),
        (24, (24576, 1024, 128), True), (4, (4096, 1024, 128), False), (16, (-16384, 1024, 128), False),
        (256, (262144, 1024, 128), True), (256, (262144, 0, 128), False),
    ],
)  # fmt: skip
def test_which_pages_are_read_by_rings(page_size, k_strides, has_ring):
    """The copy engine takes whole boxes of a page, of 8 rows or more."""
    case = paged(16, group=4, num_kv_heads=8, batch=1, kv_len=32, lens=(32,))
    problem = dataclasses.replace(
        case.base.problem, kv_len=131072, batch=16, k_strides=k_strides, v_strides=(page_size * 1024, 1024, 128),
        paging=Paging(page_size, 4, 131072, 0),
    )  # fmt: skip
    plan = plan_decode(problem, H100)
    assert plan.spec.layout == "paged" and " paged" in str(plan.spec)
    assert (plan.spec.stages > 0) is (plan.shares > 0) is has_ring and plan.bounds is None
