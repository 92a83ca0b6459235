// What the one-byte formats share: how bytes of rows become the fragments of a matrix product.
//
// A format derives from this with itself as `Format` and supplies
//   kMax                         the largest finite value
//   kGain                        the stored value is kGain times what `decode_word` gives (a power of two)
//   decode_word(word, pairs)     four codes -> two packed pairs of the operand type, in order
//   encode_pair(lo, hi)          two floats -> two codes (low byte first): to nearest even, saturating, NaN -> 0x7F
#pragma once
#include "base/operand.cuh"

template <class Format>
struct Fp8Format {
    using Operand = HalfOperand;
    static constexpr int kBytes = 1;

    // Elements 4 * step .. 4 * step + 3 of a row.
    static DEVICE void row_pairs(const u32* row, int step, u32 (&pairs)[2]) {
        Format::decode_word(row[step], pairs);
    }

    // Elements 2 * j and 2 * j + 1 of two rows, paired across the rows: (a[2j], b[2j]) and (a[2j+1], b[2j+1]).
    static DEVICE void column_pairs(const u32* a, const u32* b, int j, u32 (&pairs)[2]) {
        Format::decode_word(ptx::permute_bytes(a[j / 2], b[j / 2], j % 2 ? 0x7362 : 0x5140), pairs);
    }

    // Four neighbouring values from floats.
    static DEVICE u32 word_of(const float* x) {
        return Format::encode_pair(x[0], x[1]) | Format::encode_pair(x[2], x[3]) << 16;
    }
    static DEVICE void store_4(u8* to, const float4& x) {
        *reinterpret_cast<u32*>(to) = Format::encode_pair(x.x, x.y) | Format::encode_pair(x.z, x.w) << 16;
    }

    // Value of code number `index` (0..3) in a word of codes.
    static DEVICE float value(u32 word, int index) {
        u32 pairs[2];
        Format::decode_word(word, pairs);
        const u32 pair = pairs[index / 2];
        return Format::kGain * (index % 2 ? Operand::high(pair) : Operand::low(pair));
    }
};

// Encodes without conversion instructions; exact for every float. For formats with a sign, `EXPONENT_BITS` and
// `MANTISSA_BITS` bits and the given bias (OCP FP8 specification).
template <int MANTISSA_BITS, int BIAS, u32 MAX_CODE>
DEVICE u32 encode_fp8_software(float x) {
    const u32 bits = ptx::float_bits(x);
    const u32 sign = (bits >> 24) & 0x80u;
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fu;
    constexpr int kShift = 23 - MANTISSA_BITS;
    constexpr u32 kMinNormal = static_cast<u32>(127 - BIAS + 1) << 23;
    u32 code;
    if (magnitude < kMinNormal) {
        // Adding 2^23 steps of the smallest subnormal leaves the rounded number of steps in the low bits.
        constexpr u32 kMagic = static_cast<u32>(127 - BIAS + 1 - MANTISSA_BITS + 23) << 23;
        code = ptx::float_bits(ptx::bits_float(magnitude) + ptx::bits_float(kMagic)) - kMagic;
    } else {
        const u32 odd = (magnitude >> kShift) & 1u;
        code = (magnitude + (1u << (kShift - 1)) - 1u + odd - (static_cast<u32>(127 - BIAS) << 23)) >> kShift;
    }
    return sign | min_of(code, MAX_CODE);
}
