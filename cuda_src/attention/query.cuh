// The queries of a CTA as B fragments: one column a query head, in the order of the head dimension that a row slice
// of K comes in. They are read once, converted to the operand type of K without loss, and kept in shared memory: their
// registers are worth more to the tiles that are on their way.
#pragma once
#include "base/operand.cuh"
#include "base/row_slice.cuh"

template <class A, class B>
constexpr bool kSameType = false;
template <class A>
constexpr bool kSameType<A, A> = true;

template <class QFormat, class KFormat, int HEAD_DIM, int COLUMN_TILES, int HEADS, int WARPS>
class Query {
    using Source = typename QFormat::Operand;
    using Operand = typename KFormat::Operand;
    using Slice = RowSlice<HEAD_DIM * KFormat::kBytes, 4>;

    static constexpr bool kSame = kSameType<Source, Operand>;

  public:
    static constexpr int kSteps = HEAD_DIM / 16;
    // fp16 does not fit one bf16, but exactly two.
    static constexpr int kTerms = !kSame && kSameType<Operand, BFloatOperand> ? 2 : 1;
    // bf16 fits fp16 after a power-of-two factor that brings the column's largest value below 2^15.
    static constexpr bool kHasFactor = !kSame && kSameType<Operand, HalfOperand>;
    static constexpr int kTiles = HEADS * COLUMN_TILES;
    static constexpr int kRounds = ceil_div(kTiles, WARPS);
    static constexpr int kSharedBytes = kTiles * (kSteps * kTerms * 32 * 8 + 8 * 4);

    // A warp's share of Q on its way into registers.
    struct Asked {
        uint2 words[kRounds][kSteps];
    };

    // `row(head, column)`: where the query of a column of one of the CTA's cache heads lies, in shared memory or not.
    // The CTA's first WARPS warps take part.
    template <bool IS_SHARED, class Row>
    static DEVICE Asked ask(Row row, const Lane& lane) {
        Asked asked = {};  // or else what other warps have of the work before would be kept
#pragma unroll
        for (int round = 0; round < kRounds; round++) {
            const int n = lane.warp + round * WARPS;
            if (n >= kTiles) break;
            const u8* from = row(n / COLUMN_TILES, 8 * (n % COLUMN_TILES) + lane.group);
#pragma unroll
            for (int s = 0; s < kSteps; s++) {
                const int element = Slice::offset(4 * KFormat::kBytes * s, lane.thread) / KFormat::kBytes;
                const u8* words = from + element * QFormat::kBytes;
                if constexpr (IS_SHARED) ptx::load_shared<8>(&asked.words[round][s].x, words);
                else asked.words[round][s] = ptx::load_8(words);
            }
        }
        return asked;
    }

    // `head`: the one whose columns this warp works on. `shared`: kSharedBytes.
    DEVICE Query(const Asked& asked, int head, const Lane& lane, u8* shared)
        : fragments_(reinterpret_cast<uint2*>(shared) + lane.index()),
          inverses_(reinterpret_cast<float*>(shared + kTiles * kSteps * kTerms * 32 * 8)) {
#pragma unroll
        for (int round = 0; round < kRounds; round++) {
            const int n = lane.warp + round * WARPS;
            if (n >= kTiles) break;
            const float inverse = put(asked.words[round], n);
            if (lane.thread == 0) inverses_[8 * n + lane.group] = inverse;
        }
        ptx::sync_first<32 * WARPS>();
        fragments_ += head * COLUMN_TILES * kSteps * kTerms * 32;
        inverses_ += head * COLUMN_TILES * 8;
    }

    // The A fragment of step s of subtile r: 16 rows of K.
    template <class Keys>
    static DEVICE void rows_of(const Keys& keys, int r, int s, u32 (&a)[4]) {
        u32 low[2], high[2];
        KFormat::row_pairs(keys.low[r], s, low);
        KFormat::row_pairs(keys.high[r], s, high);
        a[0] = low[0], a[1] = high[0], a[2] = low[1], a[3] = high[1];
    }

    // Adds the products of rows of K with all columns; `rows(r, s, a)` gives an A fragment. CHAINS: sums that the steps
    // take turns over, since each waits for the one before it in the same sum.
    template <int CHAINS, int SUBTILES, class Rows>
    DEVICE void multiply(Rows rows, float (&scores)[SUBTILES][COLUMN_TILES][4]) const {
        float other[CHAINS][SUBTILES][COLUMN_TILES][4] = {};  // `scores` stands for the first
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            u32 a[SUBTILES][4];
#pragma unroll
            for (int r = 0; r < SUBTILES; r++) rows(r, s, a[r]);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (int i = 0; i < kTerms; i++) {
                    const uint2 b = fragment(n, s, i);
#pragma unroll
                    for (int r = 0; r < SUBTILES; r++)
                        Operand::mma(s % CHAINS ? other[s % CHAINS][r][n] : scores[r][n], a[r], b.x, b.y);
                }
        }
#pragma unroll
        for (int c = 1; c < CHAINS; c++)
#pragma unroll
            for (int r = 0; r < SUBTILES; r++)
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) scores[r][n][i] += other[c][r][n][i];
    }

    // What the scores of column 2 * thread + c of tile n have to be multiplied with, beside `scale`.
    DEVICE float logit_scale(float scale, int n, int c, const Lane& lane) const {
        if constexpr (kHasFactor) return scale * inverses_[8 * n + 2 * lane.thread + c];
        return scale;
    }

  private:
    DEVICE uint2& fragment(int n, int s, int i) const { return fragments_[((n * kSteps + s) * kTerms + i) * 32]; }

    // Stores a lane's part of one query. Returns the inverse of the factor it was multiplied with.
    DEVICE float put(const uint2 (&words)[kSteps], int n) const {
        float factor = 1.0f, inverse = 1.0f;
        if constexpr (kHasFactor) {
            float largest = 0.0f;
#pragma unroll
            for (int s = 0; s < kSteps; s++)
                largest = fmaxf(largest, fmaxf(largest_of(words[s].x), largest_of(words[s].y)));
            largest = fmaxf(largest, ptx::shuffle_xor(largest, 1));
            largest = fmaxf(largest, ptx::shuffle_xor(largest, 2));
            const int exponent = static_cast<int>(ptx::float_bits(largest) >> 23);
            const int shift = exponent == 255 ? 127 : max_of(1, min_of(253, 127 + 127 + 14 - exponent));
            factor = ptx::bits_float(static_cast<u32>(shift) << 23);
            inverse = ptx::bits_float(static_cast<u32>(254 - shift) << 23);
        }
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            u32 low[kTerms], high[kTerms];
            convert(words[s].x, factor, low);
            convert(words[s].y, factor, high);
#pragma unroll
            for (int i = 0; i < kTerms; i++) fragment(n, s, i) = make_uint2(low[i], high[i]);
        }
        return inverse;
    }

    static DEVICE void convert(u32 pair, float factor, u32 (&terms)[kTerms]) {
        if constexpr (kSame)
            terms[0] = pair;
        else
            split_terms<Operand, kTerms>(factor * Source::low(pair), factor * Source::high(pair), terms);
    }

    static DEVICE float largest_of(u32 pair) { return fmaxf(fabsf(Source::low(pair)), fabsf(Source::high(pair))); }

    uint2* fragments_;
    float* inverses_;
};
