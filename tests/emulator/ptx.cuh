// The functions of cuda_src/base/ptx.cuh for a CPU: the same names and meanings, none of the instructions.
#pragma once
#include "base/types.cuh"

#ifdef FP8_SOFTWARE
#define FP8_HARDWARE 0
#else
#define FP8_HARDWARE 1
#endif

namespace ptx {

DEVICE u32 float_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float bits_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

template <int BYTES>
DEVICE void load_once(u32* dst, const u8* src) {
    emulator::check_read(src, BYTES);
    dst[0] = 0;
    memcpy(dst, src, BYTES);
}

DEVICE uint2 load_8(const void* src) {
    emulator::check_read(src, 8);
    uint2 v;
    memcpy(&v, src, 8);
    return v;
}

// IEEE binary16 and bfloat16, to nearest even.
DEVICE float f16_float(u32 h) {
    const u32 exponent = (h >> 10) & 31, mantissa = h & 1023;
    const float steps = static_cast<float>(exponent ? 1024 + mantissa : mantissa);
    const float finite = ldexpf(steps, static_cast<int>(max_of(exponent, 1u)) - 25);
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY) : finite;
    return (h & 0x8000) ? -magnitude : magnitude;
}

DEVICE u32 float_f16(float x) {
    const u32 sign = (float_bits(x) >> 16) & 0x8000u;
    const float magnitude = fabsf(x);
    if (x != x) return 0x7fffu;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    if (magnitude < 6.103515625e-05f) return sign | static_cast<u32>(nearbyintf(ldexpf(magnitude, 24)));
    const u32 bits = float_bits(magnitude);
    return sign | ((bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}

DEVICE u32 pack_f16(float lo, float hi) { return float_f16(lo) | float_f16(hi) << 16; }

DEVICE u32 float_bf16(float x) {
    const u32 bits = float_bits(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

DEVICE u32 pack_bf16(float lo, float hi) { return float_bf16(lo) | float_bf16(hi) << 16; }

DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= static_cast<u32>((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
    return out;
}

DEVICE u32 multiply_high(u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); }

DEVICE float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
DEVICE float exp2(float x) { return flushed(::exp2f(flushed(x))); }
DEVICE float log2(float x) { return ::log2f(x); }
DEVICE float divide(float a, float b) { return flushed(flushed(a) / flushed(b)); }

// FP8 with a sign, `mantissa_bits` and a bias: the value of a code, and the nearest code, ties to even, saturating.
DEVICE float fp8_value(u32 code, int mantissa_bits, int bias) {
    const int exponent = static_cast<int>((code & 0x7f) >> mantissa_bits);
    const int mantissa = static_cast<int>(code & ((1u << mantissa_bits) - 1));
    const float steps = static_cast<float>(exponent ? (1 << mantissa_bits) + mantissa : mantissa);
    const float magnitude = ldexpf(steps, max_of(exponent, 1) - bias - mantissa_bits);
    return (code & 0x80) ? -magnitude : magnitude;
}

DEVICE u32 fp8_code(float x, int mantissa_bits, int bias, u32 most) {
    if (x != x) return 0x7f;
    const u32 sign = signbit(x) ? 0x80 : 0;
    const double magnitude = fabs(static_cast<double>(x));
    u32 best = 0;
    for (u32 code = 1; code <= most; code++) {
        const double here = fp8_value(code, mantissa_bits, bias), below = fp8_value(code - 1, mantissa_bits, bias);
        const double middle = (here + below) / 2;
        if (magnitude > middle || (magnitude == middle && code % 2 == 0)) best = code;
    }
    return sign | best;
}

#if FP8_HARDWARE
DEVICE void f16x4_from_e4m3x4(u32 codes, u32 (&pairs)[2]) {
    u32 half[4];
    for (int i = 0; i < 4; i++) {
        const u32 code = (codes >> (8 * i)) & 0xff;
        half[i] = (code & 0x7f) == 0x7f ? 0x7fffu : float_f16(fp8_value(code, 3, 7));
    }
    pairs[0] = half[0] | half[1] << 16;
    pairs[1] = half[2] | half[3] << 16;
}
DEVICE u32 e4m3x2_from_floats(float lo, float hi) {
    return fp8_code(lo, 3, 7, 0x7e) | fp8_code(hi, 3, 7, 0x7e) << 8;
}
DEVICE u32 e5m2x2_from_floats(float lo, float hi) {
    return fp8_code(lo, 2, 15, 0x7b) | fp8_code(hi, 2, 15, 0x7b) << 8;
}
#endif

// Fragments as the PTX ISA lays them out: lane 4 g + t.
struct MmaIn {
    u32 a[4], b[2];
    float c[4];
};
struct MmaOut {
    float c[4];
};

template <class ToFloat>
void mma(const char* name, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, ToFloat to_float) {
    const MmaIn in = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    MmaOut out;
    emulator::meet(name, in, out, [&](const MmaIn* const* ins, MmaOut* const* outs) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++)
                    A[g + 8 * (i % 2)][2 * t + h + 8 * (i / 2)] = to_float((ins[lane]->a[i] >> (16 * h)) & 0xffff);
            for (int i = 0; i < 2; i++)
                for (int half = 0; half < 2; half++)
                    B[2 * t + half + 8 * i][g] = to_float((ins[lane]->b[i] >> (16 * half)) & 0xffff);
        }
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++) {
                const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
                double sum = ins[lane]->c[i];
                for (int k = 0; k < 16; k++) sum += static_cast<double>(A[row][k]) * B[k][column];
                outs[lane]->c[i] = static_cast<float>(sum);
            }
        }
    });
    for (int i = 0; i < 4; i++) c[i] = out.c[i];
}

DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma("mma_f16", c, a, b0, b1, [](u32 h) { return f16_float(h); });
}
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma("mma_bf16", c, a, b0, b1, [](u32 h) { return bits_float(h << 16); });
}

DEVICE u32 transpose_8x8(u32 pair) {
    u32 out = 0;
    emulator::meet("transpose_8x8", pair, out, [](const u32* const* ins, u32* const* outs) {
        u32 m[8][8];
        for (int lane = 0; lane < 32; lane++)
            for (int h = 0; h < 2; h++) m[lane / 4][2 * (lane % 4) + h] = (*ins[lane] >> (16 * h)) & 0xffff;
        for (int lane = 0; lane < 32; lane++)
            *outs[lane] = m[2 * (lane % 4)][lane / 4] | m[2 * (lane % 4) + 1][lane / 4] << 16;
    });
    return out;
}

DEVICE bool any(bool predicate) {
    bool out = false;
    emulator::meet("any", predicate, out, [](const bool* const* ins, bool* const* outs) {
        bool all = false;
        for (int i = 0; i < 32; i++) all |= *ins[i];
        for (int i = 0; i < 32; i++) *outs[i] = all;
    });
    return out;
}

struct ShuffleIn {
    float x;
    int from;
};

DEVICE float exchange(const char* name, float x, int from) {
    const ShuffleIn in = {x, from};
    float out = 0.0f;
    emulator::meet(name, in, out, [](const ShuffleIn* const* ins, float* const* outs) {
        for (int i = 0; i < 32; i++) *outs[i] = ins[ins[i]->from & 31]->x;
    });
    return out;
}

DEVICE float shuffle(float x, int lane) { return exchange("shuffle", x, lane); }
DEVICE float shuffle_xor(float x, int mask) {
    return exchange("shuffle_xor", x, static_cast<int>(threadIdx.x % 32) ^ mask);
}
DEVICE void sync_threads() { emulator::barrier(); }
DEVICE void sync_warp() {
    int nothing = 0;
    emulator::meet("sync_warp", nothing, nothing, [](const int* const*, int* const*) {});
}
DEVICE void atomic_max(u32* address, u32 value) { *address = max_of(*address, value); }
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}

}  // namespace ptx
