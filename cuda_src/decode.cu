// Attention of one query token per request over a cache: softmax(q K^T) V for the query heads of a cache head together.
//
// A warp takes 16 * kSubtiles rows at a time. S^T = K Q^T has the rows of K as its rows and the query heads as its
// columns; the weights are transposed in registers and O^T += V^T P^T keeps the columns where they are. Rows go from
// global memory straight into registers; while a tile is worked on, the next tile's rows are on their way.
// The warps of a CTA take turns over its rows and combine at the end; CTAs that share a request write partial results
// for merge.cu.
//
// The specialisation's lines before this file include the policies' headers and name them: QFormat, KFormat, VFormat,
// Scale, Layout, Position, Schedule; and define kHeadDim, kColumnTiles, kSubtiles, kTeams, kWarps, kCtasPerSm, kQueryShared,
// kSoftCap and kSharedBytes.
#include "attention/columns.cuh"
#include "attention/combine.cuh"
#include "attention/query.cuh"
#include "attention/tile.cuh"
#include "mask.cuh"
#include "params.cuh"

using Queries = Query<QFormat, KFormat, kHeadDim, kColumnTiles, kQueryShared>;
using Keys = KTile<KFormat, kHeadDim, kSubtiles>;
using Values = VTile<VFormat, kHeadDim, kSubtiles>;
using WarpColumns = Columns<kColumnTiles, Values::kTiles, kSubtiles>;
using Warps = Team<kTeams, kWarps / kTeams>;
using TeamCombine = Combine<kHeadDim, kColumnTiles, Warps>;

constexpr int kTileRows = 16 * kSubtiles;
constexpr int kColumns = 8 * kColumnTiles;
constexpr int kTeamBytes = Queries::kSharedBytes + TeamCombine::kSharedBytes;
static_assert(kWarps % kTeams == 0, "teams are of equal size");
static_assert(kSharedBytes == kTeams * kTeamBytes, "spec.py and the kernel disagree");

// Scores of a tile to logits in the base of exp2, masked.
DEVICE void to_logits(float (&scores)[kSubtiles][kColumnTiles][4], const Queries& queries, const DecodeParams& p,
                      float scale, int first_row, int first_head, int kv_len, const RowRange& range, const Lane& lane) {
    const bool whole = range.covers(first_row, kTileRows);
#pragma unroll
    for (int r = 0; r < kSubtiles; r++)
#pragma unroll
        for (int n = 0; n < kColumnTiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = first_row + 16 * r + 8 * (i / 2) + lane.group;
                const int head = first_head + 8 * n + 2 * lane.thread + i % 2;
                float x = scores[r][n][i] * queries.logit_scale(scale, n, i % 2);
                if constexpr (kSoftCap) {
                    // cap * tanh(x / cap); tanh(y) = 1 - 2 / (1 + exp(2y)) is exact at both ends.
                    const float e = ptx::exp2(x * (2.0f * kLog2E / p.soft_cap));
                    x = (p.soft_cap * kLog2E) * (1.0f - 2.0f / (1.0f + e));
                }
                x = Position::logit(x, head, kv_len - 1 - row);
                scores[r][n][i] = whole || range.visible(row) ? x : negative_infinity();
            }
}

extern "C" __global__ void __launch_bounds__(32 * kWarps, kCtasPerSm) decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(16) u8 shared[];
    const Lane lane = Lane::self();
    const Warps team = Warps::self();
    u8* const team_shared = shared + team.index * kTeamBytes;
    const Work work = Schedule::work(p, blockIdx.x);
    const int kv_head = work.head_block * kTeams + team.index;
    const int kv_len = Layout::kv_len(p, work.request);
    const RowRange range = RowRange::of_request(kv_len, p.window_left).part(work.split, p.splits, kTileRows);
    const auto k_rows = Layout::k_rows(p, work.request, kv_head);
    const auto v_rows = Layout::v_rows(p, work.request, kv_head);

    Keys keys;
    Values values;
    int row = range.begin + team.rank * kTileRows;
    // The cache's first rows are asked for before q is even read.
    if (row < range.end) {
        keys.load(k_rows, range, row, lane);
        values.load(v_rows, range, row, lane);
    }

    const int first_column = work.column_block * kColumns;
    const int used_columns = min_of(kColumns, p.group_size - first_column);
    const int first_head = kv_head * p.group_size + first_column;
    const u8* q = p.q + work.request * p.q_stride_request;
    // Columns without a head of their own repeat the last one; nothing reads their results.
    const Queries queries(
        [&](int column) { return q + (first_head + min_of(column, used_columns - 1)) * p.q_stride_head; }, team,
        lane, team_shared);

    float scale = Scale::at(p.logit_scale, p.k_scale, p.k_scale_stride, kv_head);
    scale = Scale::at(scale, p.q_scale, 0, 0) * KFormat::kGain;
    if constexpr (!kSoftCap) scale *= kLog2E;  // a soft cap needs natural logits first

    WarpColumns columns;
    while (row < range.end) {
        const int next = row + Warps::kWarps * kTileRows;
        // The copy lets the next rows of K be asked for before this tile's products; it costs no registers, because
        // what stays of the tile is converted by then.
        const Keys current = keys;
        if (next < range.end) keys.load(k_rows, range, next, lane);

        float scores[kSubtiles][kColumnTiles][4] = {};
#pragma unroll
        for (int r = 0; r < kSubtiles; r++) queries.multiply(current.low[r], current.high[r], scores[r]);
        to_logits(scores, queries, p, scale, row, first_head, kv_len, range, lane);
        columns.update(scores);
#pragma unroll
        for (int r = 0; r < kSubtiles; r++) {
            constexpr int kTerms = VFormat::Operand::kWeightTerms;
            u32 weights[kColumnTiles][kTerms][2];
            WarpColumns::fragments<typename VFormat::Operand, kTerms>(scores[r], weights);
            values.accumulate(r, weights, columns.out);
        }

        if (next < range.end) values.load(v_rows, range, next, lane);
        row = next;
    }
    columns.finish();
    ptx::let_next_kernel_start();  // merge.cu, if this splits: it waits for the results where it starts

    const float out_scale = VFormat::kGain * Scale::at(p.out_scale, p.v_scale, p.v_scale_stride, kv_head);
    const int num_qo_heads = p.head_blocks.value * kTeams * p.group_size;
    TeamCombine::run(
        columns, used_columns, team, lane, team_shared + Queries::kSharedBytes,
        [&](int column, const SoftmaxState& state, int j, int group, float first, float second) {
            const int head = first_head + column;
            const int dim = Values::dim(j, group);
            const i64 row_of_out = static_cast<i64>(work.request) * num_qo_heads + head;
            const bool reports = j == 0 && group == 0;
            if (p.splits.value == 1) {
                const float factor = state.normalizer() * out_scale;
                u8* out = p.out + work.request * p.out_stride_request + head * p.out_stride_head;
                *reinterpret_cast<u32*>(out + dim * QFormat::kBytes) =
                    QFormat::Operand::pack(first * factor, second * factor);
                if (reports && p.lse) p.lse[row_of_out] = state.log2_sum() * p.lse_unit;
            } else {
                const i64 part = row_of_out * p.splits.value + work.split;
                *reinterpret_cast<float2*>(p.partial_out + part * kHeadDim + dim) =
                    make_float2(first * out_scale, second * out_scale);
                if (reports)
                    *reinterpret_cast<float2*>(p.partial_state + part * 2) = make_float2(state.reference, state.sum);
            }
        });
}
