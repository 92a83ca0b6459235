// Merges attention states (v, s) that a caller has: v is the mean of values, s the log-sum-exp of their logits.
//
// A row is one head of one token. `quads` threads take four head dimensions each, and `parts` such groups share the
// states of a row, which meet in shared memory, in a fixed order. The specialisation defines Values, the type of v.
#include "params.cuh"
#include "softmax_state.cuh"

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;

// The given state number `index` of a row: the first has arrays of its own, all others lie in one.
struct GivenState {
    const u8* v;
    const float* s;

    static DEVICE GivenState at(const MergeStatesParams& p, int index, i64 token, int head) {
        if (index == 0)
            return {p.v + token * p.v_stride_row + head * p.v_stride_head,
                    p.s + token * p.s_stride_row + head * p.s_stride_head};
        const u8* v = p.v_other + (index - 1) * p.v_other_stride_state;
        const float* s = p.s_other + (index - 1) * p.s_other_stride_state;
        return {v + token * p.v_other_stride_row + head * p.v_other_stride_head,
                s + token * p.s_other_stride_row + head * p.s_other_stride_head};
    }
};

extern "C" __global__ void __launch_bounds__(kThreads) merge_given(const __grid_constant__ MergeStatesParams p) {
    __shared__ SoftmaxState states[kThreads];
    __shared__ float4 sums[kThreads];
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const int thread = static_cast<int>(threadIdx.x);
    const int team = p.team.quotient(thread), in_team = p.team.remainder(thread, team);
    const int part = p.quads.quotient(in_team), quad = p.quads.remainder(in_team, part);
    const int row = static_cast<int>(blockIdx.x) * p.rows_per_cta + team;
    const int token = p.num_heads.quotient(row), head = p.num_heads.remainder(row, token);
    const bool works = team < p.rows_per_cta && row < p.rows && (!p.mask || p.mask[token * p.mask_stride]);

    SoftmaxState state = SoftmaxState::empty();
    float4 sum = zero;
    for (int begin = part; works && begin < p.num_states; begin += kAtOnce * p.parts) {
        // All loads of a round before the first use. An empty state has weight 0 whatever its v holds, NaN too.
        SoftmaxState given[kAtOnce];
        float4 values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int index = begin + i * p.parts;
            given[i] = SoftmaxState::empty();
            values[i] = zero;
            if (index < p.num_states) {
                const GivenState from = GivenState::at(p, index, token, head);
                const float4 read = Values::load_4(from.v + 4 * quad * Values::kBytes);
                const float log2_sum = *from.s * p.s_unit;
                if (log2_sum != negative_infinity()) {
                    given[i] = SoftmaxState{log2_sum, 1.0f};
                    values[i] = read;
                }
            }
        }
        float4 total = zero;
        state = merge_states(
            kAtOnce + 1, [&](int i) { return i == 0 ? state : given[i - 1]; },
            [&](int i, float factor) { add(total, i == 0 ? sum : values[i - 1], factor); });
        sum = total;
    }
    states[thread] = state;
    sums[thread] = sum;
    // Also what keeps a result in place of an input from being written before all threads of the row have read that.
    ptx::sync_threads();
    if (!works || part > 0) return;

    sum = zero;
    state = merge_states(
        p.parts, [&](int i) { return states[thread + i * p.quads.value]; },
        [&](int i, float factor) { add(sum, sums[thread + i * p.quads.value], factor); });
    const float factor = state.normalizer();
    u8* out = p.out + token * p.out_stride_row + head * p.out_stride_head;
    Values::store_4(out + 4 * quad * Values::kBytes,
                    make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor));
    if (quad == 0) p.lse[token * p.lse_stride_row + head * p.lse_stride_head] = state.log2_sum() * p.lse_unit;
}
