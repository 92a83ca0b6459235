"""Shared parts of contexts: the same as attention over each context on its own."""

import numpy as np
import pytest
from cascades import SCALES, TREES, D, Tree, prefix_of
from emulator.checks import move
from test_append import to_host
from test_arrays import TO

import cupy_fp8kv
from cupy_fp8kv import BatchDecodeWithSharedPrefixPagedKVCacheWrapper as SharedPrefix
from cupy_fp8kv import MultiLevelCascadeAttentionWrapper as Cascade

EACH_TREE = pytest.mark.parametrize("name", TREES)
LAYOUTS = pytest.mark.parametrize("layout", ["NHD", "HND"])


def tree_of(name, layout="NHD", heads=2, group=3, **options):
    return Tree(*TREES[name], heads, group, layout=layout, **options)


@EACH_TREE
@LAYOUTS
@pytest.mark.parametrize("group", [1, 3, 40])
def test_numpy(name, layout, group):
    tree = tree_of(name, layout, group=group)
    wrapper = Cascade(len(tree.tables), None, layout, backend="numpy")
    tree.plan(wrapper)
    tree.check(*wrapper.run(tree.q, tree.cache, **SCALES, return_lse=True), **SCALES)


@EACH_TREE
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_every_library(name, library):
    tree = tree_of(name)
    wrapper = Cascade(len(tree.tables), backend="numpy")
    tree.plan(wrapper, TO[library])
    out, lse = wrapper.run(TO[library](tree.q), TO[library](tree.cache), **SCALES, return_lse=True)
    host = to_host if library == "torch" else np.asarray
    tree.check(host(out), host(lse), **SCALES)


@pytest.mark.parametrize("name", ["a prefix", "no prefix"])
@LAYOUTS
def test_shared_prefix(name, layout):
    tree = tree_of(name, layout)
    wrapper = SharedPrefix(None, layout, backend="numpy")
    wrapper.begin_forward(*tree.tables[1][1:], tree.heads * tree.group, tree.heads, D, tree.page_size)
    out, lse = wrapper.forward(tree.q, *prefix_of(tree), tree.cache, **SCALES, return_lse=True)
    tree.check(out, lse, **SCALES)
    assert (wrapper.run(tree.q, *prefix_of(tree), tree.cache, **SCALES) == out).all()


def test_options():
    tree = tree_of("three levels")
    options = {"logits_soft_cap": 5.0, "sm_scale": 0.2}
    wrapper = Cascade(3, backend="numpy")
    tree.plan(wrapper, **options)
    pair = tree.cache[:, 0], tree.cache[:, 1]
    tree.check(*wrapper.run(tree.q, pair, q_scale=0.5, **SCALES, return_lse=True), q_scale=0.5, **SCALES, **options)


# Over the kernels


@EACH_TREE
@LAYOUTS
def test_kernels(emulate, name, layout):
    tree = tree_of(name, layout)
    wrapper = Cascade(len(tree.tables), None, layout)
    tree.plan(wrapper)
    out, lse = wrapper.run(move(tree.q), move(tree.cache), **SCALES, return_lse=True)
    tree.check(np.asarray(out), np.asarray(lse), **SCALES)


def test_kernels_on_a_shared_prefix(emulate):
    tree = tree_of("a prefix", group=30)
    wrapper = SharedPrefix()
    wrapper.plan(*map(move, tree.tables[1][1:]), tree.heads * tree.group, tree.heads, D, tree.page_size)
    prefix = map(move, prefix_of(tree))
    out, lse = wrapper.run(move(tree.q), *prefix, move(tree.cache), **SCALES, return_lse=True)
    tree.check(np.asarray(out), np.asarray(lse), **SCALES)


def test_a_prefix_is_read_by_few():
    """64 requests of 4 query heads a cache head: 16 times 16 columns, not 64 times 4."""
    tree = Tree([[64], [1] * 64], [[5], [1] * 64], 1, 4)
    wrapper = Cascade(2, backend="numpy")
    tree.plan(wrapper)
    levels = wrapper._plan[0]
    shared, alone = (level._tables for level in levels)
    assert (shared.batch, shared.queries, shared.q_rows) == (16, 4, 64)
    assert (alone.batch, alone.queries, alone.q_indptr) == (64, 1, None)
    tree.check(*wrapper.run(tree.q, tree.cache, **SCALES, return_lse=True), **SCALES)


# What is refused


def test_errors():
    tree = tree_of("a prefix")
    good = [list(column) for column in zip(*tree.tables, strict=True)]
    sizes = (6, 2, D, 16)

    def refused(error, message, column=0, level=0, value=None, sizes=sizes, tables=None):
        changed = [list(x) for x in (tables or good)]
        if value is not None:
            changed[column][level] = np.array(value, np.int32)
        with pytest.raises(error, match=message):
            Cascade(2).plan(*changed, *sizes)

    refused(ValueError, r"^qo_indptr_arr\[0\]: .*\[segments \+ 1\] = \[2\]", value=[0, 1, 5])
    refused(ValueError, r"^qo_indptr_arr\[1\]: .*5 as in the levels before", level=1, value=[0, 1, 2, 3, 4, 6])
    refused(ValueError, r"^qo_indptr_arr\[0\]: .*from 0", value=[1, 5])
    refused(NotImplementedError, r"^qo_indptr_arr\[1\]: .*one query token", level=1, value=[0, 2, 2, 3, 4, 5])
    refused(ValueError, r"^paged_kv_last_page_len\[0\]: .*1 to page_size = 16", 3, value=[17])
    refused(ValueError, r"^paged_kv_indptr_arr\[0\]: .*do not decrease", 1, value=[5, 1])
    refused(ValueError, r"^q: expected num_qo_heads", sizes=(7, 2, D, 16))
    refused(ValueError, r"^paged_kv_indices_arr: expected a list of 2 tables", tables=[*good[:2], good[2][:1], good[3]])
    for call in (lambda: Cascade(0), lambda: Cascade("2")):
        with pytest.raises(ValueError, match=r"^num_levels: expected a positive integer"):
            call()
    with pytest.raises(RuntimeError, match=r"^run: expected a plan"):
        Cascade(2).run(tree.q, tree.cache)
    with pytest.raises(RuntimeError, match=r"^run: expected a plan"):
        SharedPrefix().run(tree.q, *prefix_of(tree), tree.cache)
    wrapper = Cascade(2, backend="numpy")
    tree.plan(wrapper)
    with pytest.raises(ValueError, match=r"^q: expected shape \[5, 6, 64\] as planned, got \[4, 6, 64\]"):
        wrapper.run(tree.q[:4], tree.cache)
    wrapper.end_forward()
    with pytest.raises(RuntimeError, match=r"^run: expected a plan"):
        wrapper.run(tree.q, tree.cache)
    shared = SharedPrefix(backend="numpy")
    shared.plan(*tree.tables[1][1:], 6, 2, D, 16)
    with pytest.raises(ValueError, match=r"^k_shared: expected 3 axes"):
        shared.run(tree.q, tree.cache, tree.cache, tree.cache)
    assert "MultiLevelCascadeAttentionWrapper" in cupy_fp8kv.__all__


def tree_level(tree):
    """The first level of a tree, planned."""
    wrapper = Cascade(len(tree.tables), backend="numpy")
    tree.plan(wrapper)
    return wrapper._plan[0][0]


def test_a_plan_keeps_no_tables_of_the_caller():
    """A server writes the next step's tables over those of a plan that has not run yet."""
    tree = Tree(*TREES["a prefix"], 2, 4)
    wrapper = Cascade(len(tree.tables), backend="numpy")
    tree.plan(wrapper)
    for tables in tree.tables:
        for table in tables:
            table[...] = 0
    tree.check(*wrapper.run(tree.q, tree.cache, **SCALES, return_lse=True), **SCALES)


def test_wide_caches_of_the_largest_head_dim_have_one_row_of_q_a_request():
    """Their kernels for several rows would not fit the registers of every architecture."""
    tree = Tree(*TREES["a prefix"], 2, 4)
    level = tree_level(tree)
    for head_dim, dtype, expected in ((256, np.float16, True), (240, np.float16, False), (256, np.uint8, False)):
        q = np.ones((tree.batch, 8, head_dim), np.float16)
        cache = np.zeros((tree.cache.shape[0], 2, 16, 2, head_dim), dtype)
        level._alone = None
        v, s = level.attend(q, cache, {"backend": "numpy"}, ("paged_kv_cache",) * 2)
        assert (level._alone is not None) is expected and v.shape == q.shape
        np.testing.assert_allclose(s, np.log2(70), rtol=1e-5)
