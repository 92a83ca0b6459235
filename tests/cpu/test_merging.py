"""Merging states: the NumPy backend and every library against a weighted mean, the kernel's text against the same."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from merges import DTYPES, check, merged, specials, states
from test_arrays import LIBRARIES, TO, Foreign, bits, kind
from test_errors import Bad, aligned, each

import cupy_fp8kv
from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import KV_FORMATS

merge_state, merge_states = cupy_fp8kv.merge_state, cupy_fp8kv.merge_states
merge_state_in_place = cupy_fp8kv.merge_state_in_place
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
BASES = pytest.mark.parametrize("base", ["2", "e"])

SHAPES = [
    (3, 2, 4, 64), (1, 1, 1, 16), (5, 7, 3, 128), (2, 40, 2, 96), (1, 300, 1, 16), (2, 3, 5, 256), (3, 5, 1, 1024),
    (33, 4, 8, 32), (0, 3, 2, 16), (3, 0, 2, 16), (2, 65, 1, 512),
]  # fmt: skip
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


# The definition


@BASES
def test_merging_is_attention_over_all_rows(base):
    """Attention over parts, merged, is attention over the whole."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 6, 32)).astype(np.float16)
    k, v = rng.standard_normal((2, 2, 50, 3, 32)).astype(np.float16)
    f16 = KV_FORMATS["f16"]
    options = {"k_format": f16, "v_format": f16, "sm_scale": 0.5, "lse_base": base, "compute_dtype": np.float64}
    cuts = [0, 1, 1, 17, 50]
    parts = [reference.attention(q, k[:, a:b], v[:, a:b], **options) for a, b in itertools.pairwise(cuts)]
    got = reference.merge_states(
        *(np.stack(x, axis=1) for x in zip(*parts, strict=True)), lse_base=base, compute_dtype=np.float64
    )
    for a, b in zip(got, reference.attention(q, k, v, **options), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@BASES
@EACH_DTYPE
@EACH_SHAPE
def test_numpy(shape, dtype, base):
    v, s = states(shape, dtype)
    check(*merge_states(v, s, lse_base=base, backend="numpy"), *merged(v, s, base), dtype)


def test_specials():
    v, s = specials()
    check(*merge_states(v, s, backend="numpy"), *merged(v, s), "float32")


def test_merging_is_associative_and_the_empty_state_is_neutral():
    v, s = states((6, 3, 4, 32), "float32", seed=3)
    (a, b, c), (x, y, z) = v.swapaxes(0, 1), s.swapaxes(0, 1)
    left = merge_state(*merge_state(a, x, b, y), c, z)
    right = merge_state(a, x, *merge_state(b, y, c, z))
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    empty = np.full_like(a, np.nan), np.full_like(x, -np.inf)
    for got in (merge_state(a, x, *empty), merge_state(*empty, a, x)):
        there = np.isfinite(x)
        np.testing.assert_array_equal(got[0][there], a[there])
        np.testing.assert_allclose(got[1], x, rtol=1e-6)
        assert not got[0][~there].any()


# Libraries


@LIBRARIES
@EACH_DTYPE
def test_every_library(library, dtype):
    v, s = states((4, 2, 3, 48), dtype, seed=1)
    want = merge_states(v, s, backend="numpy")
    got = merge_states(TO[library](v), TO[library](s), backend="numpy")
    pairs = [TO[library](np.ascontiguousarray(part)) for i in range(2) for part in (v[:, i], s[:, i])]
    for results in (got, merge_state(*pairs)):
        assert [kind(array) for array in results] == [library] * 2
        assert [bits(array) for array in results] == [bits(array) for array in want]


def test_unknown_libraries():
    v, s = states((4, 2, 3, 48), "float16")
    got = merge_states(Foreign(v), Foreign(s))
    assert [bits(array) for array in got] == [bits(array) for array in merge_states(v, s)]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@EACH_DTYPE
@pytest.mark.parametrize("mask", [None, "bool", "uint8", "list"])
def test_in_place(library, dtype, mask):
    v, s = states((5, 2, 3, 48), dtype, seed=2)
    chosen = np.array([1, 0, 1, 1, 0], bool)
    given = [TO[library](np.ascontiguousarray(part)) for i in range(2) for part in (v[:, i], s[:, i])]
    kinds = {None: None, "bool": TO[library](chosen), "uint8": TO[library](chosen.astype(np.uint8)),
             "list": chosen.tolist()}  # fmt: skip
    before = [bits(array) for array in given[2:]]
    assert merge_state_in_place(*given, kinds[mask]) is None
    want = merge_state(*(np.ascontiguousarray(part) for i in range(2) for part in (v[:, i], s[:, i])))
    if mask:
        shapes = (5, 1, 1), (5, 1)
        want = [np.where(chosen.reshape(n), w, x[:, 0]) for n, w, x in zip(shapes, want, (v, s), strict=True)]
    assert [bits(array) for array in given[:2]] == [bits(array) for array in want]
    assert [bits(array) for array in given[2:]] == before


def test_in_place_in_a_view():
    v, s = states((5, 2, 3, 48), "float16", seed=2)
    wide = np.full((5, 4, 64), 7, np.float16)
    target = wide[:, 1:, 8:56]
    target[...] = v[:, 0]
    sums = s[:, 0].copy()
    merge_state_in_place(target, sums, v[:, 1], s[:, 1])
    want = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    assert bits(target) == bits(want[0]) and bits(sums) == bits(want[1])
    target[...] = 7
    assert (wide == 7).all()


# What is refused

N, H, D = 4, 3, 32


def values(*shape, dtype=np.float16):
    return np.zeros(shape or (N, H, D), dtype)


def sums(*shape, dtype=np.float32):
    return np.zeros(shape or (N, H), dtype)


def call(**arguments):
    return merge_state(**({"v_a": values(), "s_a": sums(), "v_b": values(), "s_b": sums()} | arguments))


def call_in_place(**arguments):
    good = {"v": values(), "s": sums(), "v_other": values(), "s_other": sums()}
    return merge_state_in_place(**(good | arguments))


def read_only(array):
    array.flags.writeable = False
    return array


@each({
    "rank of v": Bad(ValueError, r"^v_a: ", "3 axes", "got 2", v_a=values(N, D)),
    "rank of s": Bad(ValueError, r"^s_b: ", "2 axes", "got 1", s_b=sums(N)),
    "tokens": Bad(ValueError, r"^v_b: ", "n = 4 as in v_a", "got 5", v_b=values(5, H, D)),
    "heads of s": Bad(ValueError, r"^s_a: ", "num_heads = 3", "got 2", s_a=sums(N, 2)),
    "head_dim": Bad(ValueError, r"^v_b: ", "head_dim = 32", "got 48", v_b=values(N, H, 48)),
    "odd head_dim": Bad(ValueError, r"^v_a: ", "multiple of 16", "got 24", v_a=values(N, H, 24), v_b=values(N, H, 24)),
    "dtype": Bad(TypeError, r"^v_a: ", "float16, bfloat16 or float32", "got float64", v_a=values(dtype=np.float64)),
    "other dtype": Bad(TypeError, r"^v_b: ", "expected float16 like v_a, got float32", v_b=values(dtype=np.float32)),
    "dtype of s": Bad(TypeError, r"^s_a: ", "expected float32, got float16", s_a=sums(dtype=np.float16)),
    "no array": Bad(TypeError, r"^s_b: ", "expected an array", "got list", s_b=[[0.0]]),
    "base": Bad(ValueError, r"^lse_base: ", "'2' or 'e'", "got 2$", lse_base=2),
    "backend": Bad(ValueError, r"^backend: ", "'cuda', 'numpy' or None", backend="gpu"),
    "last axis": Bad(ValueError, r"^v_a: ", "contiguous last axis", v_a=values(N, H, 2 * D)[..., ::2]),
    "rows": Bad(ValueError, r"^v_a: ", "multiples of 16 bytes", v_a=aligned((N, H, D), np.float16, (320, 72, 2))),
})  # fmt: skip
def test_errors(bad):
    bad.check(call)


@each({
    "mask's shape": Bad(ValueError, r"^mask: ", r"\[n\] = \[4\]", r"got \[3\]", mask=np.ones(3, bool)),
    "mask's dtype": Bad(TypeError, r"^mask: ", "bool", "got int32", mask=np.ones(N, np.int32)),
    "read-only v": Bad(ValueError, r"^v: ", "can be written", "read-only", v=read_only(values())),
    "read-only s": Bad(ValueError, r"^s: ", "can be written", "read-only", s=read_only(sums())),
    "overlap": Bad(ValueError, r"^v: ", "do not overlap", v=aligned((N, H, D), np.float16, (0, 64, 2))),
})  # fmt: skip
def test_errors_in_place(bad):
    bad.check(call_in_place)


def test_jax_is_not_written():
    given = [TO["jax"](x) for x in (values(), sums(), values(), sums())] if pytest.importorskip("jax") else []
    with pytest.raises(TypeError, match=r"^v: jax arrays cannot be written"):
        merge_state_in_place(*given)


def test_libraries_are_not_mixed():
    with pytest.raises(TypeError, match=r"^s_b: expected an array of numpy like v_a, got one of torch"):
        call(s_b=TO["torch"](sums()))


def test_bfloat16_is_ml_dtypes():
    v, s = merge_states(*states((2, 2, 1, 16), "bfloat16"))
    assert v.dtype == ml_dtypes.bfloat16 and s.dtype == np.float32
