// Which rows a query sees: those before the request's length and inside its window. Both bounds are a contiguous range,
// so what is masked is mostly never visited; only the last tile of a range needs `visible`.
#pragma once
#include "base/divide.cuh"

struct RowRange {
    int begin;
    int end;

    // The rows of a query at position kv_len - 1 that sees `window_left` rows before itself (negative: all).
    static DEVICE RowRange of_request(int kv_len, int window_left) {
        // Not kv_len - 1 - window_left < 0: that may overflow.
        const int begin = window_left < 0 || window_left >= kv_len ? 0 : kv_len - 1 - window_left;
        return {begin, kv_len};
    }

    // Part `index` of `parts`, cut at whole tiles of `tile_rows` counted from `begin`; the first parts are the longer
    // ones. plan.split_rows is the same formula.
    DEVICE RowRange part(int index, const Divisor& parts, int tile_rows) const {
        const int tiles = ceil_div(end - begin, tile_rows);
        const int each = parts.quotient(tiles), longer = parts.remainder(tiles, each);
        const int first = index * each + min_of(index, longer);
        const int last = first + each + (index < longer ? 1 : 0);
        return {begin + first * tile_rows, last == tiles ? end : begin + last * tile_rows};
    }

    DEVICE bool visible(int row) const { return row < end; }
    DEVICE bool covers(int row, int rows) const { return row + rows <= end; }
    // A row that may be read in place of `row`; the range is not empty.
    DEVICE int clamp(int row) const { return min_of(row, end - 1); }
};
