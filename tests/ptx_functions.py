"""Every function of ``cuda_src/base/ptx.cuh``: a kernel that calls it, inputs, and what NumPy says it is.

The same kernel text runs in the emulator, over the host bodies, and on a GPU, over the instructions. An item is some
32-bit words in and some out; a warp's 32 items are neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupy_fp8kv.backends import reference
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.jit import sources

Array = np.ndarray[Any, Any]

THREADS, GRID = 64, 4
_KERNEL = """
struct Params { const u32* in; u32* out; i64 count; };
extern "C" __global__ void kernel(const __grid_constant__ Params p) {
    for (i64 i = blockIdx.x * %(threads)d + threadIdx.x; i < p.count; i += %(threads)d * gridDim.x) {
        const u32* in = p.in + i * %(ins)d;
        u32* out = p.out + i * %(outs)d;
        %(body)s
    }
}
"""


@dataclass(frozen=True, eq=False)
class Function:
    """``body`` computes ``out[0 .. outs - 1]`` from ``in[0 .. ins - 1]``; ``define`` does so for ``[n, ins]``.

    Results are the same bits; where ``floats`` says so, any NaN is as good as another. ``error(inputs)`` allows a
    distance from the definition instead. ``arch``: from which on it exists.
    """

    title: str
    ins: int
    outs: int
    body: str
    inputs: Callable[[int], Array]
    define: Callable[[Array], Array]
    floats: bool = False
    error: Callable[[Array], Array] | None = None
    arch: int = 80

    entry = "kernel"
    threads = THREADS
    shared_bytes = 0

    def __str__(self) -> str:
        return self.title

    def source(self) -> str:
        text = _KERNEL % {"threads": THREADS, "ins": self.ins, "outs": self.outs, "body": self.body}
        return sources.render(f"ptx function {self.title}", [], [], "base/ptx.cuh") + text

    def check(self, inputs: Array, got: Array) -> None:
        """Hold ``got`` against the definition."""
        with np.errstate(all="ignore"):
            want = self.define(inputs)
            if self.error is None:
                assert_same(got, want, self.floats)
            else:
                assert_near(got.view(np.float32), want, self.error(inputs))


def assert_same(got: Array, want: Array, floats: bool) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype == np.uint32
    differ = got != want
    if floats:
        differ &= ~(np.isnan(got.view(np.float32)) & np.isnan(want.view(np.float32)))
    at = np.argwhere(differ)
    assert not len(at), f"{len(at)} words differ, the first at {at[0]}: {got[tuple(at[0])]:#x}, {want[tuple(at[0])]:#x}"


def assert_near(got: Array, want: Array, error: Array) -> None:
    """NaN and infinities at the same places, everything else within ``error``."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    far = np.abs(np.where(finite, got - want, 0.0)) > error
    assert not far.any(), f"{far.sum()} of {far.size} are too far off, the first at {np.argwhere(far)[0]}"


# Inputs: n is a multiple of 65536


def words(count: int) -> Callable[[int], Array]:
    return lambda n: np.random.default_rng(count).integers(0, 2**32, (n, count), np.uint32)


def floats(count: int) -> Callable[[int], Array]:
    """Any bits, every fp16 value, and what lies just beside it or half a step from it."""

    def build(n: int) -> Array:
        x = words(count)(n)
        every = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
        with np.errstate(all="ignore"):
            edges = np.concatenate(
                [every, np.nextafter(every, np.float32(np.inf)), every * np.float32(1.00048828125), every / 4]
            )
        used = min(len(edges), n // 2)
        x[:used, 0] = np.random.default_rng(1).permutation(edges)[:used].view(np.uint32)
        return x

    return build


def exponents(n: int) -> Array:
    """Arguments of exp2 and log2: what softmax has, and everything else."""
    x = floats(1)(n)
    x[n // 2 :, 0] = np.random.default_rng(2).uniform(-160, 140, n - n // 2).astype(np.float32).view(np.uint32)
    return x


def fragments(dtype: Any, integers: bool) -> Callable[[int], Array]:
    """A, B and C of a matrix product: 4, 2 and 4 words."""

    def build(n: int) -> Array:
        rng = np.random.default_rng(3)
        if integers:
            halves, c = rng.integers(-8, 9, (n, 12)), rng.integers(-1000, 1001, (n, 4))
        else:
            halves = rng.standard_normal((n, 12)) * np.exp2(rng.integers(-6, 7, (n, 12)))
            c = rng.standard_normal((n, 4))
        ab = halves.astype(np.float32).astype(dtype).view(np.uint16).reshape(n, 12).view(np.uint32)
        return np.concatenate([ab, c.astype(np.float32).view(np.uint32)], axis=1)

    return build


# Definitions


def _f32(x: Array) -> Array:
    return np.ascontiguousarray(x).view(np.float32)


def _bits(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _rounded(x: Array, dtype: Any) -> Array:
    """Packed pairs of a 16-bit type; NaN is 0x7FFF."""
    bits = _f32(x).astype(dtype).view(np.uint16)
    return np.ascontiguousarray(np.where(np.isnan(_f32(x)), np.uint16(0x7FFF), bits)).view(np.uint32)


def _codes(x: Array, name: str) -> Array:
    codes = reference.encode(_f32(x), KV_FORMATS[name]).astype(np.uint32)
    return codes[:, :1] | codes[:, 1:] << 8


def _e4m3_halves(x: Array) -> Array:
    values = np.ascontiguousarray(x).view(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.view(np.uint16)).view(np.uint32)


def _permuted(x: Array) -> Array:
    """PTX ISA, prmt: a nibble names one of eight bytes; its upper bit asks for that byte's sign instead."""
    source = np.ascontiguousarray(x[:, :2]).view(np.uint8)
    nibbles = x[:, 2:] >> np.array([0, 4, 8, 12], np.uint32) & 15
    chosen = np.take_along_axis(source, (nibbles & 7).astype(np.int64), 1)
    return np.where(nibbles & 8, np.where(chosen & 0x80, 255, 0), chosen).astype(np.uint8).view(np.uint32)


_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def _matrices(x: Array, dtype: Any) -> tuple[Array, Array, Array]:
    """PTX ISA, "Matrix fragments for mma.m16n8k16": A ``[w, 16, 16]``, B ``[w, 16, 8]``, C ``[w, 16, 8]``."""
    halves = np.ascontiguousarray(x[:, :6]).view(np.uint16).view(dtype).astype(np.float64).reshape(-1, 32, 6, 2)
    a, b, c = np.empty((len(halves), 16, 16)), np.empty((len(halves), 16, 8)), np.empty((len(halves), 16, 8))
    sums = _f32(x[:, 6:]).reshape(-1, 32, 4)
    for h in range(2):
        for i in range(4):
            a[:, _G + 8 * (i % 2), 2 * _T + h + 8 * (i // 2)] = halves[:, :, i, h]
        for i in range(2):
            b[:, 2 * _T + h + 8 * i, _G] = halves[:, :, 4 + i, h]
    for i in range(4):
        c[:, _G + 8 * (i // 2), 2 * _T + i % 2] = sums[:, :, i]
    return a, b, c


def _to_fragments(c: Array) -> Array:
    return np.stack([c[:, _G + 8 * (i // 2), 2 * _T + i % 2] for i in range(4)], axis=-1).reshape(-1, 4)


def _product(dtype: Any) -> Callable[[Array], Array]:
    def define(x: Array) -> Array:
        a, b, c = _matrices(x, dtype)
        return _to_fragments(a @ b + c)

    return define


def _product_error(dtype: Any) -> Callable[[Array], Array]:
    """The order and the rounding of a tensor core's sum are its own: 2^-18 of the sum of magnitudes is allowed."""

    def error(x: Array) -> Array:
        a, b, c = (np.abs(m) for m in _matrices(x, dtype))
        return _to_fragments(a @ b + c) * 2.0**-18

    return error


def _transposed(x: Array) -> Array:
    m = np.empty((len(x) // 32, 8, 8), np.uint16)
    for h in range(2):
        m[:, _G, 2 * _T + h] = np.ascontiguousarray(x).view(np.uint16).reshape(-1, 32, 2)[:, :, h]
    pairs = np.stack([m[:, 2 * _T + h, _G] for h in range(2)], axis=-1)
    return np.ascontiguousarray(pairs).view(np.uint32).reshape(-1, 1)


def _voted(x: Array) -> Array:
    found = ((x[:, 0] & 31) == 0).reshape(-1, 32).any(1)
    return np.repeat(found, 32).astype(np.uint32)[:, None]


def _ballot(x: Array) -> Array:
    votes = ((x[:, 0] & 31) > 11).reshape(-1, 32)
    return np.repeat((votes << np.arange(32)).sum(1), 32).astype(np.uint32)[:, None]


def _sum_of_lanes(x: Array) -> Array:
    return np.repeat(x.reshape(-1, 32).sum(1, np.uint32), 32)[:, None]


def _lowest_bit(x: Array) -> Array:
    return np.log2((x & -x.astype(np.int64)).astype(np.float64)).astype(np.uint32)


def _shuffled(source: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def define(x: Array) -> Array:
        lanes = source(x[:, 1].reshape(-1, 32)).astype(np.int64)
        return np.take_along_axis(x[:, 0].reshape(-1, 32), lanes, 1).reshape(-1, 1)

    return define


def _maxima(x: Array) -> Array:
    out = np.zeros_like(x)
    np.maximum.at(out, np.arange(len(x)) % 64, x)
    return out


def _sums(x: Array) -> Array:
    out = np.zeros(len(x), np.uint64)
    np.add.at(out, np.arange(len(x)) % 64, x[:, 0])
    return out.view(np.uint32).reshape(-1, 2)


def _swapped(partners: Array) -> Callable[[Array], Array]:
    return lambda x: x.reshape(-1, len(partners))[:, partners].reshape(-1, 1)


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Rounded once: the product is exact in float64, the sum is rounded to odd there, and then to nearest."""
    with np.errstate(all="ignore"):
        product, c = _flushed(a).astype(np.float64) * _flushed(b).astype(np.float64), _flushed(c).astype(np.float64)
        total = product + c
        part = total - product
        rest = (product - (total - part)) + (c - part)
        even = np.isfinite(rest) & (rest != 0) & (total.view(np.uint64) % 2 == 0)
        total = np.where(even, np.nextafter(total, np.where(rest > 0, np.inf, -np.inf)), total)
        return _bits(_flushed(total.astype(np.float32)))


def _exp2(x: Array) -> Array:
    exact = np.exp2(_flushed(_f32(x)).astype(np.float64))
    return np.where(exact > float(np.finfo(np.float32).max), np.inf, np.where(exact < 2.0**-126, 0.0, exact))


def _log2_error(x: Array) -> Array:
    value = np.abs(_f32(x)).astype(np.float64)
    inside = (value > 0.5) & (value < 2.0)
    return np.where(inside, 2.0**-22, 2.0**-22 * np.abs(np.log2(value)))


def _load(body: str, ins: int, outs: int, title: str) -> Function:
    return Function(title, ins, outs, body, words(ins), lambda x: np.ascontiguousarray(x[:, :outs]))


def _floats_in(name: str, count: int) -> str:
    return f"ptx::{name}(" + ", ".join(f"ptx::bits_float(in[{i}])" for i in range(count)) + ")"


F16, BF16 = np.float16, ml_dtypes.bfloat16
_MMA = (
    "float c[4] = {{ptx::bits_float(in[6]), ptx::bits_float(in[7]), ptx::bits_float(in[8]), ptx::bits_float(in[9])}};\n"
    "        const u32 a[4] = {{in[0], in[1], in[2], in[3]}};\n"
    "        ptx::mma_{}(c, a, in[4], in[5]);\n"
    "        for (int j = 0; j < 4; j++) out[j] = ptx::float_bits(c[j]);"
)


def _mma(name: str, dtype: Any, integers: bool) -> Function:
    exact = _product(dtype)
    return Function(
        f"mma_{name} of {'integers' if integers else 'floats'}", 10, 4, _MMA.format(name), fragments(dtype, integers),
        (lambda x: _bits(exact(x))) if integers else exact, error=None if integers else _product_error(dtype),
    )  # fmt: skip


_EXCHANGE = (
    "__shared__ u32 words[64];\n        words[threadIdx.x] = in[0];\n        ptx::{0}();\n"
    "        out[0] = words[{1}];\n        ptx::{0}();"
)

#: Words that the other half of the CTA has stored, read back with the widest load and others.
_LOAD_SHARED = (
    "__shared__ __align__(16) u32 words[256];\n        for (int j = 0; j < {words}; j++)"
    " words[4 * threadIdx.x + j] = in[j];\n        ptx::sync_threads();\n        u32 v[4] = {{}};\n"
    "        ptx::load_shared<{bytes}>(v, reinterpret_cast<const u8*>(words + 4 * (63 - threadIdx.x)));\n"
    "        for (int j = 0; j < {words}; j++) out[j] = v[j];\n        ptx::sync_threads();"
)

_COUNTING_BARRIER = """__shared__ u64 barrier;
        __shared__ u32 words[64];
        const i64 round = i / (64 * gridDim.x);
        if (round == 0) {
            if (threadIdx.x == 0) {
                ptx::barrier_init(&barrier, 64);
                ptx::barrier_init_done();
            }
            ptx::sync_threads();
        }
        words[threadIdx.x] = in[0];
        ptx::barrier_arrive(&barrier);
        ptx::barrier_wait(&barrier, round & 1);
        out[0] = words[63 - threadIdx.x];
        ptx::sync_threads();"""


def _load_shared(nbytes: int) -> Function:
    count = max(1, nbytes // 4)
    mask = np.uint32(0xFFFF if nbytes == 2 else 0xFFFFFFFF)
    return Function(
        f"load_shared<{nbytes}>", count, count, _LOAD_SHARED.format(bytes=nbytes, words=count), words(count),
        lambda x: x.reshape(-1, 64, count)[:, ::-1].reshape(-1, count) & mask,
    )  # fmt: skip


FUNCTIONS = [
    *(_load_shared(nbytes) for nbytes in (2, 4, 8, 16)),
    Function(
        "barrier_init, barrier_arrive, barrier_wait", 1, 1, _COUNTING_BARRIER, words(1), _swapped(63 - np.arange(64)),
        arch=90,
    ),
    Function(
        "sync_first", 1, 1, _EXCHANGE.format("sync_first<64>", "63 - threadIdx.x"), words(1),
        _swapped(63 - np.arange(64)),
    ),
    Function(
        "load_once<2>", 1, 1, "u32 v[1]; ptx::load_once<2>(v, reinterpret_cast<const u8*>(in)); out[0] = v[0];",
        words(1), lambda x: x & 0xFFFF,
    ),
    _load("u32 v[1]; ptx::load_once<4>(v, reinterpret_cast<const u8*>(in)); out[0] = v[0];", 1, 1, "load_once<4>"),
    _load(
        "u32 v[2]; ptx::load_once<8>(v, reinterpret_cast<const u8*>(in));\n        out[0] = v[0], out[1] = v[1];",
        2, 2, "load_once<8>",
    ),
    _load(
        "u32 v[4]; ptx::load_once<16>(v, reinterpret_cast<const u8*>(in));\n"
        "        for (int j = 0; j < 4; j++) out[j] = v[j];", 4, 4, "load_once<16>",
    ),
    _load("out[0] = ptx::load_4(in);", 1, 1, "load_4"),
    _load("const uint2 v = ptx::load_8(in);\n        out[0] = v.x, out[1] = v.y;", 2, 2, "load_8"),
    _load(
        "u32 v[4]; ptx::load_16(v, in);\n        for (int j = 0; j < 4; j++) out[j] = v[j];", 4, 4, "load_16",
    ),
    Function(
        "load_fresh_8", 2, 2,
        "const float2 v = ptx::load_fresh_8(reinterpret_cast<const float*>(in));\n"
        "        out[0] = ptx::float_bits(v.x), out[1] = ptx::float_bits(v.y);", words(2), lambda x: x,
    ),
    Function(
        "load_fresh_16", 4, 4,
        "const float4 v = ptx::load_fresh_16(reinterpret_cast<const float*>(in));\n"
        "        out[0] = ptx::float_bits(v.x), out[1] = ptx::float_bits(v.y);\n"
        "        out[2] = ptx::float_bits(v.z), out[3] = ptx::float_bits(v.w);", words(4), lambda x: x,
    ),
    Function(
        "store_words, fence_device, load_words", 4, 4,
        "const u64 low = static_cast<u64>(in[1]) << 32 | in[0], high = static_cast<u64>(in[3]) << 32 | in[2];\n"
        "        u64* place = reinterpret_cast<u64*>(out);\n        ptx::store_words(place, low, high);\n"
        "        ptx::fence_device();\n        u64 first, second;\n        ptx::load_words(place, first, second);\n"
        "        ptx::store_words(place, second, first);", words(4), lambda x: x[:, [2, 3, 0, 1]],
    ),
    *(_mma(name, dtype, integers) for name, dtype in (("f16", F16), ("bf16", BF16)) for integers in (True, False)),
    Function("transpose_8x8", 1, 1, "out[0] = ptx::transpose_8x8(in[0]);", words(1), _transposed),
    Function("permute_bytes", 3, 1, "out[0] = ptx::permute_bytes(in[0], in[1], in[2]);", words(3), _permuted),
    Function(
        "multiply_high", 2, 1, "out[0] = ptx::multiply_high(in[0], in[1]);", words(2),
        lambda x: (x[:, :1].astype(np.uint64) * x[:, 1:] >> np.uint64(32)).astype(np.uint32),
    ),
    # PTX ISA: two units in the last place.
    Function(
        "exp2", 1, 1, f"out[0] = ptx::float_bits({_floats_in('exp2', 1)});", exponents, _exp2,
        error=lambda x: np.maximum(2.0 * 2.0**-23 * _exp2(x), 2.0**-126 * (1 + 2.0**-22) * (_exp2(x) < 2.0**-125)),
    ),
    # PTX ISA: 2^-22 absolute between 1/2 and 2, relative elsewhere.
    Function(
        "log2", 1, 1, f"out[0] = ptx::float_bits({_floats_in('log2', 1)});", floats(1),
        lambda x: np.log2(_f32(x).astype(np.float64)), error=_log2_error,
    ),
    Function(
        "divide", 2, 1, f"out[0] = ptx::float_bits({_floats_in('divide', 2)});", floats(2),
        lambda x: _bits(_flushed(_flushed(_f32(x[:, :1])) / _flushed(_f32(x[:, 1:])))), floats=True,
    ),
    Function(
        "multiply_add", 3, 1, f"out[0] = ptx::float_bits({_floats_in('multiply_add', 3)});", floats(3),
        lambda x: _multiply_add(*(_f32(x[:, i : i + 1]) for i in range(3))), floats=True,
    ),
    Function(
        "lowest_bit", 1, 1, "out[0] = ptx::lowest_bit(in[0] | 1u << (in[0] >> 27));", words(1),
        lambda x: _lowest_bit(x | np.uint32(1) << (x >> np.uint32(27))),
    ),
    Function("float_bits, bits_float", 1, 1, "out[0] = ptx::float_bits(ptx::bits_float(in[0]));", words(1), np.array),
    Function("pack_f16", 2, 1, f"out[0] = {_floats_in('pack_f16', 2)};", floats(2), lambda x: _rounded(x, F16)),
    Function("pack_bf16", 2, 1, f"out[0] = {_floats_in('pack_bf16', 2)};", floats(2), lambda x: _rounded(x, BF16)),
    Function(
        "f16_float", 1, 1, "out[0] = ptx::float_bits(ptx::f16_float(in[0] & 0xffffu));",
        lambda n: np.arange(n, dtype=np.uint32)[:, None], floats=True,
        define=lambda x: _bits((x & 0xFFFF).astype(np.uint16).view(F16).astype(np.float32)),
    ),
    Function(
        "f16x4_from_e4m3x4", 1, 2,
        "u32 pairs[2];\n        ptx::f16x4_from_e4m3x4(in[0], pairs);\n"
        "        out[0] = pairs[0], out[1] = pairs[1];",
        lambda n: (np.arange(n, dtype=np.uint32) * 0x00010001 ^ np.arange(n, dtype=np.uint32) >> 16)[:, None],
        _e4m3_halves, arch=89,
    ),
    Function(
        "e4m3x2_from_floats", 2, 1, f"out[0] = {_floats_in('e4m3x2_from_floats', 2)};", floats(2),
        lambda x: _codes(x, "e4m3"), arch=89,
    ),
    Function(
        "e5m2x2_from_floats", 2, 1, f"out[0] = {_floats_in('e5m2x2_from_floats', 2)};", floats(2),
        lambda x: _codes(x, "e5m2"), arch=89,
    ),
    Function("any", 1, 1, "out[0] = ptx::any((in[0] & 31) == 0);", words(1), _voted),
    Function("sum_of_lanes", 1, 1, "out[0] = ptx::sum_of_lanes(in[0]);", words(1), _sum_of_lanes),
    Function("ballot", 1, 1, "out[0] = ptx::ballot((in[0] & 31) > 11);", words(1), _ballot),
    Function(
        "shuffle_word", 2, 1, "out[0] = ptx::shuffle_word(in[0], in[1]);", words(2),
        _shuffled(lambda lanes: lanes & 31),
    ),
    Function(
        "shuffle", 2, 1, "out[0] = ptx::float_bits(ptx::shuffle(ptx::bits_float(in[0]), in[1] & 31));", words(2),
        _shuffled(lambda lanes: lanes & 31),
    ),
    Function(
        "shuffle of words", 2, 1, "out[0] = ptx::shuffle(in[0], static_cast<int>(in[1] & 31));", words(2),
        _shuffled(lambda lanes: lanes & 31),
    ),
    *(
        Function(
            f"shuffle_xor {mask}", 2, 1, f"out[0] = ptx::float_bits(ptx::shuffle_xor(ptx::bits_float(in[0]), {mask}));",
            words(2), _shuffled(lambda lanes, mask=mask: np.broadcast_to(_LANE ^ mask, lanes.shape)),
        )
        for mask in (1, 2, 4, 8, 16, 31)
    ),
    Function(
        "thread_index", 1, 1, "out[0] = in[0] + ptx::thread_index();", words(1),
        lambda x: x + (np.arange(x.size, dtype=np.uint32) % THREADS).reshape(x.shape),
    ),
    Function(
        "prefetch", 1, 1, "ptx::prefetch(reinterpret_cast<const u8*>(in));\n        out[0] = in[0];", words(1),
        np.array,
    ),
    Function(
        "sync_threads", 1, 1, _EXCHANGE.format("sync_threads", "63 - threadIdx.x"), words(1),
        _swapped(63 - np.arange(64)),
    ),
    Function(
        "sync_warp", 1, 1, _EXCHANGE.format("sync_warp", "threadIdx.x ^ 5"), words(1), _swapped(np.arange(64) ^ 5),
    ),
    Function("atomic_max", 1, 1, "ptx::atomic_max(&p.out[i % 64], in[0]);", words(1), _maxima),
    Function(
        "atomic_add", 1, 2, "ptx::atomic_add(reinterpret_cast<u64*>(p.out) + i % 64, in[0]);", words(1), _sums,
    ),
    Function(
        "wait_for_previous_kernel, let_next_kernel_start", 1, 1,
        "ptx::let_next_kernel_start();\n        ptx::wait_for_previous_kernel();\n        out[0] = in[0];", words(1),
        np.array,
    ),
]  # fmt: skip
