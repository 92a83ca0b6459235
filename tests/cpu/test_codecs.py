"""The FP8 codecs against the OCP table, spelled out bit by bit, for every code and every 16-bit input."""

import math

import ml_dtypes
import numpy as np
import pytest

from cupy_fp8kv.backends.reference import decode_codes, encode, to_float
from cupy_fp8kv.formats import BF16, E4M3, E5M2, F16, FP8_FORMATS, KV_FORMATS

pytestmark = pytest.mark.filterwarnings("error")

FORMATS = pytest.mark.parametrize("fmt", FP8_FORMATS.values(), ids=str)
#: Mantissa bits, bias, largest finite code.
BITS = {"e4m3": (3, 7, 0x7E), "e5m2": (2, 15, 0x7B)}


def value_of_code(code, fmt):
    mantissa_bits, bias, max_code = BITS[fmt.name]
    sign, magnitude = -1.0 if code & 0x80 else 1.0, code & 0x7F
    if magnitude > max_code:
        return sign * math.inf if fmt is E5M2 and magnitude == 0x7C else math.nan
    exponent, mantissa = magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def nearest_codes(values, fmt):
    """Encode by search: the nearer of the two neighbouring values, the even code on a tie."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = values.astype(np.float64)
        nan = np.isnan(x)
    max_code = BITS[fmt.name][2]
    table = np.array([value_of_code(code, fmt) for code in range(max_code + 1)])
    magnitude = np.minimum(np.where(nan, 0.0, np.abs(x)), table[-1])
    above = np.maximum(np.searchsorted(table, magnitude), 1)
    below = above - 1
    up, down = table[above] - magnitude, magnitude - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = code | np.where(np.signbit(x), 0x80, 0)
    return np.where(nan, 0x7F, code).astype(np.uint8)


def all_bits(dtype):
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def between_codes(fmt):
    """Midpoints of neighbouring values (exact in every float type), and values just to either side."""
    table = np.array([value_of_code(code, fmt) for code in range(BITS[fmt.name][2] + 1)])
    return (table[1:] + table[:-1]) / 2


def test_table_of_numerics():
    assert E4M3.max == value_of_code(0x7E, E4M3) == 448.0
    assert E5M2.max == value_of_code(0x7B, E5M2) == 57344.0
    assert value_of_code(0x08, E4M3) == 2.0**-6 and value_of_code(0x01, E4M3) == 2.0**-9
    assert value_of_code(0x04, E5M2) == 2.0**-14 and value_of_code(0x01, E5M2) == 2.0**-16


@FORMATS
def test_every_code_decodes(fmt):
    codes = np.arange(256, dtype=np.uint8)
    want = np.array([value_of_code(code, fmt) for code in range(256)])
    got = decode_codes(codes, fmt)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[[0x00, 0x80]]), [False, True])


@FORMATS
def test_finite_codes_survive_a_round_trip(fmt):
    codes = np.arange(256, dtype=np.uint8)
    values = decode_codes(codes, fmt)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(encode(values, fmt)[finite], codes[finite])
    assert finite.sum() == {"e4m3": 254, "e5m2": 248}[fmt.name]


@FORMATS
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_input_encodes(fmt, dtype):
    values = all_bits(dtype)
    got = encode(values, fmt)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, nearest_codes(values, fmt))


@FORMATS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_and_their_neighbours(fmt, dtype):
    middle = between_codes(fmt).astype(dtype)
    values = np.concatenate([middle, np.nextafter(middle, dtype(0)), np.nextafter(middle, dtype(np.inf))])
    values = np.concatenate([values, -values])
    np.testing.assert_array_equal(encode(values, fmt), nearest_codes(values, fmt))


@FORMATS
@pytest.mark.parametrize("relative", [2.0**-40, -(2.0**-40), 2.0**-25, -(2.0**-25)])
def test_float64_rounds_once(fmt, relative):
    # Through float32 these would become ties.
    values = between_codes(fmt) * (1 + relative)
    want = np.arange(len(values)) + (relative > 0)
    np.testing.assert_array_equal(encode(values, fmt), want)
    np.testing.assert_array_equal(encode(-values, fmt), want | 0x80)


@FORMATS
@pytest.mark.parametrize("bits", [np.uint32, np.uint64])
def test_random_wide_inputs(fmt, bits):
    rng = np.random.default_rng(1)
    dtype = {np.uint32: np.float32, np.uint64: np.float64}[bits]
    anything = rng.integers(0, np.iinfo(bits).max, 50_000, bits, endpoint=True).view(dtype)
    in_range = (rng.standard_normal(50_000) * 2.0 ** rng.integers(-20, 18, 50_000)).astype(dtype)
    for values in (anything, in_range):
        np.testing.assert_array_equal(encode(values, fmt), nearest_codes(values, fmt))


@FORMATS
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_specials(fmt, dtype):
    largest = BITS[fmt.name][2]
    huge = float(ml_dtypes.finfo(dtype).max)
    values = np.array([np.inf, huge, -np.inf, -huge, 0.0, -0.0, np.nan]).astype(dtype)
    values = np.append(values, -values[-1:])
    want = [largest, largest, largest | 0x80, largest | 0x80, 0x00, 0x80, 0x7F, 0x7F]
    np.testing.assert_array_equal(encode(values, fmt), want)


@FORMATS
def test_rounding_beyond_the_range_saturates(fmt):
    step = fmt.max - value_of_code(BITS[fmt.name][2] - 1, fmt)
    values = fmt.max + step * np.array([0.25, 0.5, 0.75, 1.0, 2.0])
    np.testing.assert_array_equal(encode(values.astype(np.float32), fmt), BITS[fmt.name][2])


@pytest.mark.parametrize("fmt", KV_FORMATS.values(), ids=str)
def test_what_still_rounds_to_the_largest_value(fmt):
    """Against ml_dtypes, which does not saturate: the next float is NaN or infinite."""
    last = np.float32(fmt.largest_rounded)
    with np.errstate(over="ignore"):
        beyond = np.nextafter(last, np.float32(np.inf)).astype(fmt.dtype)
    assert float(last.astype(fmt.dtype)) == fmt.max and not np.isfinite(beyond.astype(np.float32))


@FORMATS
def test_encode_keeps_shape_and_takes_views(fmt):
    values = np.random.default_rng(0).standard_normal((6, 4, 10), np.float32)
    view = values.transpose(2, 0, 1)[::3, ::2]
    np.testing.assert_array_equal(encode(view, fmt), encode(view.copy(), fmt))
    assert encode(np.float32(1.0), fmt).shape == () and encode(np.empty((0, 3), np.float32), fmt).shape == (0, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_float_reads_every_storage(dtype):
    values = np.linspace(-3, 3, 24).reshape(4, 6)
    for fmt in (F16, BF16, E4M3, E5M2):
        stored = values.astype(np.float32).astype(fmt.dtype)
        want = stored.astype(np.float64)
        for array in (stored, stored.view(np.uint8)) if fmt.is_fp8 else (stored,):
            got = to_float(array[:, ::2], fmt, dtype)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, want[:, ::2])
    assert len(KV_FORMATS) == 4, "a new format: name its storage here"
