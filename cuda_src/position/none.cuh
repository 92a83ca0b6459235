// No position encoding: q and the keys in the cache are rotated already, or need no rotation.
//
// A position mode changes a logit (in the base of exp2, as everywhere in the kernel) given the distance of its row from
// the query, which stands at row kv_len - 1. Modes that rotate q or the keys will widen this interface.
#pragma once
#include "base/types.cuh"

struct NoPosition {
    // `head`: the query head; `distance`: kv_len - 1 - row.
    static DEVICE float logit(float x, int head, int distance) { return x; }
};
