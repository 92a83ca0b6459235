// Which CTA does what, known from the grid alone: every request is cut into the same number of parts.
#pragma once
#include "params.cuh"

// One CTA's share: some query heads of one cache head, over one part of the rows of one request.
struct Work {
    int request;
    int kv_head;
    int column_block;
    int split;
};

struct UniformSchedule {
    // CTAs of one request's heads are neighbours: in NHD their rows are neighbours in memory. Column blocks of one head
    // read the same rows, so they are closest.
    static DEVICE Work work(const DecodeParams& p, int index) {
        Work w;
        const int columns = p.column_blocks.quotient(index);
        w.column_block = p.column_blocks.remainder(index, columns);
        const int heads = p.num_kv_heads.quotient(columns);
        w.kv_head = p.num_kv_heads.remainder(columns, heads);
        w.request = p.splits.quotient(heads);
        w.split = p.splits.remainder(heads, w.request);
        return w;
    }
};
