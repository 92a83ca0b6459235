// The softmax states and accumulators of a warp's columns. In the fragments of S and of O alike, a lane's two columns
// of tile n are 8n + 2t and 8n + 2t + 1, so rescaling an accumulator needs no exchange between lanes.
#pragma once
#include "base/operand.cuh"
#include "softmax_state.cuh"

template <int COLUMN_TILES, int TILES, int SUBTILES>
struct Columns {
    SoftmaxState state[COLUMN_TILES][2];  // `sum` covers this lane's rows only, until `finish`
    float out[COLUMN_TILES][TILES][4];    // unnormalised, transposed: head dimensions are the rows

    DEVICE Columns() {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            state[n][0] = state[n][1] = SoftmaxState::empty();
#pragma unroll
            for (int j = 0; j < TILES; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[n][j][i] = 0.0f;
        }
    }

    // Takes in the logits of a tile, which become weights.
    DEVICE void update(float (&logits)[SUBTILES][COLUMN_TILES][4]) {
        bool exceeded = false;
#pragma unroll
        for (int r = 0; r < SUBTILES; r++)
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    exceeded |= LazyReference::exceeded(logits[r][n][i], state[n][i % 2].reference);
        if (ptx::any(exceeded)) raise_references(logits);
#pragma unroll
        for (int r = 0; r < SUBTILES; r++)
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    logits[r][n][i] = state[n][i % 2].weight(logits[r][n][i]);
                    state[n][i % 2].sum += logits[r][n][i];
                }
    }

    // Weights of one subtile as B fragments: rows become the inner dimension.
    template <class Operand, int TERMS>
    static DEVICE void fragments(const float (&weights)[COLUMN_TILES][4], u32 (&out)[COLUMN_TILES][TERMS][2]) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 terms[TERMS];
                split_terms<Operand, TERMS>(weights[n][2 * half], weights[n][2 * half + 1], terms);
#pragma unroll
                for (int i = 0; i < TERMS; i++) out[n][i][half] = ptx::transpose_8x8(terms[i]);
            }
    }

    // Adds up the sums of the lanes that share a column.
    DEVICE void finish() {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int mask = 4; mask < 32; mask *= 2) state[n][c].sum += ptx::shuffle_xor(state[n][c].sum, mask);
    }

  private:
    DEVICE void raise_references(const float (&logits)[SUBTILES][COLUMN_TILES][4]) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float largest = fmaxf(logits[0][n][c], logits[0][n][c + 2]);
#pragma unroll
                for (int r = 1; r < SUBTILES; r++)
                    largest = fmaxf(largest, fmaxf(logits[r][n][c], logits[r][n][c + 2]));
#pragma unroll
                for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
                const float factor =
                    state[n][c].move_to(LazyReference::raised(largest, state[n][c].reference));
#pragma unroll
                for (int j = 0; j < TILES; j++) {
                    out[n][j][c] *= factor;
                    out[n][j][c + 2] *= factor;
                }
            }
    }
};
