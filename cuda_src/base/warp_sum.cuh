// Sums over the lanes of a warp before each of them.
#pragma once
#include "base/ptx.cuh"

DEVICE u32 shuffle_any(u32 x, int lane) { return ptx::shuffle_word(x, lane); }
DEVICE u64 shuffle_any(u64 x, int lane) {
    const u64 high = ptx::shuffle_word(static_cast<u32>(x >> 32), lane);
    return high << 32 | ptx::shuffle_word(static_cast<u32>(x), lane);
}

// The sum of the lanes up to and including this one.
template <class T>
DEVICE T inclusive_sum(T x, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const T other = shuffle_any(x, lane - step);
        if (lane >= step) x += other;
    }
    return x;
}
