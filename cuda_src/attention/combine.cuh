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
    // Four floats more than a piece has: the columns of a half-warp's 8-byte accesses then lie in different banks.
    static constexpr int kColumnStride = 16 * kPieceTiles + 4;
    static constexpr int kStateBytes = WARPS * COLUMN_TILES * 8 * static_cast<int>(sizeof(SoftmaxState));
    // Every architecture has 99 KB an SM; some of that is for Q and the states.
    static constexpr int kMostBytes = CTAS_PER_SM == 1 ? 72000 : 64000 / CTAS_PER_SM;
    static constexpr int kPieceColumns = WARPS * 8 * COLUMN_TILES * kColumnStride * 4 > kMostBytes ? 1 : COLUMN_TILES;
    static constexpr int kSharedBytes = kStateBytes + WARPS * 8 * kPieceColumns * kColumnStride * 4;

    // Calls store(head, column, state, j, group, first, second) once for every used column of every head and pair of
    // head dimensions (those of tile j, lane group `group`), with the merged state and the two merged, unnormalised
    // results.
    template <class Columns, class Store>
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
                        float* mine = piece + (lane.warp * 8 * kPieceColumns + column) * kColumnStride + 2 * lane.group;
                        if (column < width)
#pragma unroll
                            for (int j = 0; j < kPieceTiles; j++)
                                if (begin + j < kTiles)
                                    *reinterpret_cast<float2*>(mine + 16 * j) =
                                        make_float2(columns.out[first_tile + n][begin + j][c],
                                                    columns.out[first_tile + n][begin + j][c + 2]);
                    }
                ptx::sync_first<32 * WARPS>();
                for (int task = threadIdx.x; task < HEADS * width * 8 * tiles; task += 32 * WARPS) {
                    const int at = task % (8 * tiles);
                    const int head = task / (8 * tiles) % HEADS, column = task / (8 * tiles) / HEADS;
                    const auto place = [&](int i) { return i * HEADS + head; };  // of the head's warps
                    float first = 0.0f, second = 0.0f;
                    // All loads before the first use: one at a time, they would take as long as the products.
                    SoftmaxState found[kTeam];
                    float2 theirs[kTeam];
#pragma unroll
                    for (int i = 0; i < kTeam; i++) {
                        found[i] = states[(place(i) * COLUMN_TILES + first_tile) * 8 + column];
                        theirs[i] = *reinterpret_cast<const float2*>(
                            piece + (place(i) * 8 * kPieceColumns + column) * kColumnStride + 2 * at);
                    }
                    const SoftmaxState state = merge_states(
                        kTeam, [&](int i) { return found[i]; },
                        [&](int i, float factor) {
                            first += factor * theirs[i].x;
                            second += factor * theirs[i].y;
                        });
                    store(head, 8 * first_tile + column, state, begin + at / 8, at % 8, first, second);
                }
            }
        }
    }
};
