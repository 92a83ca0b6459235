"""A prepared call: the same results as the call itself, what it refuses, and when lengths are taken in."""

import dataclasses
import threading

import emulator
import numpy as np
import pytest
from cases import Case, build, pairwise_cases
from emulator.checks import SPLIT, TAIL, move
from listed import HUGE_AND_SMALL, NAMED, lists_everywhere
from plans import plan_of, run_plan

import cupy_fp8kv
from cupy_fp8kv import DecodePlan

SMALL = [case for case in pairwise_cases() if case.kv_len * case.batch * case.num_kv_heads <= 2100][::6]
RAGGED = Case(batch=3, num_kv_heads=2, group=3, kv_len=40, head_dim=64, kv_lens="device", lens=(40, 0, 17))


def same(got, want):
    return all(np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
               for a, b in zip(got, want, strict=True))  # fmt: skip


def some(batch=2, rows=9, num_kv_heads=2, head_dim=64, group=2):
    rng = np.random.default_rng(batch)
    q = rng.standard_normal((batch, num_kv_heads * group, head_dim)).astype(np.float16)
    k, v = rng.integers(0, 120, (2, batch, rows, num_kv_heads, head_dim)).astype(np.uint8)
    return q, k, v


# NumPy


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_same_as_a_call_in_numpy(case):
    arrays = build(case)
    plan = plan_of(arrays, backend="numpy")
    if case.kv_lens != "none":
        plan.schedule(arrays.kv_lens)
    out, lse = run_plan(plan, arrays)
    arrays.check(out, lse)
    want = arrays.call(backend="numpy", sm_scale=arrays.options["sm_scale"])
    assert same((out, lse), want)


def test_a_single_request():
    q, k, v = (array[0] for array in some(1))
    plan = DecodePlan(q, k, v, ragged=True, window_left=3, backend="numpy")
    for rows in (9, 4, 0):
        plan.schedule([rows])
        got = plan.run(q, k, v)
        want = cupy_fp8kv.single_decode_with_kv_cache(q, k[:rows], v[:rows], window_left=3, backend="numpy")
        assert got.shape == q.shape and np.array_equal(got, want)


def test_lengths_are_taken_in_by_schedule_alone():
    q, k, v = some()
    lens = np.array([9, 2], np.int32)
    plan = DecodePlan(q, k, v, ragged=True, backend="numpy")
    plan.schedule(lens)
    first = plan.run(q, k, v)
    lens[:] = 1
    assert np.array_equal(plan.run(q, k, v), first)
    plan.schedule(lens)
    assert not np.array_equal(plan.run(q, k, v), first)


def test_out_is_written_and_returned():
    q, k, v = some()
    plan = DecodePlan(q, k, v, backend="numpy")
    wide = np.zeros((2, 4, 128), np.float16)
    for out in (np.zeros_like(q), wide[..., 16:80]):
        assert plan.run(q, k, v, out=out) is out and np.array_equal(out, plan.run(q, k, v))
    assert not wide[..., :16].any() and not wide[..., 80:].any()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_plan_for_shapes(layout):
    q, k, v = some()
    if layout == "HND":
        k, v = (np.ascontiguousarray(cache.swapaxes(1, 2)) for cache in (k, v))
    shapes = DecodePlan.for_shapes(2, 9, 4, 2, 64, layout, library="numpy", ragged=True, backend="numpy", sm_scale=0.5)
    arrays = DecodePlan(q, k, v, layout, ragged=True, backend="numpy", sm_scale=0.5)
    assert shapes.problem == arrays.problem and "2 requests of 9 rows" in str(shapes) and "ragged" in repr(shapes)
    for plan in (shapes, arrays):
        plan.schedule([9, 4])
    assert np.array_equal(shapes.run(q, k, v), arrays.run(q, k, v))
    mixed = DecodePlan.for_shapes(
        2, 9, 4, 2, 64, q_dtype="bfloat16", kv_dtype=("float16", "uint8"), kv_format=("f16", "e5m2"), library="numpy",
        backend="numpy",
    )  # fmt: skip
    assert (mixed.problem.q_format, mixed.problem.k_format, mixed.problem.v_format) == ("bf16", "f16", "e5m2")


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(array) for array in some())
    plan = DecodePlan(q, k, v, ragged=True, backend="numpy")
    plan.schedule(torch.tensor([3, 9], dtype=torch.int32))
    got = plan.run(q, k, v)
    want = cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, v, kv_lens=[3, 9], backend="numpy")
    assert isinstance(got, torch.Tensor) and torch.equal(got, want)
    with pytest.raises(ValueError, match="k: this plan is for arrays of torch, got one of numpy"):
        plan.run(q, k.numpy(), v)


# What is refused


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("q", lambda q: q[:1], r"q: this plan is for shape \[2, 4, 64\], got \[1, 4, 64\]"),
        ("q", lambda q: q.astype(np.float32), "q: this plan is for dtype float16, got float32"),
        ("k", lambda k: k[:, :5], r"k: this plan is for shape \[2, 9, 2, 64\], got \[2, 5, 2, 64\]"),
        ("v", lambda v: v.view(np.int8), "v: this plan is for dtype uint8, got int8"),
        ("v", lambda v: np.repeat(v, 2, 1)[:, ::2], r"v: this plan is for strides \[1152, 128, 64, 1\] in bytes, got"),
        ("k", lambda k: k.tolist(), "k: expected an array"),
        ("k", lambda k: None, "k: expected an array"),
    ],
)
def test_arrays_of_another_kind(name, change, said):
    given = dict(zip("qkv", some(), strict=True))
    plan = DecodePlan(**given, backend="numpy")
    with pytest.raises((ValueError, TypeError), match=said):
        plan.run(**{**given, name: change(given[name])})
    plan.run(**given)


def test_axes_of_one_element_have_no_stride():
    q, k, v = some(1)
    plan = DecodePlan(q, k, v, backend="numpy")
    odd = np.lib.stride_tricks.as_strided(k, k.shape, (7, *k.strides[1:]))
    assert np.array_equal(plan.run(q, odd, v), plan.run(q, k, v))


def test_out_of_another_kind():
    q, k, v = some()
    plan = DecodePlan(q, k, v, backend="numpy")
    with pytest.raises(ValueError, match=r"out: expected shape \[2, 4, 64\] like q, got \[2, 4, 32\]"):
        plan.run(q, k, v, out=np.zeros((2, 4, 32), np.float16))
    with pytest.raises(TypeError, match="out: expected dtype float16 like q, got float32"):
        plan.run(q, k, v, out=np.zeros((2, 4, 64), np.float32))
    with pytest.raises(TypeError, match="out: expected an array of NumPy, CuPy, torch, JAX"):
        plan.run(q, k, v, out=[])


def test_order_of_calls():
    q, k, v = some()
    ragged, padded = (DecodePlan(q, k, v, ragged=ragged, backend="numpy") for ragged in (True, False))
    with pytest.raises(RuntimeError, match=r"run: a plan with ragged=True needs schedule\(kv_lens\) first"):
        ragged.run(q, k, v)
    with pytest.raises(ValueError, match="kv_lens: this plan is for requests of full length; make it with ragged=True"):
        padded.schedule([1, 2])
    with pytest.raises(ValueError, match="kv_lens: expected lengths from 0 to 9, got 10 for request 1"):
        ragged.schedule([1, 10])
    with pytest.raises(RuntimeError, match="schedule"):
        ragged.run(q, k, v)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"ragged": 1}, TypeError, "ragged: expected True or False, got 1"),
        ({"sm_scale": "1"}, TypeError, "sm_scale: expected a number, got '1'"),
        ({"window_left": 1.5}, TypeError, "window_left: expected an integer, got 1.5"),
        ({"logits_soft_cap": -1}, ValueError, "logits_soft_cap: expected a finite number >= 0"),
        ({"lse_base": "10"}, ValueError, "lse_base: expected '2' or 'e', got '10'"),
        ({"kv_layout": "DHN"}, ValueError, "kv_layout: expected 'NHD' or 'HND', got 'DHN'"),
        ({"pos_encoding_mode": "ALIBI"}, NotImplementedError, "ALIBI"),
        ({"backend": "tpu"}, ValueError, "backend: expected 'cuda', 'numpy' or None, got 'tpu'"),
        ({"kv_format": "e4m3fnuz"}, ValueError, "kv_format"),
    ],
)  # fmt: skip
def test_options_that_no_plan_has(options, error, said):
    with pytest.raises(error, match=said):
        DecodePlan(*some(), **{"backend": "numpy", **options})


def test_shapes_that_no_plan_has():
    shapes = (2, 9, 4, 2, 64)
    with pytest.raises(ValueError, match=r"library: expected one of cupy, torch, jax, numpy, got 'mxnet'"):
        DecodePlan.for_shapes(*shapes, library="mxnet")
    with pytest.raises(TypeError, match="scale: expected one of ragged"):
        DecodePlan.for_shapes(*shapes, library="numpy", scale=3)
    with pytest.raises(TypeError, match="kv_dtype"):
        DecodePlan.for_shapes(*shapes, library="numpy", kv_dtype="int8")
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        DecodePlan.for_shapes(2, 9, 3, 2, 64, library="numpy", backend="numpy")


# The CUDA backend, emulated


def launched(machine, call):
    before = len(machine.launches)
    result = call()
    return result, [name.partition("[")[0] for name, _ in machine.launches[before:]]


@pytest.mark.parametrize("case", [SPLIT, TAIL, RAGGED, dataclasses.replace(RAGGED, batch=1, lens=(31,))], ids=str)
def test_the_same_bits_as_a_call(emulate, case):
    arrays = build(case)
    moved = arrays.to(move)
    plan = plan_of(moved)
    assert "emulated" in str(plan)
    if case.kv_lens != "none":
        _, names = launched(emulate, lambda: plan.schedule(moved.kv_lens))
        assert not names
    got = run_plan(plan, moved)
    arrays.check(*(np.asarray(array) for array in got))
    assert same(got, arrays.to(move).call(sm_scale=arrays.options["sm_scale"]))


@pytest.mark.parametrize("name", NAMED)
def test_a_list_is_shared_by_all_layers(emulate, monkeypatch, name):
    with lists_everywhere(monkeypatch):
        layers = [build(dataclasses.replace(NAMED[name], seed=seed, given_out=False)) for seed in range(3)]
        moved = [arrays.to(move) for arrays in layers]
        plan = plan_of(moved[0])
        _, names = launched(emulate, lambda: plan.schedule(moved[0].kv_lens))
        assert names == ["schedule"]
        for arrays, there in zip(layers, moved, strict=True):
            got, names = launched(emulate, lambda there=there: run_plan(plan, there))
            assert names == ["decode", "merge"]
            arrays.check(*(np.asarray(array) for array in got))
            assert same(got, arrays.to(move).call(sm_scale=arrays.options["sm_scale"]))


@pytest.mark.parametrize("case", [RAGGED, HUGE_AND_SMALL], ids=["uniform", "listed"])
def test_device_lengths_are_taken_in_by_schedule_alone(emulate, monkeypatch, case):
    """What is written to kv_lens later has no effect until the next schedule; lengths on the host go up."""
    case = dataclasses.replace(case, kv_lens="device", lens=None, given_out=False, window_left=-1)
    arrays = build(dataclasses.replace(case, kv_lens="none"))
    moved = arrays.to(move)
    first = np.linspace(0, case.kv_len, case.batch).astype(np.int32)
    with lists_everywhere(monkeypatch) if case.batch == 9 else monkeypatch.context():
        plan = plan_of(moved, ragged=True)
        lens = move(first)
        plan.schedule(lens)
        before = run_plan(plan, moved)
        lens[...] = 1
        assert same(run_plan(plan, moved), before)
        plan.schedule(lens)
        assert not same(run_plan(plan, moved), before)
        plan.schedule(first.tolist())
        assert same(run_plan(plan, moved), before)
    options = {**arrays.options, "kv_lens": first}
    dataclasses.replace(arrays, options=options).check(*(np.asarray(array) for array in before))


def test_any_out_that_a_call_takes(emulate):
    arrays = build(dataclasses.replace(RAGGED, kv_lens="none", given_out=True))
    plan = plan_of(arrays.to(move))
    want = None
    for view in ("contiguous", "padded", "transposed"):
        placed = build(dataclasses.replace(arrays.case, view=view))
        there = dataclasses.replace(arrays.to(move), out=placed.to(move).out)
        out, lse = run_plan(plan, there)
        want = want or (np.array(out), np.array(lse))
        assert same((np.ascontiguousarray(there.out.view), lse), want)
        assert np.asarray(there.out.outside).tobytes() == placed.out.outside.tobytes()


@pytest.mark.parametrize("case", [RAGGED, HUGE_AND_SMALL, dataclasses.replace(RAGGED, kv_lens="none", lens=None)])
def test_the_usual_call_takes_a_shorter_way_with_the_same_result(emulate, monkeypatch, case):
    """Given ``out`` and no scales, from the second run on; what is wrong is noticed all the same."""
    case = dataclasses.replace(case, given_out=False, view="contiguous", soft_cap=20.0, window_left=30)
    first, second = (build(dataclasses.replace(case, seed=seed)).to(move) for seed in (1, 2))
    with lists_everywhere(monkeypatch):
        plan = plan_of(first)
        if case.kv_lens != "none":
            plan.schedule(first.kv_lens)
        wanted = [np.array(run_plan(plan, one)[0]) for one in (first, second)]
        out = move(np.zeros(first.q.view.shape, np.float16))
        plan.run(first.q.view, first.k.view, first.v.view, out=out)
        with monkeypatch.context() as patch:
            patch.setattr(plan, "_check_out", None)
            for one, want in zip((second, first), (wanted[1], wanted[0]), strict=True):
                assert plan.run(one.q.view, one.k.view, one.v.view, out=out) is out
                assert np.array_equal(out.view(np.uint16), want.view(np.uint16))
        for wrong, said in ((out[:2], "out: expected shape"), (out[..., 4:], "out: expected shape")):
            with pytest.raises(ValueError, match=said):
                plan.run(first.q.view, first.k.view, first.v.view, out=wrong)
        off = emulator.allocate(out.nbytes + 16)[8 : out.nbytes + 8].view(np.float16).reshape(out.shape)
        with pytest.raises(ValueError, match="out: expected data that starts at a multiple of 16 bytes"):
            plan.run(first.q.view, first.k.view, first.v.view, out=off)


def test_device_arrays_of_another_kind(emulate):
    moved = build(RAGGED).to(move)
    plan = plan_of(moved)
    plan.schedule(moved.kv_lens)
    q, k, v = moved.q.view, moved.k.view, moved.v.view
    with pytest.raises(ValueError, match=r"k: this plan is for shape \[3, 40, 2, 64\], got \[3, 39, 2, 64\]"):
        plan.run(q, k[:, :39], v)
    with pytest.raises(ValueError, match="q: this plan is for arrays of emulated, got one of numpy"):
        plan.run(np.asarray(q), k, v)
    with pytest.raises(TypeError, match="kv_lens: expected int32, got int64"):
        plan.schedule(move(np.zeros(3, np.int64)))
    off = emulator.allocate(q.nbytes + 16)[8 : q.nbytes + 8].view(np.float16).reshape(q.shape)
    with pytest.raises(ValueError, match="q: expected data that starts at a multiple of 16 bytes"):
        plan.run(off, k, v)


def test_an_empty_batch(emulate):
    moved = build(dataclasses.replace(RAGGED, batch=0, lens=None)).to(move)
    plan = plan_of(moved)
    plan.schedule(moved.kv_lens)
    out, lse = run_plan(plan, moved)
    assert out.shape == (0, 6, 64) and lse.shape == (0, 6)


def test_threads_share_a_plan():
    q, k, v = some()
    plan = DecodePlan(q, k, v, ragged=True, backend="numpy")
    plan.schedule([9, 5])
    want = plan.run(q, k, v)
    wrong = []

    def work():
        for _ in range(20):
            if not np.array_equal(plan.run(q, k, v), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
