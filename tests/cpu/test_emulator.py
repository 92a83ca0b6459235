"""The kernels themselves, executed on the CPU: the text that NVRTC gets, through the product's own way of a call.

``tests/emulator`` has the runtime. Decode, merge and quantise are held against the oracle here on every run; planted
bugs show that it would notice.
"""

import ctypes
import dataclasses
import shutil
import subprocess

import emulator
import numpy as np
import pytest
from cases import Case, build, pairwise_cases

import cupy_fp8kv
from cupy_fp8kv.backends import cuda, reference
from cupy_fp8kv.formats import FP8_FORMATS, KV_FORMATS
from cupy_fp8kv.jit import sources
from cupy_fp8kv.plan import plan_decode

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for this CPU")

#: A second or less each, and together every format, layout, view, option, tile and number of splits.
SMALL = [
    case
    for case in pairwise_cases()
    if case.kv_len * case.batch * case.num_kv_heads <= 2100 and case.group <= 32 and case.kv_len <= 1000
]

CHOSEN = SMALL[:: max(1, len(SMALL) // 36)]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return emulator.Emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulate(machine, monkeypatch):
    with machine.installed(monkeypatch):
        yield machine


def move(values):
    """A copy at an address that rows may start at."""
    return emulator._Library().from_numpy(values, 0)


def run(case, arrays=None):
    """Check a case and return (out, lse)."""
    arrays = arrays or build(case)
    moved = arrays.to(move)
    out, lse = moved.call()
    assert isinstance(out, emulator.EmulatedArray)
    if case.given_out:
        written = np.asarray(moved.out.outside).tobytes() != np.asarray(arrays.out.outside).tobytes()
        assert not written, "memory around out was written"
    arrays.check(np.asarray(out), np.asarray(lse))
    return np.asarray(out), np.asarray(lse)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_decode(emulate, case):
    run(case)


SPLIT = Case(group=5, num_kv_heads=1, batch=1, kv_len=1500, seed=2)
TAIL = Case(group=3, num_kv_heads=2, batch=2, kv_len=61, kv_lens="device", lens=(61, 18), view="padded")


def test_the_cases_reach_every_path(emulate):
    plans = [plan_decode(case.problem, emulator.DEVICE) for case in (*CHOSEN, SPLIT)]
    assert {plan.spec.ctas_per_sm for plan in plans} == {1, 2, 4}
    assert {plan.spec.column_tiles for plan in plans} == {1, 2} and max(plan.splits for plan in plans) > 2
    assert {plan.spec.k for plan in plans} == set(KV_FORMATS) == {plan.spec.v for plan in plans}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_any_order_of_threads_gives_the_same_bits(emulate, monkeypatch, seed):
    first = run(SPLIT)
    monkeypatch.setattr(emulate, "seed", seed)
    again = run(SPLIT)
    assert "merge" in emulate.launches[-1][0]
    assert all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
def test_any_number_of_splits(emulate, monkeypatch, splits):
    def plan(problem, device):
        found = plan_decode(problem, device)
        heads = problem.batch * problem.num_qo_heads * splits
        return dataclasses.replace(
            found, splits=splits, grid=found.grid // found.splits * splits,
            workspace_out=heads * problem.head_dim * 4, workspace_state=heads * 8,
        )  # fmt: skip

    monkeypatch.setattr(cuda, "plan_decode", plan)
    run(dataclasses.replace(TAIL, kv_len=300, lens=(300, 0)))


def test_infinities_beside_masked_rows(emulate):
    """A masked row of a tile has weight 0, which must not meet an infinity."""
    case = Case(v="e5m2", group=2, num_kv_heads=1, batch=1, kv_len=37, seed=2)
    arrays = build(case)
    arrays.v.view[0, 36, 0, 5] = arrays.host[2][0, 36, 0, 5] = 0x7C
    out, _ = run(case, arrays)
    assert np.isposinf(out[..., 5]).all() and np.isfinite(np.delete(out, 5, -1)).all()


@pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "head", "token"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_quantize_and_back(emulate, fmt, granularity, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 9, 3, 48)) * np.exp(rng.normal(0, 3, (2, 9, 3, 1)))).astype(np.float32)
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    x = x.astype(cupy_fp8kv.arrays.numpy_dtype(dtype))
    codes, scale = cupy_fp8kv.quantize(move(x), fmt, granularity=granularity)
    want = reference.amax_scale(x, fmt, granularity)
    assert np.array_equal(scale, want)
    assert np.array_equal(np.asarray(codes).view(np.uint8), reference.quantize(x, fmt, want))
    back = cupy_fp8kv.dequantize(move(np.asarray(codes).view(np.uint8)), move(want), dtype, kv_format=fmt)
    np.testing.assert_array_equal(
        np.asarray(back).astype(np.float32),
        reference.dequantize(np.asarray(codes).view(np.uint8), fmt, want, x.dtype).astype(np.float32),
    )


@pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
@pytest.mark.parametrize("software", [False, True], ids=["hardware", "integer"])
def test_every_code_and_every_half(emulate, monkeypatch, fmt, software):
    """All 65536 fp16 values to codes and all 256 codes back, as the definition has them."""
    original = cuda.Quantizer.__init__
    monkeypatch.setattr(cuda.Quantizer, "__init__", lambda self, *a: original(self, *a, software_fp8=software))
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(1, 512, 128)
    codes, _ = cupy_fp8kv.quantize(move(halves), fmt, scale=1.0)
    assert np.array_equal(np.asarray(codes).view(np.uint8), reference.encode(halves, fmt))
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    floats = cupy_fp8kv.dequantize(move(every), 1.0, "float32", kv_format=fmt)
    np.testing.assert_array_equal(np.asarray(floats), reference.decode_codes(every, fmt))


# Nothing is touched that may not be: rows beyond a length or before a window, gaps between rows, other memory


def readable_rows(case, arrays, moved):
    """Which elements of the buffers of K and V the call may read, as pairs for ``watching``."""
    lens = arrays.kv_lens if arrays.kv_lens is not None else [case.kv_len] * case.batch
    for placed in (moved.k, moved.v):
        mask = dataclasses.replace(placed, base=np.zeros(placed.base.shape, bool))
        view = mask.view if case.layout == "NHD" else mask.view.swapaxes(1, 2)
        for request, length in enumerate(lens):
            first = 0 if case.window_left < 0 else max(0, length - 1 - case.window_left)
            view[request, first:length] = True
        yield np.asarray(placed.base), mask.base


WATCHED = [
    dataclasses.replace(TAIL, view=view, layout=layout, window_left=window, k=k, head_dim=head_dim)
    for view, layout, window, k, head_dim in (
        ("contiguous", "NHD", -1, "e4m3", 128), ("padded", "HND", 5, "e4m3", 128), ("padded", "NHD", 0, "f16", 96),
        ("transposed", "NHD", 17, "e5m2", 80), ("padded", "HND", -1, "bf16", 256), ("padded", "NHD", -1, "e4m3", 16),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", [*WATCHED, SPLIT], ids=str)
def test_no_byte_is_read_that_may_not_be(emulate, case):
    arrays = build(case)
    moved = arrays.to(move)
    with emulate.watching(*readable_rows(case, arrays, moved)):
        out, lse = moved.call()
    arrays.check(np.asarray(out), np.asarray(lse))


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("mask.cuh", "return min_of(row, end - 1);", "return row;"),
        ("mask.cuh", "kv_len - 1 - window_left;", "max_of(0, kv_len - 2 - window_left);"),
        ("base/row_slice.cuh", "return lane * load_width(0);", "return lane * load_width(0) + 16;"),
    ],
    ids=["no clamp", "a row before the window", "past the end of a row"],
)
def test_reads_that_change_no_result_are_noticed(tmp_path, monkeypatch, file, right, wrong):
    text = sources.FILES[file]
    assert right in text, f"{file} has changed: plant this bug elsewhere"
    case = WINDOWED
    arrays = build(case)
    moved = arrays.to(move)
    machine = emulator.Emulator(tmp_path)
    with machine.installed(monkeypatch), machine.watching(*readable_rows(case, arrays, moved)):
        monkeypatch.setitem(sources.FILES, file, text.replace(right, wrong))
        with pytest.raises(RuntimeError, match="a read of what nobody may read"):
            moved.call()


# The host bodies of the PTX functions

PROBE = """
extern "C" void probe_f16_to_float(const u16* in, float* out, int n) {
    for (int i = 0; i < n; i++) out[i] = ptx::f16_float(in[i]);
}
extern "C" void probe_pack(const float* in, u32* half, u32* bfloat, int n) {
    for (int i = 0; i < n; i++) half[i] = ptx::pack_f16(in[i], -in[i]), bfloat[i] = ptx::pack_bf16(in[i], -in[i]);
}
extern "C" u32 probe_permute(u32 a, u32 b, u32 selector) { return ptx::permute_bytes(a, b, selector); }
extern "C" u32 probe_high(u32 a, u32 b) { return ptx::multiply_high(a, b); }
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    text = (emulator.HERE / "runtime.h").read_text() + sources.FILES["base/types.cuh"].replace("#pragma once", "")
    text += (emulator.HERE / "ptx.cuh").read_text().replace('#include "base/types.cuh"', "").replace("#pragma once", "")
    (folder / "probe.cpp").write_text(text.replace("#pragma once", "") + PROBE)
    command = ["g++", *emulator.FLAGS, str(folder / "probe.cpp"), "-o", str(folder / "probe.so")]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(folder / "probe.so"))


def test_host_conversions_are_numpys(probe):
    halves = np.arange(65536, dtype=np.uint16)
    floats = np.empty(65536, np.float32)
    probe.probe_f16_to_float(halves.ctypes, floats.ctypes, 65536)
    np.testing.assert_array_equal(floats, halves.view(np.float16).astype(np.float32))
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32), floats])
    x = np.concatenate([x, np.nextafter(floats, np.float32(np.inf)), floats * np.float32(1.00048828125)])
    half, bfloat = np.empty(len(x), np.uint32), np.empty(len(x), np.uint32)
    probe.probe_pack(x.ctypes, half.ctypes, bfloat.ctypes, len(x))
    with np.errstate(all="ignore"):
        for packed, dtype in ((half, np.dtype(np.float16)), (bfloat, KV_FORMATS["bf16"].dtype)):
            low = (packed & 0xFFFF).astype(np.uint16).view(dtype)
            high = (packed >> 16).astype(np.uint16).view(dtype)
            np.testing.assert_array_equal(low.astype(np.float32), x.astype(dtype).astype(np.float32))
            np.testing.assert_array_equal(high.astype(np.float32), (-x).astype(dtype).astype(np.float32))


def test_host_integers_are_pythons(probe):
    rng = np.random.default_rng(1)
    for a, b, selector in rng.integers(0, 2**32, (2000, 3), dtype=np.uint64).tolist():
        chosen = (a | b << 32).to_bytes(8, "little")
        want = bytes(chosen[(selector >> 4 * i) & 7] for i in range(4))
        got = probe.probe_permute(ctypes.c_uint(a), ctypes.c_uint(b), ctypes.c_uint(selector)) & 0xFFFFFFFF
        assert got == int.from_bytes(want, "little")
        assert probe.probe_high(ctypes.c_uint(a), ctypes.c_uint(b)) & 0xFFFFFFFF == a * b >> 32


# Planted bugs: file, what to replace, with what, and the case that must notice

BF16_CACHE = dataclasses.replace(TAIL, k="bf16", v="bf16")
BF16_QUERY = dataclasses.replace(TAIL, q="bf16")
CAPPED = dataclasses.replace(TAIL, soft_cap=5.0, sharpness=3.0)
WINDOWED = dataclasses.replace(TAIL, window_left=20)
SCALED = dataclasses.replace(TAIL, scales="head")
LONG = dataclasses.replace(TAIL, kv_len=900, lens=(900, 500), sharpness=20.0)
BUGS = {
    "splits overlap": ("decode.cu", "p.splits.value * kWarps * kTileRows", "kWarps * kTileRows", SPLIT),
    "a row too many": ("mask.cuh", "return row < end;", "return row <= end;", TAIL),
    "a window one short": ("mask.cuh", "kv_len - 1 - window_left;", "kv_len - window_left;", WINDOWED),
    "slices in another order": ("base/row_slice.cuh", "return LANES * start + lane", "return start + lane", TAIL),
    "bytes paired wrongly": ("kv_format/fp8.cuh", "j % 2 ? 0x7362 : 0x5140", "j % 2 ? 0x7362 : 0x4150", TAIL),
    "weights not transposed": (
        "attention/columns.cuh", "ptx::transpose_8x8(terms[i])", "terms[i]", TAIL,
    ),
    "no barrier before combining": (
        "attention/combine.cuh", "                ptx::sync_threads();\n                for (int task",
        "                for (int task", TAIL,
    ),
    "no barrier after storing q": ("attention/query.cuh", "        ptx::sync_threads();\n", "", TAIL),
    "half an accumulator not rescaled": (
        "attention/columns.cuh", "out[n][j][c + 2] *= factor;", "", LONG,
    ),
    "sums of some lanes only": (
        "attention/columns.cuh", "mask = 4; mask < 32; mask *= 2) state", "mask = 8; mask < 32; mask *= 2) state", TAIL,
    ),
    "a sum merged without its factor": (
        "merge.cu", "states_read[i].sum * factor;", "states_read[i].sum;", SPLIT,
    ),
    "the wrong query heads": (
        "decode.cu", "work.kv_head * p.group_size + first_column", "work.kv_head + first_column", TAIL,
    ),
    "the wrong cache head": ("layout/padded.cuh", "head * p.v_stride_head", "0 * p.v_stride_head", TAIL),
    "a vote of some lanes": (
        "attention/columns.cuh", "if (ptx::any(exceeded))", "if (exceeded && ptx::any(exceeded))", TAIL,
    ),
    "one term of a bf16 weight": ("base/operand.cuh", "kWeightTerms = 2;", "kWeightTerms = 1;", BF16_CACHE),
    "the query's factor not undone": (
        "attention/query.cuh", "return scale * inverses_", "return scale; scale * inverses_", BF16_QUERY,
    ),
    "a soft cap of the wrong base": ("decode.cu", "(p.soft_cap * kLog2E)", "(p.soft_cap)", CAPPED),
    "one scale for all heads": (
        "scale/head.cuh", "scales[static_cast<i64>(head) * stride]", "scales[0]", SCALED,
    ),
    "the lse in the wrong unit": (
        "decode.cu", "state.log2_sum() * p.lse_unit", "state.log2_sum()", dataclasses.replace(TAIL, lse_base="e"),
    ),
    "rows of another request": ("decode.cu", "Layout::kv_len(p, work.request)", "Layout::kv_len(p, 0)", TAIL),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, name):
    file, right, wrong, case = BUGS[name]
    text = sources.FILES[file]
    assert right in text, f"{file} has changed: plant this bug elsewhere"
    with emulator.Emulator(tmp_path).installed(monkeypatch):
        monkeypatch.setitem(sources.FILES, file, text.replace(right, wrong))
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            run(case)
    assert "g++ cannot compile" not in str(caught.value)


def test_cases_of_planted_bugs_are_right_without_them(emulate):
    for case in {case for *_, case in BUGS.values()}:
        run(case)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("if (threadIdx.x % 2 && ptx::any(exceeded))", "different operations"),
        ("while (threadIdx.x >= 16) emulator::yield();\n        if (ptx::any(exceeded))", "deadlock"),
    ],
)
def test_mismatched_meetings_are_told(tmp_path, monkeypatch, wrong, said):
    """Lanes at different operations, and threads that wait for each other, end a launch with what happened."""
    text = sources.FILES["attention/columns.cuh"]
    with emulator.Emulator(tmp_path).installed(monkeypatch):
        monkeypatch.setitem(sources.FILES, "attention/columns.cuh", text.replace("if (ptx::any(exceeded))", wrong, 1))
        with pytest.raises(RuntimeError, match=said):
            build(TAIL).to(move).call()
