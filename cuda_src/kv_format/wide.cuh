// What the two-byte formats share: nothing to decode, only pairs to bring together. Also the types of Q and the output.
#pragma once
#include "base/operand.cuh"

template <class OperandType>
struct WideFormat {
    using Operand = OperandType;
    static constexpr int kBytes = 2;
    static constexpr float kGain = 1.0f;

    static DEVICE void row_pairs(const u32* row, int step, u32 (&pairs)[2]) {
        pairs[0] = row[2 * step];
        pairs[1] = row[2 * step + 1];
    }

    static DEVICE void column_pairs(const u32* a, const u32* b, int j, u32 (&pairs)[2]) {
        pairs[0] = ptx::permute_bytes(a[j], b[j], 0x5410);
        pairs[1] = ptx::permute_bytes(a[j], b[j], 0x7632);
    }

    // The two values of a word as floats, and back.
    static DEVICE void floats_of(u32 word, float* x) {
        x[0] = Operand::low(word);
        x[1] = Operand::high(word);
    }
    static DEVICE u32 word_of(const float* x) { return Operand::pack(x[0], x[1]); }

    // Four neighbouring values as floats, and back.
    static DEVICE float4 load_4(const u8* from) {
        const uint2 pairs = *reinterpret_cast<const uint2*>(from);
        return make_float4(Operand::low(pairs.x), Operand::high(pairs.x),  //
                           Operand::low(pairs.y), Operand::high(pairs.y));
    }
    static DEVICE void store_4(u8* to, const float4& x) {
        *reinterpret_cast<uint2*>(to) = make_uint2(Operand::pack(x.x, x.y), Operand::pack(x.z, x.w));
    }
};
