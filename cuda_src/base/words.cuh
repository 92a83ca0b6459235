// Stores neighbouring 32-bit words, 4, 8 or 16 bytes to a multiple of as many, by one instruction.
#pragma once
#include "base/types.cuh"

template <int WORDS>
DEVICE void store_words(u8* to, const u32 (&words)[WORDS]) {
    static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4, "one store instruction");
    if constexpr (WORDS == 1) {
        *reinterpret_cast<u32*>(to) = words[0];
    } else if constexpr (WORDS == 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
