// Brings together what the warps of a team found for the same columns, through shared memory, in a fixed order.
//
// The head dimension passes through in pieces of at most kPieceTiles tiles, which bounds the memory whatever it is.
#pragma once
#include "softmax_state.cuh"

template <int HEAD_DIM, int COLUMN_TILES, class Team>
struct Combine {
    static constexpr int kWarps = Team::kWarps;
    static constexpr int kTiles = HEAD_DIM / 16;
    static constexpr int kPieceTiles = min_of(kTiles, 8);
    // Four floats more than a piece has: the columns of a half-warp's 8-byte accesses then lie in different banks.
    static constexpr int kColumnStride = 16 * kPieceTiles + 4;
    static constexpr int kStateBytes = kWarps * COLUMN_TILES * 8 * static_cast<int>(sizeof(SoftmaxState));
    static constexpr int kSharedBytes = kStateBytes + kWarps * 8 * kColumnStride * 4;

    // Calls store(column, state, j, group, first, second) once for every used column and pair of head dimensions (those
    // of tile j, lane group `group`), with the merged state and the two merged, unnormalised results.
    template <class Columns, class Store>
    static DEVICE void run(const Columns& columns, int used, const Team& team, const Lane& lane, u8* shared,
                           Store store) {
        SoftmaxState* states = reinterpret_cast<SoftmaxState*>(shared);
        float* piece = reinterpret_cast<float*>(shared + kStateBytes);
        if (lane.group == 0)
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (int c = 0; c < 2; c++)
                    states[(team.rank * COLUMN_TILES + n) * 8 + 2 * lane.thread + c] = columns.state[n][c];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            const int width = min_of(8, used - 8 * n);
#pragma unroll
            for (int begin = 0; begin < kTiles; begin += kPieceTiles) {
                const int tiles = min_of(kPieceTiles, kTiles - begin);
                if (n || begin) ptx::sync_threads();
                float* mine = piece + (team.rank * 8 + 2 * lane.thread) * kColumnStride + 2 * lane.group;
#pragma unroll
                for (int c = 0; c < 2; c++)
                    if (2 * lane.thread + c < width)
#pragma unroll
                        for (int j = 0; j < kPieceTiles; j++)
                            if (begin + j < kTiles)
                                *reinterpret_cast<float2*>(mine + c * kColumnStride + 16 * j) =
                                    make_float2(columns.out[n][begin + j][c], columns.out[n][begin + j][c + 2]);
                ptx::sync_threads();
                for (int task = 32 * team.rank + lane.index(); task < width * 8 * tiles; task += 32 * kWarps) {
                    const int column = task / (8 * tiles), at = task % (8 * tiles);
                    float first = 0.0f, second = 0.0f;
                    const SoftmaxState state = merge_states(
                        kWarps, [&](int w) { return states[(w * COLUMN_TILES + n) * 8 + column]; },
                        [&](int w, float factor) {
                            const float2 theirs = *reinterpret_cast<const float2*>(
                                piece + (w * 8 + column) * kColumnStride + 2 * at);
                            first += factor * theirs.x;
                            second += factor * theirs.y;
                        });
                    store(8 * n + column, state, begin + at / 8, at % 8, first, second);
                }
            }
        }
    }
};
