// Tiles of K and V in registers, loaded straight from global memory in the shape of tensor-core fragments.
#pragma once
#include "base/row_slice.cuh"
#include "mask.cuh"

// SUBTILES times 16 rows of K. A lane holds its slice of rows g and g + 8 of each.
template <class Format, int HEAD_DIM, int SUBTILES>
struct KTile {
    using Slice = RowSlice<HEAD_DIM * Format::kBytes, 4>;
    u32 low[SUBTILES][Slice::kWords];
    u32 high[SUBTILES][Slice::kWords];

    // `rows`: each from this lane's Slice::begin on.
    template <class Rows>
    DEVICE void load(const Rows& rows, const RowRange& range, int first, const Lane& lane) {
#pragma unroll
        for (int r = 0; r < SUBTILES; r++) {
            const int row = first + 16 * r + lane.group;
            Slice::load(low[r], rows.row(row, range), lane.thread);
            Slice::load(high[r], rows.row(row + 8, range), lane.thread);
        }
    }

    DEVICE u32 bits_of_loads() const {
        u32 bits = 0;
#pragma unroll
        for (int r = 0; r < SUBTILES; r++) bits |= Slice::bits_of_loads(low[r]) | Slice::bits_of_loads(high[r]);
        return bits;
    }
};

// SUBTILES times 16 rows of V. A lane holds its slice of rows 2t, 2t + 1, 2t + 8 and 2t + 9 of each: after pairing
// bytes across rows it has, for every pair of head dimensions, the A fragment of the transposed tile.
template <class Format, int HEAD_DIM, int SUBTILES>
struct VTile {
    using Slice = RowSlice<HEAD_DIM * Format::kBytes, 8>;
    static constexpr int kTiles = HEAD_DIM / 16;
    u32 rows_[SUBTILES][4][Slice::kWords];

    template <class Rows>
    DEVICE void load(const Rows& rows, const RowRange& range, int first, const Lane& lane) {
#pragma unroll
        for (int r = 0; r < SUBTILES; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                Slice::load(rows_[r][i], rows.row(row_of(first, r, i, lane), range), lane.group);
    }

    DEVICE u32 bits_of_loads() const {
        u32 bits = 0;
#pragma unroll
        for (int r = 0; r < SUBTILES; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) bits |= Slice::bits_of_loads(rows_[r][i]);
        return bits;
    }

    // Zeroes what was loaded in place of rows that `range` does not have.
    template <bool FROM_BEFORE>
    DEVICE void clear_beyond(const RowRange& range, int first, const Lane& lane) {
#pragma unroll
        for (int r = 0; r < SUBTILES; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!range.visible<FROM_BEFORE>(row_of(first, r, i, lane)))
#pragma unroll
                    for (int w = 0; w < Slice::kWords; w++) rows_[r][i][w] = 0;
    }

    // Head dimension of result row g (second = 0) or g + 8 (second = 1) of tile j.
    static DEVICE int dim(int j, int group) { return Slice::offset(2 * Format::kBytes * j, group) / Format::kBytes; }

    // Whether a lane's head dimensions of tile j + 1 follow on those of tile j.
    static DEVICE constexpr bool continues(int j) {
        return Slice::load_start(2 * Format::kBytes * j) == Slice::load_start(2 * Format::kBytes * (j + 1));
    }

    // out[n][j] += (16 head dimensions of subtile r, transposed) * weights of column tile n.
    template <int COLUMN_TILES, int TERMS>
    DEVICE void accumulate(int r, const u32 (&weights)[COLUMN_TILES][TERMS][2],
                           float (&out)[COLUMN_TILES][kTiles][4]) const {
#pragma unroll
        for (int j = 0; j < kTiles; j++) {
            u32 first[2], second[2];
            Format::column_pairs(rows_[r][0], rows_[r][1], j, first);
            Format::column_pairs(rows_[r][2], rows_[r][3], j, second);
            const u32 a[4] = {first[0], first[1], second[0], second[1]};
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (int i = 0; i < TERMS; i++) Format::Operand::mma(out[n][j], a, weights[n][i][0], weights[n][i][1]);
        }
    }

  private:
    static DEVICE int row_of(int first, int r, int i, const Lane& lane) {
        return first + 16 * r + 2 * lane.thread + (i % 2) + 8 * (i / 2);
    }
};
