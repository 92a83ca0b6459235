// Which rows a query sees: those before the request's length and inside its window. Both bounds are a contiguous range,
// so what is masked is mostly never visited; only the last tile of a range needs `visible`, and the first one where
// tiles begin with a page.
#pragma once
#include "base/types.cuh"

struct RowRange {
    int begin;
    int end;

    // The rows of a query at position kv_len - 1 that sees `window_left` rows before itself (negative: all).
    static DEVICE RowRange of_request(int kv_len, int window_left) {
        // Not kv_len - 1 - window_left < 0: that may overflow.
        const int begin = window_left < 0 || window_left >= kv_len ? 0 : kv_len - 1 - window_left;
        return {begin, kv_len};
    }

    // FROM_BEFORE: rows from before the range on may be asked about.
    template <bool FROM_BEFORE>
    DEVICE bool visible(int row) const {
        return row < end && (!FROM_BEFORE || row >= begin);
    }
    template <bool FROM_BEFORE>
    DEVICE bool covers(int row, int rows) const {
        return row + rows <= end && (!FROM_BEFORE || row >= begin);
    }
    // A row that may be read in place of `row`; the range is not empty.
    DEVICE int clamp(int row) const { return min_of(row, end - 1); }
};
