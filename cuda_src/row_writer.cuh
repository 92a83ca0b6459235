// How four neighbouring elements of a row go into a cache: floats converted to its format, or bytes as they are.
//
// `Writer` of append.cu is one of these.
#pragma once
#include "base/ptx.cuh"

template <class Values, class Stored>
struct Convert {
    static constexpr bool kConverts = true;
    static constexpr int kBytes = Values::kBytes;        // of an element that comes in
    static constexpr int kStoredBytes = Stored::kBytes;  // of one in the cache

    static DEVICE float4 load(const u8* from) { return Values::load_4(from); }
    static DEVICE void store(u8* to, const float4& x) { Stored::store_4(to, x); }
};

template <int BYTES>
struct CopyBytes {
    static constexpr bool kConverts = false;
    static constexpr int kBytes = BYTES;
    static constexpr int kStoredBytes = BYTES;

    static DEVICE void copy(u8* to, const u8* from) {
        static_assert(BYTES == 1 || BYTES == 2, "elements of a cache");
        if constexpr (BYTES == 1) {
            *reinterpret_cast<u32*>(to) = *reinterpret_cast<const u32*>(from);
        } else {
            *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
        }
    }
};
