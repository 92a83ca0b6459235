"""Quantising on the GPU, to the bits of the NumPy backend; and the integer conversions that older devices use."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from cases import Case, build
from gpu_support import assert_same_bits, cp, planned, poison_pool, to_cupy, to_host

import cupy_fp8kv
from cupy_fp8kv.backends import reference
from cupy_fp8kv.backends.cuda import Quantizer, RowAxes
from cupy_fp8kv.formats import FP8_FORMATS

pytestmark = pytest.mark.gpu

FORMATS = pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
SOFTWARE = pytest.mark.parametrize("software", [False, True], ids=["hardware", "software"])


def convert(entry, array, fmt, scale, software, value_dtype):
    """One kernel of quantize.cu on rows of 256 elements, with one scale for all; both ways of converting."""
    source = to_cupy(np.ascontiguousarray(array).reshape(-1, 256))
    codes = entry == "quantize"
    target = to_cupy(np.zeros(source.shape, np.uint8 if codes else DTYPES[value_dtype]))
    target.view(np.uint8)[...] = 0xA5
    quantizer = Quantizer(value_dtype, fmt.name, 0, software_fp8=software)
    stream = cp.cuda.get_current_stream().ptr
    axes = RowAxes(source.shape, source.strides)
    quantizer.convert(entry, axes, source.data.ptr, target.data.ptr, 0, scale, (0, 0, 0), stream)
    return to_host(target).reshape(np.shape(array))


def same_values(got, want):
    """The same bits, except that a NaN may be any NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    wide = got.astype(np.float32), want.astype(np.float32)
    nan = np.isnan(wide[1])
    np.testing.assert_array_equal(np.isnan(wide[0]), nan)
    bits = np.dtype(f"u{got.dtype.itemsize}")
    np.testing.assert_array_equal(got.view(bits)[~nan], want.view(bits)[~nan])


def float32_inputs(fmt):
    """Floats where conversions go wrong: ties and their neighbours, subnormals, the ends of the range, specials."""
    rng = np.random.default_rng(5)
    table = reference.decode_codes(np.arange(0x80, dtype=np.uint8), fmt)
    table = np.sort(table[np.isfinite(table)]).astype(np.float64)
    middle = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))]
    top = np.float32(fmt.max) * np.linspace(0.9, 1.2, 400, dtype=np.float32)
    tiny = (rng.standard_normal(20_000) * table[1]).astype(np.float32)
    wide = (rng.standard_normal(40_000) * 2.0 ** rng.integers(-24, 20, 40_000)).astype(np.float32)
    anything = rng.integers(0, 2**32, 60_000, np.uint32).view(np.float32)
    special = np.array([0, np.inf, np.nan, 3.4e38, 1e-45, 1.1754944e-38], np.float32)
    values = np.concatenate([*near, top, tiny, wide, anything, special, table.astype(np.float32)])
    values = np.concatenate([values, -values])
    return np.resize(values, -(-len(values) // 256) * 256)


# One scale: the conversions themselves


@FORMATS
@SOFTWARE
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_input(fmt, software, dtype):
    values = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])
    got = convert("quantize", values, fmt, 1.0, software, dtype)
    assert_same_bits(got, reference.encode(values, fmt))


@FORMATS
@SOFTWARE
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3, 1e4, 1e-30])
def test_floats(fmt, software, scale):
    values = float32_inputs(fmt)
    # Devices flush subnormal floats; what they are divided by here leaves them far below the smallest code anyway.
    assert_same_bits(convert("quantize", values, fmt, scale, software, "float32"),
                     reference.quantize(values, fmt, np.float32(scale)))  # fmt: skip


@FORMATS
@SOFTWARE
@EACH_DTYPE
@pytest.mark.parametrize("scale", [1.0, 0.3, 448.0, 2.0**-20])
def test_every_code(fmt, software, dtype, scale):
    codes = np.arange(256, dtype=np.uint8)
    got = convert("dequantize", codes, fmt, scale, software, dtype)
    want = reference.dequantize(codes, fmt, np.float32(scale), DTYPES[dtype])
    same_values(got, want)


# The public functions: granularities, layouts, views


def random_values(shape, dtype, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * spread * 2.0 ** rng.integers(-6, 4, (*shape[:-1], 1))
    return values.astype(DTYPES[dtype])


VIEWS = {
    "whole": lambda x: x,
    "inner": lambda x: x[..., 16:-16],
    "every second row": lambda x: x[:, ::2],
    "other order": lambda x: x.swapaxes(0, 1),
    "one": lambda x: x[:1, :1],
}


@FORMATS
@EACH_DTYPE
@pytest.mark.parametrize("granularity", ["tensor", "head", "token"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("view", VIEWS)
def test_granularities(fmt, dtype, granularity, layout, view):
    values = random_values((4, 6, 5, 96), dtype)
    take = VIEWS[view]
    poison_pool(values.size, values.size * 4, 4096)
    codes, scale = cupy_fp8kv.quantize(take(to_cupy(values)), fmt, granularity=granularity, kv_layout=layout)
    want_codes, want_scale = cupy_fp8kv.quantize(
        take(values), fmt, granularity=granularity, kv_layout=layout, backend="numpy"
    )
    assert isinstance(codes, cp.ndarray) and codes.dtype == np.uint8 and codes.flags.c_contiguous
    assert_same_bits(scale, want_scale, "scale")
    assert_same_bits(codes, want_codes.view(np.uint8), "codes")
    again, same = cupy_fp8kv.quantize(take(to_cupy(values)), fmt, scale, kv_layout=layout)
    assert same is scale
    assert_same_bits(again, codes, "with the scale given")
    for out_dtype, numpy_dtype in DTYPES.items():
        back = cupy_fp8kv.dequantize(codes, scale, out_dtype, kv_format=fmt, kv_layout=layout)
        want = reference.dequantize(
            to_host(codes), fmt, to_host(scale), numpy_dtype, head_axis=2 if layout == "NHD" else 1
        )
        same_values(to_host(back), want)


@FORMATS
@pytest.mark.parametrize("shape", [(16,), (7, 64), (5, 3, 32), (2, 5, 3, 256), (1, 1, 1, 16), (3, 0, 2, 32), (0, 16)])
def test_shapes(fmt, shape):
    values = random_values(shape, "float16") if 0 not in shape else np.zeros(shape, np.float16)
    for granularity in ("tensor", "head", "token") if len(shape) > 2 else ("tensor", "token"):
        codes, scale = cupy_fp8kv.quantize(to_cupy(values), fmt, granularity=granularity)
        want_codes, want_scale = cupy_fp8kv.quantize(values, fmt, granularity=granularity, backend="numpy")
        assert_same_bits(codes, want_codes.view(np.uint8))
        assert_same_bits(scale, want_scale)


@FORMATS
def test_many_rows_and_heads(fmt):
    """More rows than threads in flight, more heads than one CTA has warps: every slot's maximum is found."""
    for shape in ((3, 3000, 8, 64), (1, 200_000, 1, 16), (2, 40, 300, 32), (700, 1, 3, 128)):
        values = random_values(shape, "float16", seed=len(shape))
        for granularity in ("tensor", "head", "token"):
            codes, scale = cupy_fp8kv.quantize(to_cupy(values), fmt, granularity=granularity)
            want_scale = reference.amax_scale(values, fmt, granularity)
            assert_same_bits(scale, want_scale, f"{granularity} scale of {shape}")
            assert_same_bits(codes, reference.quantize(values, fmt, want_scale), f"{granularity} codes of {shape}")


@FORMATS
def test_specials(fmt):
    values = random_values((3, 4, 2, 64), "float32")
    values[0, 0, 0] = 0.0
    values[0, 1, 0] = np.nan
    values[1, 0, 0, :4] = [np.inf, -np.inf, np.nan, -0.0]
    values[1, 1, 1] = 1e-45
    values[2, 0, 0] = 1e-38
    values[2, 1, 1, 5] = 3e38
    for granularity in ("tensor", "head", "token"):
        codes, scale = cupy_fp8kv.quantize(to_cupy(values), fmt, granularity=granularity)
        want_codes, want_scale = cupy_fp8kv.quantize(values, fmt, granularity=granularity, backend="numpy")
        assert_same_bits(scale, want_scale, granularity)
        assert_same_bits(codes, want_codes.view(np.uint8), granularity)


def test_given_scales_of_every_kind():
    values = random_values((2, 9, 3, 32), "bfloat16")
    gpu = to_cupy(values)
    per_head, per_token = np.array([0.1, 2.0, 0.7], np.float32), np.random.default_rng(0).random((2, 9, 3), np.float32)
    for scale in (0.3, np.float32(0.3), np.array([0.3], np.float32), per_head, per_token, per_token.astype(np.float64)):
        want = reference.quantize(values, FP8_FORMATS["e4m3"], np.asarray(scale, np.float32))
        for given in (scale, cp.asarray(scale)):
            codes, returned = cupy_fp8kv.quantize(gpu, "e4m3", given)
            assert returned is given
            assert_same_bits(codes, want)
    strided = cp.asarray(np.repeat(per_head, 2))[::2]
    assert_same_bits(cupy_fp8kv.quantize(gpu, "e4m3", strided)[0], reference.quantize(
        values, FP8_FORMATS["e4m3"], per_head))  # fmt: skip


def test_host_arrays_are_uploaded():
    values = random_values((2, 9, 3, 32), "float32")
    for granularity in ("tensor", "head", "token"):
        want_codes, want_scale = cupy_fp8kv.quantize(values, granularity=granularity, backend="numpy")
        codes, scale = cupy_fp8kv.quantize(values, granularity=granularity, backend="cuda")
        assert isinstance(codes, np.ndarray) and isinstance(scale, np.ndarray) and codes.dtype == want_codes.dtype
        assert_same_bits(codes, want_codes)
        assert_same_bits(scale, want_scale)
        back = cupy_fp8kv.dequantize(codes, scale, "float16", backend="cuda")
        assert_same_bits(back, cupy_fp8kv.dequantize(codes, scale, "float16", backend="numpy"))


def test_what_is_refused_on_the_device():
    x = cp.ones((4, 3, 32), np.float16)
    with pytest.raises(ValueError, match=r"x: expected a contiguous last axis"):
        cupy_fp8kv.quantize(cp.ones((4, 3, 64), np.float16)[..., ::2])
    with pytest.raises(ValueError, match=r"x: expected rows at multiples of 16 bytes"):
        cupy_fp8kv.quantize(cp.ones((4, 3, 36), np.float16)[..., :32])
    with pytest.raises(ValueError, match=r"x: expected data that starts at a multiple of 16 bytes"):
        cupy_fp8kv.quantize(cp.ones(4 * 3 * 32 + 4, np.float16)[4:].reshape(4, 3, 32))
    with pytest.raises(ValueError, match=r"scale: .*\[3\] or \[4, 3\], got shape \[4\]"):
        cupy_fp8kv.quantize(x, scale=cp.ones(4, np.float32))
    codes, _ = cupy_fp8kv.quantize(x)
    assert codes.shape == x.shape


def test_torch_types_and_streams():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    values = random_values((2, 50, 3, 64), "float32")
    source = torch.from_numpy(values).cuda()
    tensor = torch.full_like(source, float("nan"))
    cupy_fp8kv.quantize(source, granularity="head")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        tensor.copy_(source)
        codes, scale = cupy_fp8kv.quantize(tensor, "e5m2", granularity="head")
        back = cupy_fp8kv.dequantize(codes, scale, torch.bfloat16)
    side.synchronize()
    want_codes, want_scale = cupy_fp8kv.quantize(values, "e5m2", granularity="head", backend="numpy")
    assert codes.dtype == torch.float8_e5m2 and scale.dtype == torch.float32 and back.dtype == torch.bfloat16
    assert_same_bits(codes, want_codes.view(np.uint8))
    assert_same_bits(scale, want_scale)
    want = cupy_fp8kv.dequantize(want_codes, want_scale, "bfloat16", backend="numpy")
    assert_same_bits(back, want)


# The integer conversions in the decode kernel


def software_plan(plan):
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, software_fp8=True))


SOFTWARE_CASES = [
    Case(k=k, v=v, values=values, group=3, num_kv_heads=2, batch=3, kv_len=kv_len, head_dim=head_dim, q=q,
         kv_lens="device", view="padded")
    for k, v, q, head_dim, kv_len in (
        ("e4m3", "e4m3", "f16", 128, 60), ("e5m2", "e5m2", "f16", 128, 60), ("e4m3", "e5m2", "bf16", 80, 60),
        ("e4m3", "e4m3", "f16", 128, 5000), ("f16", "e4m3", "f16", 64, 100), ("e5m2", "bf16", "bf16", 64, 100),
    )
    for values in ("normal", "codes")
]  # fmt: skip


@pytest.mark.parametrize("case", SOFTWARE_CASES, ids=str)
def test_decode_with_integer_conversions(monkeypatch, case):
    arrays = build(case)
    moved = arrays.to(to_cupy)
    poison_pool(case.batch * 6 * case.head_dim * 2)
    with planned(monkeypatch, software_plan) as plans:
        out, lse = moved.call()
    assert plans[0].spec.software_fp8
    arrays.check(to_host(out), to_host(lse))
    hardware = moved.call()
    # Codes are exact on both ways, up to a power of two that is taken out in fp32.
    np.testing.assert_allclose(to_host(out).astype(np.float32), to_host(hardware[0]).astype(np.float32),
                               rtol=2**-7 if case.q == "bf16" else 2**-10, atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(to_host(lse), to_host(hardware[1]), atol=1e-5)


@FORMATS
@pytest.mark.parametrize("cache", ["k", "v"])
def test_special_codes_with_integer_conversions(monkeypatch, fmt, cache):
    """Every NaN and infinity of the format, in rows that are read: as the oracle has them."""
    codes = np.arange(256, dtype=np.uint8)
    specials = codes[~np.isfinite(reference.decode_codes(codes, fmt))]
    assert len(specials) == {"e4m3": 2, "e5m2": 8}[fmt.name]
    for code in specials:
        for row in (0, 17, 39):
            arrays = build(Case(k=fmt.name, v=fmt.name, group=3, num_kv_heads=2, batch=2, kv_len=40))
            target = arrays.host[1 if cache == "k" else 2]
            target[0, row, 1, 5] = code
            arrays = dataclasses.replace(arrays, **{cache: dataclasses.replace(getattr(arrays, cache), base=target)})
            with planned(monkeypatch, software_plan) as plans:
                out, lse = arrays.to(to_cupy).call()
            assert plans[0].spec.software_fp8
            arrays.check(to_host(out), to_host(lse))


def test_every_code_with_integer_conversions(monkeypatch):
    for fmt in FP8_FORMATS.values():
        codes = cp.arange(256, dtype=np.uint8).reshape(1, 1, 256)
        q = cp.ones((4, 256), np.float16)
        call = cupy_fp8kv.single_decode_with_kv_cache
        with planned(monkeypatch, software_plan) as plans:
            out = call(q, cp.zeros_like(codes), codes, kv_format=fmt.name)
        assert plans[0].spec.software_fp8
        values = reference.decode_codes(np.arange(256, dtype=np.uint8), fmt)
        finite = np.isfinite(values)
        for head in to_host(out):
            np.testing.assert_array_equal(head[finite], values[finite].astype(np.float16))
            assert np.isnan(head[np.isnan(values)]).all()
