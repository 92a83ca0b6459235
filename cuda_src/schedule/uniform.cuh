// Which CTA does what, known from the grid alone: every request is cut into the same number of parts.
#pragma once
#include "schedule/work.cuh"

struct UniformSchedule {
    static constexpr bool kHasSurplus = false;
    static constexpr bool kManyWorks = false;
    static constexpr bool kHasShares = false;

    // All but the length.
    static DEVICE Work place(const DecodeParams& p, int index) {
        const Place place = Place::of(p, index);
        // Parts are numbered like places: [B, splits].
        const int request = p.splits.quotient(place.part), splits = p.splits.value;
        return {request, place.head_team, place.column_block, 0, {0, 0}, 0, p.splits.remainder(place.part, request),
                splits, splits == 1, place.part, true, {}};
    }

    template <class Layout>
    static DEVICE Work work(const DecodeParams& p, Work work) {
        work.kv_len = Layout::kv_len(p, work.request);
        work.rows = RowRange::of_request(work.kv_len, p.window_left);
        work.first_row = work.rows.begin;
        return work;
    }

    static DEVICE int most_merges(const DecodeParams& p) { return p.batch * p.num_kv_heads * p.columns; }

    template <class Layout>
    static DEVICE Parts parts(const DecodeParams& p, int index) {
        const int columns = p.num_kv_heads * p.columns;
        const int request = index / columns;
        return {request, index % columns, {request * p.splits.value, 1, 0, p.splits.value}};
    }
};
