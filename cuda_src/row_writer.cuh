// How a share of a row, 16 bytes of what comes in, goes into a cache: floats converted to its format, or bytes as they
// are.
//
// `Writer` of append.cu is one of these.
#pragma once
#include "base/ptx.cuh"
#include "base/words.cuh"

template <class Values, class Stored>
struct Convert {
    static constexpr bool kConverts = true;
    static constexpr int kBytes = Values::kBytes;        // of an element that comes in
    static constexpr int kStoredBytes = Stored::kBytes;  // of one in the cache
    static constexpr int kElements = 16 / kBytes;        // of a share

    static DEVICE void floats_of(const u32 (&words)[4], float (&x)[kElements]) {
#pragma unroll
        for (int i = 0; i < 4; i++) Values::floats_of(words[i], &x[i * (kElements / 4)]);
    }
    static DEVICE void store(u8* to, const float (&x)[kElements]) {
        constexpr int kWords = kElements * kStoredBytes / 4;
        u32 words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; i++) words[i] = Stored::word_of(&x[i * (kElements / kWords)]);
        store_words(to, words);
    }
};

template <int BYTES>
struct CopyBytes {
    static constexpr bool kConverts = false;
    static constexpr int kBytes = BYTES;
    static constexpr int kStoredBytes = BYTES;
    static constexpr int kElements = 16 / BYTES;
};
