// Which rows of q, and of the results, belong to a request: one, or all that share its rows of K and V.
//
// The columns of a cache head are the query heads of its group, of one row of q after the other.
#pragma once
#include "params.cuh"

// A row of q, out and lse, and one of its heads.
struct QueryPlace {
    int row;
    int head;

    DEVICE i64 from(i64 stride_row, i64 stride_head) const { return row * stride_row + head * stride_head; }
};

template <bool MANY>
struct QueryRows {
    int first;
    int count;

    static DEVICE QueryRows of(const DecodeParams& p, int request) {
        if constexpr (!MANY) return {request, 1};
        const int first = p.q_indptr[request];
        return {first, p.q_indptr[request + 1] - first};
    }

    // Columns of a cache head.
    DEVICE int columns(const DecodeParams& p) const { return MANY ? count * p.group_size.value : p.columns; }

    DEVICE QueryPlace place(const DecodeParams& p, int kv_head, int column) const {
        if constexpr (!MANY) return {first, kv_head * p.columns + column};
        const int row = p.group_size.quotient(column);
        return {first + row, kv_head * p.group_size.value + p.group_size.remainder(column, row)};
    }
};
