// Brings together what the warps of a CTA found for the same columns, through shared memory, in a fixed order.
//
// Where not all fits into an SM, it passes through in pieces: 128 head dimensions, and one tile of columns, at a time.
#pragma once
#include "softmax_state.cuh"

// Warp w works on cache head w % HEADS of the CTA's.
template <int HEAD_DIM, int COLUMN_TILES, int WARPS, int HEADS, int CTAS_PER_SM>
struct Combine {
    static constexpr int kTiles = HEAD_DIM / 16;
    static constexpr int kTeam = WARPS / HEADS;
    static constexpr int kPieceTiles = min_of(kTiles, 8);
    // Head dimensions in their order, with four floats after each 16 and after each column: a quarter-warp's 16-byte
    // accesses then lie in different banks.
    static constexpr int kColumnStride = 20 * kPieceTiles + 4;
    static constexpr int kStateBytes = WARPS * COLUMN_TILES * 8 * static_cast<int>(sizeof(SoftmaxState));
    // Every architecture has 99 KB an SM; some of that is for Q and the states.
    static constexpr int kMostBytes = CTAS_PER_SM == 1 ? 84000 : 64000 / CTAS_PER_SM;
    static constexpr int kPieceColumns = WARPS * 8 * COLUMN_TILES * kColumnStride * 4 > kMostBytes ? 1 : COLUMN_TILES;
    static constexpr int kSharedBytes = kStateBytes + WARPS * 8 * kPieceColumns * kColumnStride * 4;

    // Calls store(head, column, state, dim, x) once for every used column of every head and four head dimensions from
    // `dim` on, with the merged state and the merged, unnormalised results. `Tile`: the VTile of the columns.
    template <class Tile, class Columns, class Store>
    static DEVICE void run(const Columns& columns, int used, const Lane& lane, u8* shared, Store store) {
        SoftmaxState* states = reinterpret_cast<SoftmaxState*>(shared);
        float* piece = reinterpret_cast<float*>(shared + kStateBytes);
        if (lane.group == 0)
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (int c = 0; c < 2; c++)
                    states[(lane.warp * COLUMN_TILES + n) * 8 + 2 * lane.thread + c] = columns.state[n][c];
#pragma unroll
        for (int first_tile = 0; first_tile < COLUMN_TILES; first_tile += kPieceColumns) {
            const int width = min_of(8 * kPieceColumns, used - 8 * first_tile);
#pragma unroll
            for (int begin = 0; begin < kTiles; begin += kPieceTiles) {
                const int tiles = min_of(kPieceTiles, kTiles - begin);
                if (first_tile || begin) ptx::sync_first<32 * WARPS>();
#pragma unroll
                for (int n = 0; n < kPieceColumns; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int column = 8 * n + 2 * lane.thread + c;
                        float* mine = piece + (lane.warp * 8 * kPieceColumns + column) * kColumnStride;
                        if (column < width) put<Tile>(columns.out[first_tile + n], c, begin, lane, mine);
                    }
                ptx::sync_first<32 * WARPS>();
                for (int task = lane.in_cta; task < HEADS * width * 4 * tiles; task += 32 * WARPS) {
                    const int dim = task % (4 * tiles) * 4;  // within the piece
                    const int head = task / (4 * tiles) % HEADS, column = task / (4 * tiles) / HEADS;
                    const auto place = [&](int i) { return i * HEADS + head; };  // of the head's warps
                    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    // All loads before the first use: one at a time, they would take as long as the products.
                    SoftmaxState found[kTeam];
                    float4 theirs[kTeam];
#pragma unroll
                    for (int i = 0; i < kTeam; i++) {
                        found[i] = states[(place(i) * COLUMN_TILES + first_tile) * 8 + column];
                        theirs[i] = *reinterpret_cast<const float4*>(
                            piece + (place(i) * 8 * kPieceColumns + column) * kColumnStride + padded(dim));
                    }
                    const SoftmaxState state = merge_states(
                        kTeam, [&](int i) { return found[i]; },
                        [&](int i, float factor) { add(sum, theirs[i], factor); });
                    store(head, 8 * first_tile + column, state, 16 * begin + dim, sum);
                }
            }
        }
    }

  private:
    static DEVICE int padded(int dim) { return dim + dim / 16 * 4; }

    // A lane's results of one column, c of its two, for the tiles of the piece that starts with tile `begin`.
    template <class Tile>
    static DEVICE void put(const float (&out)[kTiles][4], int c, int begin, const Lane& lane, float* column) {
        const auto at = [&](int j) { return column + padded(Tile::dim(j, lane.group) - 16 * begin); };
        const auto put_pair = [&](int j) { *reinterpret_cast<float2*>(at(j)) = make_float2(out[j][c], out[j][c + 2]); };
#pragma unroll
        for (int j = begin; j < min_of(begin + kPieceTiles, kTiles); j += 2) {
            const bool two = j + 1 < kTiles;
            if (two && Tile::continues(j)) {
                *reinterpret_cast<float4*>(at(j)) =
                    make_float4(out[j][c], out[j][c + 2], out[j + 1][c], out[j + 1][c + 2]);
            } else {
                put_pair(j);
                if (two) put_pair(j + 1);
            }
        }
    }
};
