// Merges the partial results of the CTAs that shared a request: a CTA at a time for a query head of a request that was
// split.
//
// A thread owns four head dimensions of every `parts`-th split; the parts meet in shared memory, in a fixed order.
// The specialisation defines QFormat, the type of the result, and Schedule.
#include "params.cuh"
#include "softmax_state.cuh"

constexpr int kThreads = 256;
constexpr int kMostParts = kThreads / 4;  // head_dim 16
constexpr int kAtOnce = 8;

DEVICE void scale(float4& x, float factor) {
    x.x *= factor;
    x.y *= factor;
    x.z *= factor;
    x.w *= factor;
}

DEVICE void add(float4& x, const float4& other, float factor) {
    x.x += factor * other.x;
    x.y += factor * other.y;
    x.z += factor * other.z;
    x.w += factor * other.w;
}

// One query head.
DEVICE void merge_head(const DecodeParams& p, const Parts& found, SoftmaxState (&states)[kMostParts],
                       float4 (&outs)[kThreads]) {
    const int quads = p.head_dim / 4;
    const int parts = kThreads / quads;
    const int quad = threadIdx.x % quads, part = threadIdx.x / quads;
    SoftmaxState state = SoftmaxState::empty();
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 out = zero;
    if (part < parts) {
        const float4* partial_out = reinterpret_cast<const float4*>(p.partial_out) + found.first * quads + quad;
        const float2* partial_state = reinterpret_cast<const float2*>(p.partial_state) + found.first;
        for (int begin = part; begin < found.count; begin += kAtOnce * parts) {
            // All loads of a round before the first use: what is slow here is the way to memory and back.
            SoftmaxState states_read[kAtOnce];
            float4 outs_read[kAtOnce];
            float reference = state.reference;
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const int split = begin + i * parts;
                const bool exists = split < found.count;
                const i64 row = static_cast<i64>(split) * found.stride;
                const float2 s = exists ? partial_state[row] : make_float2(0.0f, 0.0f);
                states_read[i] = exists ? SoftmaxState{s.x, s.y} : SoftmaxState::empty();
                outs_read[i] = exists ? partial_out[row * quads] : zero;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) reference = max_of(reference, states_read[i].reference);
            scale(out, state.move_to(reference));
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const float factor = states_read[i].factor_to(reference);
                state.sum += states_read[i].sum * factor;
                add(out, outs_read[i], factor);
            }
        }
        outs[part * quads + quad] = out;
        if (quad == 0) states[part] = state;
    }
    ptx::sync_threads();
    if (part > 0) return;

    out = zero;
    state = merge_states(
        min_of(parts, found.count), [&](int i) { return states[i]; },
        [&](int i, float factor) { add(out, outs[i * quads + quad], factor); });
    const float factor = state.normalizer();
    u8* to = p.out + found.request * p.out_stride_request + found.head * p.out_stride_head;
    reinterpret_cast<uint2*>(to)[quad] = make_uint2(QFormat::Operand::pack(out.x * factor, out.y * factor),
                                                    QFormat::Operand::pack(out.z * factor, out.w * factor));
    const i64 row_of_out = static_cast<i64>(found.request) * (p.num_kv_heads * p.group_size) + found.head;
    if (quad == 0 && p.lse) p.lse[row_of_out] = state.log2_sum() * p.lse_unit;
}

extern "C" __global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ DecodeParams p) {
    __shared__ SoftmaxState states[kMostParts];
    __shared__ float4 outs[kThreads];
    // What comes next may take its places now and wait there; this waits for the partial results.
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    if constexpr (!Schedule::kHasSurplus) {
        merge_head(p, Schedule::parts(p, blockIdx.x), states, outs);
    } else {
        // Most of what could be split is not, so the grid is smaller than that.
        const int most = p.most_split * p.num_kv_heads * p.group_size;
        for (int index = blockIdx.x; index < most; index += gridDim.x) {
            const Parts found = Schedule::parts(p, index);
            if (found.count == 0) return;
            if (index != static_cast<int>(blockIdx.x)) ptx::sync_threads();  // shared memory is used again
            merge_head(p, found, states, outs);
        }
    }
}
