// float as a type of values to quantise. It is not a format of a cache.
#pragma once
#include "base/types.cuh"

struct F32 {
    static constexpr int kBytes = 4;

    static DEVICE float4 load_4(const u8* from) { return *reinterpret_cast<const float4*>(from); }
    static DEVICE void store_4(u8* to, const float4& x) { *reinterpret_cast<float4*>(to) = x; }
};
