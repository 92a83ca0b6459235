// Which CTA does what, known from the grid alone: every request is cut into the same number of parts.
#pragma once
#include "base/ptx.cuh"
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
    static DEVICE Work work(const DecodeParams& p, u32 index) {
        Work w;
        index = divide(index, p.column_blocks, p.column_blocks_multiplier, p.column_blocks_shift, w.column_block);
        index = divide(index, p.num_kv_heads, p.num_kv_heads_multiplier, p.num_kv_heads_shift, w.kv_head);
        w.request = divide(index, p.splits, p.splits_multiplier, p.splits_shift, w.split);
        return w;
    }

  private:
    // Division by an invariant, after Granlund and Montgomery (1994): exact for values below 2^31, without the some 100
    // cycles that three divisions would put before the first load.
    static DEVICE u32 divide(u32 value, int divisor, u32 multiplier, int shift, int& remainder) {
        const u32 quotient = (ptx::multiply_high(value, multiplier) + value) >> shift;
        remainder = static_cast<int>(value - quotient * divisor);
        return quotient;
    }
};
