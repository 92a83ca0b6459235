// Floats to FP8 codes and back: code = encode(value / scale), value = decode(code) * scale, with the scale in fp32.
//
// Arrays are rows of head_dim elements on three axes; a stride of 0 in the scales' axes is what makes a scale common to
// a tensor or a head. The specialisation defines Values (F16, BF16 or F32) and Codes (an FP8 format).
#include "base/operand.cuh"
#include "params.cuh"
#include "scale/amax.cuh"

constexpr int kThreads = 256;

struct RowIndex {
    int i0, i1, i2;

    static DEVICE RowIndex of(const QuantizeParams& p, i64 row) {
        const i64 outer = row / p.n2;
        return {static_cast<int>(outer / p.n1), static_cast<int>(outer % p.n1), static_cast<int>(row % p.n2)};
    }
    DEVICE const u8* values(const QuantizeParams& p) const {
        return p.values + i0 * p.stride0 + i1 * p.stride1 + i2 * p.stride2;
    }
    DEVICE i64 slot(const QuantizeParams& p) const {
        return static_cast<i64>(i0) * p.scale_stride0 + static_cast<i64>(i1) * p.scale_stride1 +
               static_cast<i64>(i2) * p.scale_stride2;
    }
    DEVICE float scale(const QuantizeParams& p) const { return p.scales ? p.scales[slot(p)] : p.scale; }
};

// One warp a row at a time. Where every row has its own scale it is stored; otherwise the largest magnitude is, as
// bits, for `scales` to turn into scales: a maximum does not depend on the order it is taken in.
extern "C" __global__ void __launch_bounds__(kThreads) amax(const __grid_constant__ QuantizeParams p) {
    const int lane = threadIdx.x % 32;
    const i64 warps = static_cast<i64>(gridDim.x) * (kThreads / 32);
    u32* slots = reinterpret_cast<u32*>(p.scales);
    const bool per_row = p.scale_count == p.rows;
    i64 slot = -1;
    u32 largest = 0;
    for (i64 row = static_cast<i64>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; row < p.rows; row += warps) {
        const RowIndex index = RowIndex::of(p, row);
        if (index.slot(p) != slot) {
            if (slot >= 0 && lane == 0) ptx::atomic_max(&slots[slot], largest);
            slot = index.slot(p);
            largest = 0;
        }
        const u8* values = index.values(p);
        u32 mine = 0;
        for (int d = 4 * lane; d < p.head_dim; d += 128) {
            mine = max_of(mine, finite_magnitude(Values::load_4(values + d * Values::kBytes)));
        }
        for (int mask = 16; mask; mask /= 2)
            mine = max_of(mine, ptx::float_bits(ptx::shuffle_xor(ptx::bits_float(mine), mask)));
        if (per_row) {
            if (lane == 0) p.scales[slot] = scale_of(mine, Codes::kMax);
            slot = -1;
        }
        largest = max_of(largest, mine);
    }
    if (slot >= 0 && lane == 0) ptx::atomic_max(&slots[slot], largest);
}

extern "C" __global__ void __launch_bounds__(kThreads) scales(const __grid_constant__ QuantizeParams p) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < p.scale_count) p.scales[i] = scale_of(ptx::float_bits(p.scales[i]), Codes::kMax);
}

extern "C" __global__ void __launch_bounds__(kThreads) quantize(const __grid_constant__ QuantizeParams p) {
    const int quads = p.head_dim / 4;
    const i64 threads = static_cast<i64>(gridDim.x) * kThreads;
    for (i64 at = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; at < p.rows * quads; at += threads) {
        const i64 row = at / quads;
        const int quad = static_cast<int>(at % quads);
        const RowIndex index = RowIndex::of(p, row);
        const float4 x = Values::load_4(index.values(p) + 4 * quad * Values::kBytes);
        const float scale = index.scale(p);
        Codes::store_4(p.out + 4 * at, make_float4(ptx::divide(x.x, scale), ptx::divide(x.y, scale),
                                                   ptx::divide(x.z, scale), ptx::divide(x.w, scale)));
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) dequantize(const __grid_constant__ QuantizeParams p) {
    const int quads = p.head_dim / 4;
    const i64 threads = static_cast<i64>(gridDim.x) * kThreads;
    for (i64 at = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; at < p.rows * quads; at += threads) {
        const i64 row = at / quads;
        const int quad = static_cast<int>(at % quads);
        const RowIndex index = RowIndex::of(p, row);
        const u32 word = *reinterpret_cast<const u32*>(index.values(p) + 4 * quad);
        const float scale = index.scale(p);
        Values::store_4(p.out + at * 4 * Values::kBytes,
                     make_float4(scale * Codes::value(word, 0), scale * Codes::value(word, 1),
                                 scale * Codes::value(word, 2), scale * Codes::value(word, 3)));
    }
}
