// float as a type of values to quantise. It is not a format of a cache.
#pragma once
#include "base/ptx.cuh"

struct F32 {
    static constexpr int kBytes = 4;

    // Of one word, and back.
    static DEVICE void floats_of(u32 word, float* x) { x[0] = ptx::bits_float(word); }
    static DEVICE u32 word_of(const float* x) { return ptx::float_bits(x[0]); }

    static DEVICE float4 load_4(const u8* from) { return *reinterpret_cast<const float4*>(from); }
    static DEVICE void store_4(u8* to, const float4& x) { *reinterpret_cast<float4*>(to) = x; }
};
