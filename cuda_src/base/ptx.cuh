// Every PTX instruction and warp intrinsic that the kernels use, under a plain name: the only file with inline asm.
//
// What depends on the architecture is decided here and nowhere else. FP8 conversion exists in hardware from sm_89 on;
// FP8_SOFTWARE (a line of the specialisation) forces the integer path, so that it can be tested on any device.
#pragma once
#include "base/types.cuh"

#if __CUDA_ARCH__ >= 890 && !defined(FP8_SOFTWARE)
#define FP8_HARDWARE 1
#else
#define FP8_HARDWARE 0
#endif

namespace ptx {

// ---------------------------------------------------------------------------------------------- global memory
// A cache is read once: it must not push anything out of L1. Prefetching 128 bytes into L2 is worth 1.5 % on an H100.
template <int BYTES>
DEVICE void load_once(u32* dst, const u8* src) {
    static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4 || BYTES == 2, "one load instruction");
    if constexpr (BYTES == 16) {
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
                     : "l"(src));
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                     : "=r"(dst[0]), "=r"(dst[1])
                     : "l"(src));
    } else if constexpr (BYTES == 4) {
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(dst[0]) : "l"(src));
    } else {
        u16 half;
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u16 %0, [%1];" : "=h"(half) : "l"(src));
        dst[0] = half;
    }
}

// A word that neighbouring warps ask for too.
DEVICE u32 load_4(const void* src) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(src));
    return v;
}

DEVICE uint2 load_8(const void* src) {
    uint2 v;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(src));
    return v;
}

DEVICE void load_16(u32 (&v)[4], const void* src) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(src));
}

// What another CTA has written while this kernel runs, from where writes go. In place after a fence.
DEVICE float2 load_fresh_8(const float* src) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(src) : "memory");
    return v;
}

DEVICE float4 load_fresh_16(const float* src) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(src)
                 : "memory");
    return v;
}

// Words by which CTAs of one kernel tell each other something, two at a time: each is seen whole or not at all. Of two
// CTAs that store theirs, pass a fence, and load the other's, one at least sees them.
DEVICE void store_words(u64* to, u64 first, u64 second) {
    asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" : : "l"(to), "l"(first), "l"(second) : "memory");
}

DEVICE void load_words(const u64* from, u64& first, u64& second) {
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                 : "=l"(first), "=l"(second)
                 : "l"(from)
                 : "memory");
}

DEVICE void fence_device() { asm volatile("fence.sc.gpu;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------- shared memory
template <int BYTES>
DEVICE void load_shared(u32* dst, const u8* src) {
    static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4 || BYTES == 2, "one load instruction");
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(src));
    if constexpr (BYTES == 16) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
                     : "r"(address));
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(dst[0]), "=r"(dst[1]) : "r"(address));
    } else if constexpr (BYTES == 4) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(dst[0]) : "r"(address));
    } else {
        u16 half;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(address));
        dst[0] = half;
    }
}

// From here to the tensor cores: sm_90 and later.
//
// A barrier that counts arrivals and bytes: its phase ends when `arrivals` threads have arrived and the bytes that were
// announced have been copied. Phases alternate in parity, from 0 on.
DEVICE void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(barrier))), "r"(arrivals)
                 : "memory");
}

// Makes barriers that this thread has initialised known to the copy engine.
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
                 :
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(barrier)))
                 : "memory");
}

// Arrives, and announces bytes that this phase waits for.
DEVICE void barrier_arrive_expecting(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(barrier))), "r"(bytes)
                 : "memory");
}

// Waits for the end of the phase of this parity.
DEVICE void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n\t"
        ".reg .pred done;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t"
        "}"
        :
        : "r"(static_cast<u32>(__cvta_generic_to_shared(barrier))), "r"(parity)
        : "memory");
}

DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// Has the copy engine (TMA) bring the box of `map` at these coordinates, innermost first, into shared memory at `dst`,
// and count its bytes at `barrier`. Elements outside the array come as zeros.
DEVICE void copy_box(u8* dst, const TensorMap* map, int c0, int c1, int c2, int c3, int c4, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3, %4, %5, %6}], [%7];"
        :
        : "r"(static_cast<u32>(__cvta_generic_to_shared(dst))), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
          "r"(static_cast<u32>(__cvta_generic_to_shared(barrier)))
        : "memory");
}

// Has the copy engine bring `bytes`, a multiple of 16 at multiples of 16, into shared memory.
DEVICE void copy_bytes(u8* dst, const u8* src, int bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(dst))), "l"(src), "r"(bytes),
                   "r"(static_cast<u32>(__cvta_generic_to_shared(barrier)))
                 : "memory");
}

// Has it bring the box into the L2 cache.
DEVICE void prefetch_box(const TensorMap* map, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];"
                 :
                 : "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

// ---------------------------------------------------------------------------------------------- tensor cores
// c[16 x 8] += a[16 x 16] * b[16 x 8], accumulated in fp32.
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit elements that is spread over the warp, two elements of a row a lane.
DEVICE u32 transpose_8x8(u32 pair) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

// ---------------------------------------------------------------------------------------------- bytes and floats
// Four bytes out of the eight of (a, b), chosen by the four nibbles of `selector`.
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }

// The number of the lowest bit that is set; x is not 0.
DEVICE int lowest_bit(u32 x) { return __ffs(static_cast<int>(x)) - 1; }

DEVICE float exp2(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

DEVICE float log2(float x) {
    float out;
    asm("lg2.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }

// a * b + c, rounded once.
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

DEVICE u32 pack_f16(float lo, float hi) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}

DEVICE u32 pack_bf16(float lo, float hi) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}

DEVICE float f16_float(u32 low_half) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(static_cast<u16>(low_half)));
    return out;
}

// ---------------------------------------------------------------------------------------------- FP8 in hardware
#if FP8_HARDWARE
// Four codes to two fp16 pairs. The halves are taken apart inside, where ptxas reads the upper one in place.
DEVICE void f16x4_from_e4m3x4(u32 codes, u32 (&pairs)[2]) {
    asm("{\n\t"
        ".reg .b16 low, high;\n\t"
        "mov.b32 {low, high}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n\t"
        "}"
        : "=r"(pairs[0]), "=r"(pairs[1])
        : "r"(codes));
}

// Saturates to the largest finite value; NaN becomes 0x7F.
DEVICE u32 e4m3x2_from_floats(float lo, float hi) {
    u16 out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(hi), "f"(lo));
    return out;
}

DEVICE u32 e5m2x2_from_floats(float lo, float hi) {
    u16 out;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(out) : "f"(hi), "f"(lo));
    return out;
}
#endif

// ---------------------------------------------------------------------------------------------- between threads
DEVICE bool any(bool predicate) { return __any_sync(0xffffffffu, predicate); }
DEVICE u32 sum_of_lanes(u32 x) { return __reduce_add_sync(0xffffffffu, x); }
DEVICE u32 ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
DEVICE u32 shuffle_word(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE u32 shuffle(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// Brings the 128 bytes around an address into the L2 cache.
DEVICE void prefetch(const u8* from) { asm volatile("prefetch.global.L2 [%0];" : : "l"(from)); }

// Of x, and read here: what is made of it is not made earlier.
DEVICE u32 thread_index() {
    u32 x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

DEVICE void sync_threads() { __syncthreads(); }
// The first COUNT threads of the CTA meet: whole warps, the others do not take part.
template <int COUNT>
DEVICE void sync_first() {
    asm volatile("barrier.sync 1, %0;" : : "n"(COUNT) : "memory");
}
DEVICE void sync_warp() { __syncwarp(); }

DEVICE void atomic_max(u32* address, u32 value) { atomicMax(address, value); }
DEVICE void atomic_add(u64* address, u64 value) { atomicAdd(address, value); }

// Programmatic dependent launch (sm_90 and later): a kernel launched with that attribute starts while the one before it
// still runs, and waits here until that one's writes are visible. Without the attribute both do nothing.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ptx
