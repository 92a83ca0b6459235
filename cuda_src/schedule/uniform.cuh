// Which CTA does what, known from the grid alone: every request is cut into the same number of parts.
#pragma once
#include "schedule/work.cuh"

struct UniformSchedule {
    static constexpr bool kHasSurplus = false;

    // All but the length.
    static DEVICE Work place(const DecodeParams& p, int index) {
        const Place place = Place::of(p, index);
        const int request = p.splits.quotient(place.part);
        return {request, place.head_team, place.column_block, 0, p.splits.remainder(place.part, request),
                p.splits.value, 0};
    }

    template <class Layout>
    static DEVICE Work work(const DecodeParams& p, Work work) {
        work.kv_len = Layout::kv_len(p, work.request);
        return work;
    }

    static DEVICE i64 partial(const DecodeParams& p, const Work& work, int head) {
        const i64 row = static_cast<i64>(work.request) * (p.num_kv_heads * p.group_size) + head;
        return row * p.splits.value + work.split;
    }

    static DEVICE Parts parts(const DecodeParams& p, int index) {
        const int num_qo_heads = p.num_kv_heads * p.group_size;
        return {index / num_qo_heads, index % num_qo_heads, p.splits.value, static_cast<i64>(index) * p.splits.value,
                1};
    }
};
