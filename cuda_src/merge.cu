// Merges the partial results of the CTAs that shared a request: one CTA a query head of a request.
//
// A thread owns four head dimensions of every kParts-th split; the parts meet in shared memory, in a fixed order.
// The specialisation defines QFormat, the type of the result.
#include "params.cuh"
#include "softmax_state.cuh"

constexpr int kThreads = 256;
constexpr int kMostParts = kThreads / 4;  // head_dim 16


extern "C" __global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ MergeParams p) {
    __shared__ SoftmaxState states[kMostParts];
    __shared__ float4 outs[kThreads];
    const int quads = p.head_dim / 4;
    const int parts = kThreads / quads;
    const int quad = threadIdx.x % quads, part = threadIdx.x / quads;
    const i64 first = static_cast<i64>(blockIdx.x) * p.splits;

    ptx::wait_for_previous_kernel();
    float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    auto add = [&](const float4& other, float factor) {
        out.x += factor * other.x;
        out.y += factor * other.y;
        out.z += factor * other.z;
        out.w += factor * other.w;
    };
    if (part < parts) {
        const float4* partial_out = reinterpret_cast<const float4*>(p.partial_out) + first * quads + quad;
        const float2* partial_state = reinterpret_cast<const float2*>(p.partial_state) + first;
        const int count = part < p.splits ? ceil_div(p.splits - part, parts) : 0;
        const SoftmaxState state = merge_states(
            count,
            [&](int i) {
                const float2 s = partial_state[part + i * parts];
                return SoftmaxState{s.x, s.y};
            },
            [&](int i, float factor) { add(partial_out[static_cast<i64>(part + i * parts) * quads], factor); });
        outs[part * quads + quad] = out;
        if (quad == 0) states[part] = state;
    }
    ptx::sync_threads();
    if (part > 0) return;

    out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const SoftmaxState state = merge_states(
        min_of(parts, p.splits), [&](int i) { return states[i]; },
        [&](int i, float factor) { add(outs[i * quads + quad], factor); });
    const float factor = state.normalizer();
    const int request = blockIdx.x / p.num_qo_heads, head = blockIdx.x % p.num_qo_heads;
    u8* to = p.out + request * p.out_stride_request + head * p.out_stride_head;
    reinterpret_cast<uint2*>(to)[quad] = make_uint2(QFormat::Operand::pack(out.x * factor, out.y * factor),
                                                    QFormat::Operand::pack(out.z * factor, out.w * factor));
    if (quad == 0 && p.lse) p.lse[blockIdx.x] = state.log2_sum() * p.lse_unit;
}
