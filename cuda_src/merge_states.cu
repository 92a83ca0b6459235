// Merges attention states (v, s) that a caller has: v is the mean of values, s the log-sum-exp of their logits.
//
// A row is one head of one token. `shares` threads take 16 bytes of it each. Of many states, `parts` such groups take
// some each, and meet in shared memory, in a fixed order. The specialisation defines Values, the type of v.
#include "base/words.cuh"
#include "params.cuh"
#include "softmax_state.cuh"

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;
constexpr int kElements = 16 / Values::kBytes;
constexpr int kPerWord = 4 / Values::kBytes;

// What a thread has of one v, or of a weighted sum of several.
struct Share {
    float x[kElements];

    static DEVICE Share zero() { return {}; }

    DEVICE void add(const Share& other, float factor) {
#pragma unroll
        for (int i = 0; i < kElements; i++) x[i] += factor * other.x[i];
    }
    DEVICE void add(const u32 (&words)[4], float factor) {
        Share other;
#pragma unroll
        for (int i = 0; i < 4; i++) Values::floats_of(words[i], &other.x[i * kPerWord]);
        add(other, factor);
    }
    DEVICE void store(u8* to, float factor) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < kElements; i++) x[i] *= factor;
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = Values::word_of(&x[i * kPerWord]);
        store_words(to, words);
    }
};

// The states of a row: the first has arrays of its own, all others lie in one.
struct GivenStates {
    const MergeStatesParams& p;
    const u8* v;
    const u8* v_other;
    const float* s;
    const float* s_other;

    DEVICE GivenStates(const MergeStatesParams& p, i64 token, int head, int share)
        : p(p),
          v(p.v + token * p.v_stride_row + head * p.v_stride_head + 16 * share),
          v_other(p.v_other + token * p.v_other_stride_row + head * p.v_other_stride_head + 16 * share),
          s(p.s + token * p.s_stride_row + head * p.s_stride_head),
          s_other(p.s_other + token * p.s_other_stride_row + head * p.s_other_stride_head) {}

    // State number `index`, which is the `first` if it is 0.
    DEVICE void load(int index, bool first, u32 (&words)[4], float& sum) const {
        ptx::load_16(words, first ? v : v_other + (index - 1) * p.v_other_stride_state);
        sum = *(first ? s : s_other + (index - 1) * p.s_other_stride_state);
    }
};

extern "C" __global__ void __launch_bounds__(kThreads) merge_given(const __grid_constant__ MergeStatesParams p) {
    __shared__ SoftmaxState states[kThreads];
    __shared__ Share sums[kThreads];
    const int thread = static_cast<int>(threadIdx.x);
    const int team = p.team.quotient(thread), in_team = p.team.remainder(thread, team);
    const int part = p.shares.quotient(in_team), share = p.shares.remainder(in_team, part);
    const int row = static_cast<int>(blockIdx.x) * p.rows_per_cta + team;
    const int token = p.num_heads.quotient(row), head = p.num_heads.remainder(row, token);
    const bool works = team < p.rows_per_cta && row < p.rows && (!p.mask || p.mask[token * p.mask_stride]);

    const GivenStates states_given(p, token, head, share);
    SoftmaxState state = SoftmaxState::empty();
    Share sum = Share::zero();
    for (int begin = part; works && begin < p.num_states; begin += kAtOnce * p.parts) {
        // All loads of a round before the first use.
        u32 words[kAtOnce][4];
        float sums_given[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int index = begin + i * p.parts;
            if (index >= p.num_states) break;
            states_given.load(index, i == 0 && index == 0, words[i], sums_given[i]);
        }
        const auto given = [&](int i) {
            const float log2_sum = sums_given[i] * p.s_unit;
            const bool counts = begin + i * p.parts < p.num_states && log2_sum != negative_infinity();
            return counts ? SoftmaxState{log2_sum, 1.0f} : SoftmaxState::empty();
        };
        Share total = Share::zero();
        state = merge_states(
            kAtOnce + 1, [&](int i) { return i == 0 ? state : given(i - 1); },
            [&](int i, float factor) {
                // An empty state has weight 0 whatever its v holds, NaN too.
                if (i == 0) total.add(sum, factor);
                else if (given(i - 1).sum != 0.0f) total.add(words[i - 1], factor);
            });
        sum = total;
    }
    if (p.parts > 1) {
        states[thread] = state;
        sums[thread] = sum;
    }
    // Also what keeps a result in place of an input from being written before all threads of the row have read that.
    ptx::sync_threads();
    if (!works || part > 0) return;

    if (p.parts > 1) {
        sum = Share::zero();
        state = merge_states(
            p.parts, [&](int i) { return states[thread + i * p.shares.value]; },
            [&](int i, float factor) { sum.add(sums[thread + i * p.shares.value], factor); });
    }
    u8* out = p.out + token * p.out_stride_row + head * p.out_stride_head;
    sum.store(out + 16 * share, state.normalizer());
    if (share == 0) p.lse[token * p.lse_stride_row + head * p.lse_stride_head] = state.log2_sum() * p.lse_unit;
}
