// Merges the partial results of the CTAs that shared a request: a CTA at a time for a query head of a request that was
// split.
//
// A thread owns four head dimensions of every `parts`-th split; the parts meet in shared memory, in a fixed order.
// The specialisation defines QFormat, the type of the result, Schedule, and Layout, whose lengths some schedules ask
// for.
#include "attention/parts.cuh"

constexpr int kThreads = 256;
constexpr int kMostGroups = kThreads / 4;  // head_dim 16

// One query head, by groups of threads that take its parts in turn.
DEVICE void merge_head(const DecodeParams& p, const Parts& found, SoftmaxState (&states)[kMostGroups],
                       float4 (&outs)[kThreads]) {
    const int quads = p.head_dim / 4;
    const int groups = kThreads / quads;
    const int quad = threadIdx.x % quads, group = threadIdx.x / quads;
    if (group < groups) {
        const PartSum sum = sum_of_parts(p, found.range, found.head, quad, group, groups);
        outs[group * quads + quad] = sum.out;
        if (quad == 0) states[group] = sum.state;
    }
    ptx::sync_threads();
    if (group > 0) return;

    float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const SoftmaxState state = merge_states(
        min_of(groups, found.range.count), [&](int i) { return states[i]; },
        [&](int i, float factor) { add(out, outs[i * quads + quad], factor); });
    const float factor = state.normalizer();
    u8* to = p.out + found.request * p.out_stride_request + found.head * p.out_stride_head;
    reinterpret_cast<uint2*>(to)[quad] = make_uint2(QFormat::Operand::pack(out.x * factor, out.y * factor),
                                                    QFormat::Operand::pack(out.z * factor, out.w * factor));
    const i64 row_of_out = static_cast<i64>(found.request) * (p.num_kv_heads * p.group_size) + found.head;
    if (quad == 0 && p.lse) p.lse[row_of_out] = state.log2_sum() * p.lse_unit;
}

extern "C" __global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ DecodeParams p) {
    __shared__ SoftmaxState states[kMostGroups];
    __shared__ float4 outs[kThreads];
    // What comes next may take its places now, or when this has found out what there is to merge, and wait there.
    if (!Schedule::kManyWorks) ptx::let_next_kernel_start();
    // What this reads of lengths and lists was complete before decode.cu, which has waited for it, let this start.
    Parts found = Schedule::template parts<Layout>(p, blockIdx.x);
    ptx::wait_for_previous_kernel();
    if (Schedule::kManyWorks) ptx::let_next_kernel_start();
    // Where lengths decide, most of what could be split is not, and the grid is smaller than that.
    const int most = Schedule::most_merges(p);
    for (int index = blockIdx.x; found.range.count != Parts::kNoMore;) {
        if (found.range.count > 0) merge_head(p, found, states, outs);
        index += gridDim.x;
        if (index >= most) return;
        ptx::sync_threads();  // shared memory is used again
        found = Schedule::template parts<Layout>(p, index);
    }
}
