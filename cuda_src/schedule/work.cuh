// What a Schedule speaks of: the share of one CTA of decode.cu, and what merge.cu puts together.
#pragma once
#include "attention/parts.cuh"
#include "mask.cuh"
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

// A CTA's share, or a part of it: some query heads of one team of cache heads, over every `splits`-th turn of rows of
// one request, from number `split` on.
struct Work {
    static constexpr int kNone = -1;

    int request;  // kNone: there is no work
    int head_team;
    int column_block;
    int kv_len;
    RowRange rows;
    int first_row;  // of turn 0: where `rows` begin, or before it where boxes are cut like pages
    int split;
    int splits;
    bool is_whole;  // nobody else has rows of the request for these heads: results are not partial
    int part;       // where partial results go
    bool is_last;   // of the CTA's
    // Of shares: all parts of a request that has several.
    PartRange parts;
};

// What merge.cu is to merge.
struct Parts {
    static constexpr int kNoMore = -1;

    int request;
    int column;  // of all cache heads'
    PartRange range;  // with a count of 0: there is nothing to merge; kNoMore: neither for any index from here on
};
