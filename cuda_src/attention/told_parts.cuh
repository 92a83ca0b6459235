// Parts of a request that CTAs of one kernel tell each other, so that no other kernel has to merge them.
//
// Nobody counts CTAs, for a counter would have to be cleared first; and nobody says that a part is written, for that
// would take a fence and a way to memory more. Instead each float comes with a tag in the other half of its word. A CTA
// stores its part, passes a fence and loads all parts: who finds every tag has all of the request and merges, dimension
// by dimension. The fence makes that the last one does; if two do, both write the same bits, because parts are summed
// in their order. A tag is a number that memory does not hold by chance, and who has merged takes the tags away before
// the next call.
#pragma once
#include "attention/parts.cuh"

template <int HEAD_DIM>
class ToldParts {
    static constexpr int kPairs = 3;  // of words: four results, then the state
    static constexpr int kStep = HEAD_DIM / 2;  // words from one pair to the next: those of quads are side by side

  public:
    static constexpr bool kMayBeMissing = true;
    struct Raw {
        u64 words[2 * kPairs];
    };

    // Of a column of all cache heads', for the four head dimensions from 4 * quad on.
    DEVICE ToldParts(const DecodeParams& p, int column, int quad)
        : tag_(p.tag), part_words_(p.num_kv_heads * p.columns * (kPairs * kStep)),
          words_(reinterpret_cast<u64*>(p.partial_out) + column * (kPairs * kStep) + 2 * quad) {}

    DEVICE void store(int part, const SoftmaxState& state, const float4& out) const {
        ptx::store_words(at(part), word(out.x), word(out.y));
        ptx::store_words(at(part) + kStep, word(out.z), word(out.w));
        ptx::store_words(at(part) + 2 * kStep, word(state.reference), word(state.sum));
    }
    DEVICE Raw load(int part) const {
        Raw raw;
#pragma unroll
        for (int i = 0; i < kPairs; i++)
            ptx::load_words(at(part) + i * kStep, raw.words[2 * i], raw.words[2 * i + 1]);
        return raw;
    }
    static DEVICE Raw none() { return {}; }
    // Whether the first words are not there; if they are, others may still be missing.
    DEVICE bool is_missing(int part) const {
        u64 first, second;
        ptx::load_words(at(part), first, second);
        return tag_of(first) != tag_;
    }
    // False if some of it is not there.
    DEVICE bool unpack(const Raw& raw, Part& part) const {
        u32 wrong = 0;
        float x[2 * kPairs];
#pragma unroll
        for (int i = 0; i < 2 * kPairs; i++) {
            wrong |= tag_of(raw.words[i]) ^ tag_;
            x[i] = ptx::bits_float(static_cast<u32>(raw.words[i]));
        }
        part = {{x[4], x[5]}, make_float4(x[0], x[1], x[2], x[3])};
        return wrong == 0;
    }
    DEVICE void clear(int part) const {
#pragma unroll
        for (int i = 0; i < kPairs; i++) ptx::store_words(at(part) + i * kStep, 0, 0);
    }

  private:
    DEVICE u64 word(float x) const { return static_cast<u64>(tag_) << 32 | ptx::float_bits(x); }
    static DEVICE u32 tag_of(u64 word) { return static_cast<u32>(word >> 32); }
    DEVICE u64* at(int part) const { return words_ + static_cast<i64>(part) * part_words_; }

    u32 tag_;
    int part_words_;
    u64* words_;
};
