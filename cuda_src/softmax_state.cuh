// The state of a softmax that is computed in parts, after "Online normalizer calculation for softmax" (Milakov and
// Gimelshein, 2018): weights are 2^(logit - reference), `sum` adds them up, and an accumulator beside it adds up
// weight * value. The reference need not be the maximum; it only keeps the weights in range.
//
// Logits here are in the base of the exponential: natural logits times log2(e).
#pragma once
#include "base/ptx.cuh"

constexpr float kLog2E = 1.4426950408889634f;
DEVICE float negative_infinity() { return ptx::bits_float(0xff800000u); }

struct SoftmaxState {
    float reference;
    float sum;

    // The neutral element of merging. Its reference is finite, so that differences of references are never NaN; a
    // logit of -inf gets weight 0 against it.
    static DEVICE SoftmaxState empty() { return {-3.402823466e38f, 0.0f}; }

    DEVICE float weight(float logit) const { return ptx::exp2(logit - reference); }

    // What a sum or an accumulator against this reference has to be multiplied with to stand against another one.
    DEVICE float factor_to(float other) const { return ptx::exp2(reference - other); }

    // Moves to another reference and returns what accumulators have to be multiplied with.
    DEVICE float move_to(float other) {
        const float factor = factor_to(other);
        reference = other;
        sum *= factor;
        return factor;
    }

    // What an accumulator has to be multiplied with to give the mean; an empty state has mean 0.
    DEVICE float normalizer() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
    DEVICE float log2_sum() const { return sum == 0.0f ? negative_infinity() : reference + ptx::log2(sum); }
};

DEVICE void scale(float4& x, float factor) {
    x.x *= factor;
    x.y *= factor;
    x.z *= factor;
    x.w *= factor;
}

// Not left to the compiler: which product it takes into the sum must be the same wherever this is used.
DEVICE void add(float& x, float other, float factor) { x = ptx::multiply_add(factor, other, x); }
DEVICE void add(float4& x, const float4& other, float factor) {
    add(x.x, other.x, factor);
    add(x.y, other.y, factor);
    add(x.z, other.z, factor);
    add(x.w, other.w, factor);
}

// Merges `count` states: `state(i)` gives one, `add(i, factor)` is called in order to add up its accumulator times
// factor.
template <class State, class Add>
DEVICE SoftmaxState merge_states(int count, State state, Add add) {
    SoftmaxState total = SoftmaxState::empty();
#pragma unroll
    for (int i = 0; i < count; i++) total.reference = max_of(total.reference, state(i).reference);
#pragma unroll
    for (int i = 0; i < count; i++) {
        const SoftmaxState part = state(i);
        const float factor = part.factor_to(total.reference);
        total.sum += part.sum * factor;
        add(i, factor);
    }
    return total;
}

// When the reference moves. A weight is at most 2^15, which fp16 holds; it starts at 2^7 for the largest logit, which
// leaves 2^-31 of it before fp16's subnormals end, and a maximum that rises by less than 2^8 moves nothing.
struct LazyReference {
    static constexpr float kLead = 7.0f;
    static constexpr float kHeadroom = 15.0f;

    static DEVICE bool exceeded(float logit, float reference) { return logit > reference + kHeadroom; }
    // The reference for a column whose largest new logit is `maximum`.
    static DEVICE float raised(float maximum, float reference) {
        return exceeded(maximum, reference) ? maximum - kLead : reference;
    }
};
