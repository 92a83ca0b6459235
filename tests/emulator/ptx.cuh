// The functions of cuda_src/base/ptx.cuh for a CPU: the same names and meanings, none of the instructions. A function
// there needs its host body here; what it computes for one thread is in numbers.h, what a warp does together in
// warp.cpp.
#pragma once
#include "base/types.cuh"

#ifdef FP8_SOFTWARE
#define FP8_HARDWARE 0
#else
#define FP8_HARDWARE 1
#endif

namespace ptx {

// ---------------------------------------------------------------------------------------------- global memory
template <int BYTES>
DEVICE void load_once(u32* dst, const u8* src, CALL_SITE) {
    static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4 || BYTES == 2, "one load instruction");
    emulator::check_read(src, BYTES, at);
    dst[0] = 0;
    memcpy(dst, src, BYTES);
}

DEVICE u32 load_4(const void* src, CALL_SITE) {
    emulator::check_read(src, 4, at);
    u32 v;
    memcpy(&v, src, 4);
    return v;
}

DEVICE uint2 load_8(const void* src, CALL_SITE) {
    emulator::check_read(src, 8, at);
    uint2 v;
    memcpy(&v, src, 8);
    return v;
}

DEVICE void load_16(u32 (&v)[4], const void* src, CALL_SITE) {
    emulator::check_read(src, 16, at);
    memcpy(v, src, 16);
}

DEVICE float2 load_fresh_8(const float* src, CALL_SITE) {
    emulator::check_read(src, 8, at);
    return {src[0], src[1]};
}
DEVICE float4 load_fresh_16(const float* src, CALL_SITE) {
    emulator::check_read(src, 16, at);
    return {src[0], src[1], src[2], src[3]};
}
// Stronger than the instructions, so that no fence is needed, which ThreadSanitizer does not know.
DEVICE void store_words(u64* to, u64 first, u64 second, CALL_SITE) {
    if (reinterpret_cast<u64>(to) % 16) emulator::fail("a misaligned store", at);
    __atomic_store_n(to, first, __ATOMIC_SEQ_CST);
    __atomic_store_n(to + 1, second, __ATOMIC_SEQ_CST);
}
DEVICE void load_words(const u64* from, u64& first, u64& second, CALL_SITE) {
    if (reinterpret_cast<u64>(from) % 16) emulator::fail("a misaligned load", at);
    first = __atomic_load_n(from, __ATOMIC_SEQ_CST);
    second = __atomic_load_n(from + 1, __ATOMIC_SEQ_CST);
}
DEVICE void fence_device() {}

// ---------------------------------------------------------------------------------------------- shared memory
template <int BYTES>
DEVICE void load_shared(u32* dst, const u8* src, CALL_SITE) {
    static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4 || BYTES == 2, "one load instruction");
    if (reinterpret_cast<u64>(src) % BYTES) emulator::fail("a misaligned read of shared memory", at);
    dst[0] = 0;
    memcpy(dst, src, BYTES);
}

DEVICE void barrier_init(u64* barrier, int arrivals, CALL_SITE) { emulator::barrier_init(barrier, arrivals, at); }
DEVICE void barrier_init_done() {}
DEVICE void barrier_arrive(u64* barrier, CALL_SITE) { emulator::barrier_arrive(barrier, 0, at); }
DEVICE void barrier_arrive_expecting(u64* barrier, int bytes, CALL_SITE) {
    emulator::barrier_arrive(barrier, bytes, at);
}
DEVICE void barrier_wait(u64* barrier, u32 parity, CALL_SITE) { emulator::barrier_wait(barrier, parity, at); }
DEVICE void prefetch_tensor_map(const TensorMap*) {}
DEVICE void copy_box(u8* dst, const TensorMap* map, int c0, int c1, int c2, int c3, int c4, u64* barrier, CALL_SITE) {
    emulator::copy_box(dst, map, {c0, c1, c2, c3, c4}, barrier, at);
}

DEVICE void copy_bytes(u8* dst, const u8* src, int bytes, u64* barrier, CALL_SITE) {
    emulator::copy_bytes(dst, src, bytes, barrier, at);
}
DEVICE void prefetch_box(const TensorMap*, int, int, int, int, int) {}

// ---------------------------------------------------------------------------------------------- tensor cores
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, CALL_SITE) {
    emulator::mma_f16(c, a, b0, b1, at);
}
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, CALL_SITE) {
    emulator::mma_bf16(c, a, b0, b1, at);
}
DEVICE u32 transpose_8x8(u32 pair, CALL_SITE) { return emulator::transpose_8x8(pair, at); }

// ---------------------------------------------------------------------------------------------- bytes and floats
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> (4 * i) & 15;
        const u32 byte = static_cast<u32>(bytes >> (8 * (nibble & 7))) & 0xffu;
        // The nibble's upper bit asks for the sign of the byte in its place.
        out |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return out;
}

DEVICE u32 multiply_high(u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); }

DEVICE int lowest_bit(u32 x) { return __builtin_ctz(x); }

DEVICE float exp2(float x) { return numbers::flushed(::exp2f(numbers::flushed(x))); }
DEVICE float log2(float x) { return ::log2f(x); }
// Kernels are compiled with -ftz=true.
DEVICE float divide(float a, float b) { return numbers::flushed(numbers::flushed(a) / numbers::flushed(b)); }
DEVICE float multiply_add(float a, float b, float c) {
    return numbers::flushed(__builtin_fmaf(numbers::flushed(a), numbers::flushed(b), numbers::flushed(c)));
}

DEVICE u32 float_bits(float x) { return numbers::float_bits(x); }
DEVICE float bits_float(u32 x) { return numbers::bits_float(x); }

DEVICE u32 pack_f16(float lo, float hi) { return numbers::float_f16(lo) | numbers::float_f16(hi) << 16; }
DEVICE u32 pack_bf16(float lo, float hi) { return numbers::float_bf16(lo) | numbers::float_bf16(hi) << 16; }
DEVICE float f16_float(u32 low_half) { return numbers::f16_float(low_half & 0xffffu); }

// ---------------------------------------------------------------------------------------------- FP8 in hardware
#if FP8_HARDWARE
DEVICE void f16x4_from_e4m3x4(u32 codes, u32 (&pairs)[2]) {
    u32 half[4];
    for (int i = 0; i < 4; i++) {
        const u32 code = (codes >> (8 * i)) & 0xffu;
        half[i] = (code & 0x7fu) == 0x7fu ? 0x7fffu : numbers::float_f16(numbers::fp8_float(code, 3, 7));
    }
    pairs[0] = half[0] | half[1] << 16;
    pairs[1] = half[2] | half[3] << 16;
}
DEVICE u32 e4m3x2_from_floats(float lo, float hi) {
    return numbers::float_fp8(lo, 3, 7, 0x7e) | numbers::float_fp8(hi, 3, 7, 0x7e) << 8;
}
DEVICE u32 e5m2x2_from_floats(float lo, float hi) {
    return numbers::float_fp8(lo, 2, 15, 0x7b) | numbers::float_fp8(hi, 2, 15, 0x7b) << 8;
}
#endif

// ---------------------------------------------------------------------------------------------- between threads
DEVICE bool any(bool predicate, CALL_SITE) { return emulator::any(predicate, at); }
DEVICE u32 sum_of_lanes(u32 x, CALL_SITE) { return emulator::sum_of_lanes(x, at); }
DEVICE u32 ballot(bool predicate, CALL_SITE) { return emulator::ballot(predicate, at); }
DEVICE u32 shuffle_word(u32 x, int lane, CALL_SITE) { return emulator::shuffle(x, lane, at); }
DEVICE float shuffle(float x, int lane, CALL_SITE) { return bits_float(emulator::shuffle(float_bits(x), lane, at)); }
DEVICE u32 shuffle(u32 x, int lane, CALL_SITE) { return emulator::shuffle(x, lane, at); }
DEVICE float shuffle_xor(float x, int mask, CALL_SITE) {
    return shuffle(x, static_cast<int>(threadIdx.x % 32) ^ mask, at);
}
DEVICE void prefetch(const u8*) {}
DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE void sync_threads(CALL_SITE) { emulator::sync_threads(at); }
template <int COUNT>
DEVICE void sync_first(CALL_SITE) {
    emulator::sync_first(COUNT, at);
}
DEVICE void sync_warp(CALL_SITE) { emulator::sync_warp(at); }

DEVICE void atomic_max(u32* address, u32 value) {
    emulator::publish(address);
    u32 old = __atomic_load_n(address, __ATOMIC_RELAXED);
    constexpr int kOrder = __ATOMIC_RELAXED;
    while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, kOrder, kOrder)) {
    }
}

DEVICE void atomic_add(u64* address, u64 value) {
    emulator::publish(address);
    __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// Kernels follow each other: one starts when the one before it has ended.
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}

}  // namespace ptx
