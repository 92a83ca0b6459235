// The partial results of a request, and their sum: what merge.cu does, or the last of the CTAs of decode.cu that share
// the request.
//
// Nobody counts CTAs, for a counter would have to be cleared first. Instead each leaves a tag when its part is written,
// and then looks for the tags of the others; a fence between the two in every CTA makes that the last one sees all. If
// two do, both write the same bits, because parts are summed in their order. A tag is a number that memory does not
// hold by chance, and who has merged takes the tags away before the next call.
#pragma once
#include "params.cuh"
#include "softmax_state.cuh"

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

// Every `step`-th part of a query head, from number `begin` on, for the four head dimensions from 4 * quad on.
DEVICE PartSum sum_of_parts(const DecodeParams& p, const PartRange& parts, int head, int quad, int begin, int step) {
    constexpr int kAtOnce = 8;
    const int num_qo_heads = p.num_kv_heads * p.group_size, quads = p.head_dim / 4;
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
                const i64 row = static_cast<i64>(parts.at(part)) * num_qo_heads + head;
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

// Sums up the parts of `rows` query heads with all THREADS of a CTA, and calls store(row, state, quad, out) for four
// head dimensions at a time. `head_of(row)`; `shared`: kSharedBytes.
template <int HEAD_DIM, int THREADS>
struct PartMerge {
    static constexpr int kQuads = HEAD_DIM / 4;
    static constexpr int kSharedBytes =
        THREADS * static_cast<int>(sizeof(float4)) + THREADS / kQuads * static_cast<int>(sizeof(SoftmaxState));

    template <class Head, class Store>
    static DEVICE void run(const DecodeParams& p, const PartRange& parts, int rows, u8* shared, Head head_of,
                           Store store) {
        float4* outs = reinterpret_cast<float4*>(shared);
        SoftmaxState* states = reinterpret_cast<SoftmaxState*>(outs + THREADS);
        const int tasks = rows * kQuads;
        // Threads that fewer heads leave idle take other parts of the same ones.
        const int groups = max_of(1, THREADS / tasks);
        const int group = groups == 1 ? 0 : threadIdx.x / tasks;
        for (int task = threadIdx.x - group * tasks; groups > 1 || task < tasks; task += THREADS) {
            const int row = task / kQuads, quad = task % kQuads;
            PartSum sum = {SoftmaxState::empty(), make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
            if (group < groups) sum = sum_of_parts(p, parts, head_of(row), quad, group, groups);
            if (groups == 1) {
                store(row, sum.state, quad, sum.out);
                continue;
            }
            if (group < groups) {
                outs[group * tasks + task] = sum.out;
                if (quad == 0) states[group * rows + row] = sum.state;
            }
            ptx::sync_first<THREADS>();
            if (group == 0) {
                float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                const SoftmaxState state = merge_states(
                    min_of(groups, parts.count), [&](int i) { return states[i * rows + row]; },
                    [&](int i, float factor) { add(out, outs[i * tasks + task], factor); });
                store(row, state, quad, out);
            }
            break;
        }
    }
};

// Leaves the tag of a part, whose results the CTA's first THREADS threads have written, and says whether all parts of
// the request have theirs. `per_part`: CTAs that share a part, of which this is number `own`. `verdict`: in shared
// memory.
template <int THREADS>
DEVICE bool all_are_written(const DecodeParams& p, const PartRange& parts, int part, int per_part, int own,
                            const Lane& lane, int* verdict) {
    ptx::sync_first<THREADS>();
    if (lane.warp == 0) {
        if (lane.index() == 0) {
            ptx::fence_device();
            ptx::store_tag(p.tags + (part * per_part + own), p.tag);
        }
        ptx::sync_warp();
        ptx::fence_device();
        bool missing = false;
        for (int i = lane.index(); i < parts.count; i += 32)
            missing |= ptx::load_tag(p.tags + (parts.at(i) * per_part + own)) != static_cast<u64>(p.tag);
        missing = ptx::any(missing);
        if (lane.index() == 0) *verdict = !missing;
        ptx::fence_device();
    }
    ptx::sync_first<THREADS>();
    return *verdict != 0;
}

template <int THREADS>
DEVICE void take_tags_away(const DecodeParams& p, const PartRange& parts, int per_part, int own) {
    for (int i = threadIdx.x; i < parts.count; i += THREADS) ptx::store_tag(p.tags + (parts.at(i) * per_part + own), 0);
}
