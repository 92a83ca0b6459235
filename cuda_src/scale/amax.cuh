// Scales from the largest magnitude of what they are for: that becomes the largest value of the format.
#pragma once
#include "base/ptx.cuh"

// 2^-126: a scale below it would be lost where subnormals are flushed, and all its values with it.
constexpr float kMinScale = 1.17549435e-38f;

// Bits of |x|, which compare like the values; 0 for infinities and NaN, which have no say in a scale.
DEVICE u32 finite_magnitude(float x) {
    const u32 bits = ptx::float_bits(x) & 0x7fffffffu;
    return bits < 0x7f800000u ? bits : 0u;
}

DEVICE u32 finite_magnitude(const float4& x) {
    return max_of(max_of(finite_magnitude(x.x), finite_magnitude(x.y)),
                  max_of(finite_magnitude(x.z), finite_magnitude(x.w)));
}

// The scale of a format whose largest value is `most`; 1 where it would not be a normal float.
DEVICE float scale_of(u32 amax_bits, float most) {
    const float scale = ptx::divide(ptx::bits_float(amax_bits), most);
    return scale < kMinScale ? 1.0f : scale;
}
