"""The cases of the GPU tests on the NumPy backend, in float32: proof that cases, poison and oracle fit together."""

import dataclasses

import cases
import numpy as np
import oracle
import pytest
from cases import FACTORS, Case, build, pairwise_cases, random_cases
from pairwise import pairs_of, pairwise

from cupy_fp8kv.formats import KV_FORMATS

#: Decode kernels that the GPU tests may compile for these cases, at about 0.4 s each on one core.
MOST_SPECIALISATIONS = 240


def is_nan(array):
    typed = array.view(KV_FORMATS["e4m3"].dtype) if array.dtype == np.uint8 else array
    return np.isnan(typed.astype(np.float32))


@pytest.mark.parametrize("case", [*pairwise_cases()[::2], *random_cases()[::3]], ids=str)
def test_case(case):
    arrays = build(case)
    before = [placed.base.copy() for placed in (arrays.q, arrays.k, arrays.v)]
    out, lse = arrays.call(backend="numpy")
    assert out.dtype == KV_FORMATS[case.q].dtype and lse.dtype == np.float32
    arrays.check(out, lse)
    for placed, base in zip((arrays.q, arrays.k, arrays.v), before, strict=True):
        np.testing.assert_array_equal(placed.base.view(np.uint8), base.view(np.uint8))
    if case.given_out:
        assert np.shares_memory(out, arrays.out.base)
        np.testing.assert_array_equal(arrays.out.view.reshape(out.shape), out)
        assert is_nan(arrays.out.base).sum() == arrays.out.base.size - out.size


@pytest.mark.parametrize("name", cases.SPLIT_CASES)
def test_split_cases_take_the_path_they_are_named_for(name):
    case, holds = cases.SPLIT_CASES[name]
    assert holds(case.plan()), case.plan()


def test_pairs_are_covered():
    covered = set()
    for case in pairwise(FACTORS):
        assert case.keys() == FACTORS.keys()
        covered |= pairs_of(case, list(FACTORS))
    names = list(FACTORS)
    every = {(a, x, b, y) for i, a in enumerate(names) for b in names[i + 1 :] for x in FACTORS[a] for y in FACTORS[b]}
    assert covered == every
    # No fewer cases are possible than the two longest factors have pairs; the greedy choice needs few more.
    assert 16 * 12 <= len(pairwise_cases()) <= 16 * 12 + 10


def test_cases_are_always_the_same():
    assert pairwise(FACTORS) == pairwise(FACTORS) != pairwise(FACTORS, seed=1)
    assert random_cases.__wrapped__() == random_cases()
    case = pairwise_cases()[7]
    for a, b in zip(build(case).host, build(case).host, strict=True):
        assert a.tobytes() == b.tobytes()


def test_cases_take_every_path():
    everything = [*pairwise_cases(), *random_cases(), *(case for case, _ in cases.SPLIT_CASES.values())]
    plans = [case.plan() for case in everything]
    assert len(cases.specialisations(everything)) <= MOST_SPECIALISATIONS
    for what, got, want in (
        ("splits", {min(plan.splits, 3) for plan in plans}, {1, 2, 3}),
        ("CTAs per SM", {plan.spec.ctas_per_sm for plan in plans}, {1, 2, 4}),
        ("column tiles", {plan.spec.column_tiles for plan in plans}, {1, 2}),
        ("column blocks", {plan.column_blocks for plan in plans} >= {1, 2, 3, 8, 16}, True),
        ("tiles ahead", {plan.spec.ahead for plan in plans} >= {0, 2}, True),
        ("q in two terms", {plan.spec.query_terms for plan in plans}, {1, 2}),
        ("subtiles", {plan.spec.subtiles for plan in plans} >= {1, 2}, True),
    ):
        assert got == want, what


def test_views_are_what_they_say():
    for view in FACTORS["view"]:
        for layout in FACTORS["layout"]:
            case = Case(view=view, layout=layout, batch=3, num_kv_heads=2, group=2, kv_len=20, given_out=True, q="bf16")
            arrays = build(case)
            k = arrays.k.view if layout == "NHD" else arrays.k.view.swapaxes(1, 2)
            np.testing.assert_array_equal(k, arrays.host[1])
            assert k.strides[-1] == 1 and all(stride % 16 == 0 for stride in k.strides[:-1])
            outside = arrays.k.base.size - k.size
            assert is_nan(arrays.k.base).sum() == outside and bool(outside) == (view == "padded")
            assert is_nan(arrays.out.base).all()
            assert arrays.q.view.flags.c_contiguous == (view == "contiguous")


def test_what_is_not_read_is_nan():
    case = Case(batch=3, kv_len=50, window_left=10, kv_lens="host", lens=(50, 7, 0))
    arrays = build(case)
    rows = is_nan(arrays.host[1]).all(axis=(2, 3))
    want = np.ones((3, 50), bool)
    want[0, 39:50] = want[1, :7] = False
    np.testing.assert_array_equal(rows, want)
    assert is_nan(arrays.host[1]).sum() == want.sum() * 128


def test_a_wrong_result_is_noticed():
    """The oracle sees what it is there for: a row too many, a row too few, a scale forgotten, another head's rows."""
    case = Case(batch=2, kv_len=60, group=2, num_kv_heads=2, kv_lens="host", lens=(59, 30), scales="number")
    arrays = build(case)
    good = arrays.call(backend="numpy")
    arrays.check(*good)
    for changes in (
        {"kv_lens": np.array([58, 30])}, {"kv_lens": np.array([59, 31])}, {"k_scale": None}, {"v_scale": None},
        {"window_left": 50}, {"logits_soft_cap": 3.0}, {"lse_base": "e"},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            arrays.check(*arrays.call(backend="numpy", **changes))
    swapped = dataclasses.replace(arrays, v=cases.Placed(arrays.v.view[:, :, ::-1]))
    with pytest.raises(AssertionError):
        arrays.check(*swapped.call(backend="numpy"))
    assert oracle.relative_l2(good[0], arrays.oracle()[0]) < 5e-4
