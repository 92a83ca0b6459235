// Brings together what the warps of a CTA found for the same columns, through shared memory, in a fixed order.
//
// The head dimension passes through in pieces of at most kPieceTiles tiles, which bounds the memory whatever it is.
#pragma once
#include "softmax_state.cuh"

template <int HEAD_DIM, int COLUMN_TILES, int WARPS>
struct Combine {
    static constexpr int kTiles = HEAD_DIM / 16;
    static constexpr int kPieceTiles = min_of(kTiles, 8);
    // Four floats more than a piece has: the lanes of a warp then write to 32 different banks.
    static constexpr int kColumnStride = 16 * kPieceTiles + 4;
    static constexpr int kStateBytes = WARPS * COLUMN_TILES * 8 * static_cast<int>(sizeof(SoftmaxState));
    static constexpr int kSharedBytes = kStateBytes + WARPS * 8 * kColumnStride * 4;

    // Calls store(column, state, j, group, first, second) once for every used column and pair of head dimensions (those
    // of tile j, lane group `group`), with the merged state and the two merged, unnormalised results.
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
        for (int n = 0; n < COLUMN_TILES; n++) {
            const int width = min_of(8, used - 8 * n);
#pragma unroll
            for (int begin = 0; begin < kTiles; begin += kPieceTiles) {
                const int tiles = min_of(kPieceTiles, kTiles - begin);
                if (n || begin) ptx::sync_threads();
                float* mine = piece + (lane.warp * 8 + 2 * lane.thread) * kColumnStride + lane.group;
#pragma unroll
                for (int c = 0; c < 2; c++)
                    if (2 * lane.thread + c < width)
#pragma unroll
                        for (int j = 0; j < kPieceTiles; j++)
                            if (begin + j < kTiles) {
                                mine[c * kColumnStride + 8 * j] = columns.out[n][begin + j][c];
                                mine[c * kColumnStride + 8 * (kPieceTiles + j)] = columns.out[n][begin + j][c + 2];
                            }
                ptx::sync_threads();
                for (int task = threadIdx.x; task < width * 8 * tiles; task += 32 * WARPS) {
                    const int column = task / (8 * tiles), at = task % (8 * tiles);
                    float first = 0.0f, second = 0.0f;
                    const SoftmaxState state = merge_states(
                        WARPS, [&](int w) { return states[(w * COLUMN_TILES + n) * 8 + column]; },
                        [&](int w, float factor) {
                            const float* theirs = piece + (w * 8 + column) * kColumnStride + at;
                            first += factor * theirs[0];
                            second += factor * theirs[8 * kPieceTiles];
                        });
                    store(8 * n + column, state, begin + at / 8, at % 8, first, second);
                }
            }
        }
    }
};
