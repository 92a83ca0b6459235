// The queries of a CTA as B fragments: one column a query head, in the order of the head dimension that a row slice
// of K comes in. They are read once, converted to the operand type of K without loss, and stay in registers, or in
// shared memory where registers are needed for more than one tile of columns.
#pragma once
#include "base/operand.cuh"
#include "base/row_slice.cuh"

template <class A, class B>
constexpr bool kSameType = false;
template <class A>
constexpr bool kSameType<A, A> = true;

template <class QFormat, class KFormat, int HEAD_DIM, int COLUMN_TILES, bool SHARED>
class Query {
    using Source = typename QFormat::Operand;
    using Operand = typename KFormat::Operand;
    using Slice = RowSlice<HEAD_DIM * KFormat::kBytes, 4>;

    static constexpr bool kSame = kSameType<Source, Operand>;
    static constexpr int kInRegisters = SHARED ? 0 : COLUMN_TILES;

  public:
    static constexpr int kSteps = HEAD_DIM / 16;
    // fp16 does not fit one bf16, but exactly two.
    static constexpr int kTerms = !kSame && kSameType<Operand, BFloatOperand> ? 2 : 1;
    // bf16 fits fp16 after a power-of-two factor that brings the column's largest value below 2^15.
    static constexpr bool kHasFactor = !kSame && kSameType<Operand, HalfOperand>;
    static constexpr int kSharedBytes = SHARED ? COLUMN_TILES * (kSteps * kTerms * 32 * 8 + 8 * 4) : 0;

    // `row(column)`: where the query of a column lies. `shared`: kSharedBytes.
    template <class Row>
    DEVICE Query(Row row, const Lane& lane, u8* shared) {
        if constexpr (SHARED) {
            fragments_ = reinterpret_cast<uint2*>(shared) + lane.index();
            float* factors = reinterpret_cast<float*>(shared + COLUMN_TILES * kSteps * kTerms * 32 * 8);
            for (int n = lane.warp; n < COLUMN_TILES; n += blockDim.x / 32) {
                u32 column[kSteps][kTerms][2];
                const float factor = load(row(8 * n + lane.group), lane, column);
#pragma unroll
                for (int s = 0; s < kSteps; s++)
#pragma unroll
                    for (int i = 0; i < kTerms; i++) fragment(n, s, i) = make_uint2(column[s][i][0], column[s][i][1]);
                if (lane.thread == 0) factors[8 * n + lane.group] = factor;
            }
            ptx::sync_threads();
            if constexpr (kHasFactor)
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) undo_[n][c] = factors[8 * n + 2 * lane.thread + c];
        } else {
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                const float factor = load(row(8 * n + lane.group), lane, registers_[n]);
                if constexpr (kHasFactor)
#pragma unroll
                    for (int c = 0; c < 2; c++) undo_[n][c] = ptx::shuffle(factor, 4 * (2 * lane.thread + c));
            }
        }
    }

    // Adds the products of the rows of a KTile with all columns.
    template <class Keys, int SUBTILES>
    DEVICE void multiply(const Keys& keys, float (&scores)[SUBTILES][COLUMN_TILES][4]) const {
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            u32 a[SUBTILES][4];
#pragma unroll
            for (int r = 0; r < SUBTILES; r++) {
                u32 low[2], high[2];
                KFormat::row_pairs(keys.low[r], s, low);
                KFormat::row_pairs(keys.high[r], s, high);
                a[r][0] = low[0], a[r][1] = high[0], a[r][2] = low[1], a[r][3] = high[1];
            }
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (int i = 0; i < kTerms; i++) {
                    uint2 b;
                    if constexpr (SHARED)
                        b = fragment(n, s, i);
                    else
                        b = make_uint2(registers_[n][s][i][0], registers_[n][s][i][1]);
#pragma unroll
                    for (int r = 0; r < SUBTILES; r++) Operand::mma(scores[r][n], a[r], b.x, b.y);
                }
        }
    }

    // What the scores of column 2 * thread + c of tile n have to be multiplied with, beside `scale`.
    DEVICE float logit_scale(float scale, int n, int c) const {
        if constexpr (kHasFactor) return scale * undo_[n][c];
        return scale;
    }

  private:
    DEVICE uint2& fragment(int n, int s, int i) const { return fragments_[((n * kSteps + s) * kTerms + i) * 32]; }

    // Reads a lane's part of one query. Returns the inverse of the factor it was multiplied with.
    static DEVICE float load(const u8* row, const Lane& lane, u32 (&column)[kSteps][kTerms][2]) {
        uint2 words[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            const int element = Slice::offset(4 * KFormat::kBytes * s, lane.thread) / KFormat::kBytes;
            words[s] = ptx::load_8(row + element * QFormat::kBytes);
        }
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
        for (int s = 0; s < kSteps; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 pair = half ? words[s].y : words[s].x;
                u32 terms[kTerms];
                if constexpr (kSame)
                    terms[0] = pair;
                else
                    split_terms<Operand, kTerms>(factor * Source::low(pair), factor * Source::high(pair), terms);
#pragma unroll
                for (int i = 0; i < kTerms; i++) column[s][i][half] = terms[i];
            }
        return inverse;
    }

    static DEVICE float largest_of(u32 pair) { return fmaxf(fabsf(Source::low(pair)), fabsf(Source::high(pair))); }

    u32 registers_[kInRegisters ? kInRegisters : 1][kSteps][kTerms][2];
    float undo_[COLUMN_TILES][2];
    uint2* fragments_;
};
