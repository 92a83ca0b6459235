"""Merging states on the GPU, against a weighted mean in float64."""

import numpy as np
import pytest
from gpu_support import assert_same_bits, cp, poison_pool, spin, to_cupy, to_host, warm_spin
from merges import DTYPES, check, merged, specials, states

import cupy_fp8kv
from cupy_fp8kv import merge_state, merge_state_in_place, merge_states

pytestmark = pytest.mark.gpu

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
BASES = pytest.mark.parametrize("base", ["2", "e"])
SHAPES = [
    (3, 2, 4, 64), (1, 1, 1, 16), (5, 7, 3, 128), (2, 40, 2, 96), (1, 300, 1, 16), (2, 3, 5, 256), (3, 5, 1, 1024),
    (33, 4, 8, 32), (0, 3, 2, 16), (3, 0, 2, 16), (2, 65, 1, 512), (700, 2, 32, 128), (64, 17, 32, 128),
]  # fmt: skip


def two(v, s, move):
    return [move(np.ascontiguousarray(part)) for i in range(2) for part in (v[:, i], s[:, i])]


@BASES
@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(shape, dtype, base):
    v, s = states(shape, dtype)
    moved = to_cupy(v), to_cupy(s)
    poison_pool(v.nbytes, s.nbytes, v.nbytes // max(1, shape[1]), s.nbytes // max(1, shape[1]))
    got = merge_states(*moved, lse_base=base)
    assert all(isinstance(array, cp.ndarray) for array in got)
    check(*map(to_host, got), *merged(v, s, base), dtype)
    again = merge_states(*moved, lse_base=base)
    for one, other in zip(got, again, strict=True):
        assert_same_bits(one, other)
    if shape[1] == 2:
        for one, other in zip(got, merge_state(*two(v, s, to_cupy), lse_base=base), strict=True):
            assert_same_bits(one, other)


def test_specials():
    v, s = specials()
    check(*map(to_host, merge_states(to_cupy(v), to_cupy(s))), *merged(v, s), "float32")


@EACH_DTYPE
@pytest.mark.parametrize("mask", [None, "device", "strided", "host"])
def test_in_place(dtype, mask):
    v, s = states((900, 2, 5, 48), dtype, seed=2)
    chosen = np.random.default_rng(0).random(900) < 0.5
    masks = {None: None, "host": chosen, "device": cp.asarray(chosen), "strided": cp.asarray(np.repeat(chosen, 2))[::2]}
    bits = np.uint32 if dtype == "float32" else np.uint16
    wide = cp.full((900, 7, 64), 7, bits).view(DTYPES[dtype])
    given = two(v, s, to_cupy)
    target = wide[:, 1:6, 16:]
    target[...] = given[0]
    others = [array.copy() for array in given[2:]]
    merge_state_in_place(target, *given[1:], masks[mask])
    want_v, want_s = merged(v, s)
    used = chosen if mask else np.ones(900, bool)
    got_v, got_s = to_host(target), to_host(given[1])
    check(got_v[used], got_s[used], want_v[used], want_s[used], dtype)
    assert_same_bits(got_v[~used], v[~used, 0])
    assert_same_bits(got_s[~used], s[~used, 0])
    for array, before in zip(given[2:], others, strict=True):
        assert_same_bits(array, before)
    target[...] = cp.full(target.shape, 7, bits).view(DTYPES[dtype])
    assert (wide.view(bits) == 7).all(), "something around v was written"


def test_the_callers_stream():
    warm_spin()
    v, s = states((50, 3, 4, 64), "float16")
    source_v, source_s = to_cupy(v), to_cupy(s)
    merge_states(source_v, source_s)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        given_v, given_s = cp.empty_like(source_v), cp.empty_like(source_s)
        spin(20)
        given_v[...], given_s[...] = source_v, source_s
        got = merge_states(given_v, given_s)
    stream.synchronize()
    check(*map(to_host, got), *merged(v, s), "float16")


def test_a_captured_graph_merges_again():
    v, s = states((50, 2, 4, 64), "float16")
    given = two(v, s, to_cupy)
    mask = cp.ones(50, np.bool_)
    merge_state_in_place(*(array.copy() for array in given), mask)
    kept = [array.copy() for array in given[:2]]
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        merge_state_in_place(*given, mask)
        graph = stream.end_capture()
        for seed in (1, 2):
            more_v, more_s = states((50, 2, 4, 64), "float16", seed=seed)
            for target, values in zip(given, two(more_v, more_s, to_cupy), strict=True):
                target[...] = values
            graph.launch()
            stream.synchronize()
            check(*map(to_host, given[:2]), *merged(more_v, more_s), "float16")
    assert kept[0].shape == given[0].shape
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match=r"mask: .*while a graph is captured"):
                merge_state_in_place(*given, np.ones(50, bool))
        finally:
            stream.end_capture()


@EACH_DTYPE
def test_torch(dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    v, s = states((20, 2, 4, 64), dtype)
    values = torch.from_numpy(v.astype(np.float32)).cuda().to(getattr(torch, dtype))
    sums = torch.from_numpy(s).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = merge_states(values, sums)
        in_place = [x[:, 0].contiguous() for x in (values, sums)]
        merge_state_in_place(*in_place, values[:, 1], sums[:, 1], torch.ones(20, dtype=torch.bool, device="cuda"))
    side.synchronize()
    assert all(isinstance(array, torch.Tensor) and array.is_cuda for array in got)
    check(*map(to_host, got), *merged(v, s), dtype)
    check(*map(to_host, in_place), *merged(v, s), dtype)


def test_host_arrays_are_uploaded():
    v, s = states((20, 2, 4, 64), "bfloat16")
    got = merge_states(v, s, backend="cuda")
    assert all(type(array) is np.ndarray for array in got)
    check(*got, *merged(v, s), "bfloat16")
    given = two(v, s, np.copy)
    merge_state_in_place(*given, backend="cuda")
    check(*given[:2], *merged(v, s), "bfloat16")


def test_a_split_cache_merges_to_the_whole():
    rng = np.random.default_rng(0)
    q = cp.asarray(rng.standard_normal((16, 32, 128)), np.float16)
    k, v = (cp.asarray(rng.integers(0, 120, (16, 700, 8, 128), np.uint8)) for _ in range(2))
    decode = cupy_fp8kv.batch_decode_with_padded_kv_cache_return_lse
    options = {"k_scale": 0.02, "v_scale": 0.01}
    parts = [decode(q, k[:, a:b], v[:, a:b], **options) for a, b in ((0, 16), (16, 500), (500, 700))]
    got = merge_states(*(cp.stack(x, axis=1) for x in zip(*parts, strict=True)))
    want = decode(q, k, v, **options)
    np.testing.assert_allclose(to_host(got[0]).astype(float), to_host(want[0]).astype(float), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(to_host(got[1]), to_host(want[1]), atol=1e-4)
