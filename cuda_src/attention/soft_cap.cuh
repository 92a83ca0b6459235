// The function that a soft cap bends logits by.
#pragma once
#include "softmax_state.cuh"

// tanh(y) to some 2^-20 of itself: 1 - 2 / (1 + exp(2y)), which is exact at both ends but cancels near 0, where its
// series is used (DLMF 4.33.3).
DEVICE float tanh_of(float y) {
    const float square = y * y;
    const float series = y * (1.0f - square * (0.33333333f - square * (0.13333333f - square * 0.05396825f)));
    const float rational = 1.0f - 2.0f / (1.0f + ptx::exp2(y * (2.0f * kLog2E)));
    return square < 0.04f ? series : rational;
}
