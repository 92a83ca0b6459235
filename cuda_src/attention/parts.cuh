// The partial results of a request, and their sum: what merge.cu does, or the last of the CTAs of decode.cu that share
// the request (attention/tags.cuh).
#pragma once
#include "params.cuh"
#include "softmax_state.cuh"

// Where the partial results of a request are: parts first + lead, first + stride, first + 2 * stride …
struct PartRange {
    int first;
    int stride;
    int lead;
    int count;

    DEVICE int at(int i) const { return first + i * stride + (i ? 0 : lead); }
};

// Of some head dimensions: a softmax state, and results without its normaliser.
struct PartSum {
    SoftmaxState state;
    float4 out;
};

// Every `step`-th part of a column of the request's, from number `begin` on, for the four head dimensions from
// 4 * quad on.
DEVICE PartSum sum_of_parts(const DecodeParams& p, const PartRange& parts, int column, int quad, int begin, int step) {
    constexpr int kAtOnce = 8;
    const int columns = p.num_kv_heads * p.columns, quads = p.head_dim / 4;
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    PartSum sum = {SoftmaxState::empty(), zero};
    for (; begin < parts.count; begin += kAtOnce * step) {
        // All loads of a round before the first use: what is slow here is the way to memory and back.
        SoftmaxState states[kAtOnce];
        float4 outs[kAtOnce];
        float reference = sum.state.reference;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int part = begin + i * step;
            states[i] = SoftmaxState::empty();
            outs[i] = zero;
            if (part < parts.count) {
                const i64 row = static_cast<i64>(parts.at(part)) * columns + column;
                const float2 s = ptx::load_fresh_8(p.partial_state + row * 2);
                states[i] = {s.x, s.y};
                outs[i] = ptx::load_fresh_16(p.partial_out + (row * quads + quad) * 4);
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) reference = max_of(reference, states[i].reference);
        scale(sum.out, sum.state.move_to(reference));
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const float factor = states[i].factor_to(reference);
            sum.state.sum += states[i].sum * factor;
            add(sum.out, outs[i], factor);
        }
    }
    return sum;
}

// What merging with THREADS threads shares: their sums, and a state for each group of them that takes some of the
// parts. A column has four threads at least.
template <int THREADS>
struct MergeShared {
    float4 outs[THREADS];
    SoftmaxState states[THREADS / 4];
};

// Sums up the parts of `count` columns with all THREADS of a CTA, and calls store(i, state, quad, out) for four head
// dimensions at a time; `column_of(i)`: of the request. `quads`: head_dim / 4; `thread`: this one's number.
template <int THREADS, class ColumnOf, class Store>
DEVICE void merge_parts(const DecodeParams& p, const PartRange& parts, int count, int quads, int thread,
                        MergeShared<THREADS>& shared, ColumnOf column_of, Store store) {
    const int tasks = count * quads;
    if (tasks == 0) return;
    // Threads that fewer columns leave idle take other parts of the same ones.
    const int groups = max_of(1, THREADS / tasks);
    const int group = groups == 1 ? 0 : thread / tasks;
    for (int task = thread - group * tasks; groups > 1 || task < tasks; task += THREADS) {
        // Of one column the compiler knows this, and divisions take long.
        const int i = count == 1 ? 0 : task / quads, quad = count == 1 ? task : task % quads;
        PartSum sum = {SoftmaxState::empty(), make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
        if (group < groups) sum = sum_of_parts(p, parts, column_of(i), quad, group, groups);
        if (groups == 1) {
            store(i, sum.state, quad, sum.out);
            continue;
        }
        if (group < groups) {
            shared.outs[group * tasks + task] = sum.out;
            if (quad == 0) shared.states[group * count + i] = sum.state;
        }
        ptx::sync_first<THREADS>();
        if (group == 0) {
            float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            const SoftmaxState state = merge_states(
                min_of(groups, parts.count), [&](int other) { return shared.states[other * count + i]; },
                [&](int other, float factor) { add(out, shared.outs[other * tasks + task], factor); });
            store(i, state, quad, out);
        }
        break;
    }
}
