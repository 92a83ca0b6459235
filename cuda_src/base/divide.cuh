// Division by a number that the host knows, after Granlund and Montgomery, "Division by invariant integers using
// multiplication" (1994): exact for dividends from 0 to 2^31 - 1. A plain division would put some 40 cycles each before
// a kernel's first load.
#pragma once
#include "base/ptx.cuh"

struct Divisor {
    int value;
    u32 multiplier;
    int shift;

    DEVICE int quotient(int dividend) const {
        return static_cast<int>((ptx::multiply_high(dividend, multiplier) + dividend) >> shift);
    }
    DEVICE int remainder(int dividend, int quotient) const { return dividend - quotient * value; }
};
