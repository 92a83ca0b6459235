// E4M3FN: 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest value 448, no infinity, NaN 0x7F and 0xFF.
#pragma once
#include "kv_format/fp8.cuh"

struct E4M3 : Fp8Format<E4M3> {
    static constexpr float kMax = 448.0f;
#if FP8_HARDWARE
    static constexpr float kGain = 1.0f;

    static DEVICE void decode_word(u32 word, u32 (&pairs)[2]) { ptx::f16x4_from_e4m3x4(word, pairs); }

    static DEVICE u32 encode_pair(float lo, float hi) { return ptx::e4m3x2_from_floats(lo, hi); }
#else
    // Exponent and mantissa moved to where fp16 has them give the value times 2^(7 - 15), subnormals included.
    static constexpr float kGain = 256.0f;

    static DEVICE void decode_word(u32 word, u32 (&pairs)[2]) {
        pairs[0] = shift_into_place(ptx::permute_bytes(word, 0, 0x1404));
        pairs[1] = shift_into_place(ptx::permute_bytes(word, 0, 0x3424));
    }

    static DEVICE u32 encode_pair(float lo, float hi) { return encode(lo) | encode(hi) << 8; }

  private:
    // `codes`: one code in the high byte of each half, zeros in the low bytes.
    static DEVICE u32 shift_into_place(u32 codes) {
        const u32 magnitude = (codes >> 1) & 0x3f803f80u;
        // Only the NaN code 0x7F carries into bit 14, which makes fp16's exponent all ones: NaN stays NaN.
        const u32 nan = (magnitude + 0x00800080u) & 0x40004000u;
        return (codes & 0x80008000u) | magnitude | nan;
    }

    static DEVICE u32 encode(float x) { return encode_fp8_software<3, 7, 0x7eu>(x); }
#endif
};
