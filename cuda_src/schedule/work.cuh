// What a Schedule speaks of: the share of one CTA of decode.cu, and what merge.cu puts together.
#pragma once
#include "params.cuh"

// What is known of a CTA without reading memory. CTAs of one part's heads are neighbours: in NHD their rows are
// neighbours in memory. Column blocks of one head read the same rows, so they are closest.
struct Place {
    int part;  // of the rows of all requests
    int head_team;
    int column_block;

    static DEVICE Place of(const DecodeParams& p, int index) {
        const int columns = p.column_blocks.quotient(index);
        const int part = p.head_teams.quotient(columns);
        return {part, p.head_teams.remainder(columns, part), p.column_blocks.remainder(index, columns)};
    }
};

// One CTA's share: some query heads of one team of cache heads, over one of the `splits` of the rows of one request.
struct Work {
    int request;
    int head_team;
    int column_block;
    int kv_len;
    int split;
    int splits;
    int slot;  // of a listed schedule: where partial results go
};

// The partial results of one query head of a request: rows first, first + stride … of DecodeParams::partial_out.
struct Parts {
    int request;
    int head;
    int count;
    i64 first;
    int stride;
};
