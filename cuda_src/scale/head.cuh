// A scale per tensor or per cache head. It is constant along the rows, so it multiplies logits and results, never rows.
#pragma once
#include "base/types.cuh"

struct HeadScale {
    // `known`: the product of what the host knows; `scales`: one float, or one a head, in device memory; may be null.
    static DEVICE float at(float known, const float* scales, int stride, int head) {
        return scales ? known * scales[static_cast<i64>(head) * stride] : known;
    }
};
