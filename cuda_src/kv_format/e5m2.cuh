// E5M2: 1 sign, 5 exponent (bias 15), 2 mantissa bits: the upper byte of an fp16, infinities and NaNs included.
#pragma once
#include "kv_format/fp8.cuh"

struct E5M2 : Fp8Format<E5M2> {
    static constexpr float kMax = 57344.0f;
    static constexpr float kGain = 1.0f;

    static DEVICE void decode_word(u32 word, u32 (&pairs)[2]) {
        pairs[0] = ptx::permute_bytes(word, 0, 0x1404);
        pairs[1] = ptx::permute_bytes(word, 0, 0x3424);
    }

#if FP8_HARDWARE
    static DEVICE u32 encode_pair(float lo, float hi) { return ptx::e5m2x2_from_floats(lo, hi); }
#else
    static DEVICE u32 encode_pair(float lo, float hi) {
        return encode_fp8_software<2, 15, 0x7bu>(lo) | encode_fp8_software<2, 15, 0x7bu>(hi) << 8;
    }
#endif
};
