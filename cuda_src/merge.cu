// Merges the partial results of the CTAs that shared a request: a CTA at a time for one column of a request that was
// split. The specialisation defines QFormat, the type of the result, Schedule, Layout, whose lengths some schedules ask
// for, and kManyQueries.
#include "attention/parts.cuh"
#include "attention/query_rows.cuh"

constexpr int kThreads = 256;

// One column.
DEVICE void merge_column(const DecodeParams& p, const Parts& found, MergeShared<kThreads>& shared) {
    const auto queries = QueryRows<kManyQueries>::of(p, found.request);
    QueryPlace place = {found.request, found.column};
    if constexpr (kManyQueries) {
        const int kv_head = found.column / p.columns, column = found.column % p.columns;
        if (column >= queries.columns(p)) return;  // other requests have more queries
        place = queries.place(p, kv_head, column);
    }
    merge_parts<kThreads>(
        found.range, 1, p.head_dim / 4, threadIdx.x, &shared,
        [&](int, int quad) { return LeftParts(p, found.column, quad); },
        [&](int, const Part& sum, int quad) {
            const float factor = sum.state.normalizer();
            u8* out = p.out + place.from(p.out_stride_request, p.out_stride_head);
            reinterpret_cast<uint2*>(out)[quad] =
                make_uint2(QFormat::Operand::pack(sum.out.x * factor, sum.out.y * factor),
                           QFormat::Operand::pack(sum.out.z * factor, sum.out.w * factor));
            if (quad == 0 && p.lse)
                p.lse[place.from(p.num_kv_heads * p.group_size.value, 1)] = sum.state.log2_sum() * p.lse_unit;
        });
}

extern "C" __global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ DecodeParams p) {
    __shared__ MergeShared<kThreads> shared;
    // What comes next may take its places now, or when this has found out what there is to merge, and wait there.
    if (!Schedule::kHasShares) ptx::let_next_kernel_start();
    // What this reads of lengths and lists was complete before decode.cu, which has waited for it, let this start.
    Parts found = Schedule::template parts<Layout>(p, blockIdx.x);
    ptx::wait_for_previous_kernel();
    if (Schedule::kHasShares) ptx::let_next_kernel_start();
    // Where lengths decide, most of what could be split is not, and the grid is smaller than that.
    const int most = Schedule::most_merges(p);
    for (int index = blockIdx.x; found.range.count != Parts::kNoMore;) {
        if (found.range.count > 0) merge_column(p, found, shared);
        index += gridDim.x;
        if (index >= most) return;
        ptx::sync_threads();  // shared memory is used again
        found = Schedule::template parts<Layout>(p, index);
    }
}
