// The two 16-bit types that tensor cores multiply. A cache format names the one its values are exact in.
#pragma once
#include "base/ptx.cuh"

// FP8 and FP16 values are exact in fp16. One term of P is enough: rounding adds at most 2^-11 to a weight, and over
// many different weights much less.
struct HalfOperand {
    static constexpr int kWeightTerms = 1;
    static DEVICE u32 pack(float lo, float hi) { return ptx::pack_f16(lo, hi); }
    static DEVICE float low(u32 pair) { return ptx::f16_float(pair & 0xffffu); }
    static DEVICE float high(u32 pair) { return ptx::f16_float(pair >> 16); }
    static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { ptx::mma_f16(c, a, b0, b1); }
};

// BF16 values exceed fp16's range. Eight bits of P would add 2^-9 per weight, so P goes in as two terms, high + low.
struct BFloatOperand {
    static constexpr int kWeightTerms = 2;
    static DEVICE u32 pack(float lo, float hi) { return ptx::pack_bf16(lo, hi); }
    static DEVICE float low(u32 pair) { return ptx::bits_float(pair << 16); }
    static DEVICE float high(u32 pair) { return ptx::bits_float(pair & 0xffff0000u); }
    static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { ptx::mma_bf16(c, a, b0, b1); }
};

// Splits two floats into TERMS packed 16-bit terms that add up to them: each term is what the ones before left over.
template <class Operand, int TERMS>
DEVICE void split_terms(float lo, float hi, u32 (&terms)[TERMS]) {
#pragma unroll
    for (int i = 0; i < TERMS; i++) {
        terms[i] = Operand::pack(lo, hi);
        if (i + 1 < TERMS) {
            lo -= Operand::low(terms[i]);
            hi -= Operand::high(terms[i]);
        }
    }
}
