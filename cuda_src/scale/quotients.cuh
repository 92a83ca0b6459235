// Many floats by one scale, each rounded as a division rounds it, for half of the instructions.
//
// With r the reciprocal of the scale, correctly rounded, x * r is within two steps of the quotient; adding its exact
// remainder times r once gives one of the two neighbours of the quotient, and a second time the nearer one (Markstein,
// "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). That needs remainders that are
// floats, as they are unless x is below 2^-79: then the result is below 2^-46, and no more than nearly right.
#pragma once
#include "base/ptx.cuh"

// Scales between one over this and this keep clear of both ends of floats.
constexpr float kPlainScale = 4294967296.0f;
constexpr float kPlainValue = 1.6543612251060553e-24f;  // 2^-79

// `reciprocal`: that of the scale. `EXACT`: results below 2^-46 matter as well.
template <bool EXACT, int COUNT>
DEVICE void divide_all(float (&quotients)[COUNT], const float (&x)[COUNT], float scale, float reciprocal) {
    if (scale >= 1.0f / kPlainScale && scale <= kPlainScale) {
        float poison = 0.0f;
        bool tiny = false;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const u32 bits = ptx::float_bits(x[i]), magnitude = bits & 0x7fffffffu;
            float q = x[i] * reciprocal;
#pragma unroll
            for (int step = 0; step < 2; step++)
                q = ptx::multiply_add(ptx::multiply_add(-q, scale, x[i]), reciprocal, q);
            // Infinities have become NaN, and -0 has lost its sign.
            poison = ptx::multiply_add(q, 0.0f, poison);
            if constexpr (EXACT) tiny = tiny || (magnitude && magnitude < ptx::float_bits(kPlainValue));
            quotients[i] = ptx::bits_float((ptx::float_bits(q) & 0x7fffffffu) | (bits & 0x80000000u));
        }
        if (poison == 0.0f && !tiny) return;
    }
    // Rare: one division for all, which take turns in the first place.
#pragma unroll
    for (int i = 0; i < COUNT; i++) quotients[i] = x[i];
#pragma unroll 1
    for (int turn = 0; turn < COUNT; turn++) {
        const float q = ptx::divide(quotients[0], scale);
#pragma unroll
        for (int i = 1; i < COUNT; i++) quotients[i - 1] = quotients[i];
        quotients[COUNT - 1] = q;
    }
}
