// The number formats of the kernels on a CPU, each rounded to nearest even: binary16, bfloat16 and the two FP8 formats.
#pragma once
// C's own header: the one that libstdc++ puts in its place brings all of <cmath>, a quarter of the time that a kernel
// takes to compile.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <stdint.h>

namespace numbers {

inline uint32_t float_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

inline float f16_float(uint32_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
    if (exponent == 0) {
        const float steps = static_cast<float>(mantissa) * 5.9604644775390625e-08f;  // 2^-24
        return sign ? -steps : steps;
    }
    return bits_float(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}

inline uint32_t float_f16(float x) {
    const uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
    const float magnitude = fabsf(x);
    if (x != x) return 0x7fffu;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    if (magnitude < 6.103515625e-05f) return sign | static_cast<uint32_t>(nearbyintf(ldexpf(magnitude, 24)));
    const uint32_t bits = float_bits(magnitude);
    return sign | ((bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}

inline float bf16_float(uint32_t h) { return bits_float(h << 16); }

inline uint32_t float_bf16(float x) {
    const uint32_t bits = float_bits(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// FP8 with a sign, `mantissa_bits` and a bias: the value of a finite code, and the nearest code, saturating at `most`.
inline float fp8_float(uint32_t code, int mantissa_bits, int bias) {
    const int exponent = static_cast<int>((code & 0x7fu) >> mantissa_bits);
    const int mantissa = static_cast<int>(code & ((1u << mantissa_bits) - 1u));
    const float steps = static_cast<float>(exponent ? (1 << mantissa_bits) + mantissa : mantissa);
    const float magnitude = ldexpf(steps, (exponent ? exponent : 1) - bias - mantissa_bits);
    return (code & 0x80u) ? -magnitude : magnitude;
}

inline uint32_t float_fp8(float x, int mantissa_bits, int bias, uint32_t most) {
    if (x != x) return 0x7fu;
    const uint32_t sign = (float_bits(x) >> 24) & 0x80u;
    const double magnitude = fabs(static_cast<double>(x));
    uint32_t below = 0, above = most;  // codes rise with their values
    if (magnitude >= fp8_float(most, mantissa_bits, bias)) return sign | most;
    while (above - below > 1) {
        const uint32_t middle = (below + above) / 2;
        (fp8_float(middle, mantissa_bits, bias) <= magnitude ? below : above) = middle;
    }
    const double half =
        (static_cast<double>(fp8_float(below, mantissa_bits, bias)) + fp8_float(above, mantissa_bits, bias)) / 2;
    return sign | (magnitude > half || (magnitude == half && below % 2) ? above : below);
}

// As the instructions with .ftz read and write floats.
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }

}  // namespace numbers
