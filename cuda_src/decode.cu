// Attention of query tokens over a cache: softmax(q K^T) V for the query heads of a cache head together, of all tokens
// that see the same rows.
//
// A warp takes 16 * kSubtiles rows of one cache head at a time. S^T = K Q^T has the rows of K as its rows and the query
// heads as its columns; the weights are transposed in registers and O^T += V^T P^T keeps the columns where they are.
// Rows come through a ring in shared memory that the copy engine fills (kHasRing, sm_90 and later), for kHeads
// neighbouring cache heads together; or from global memory straight into registers, where the next tile's rows are on
// their way while a tile is worked on. The warps of a CTA take turns over its rows and combine at the end; CTAs that
// share a request write partial results, which the last of them merges, or merge.cu.
//
// The specialisation's lines before this file include the policies' headers and name them: QFormat, KFormat, VFormat,
// Scale, Layout, Position, Schedule; and define kHeadDim, kColumnTiles, kSubtiles, kWarps, kHeads, kHasRing,
// kCtasPerSm, kAhead, kSoftCap, kManyQueries and kSharedBytes. kAhead is how early the next tile is asked for, as far
// as registers allow: 2, its K before this tile's products with Q and its V after those with the weights; 1, its K
// after the products with Q; 0, K and V take turns in the registers, as they always do with a ring.
#include "attention/columns.cuh"
#include "attention/combine.cuh"
#include "attention/parts.cuh"
#include "attention/query.cuh"
#include "attention/query_rows.cuh"
#include "attention/ring.cuh"
#include "attention/tags.cuh"
#include "attention/tile.cuh"
#include "attention/work_queue.cuh"
#include "mask.cuh"
#include "params.cuh"

using Queries = Query<QFormat, KFormat, kHeadDim, kColumnTiles, kHeads, kWarps>;
using Keys = KTile<KFormat, kHeadDim, kSubtiles>;
using Values = VTile<VFormat, kHeadDim, kSubtiles>;
using WarpColumns = Columns<kColumnTiles, Values::kTiles, kSubtiles>;
using WarpCombine = Combine<kHeadDim, kColumnTiles, kWarps, kHeads, kCtasPerSm>;
using RowsOfQ = QueryRows<kManyQueries>;

constexpr int kTileRows = 16 * kSubtiles;
constexpr int kColumns = 8 * kColumnTiles;
// Rows that the warps of a CTA take together, for each of its heads.
constexpr int kTurnRows = kWarps / kHeads * kTileRows;
constexpr int kThreads = 32 * (kWarps + kHasRing);
using KBox = RingBox<kHeadDim * KFormat::kBytes, kTurnRows, kHeads>;
using VBox = RingBox<kHeadDim * VFormat::kBytes, kTurnRows, kHeads>;
using KVRing = Ring<KBox, VBox, kWarps>;
// With little else to wait for, the chain of products is what a tile takes long for.
constexpr int kChains = kHasRing && kSubtiles * kColumnTiles == 1 ? 2 : 1;
using Queue = WorkQueue<kWarps>;
constexpr int kQueueBytes = Schedule::kManyWorks ? Queue::kSharedBytes : 0;
static_assert(kSharedBytes == WarpCombine::kSharedBytes + Queries::kSharedBytes + kQueueBytes,
              "spec.py and the kernel disagree");
static_assert(sizeof(MergeShared<32 * kWarps>) <= WarpCombine::kSharedBytes - WarpCombine::kStateBytes,
              "merging needs more");
static_assert(!kHasRing || kAhead == 0, "a ring is ahead by itself");
static_assert(!kHasRing || !Schedule::kHasSurplus || Schedule::kManyWorks,
              "the warp that feeds a ring would wait for warps that have left");
static_assert(kHasRing || !Schedule::kManyWorks, "who feeds the ring says what there is to do");
// Where lengths decide on the shares of rings, many small boxes make a turn, so that little is read beyond the end of a
// request, and none crosses from page to page. Lanes of the warp that feeds take one each.
constexpr int kFeeders = Schedule::kHasShares ? 32 : 1;
// Turns then begin with a box, which may be before the first row that the query sees.
constexpr bool kFromBefore = Schedule::kHasShares && Layout::kLooksUp;

// tanh(y) to some 2^-20 of itself: 1 - 2 / (1 + exp(2y)), which is exact at both ends but cancels near 0, where its
// series is used (DLMF 4.33.3).
DEVICE float tanh_of(float y) {
    const float square = y * y;
    const float series = y * (1.0f - square * (0.33333333f - square * (0.13333333f - square * 0.05396825f)));
    const float rational = 1.0f - 2.0f / (1.0f + ptx::exp2(y * (2.0f * kLog2E)));
    return square < 0.04f ? series : rational;
}

// Scores of a tile to logits in the base of exp2, masked. `head_of(column)`: the query head.
template <class HeadOf>
DEVICE void to_logits(float (&scores)[kSubtiles][kColumnTiles][4], const Queries& queries, const DecodeParams& p,
                      float scale, int first_row, HeadOf head_of, int kv_len, const RowRange& range, const Lane& lane) {
#pragma unroll
    for (int r = 0; r < kSubtiles; r++)
#pragma unroll
        for (int n = 0; n < kColumnTiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = first_row + 16 * r + 8 * (i / 2) + lane.group;
                const int head = head_of(8 * n + 2 * lane.thread + i % 2);
                float x = scores[r][n][i] * queries.logit_scale(scale, n, i % 2, lane);
                if constexpr (kSoftCap) x = (p.soft_cap * kLog2E) * tanh_of(x / p.soft_cap);
                scores[r][n][i] = Position::logit(x, head, kv_len - 1 - row);
            }
    if (range.covers<kFromBefore>(first_row, kTileRows)) return;
#pragma unroll
    for (int r = 0; r < kSubtiles; r++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (!range.visible<kFromBefore>(first_row + 16 * r + 8 * (i / 2) + lane.group))
#pragma unroll
                for (int n = 0; n < kColumnTiles; n++) scores[r][n][i] = negative_infinity();
}

// Rows from one turn of a CTA to its next one, and where the first begins. A CTA that stays shares turns with no other.
DEVICE int step_of(const Work& work) { return (Schedule::kManyWorks ? 1 : work.splits) * kTurnRows; }
DEVICE int first_turn_of(const Work& work) {
    return work.first_row + (Schedule::kManyWorks ? 0 : work.split * kTurnRows);
}

// How the ring goes round, from work to work.
struct Filling {
    KVRing::Turn turn;
    int boxes = 0;  // so far
};

// Keeps the ring full: what the first kFeeders lanes of a warp of its own do.
DEVICE void feed(const DecodeParams& p, const Work& work, const KVRing& ring, Filling& filling, const Lane& lane) {
    const RowRange range = work.rows;
    const int step = step_of(work), head = work.head_team * kHeads;
    const int before = kFeeders == 1 ? 0 : lane.index() << p.box_shift;  // rows of a turn before this lane's box
    const auto whole_boxes = [&](int rows) { return (rows + (1 << p.box_shift) - 1) >> p.box_shift << p.box_shift; };
    typename Layout::BoxPlaces places(p, work.request);
    int row = first_turn_of(work);
    if (row < range.end) places.ask(row + before, range);
    for (; row < range.end; row += step) {
        const int rows = kFeeders == 1 ? kTurnRows : min_of(kTurnRows, whole_boxes(range.end - row));
        places.find(row + before);
        if (row + step < range.end) places.ask(row + step + before, range);
        const auto fill = [&](const TensorMap& map, int row_bytes) {
            const bool first = filling.boxes++ < p.stages;
            ring.fill<kFeeders>(filling.turn, first, rows * row_bytes, lane, [&](u8* box, u64* barrier) {
                if (before < rows)
                    ptx::copy_box(box + before * row_bytes, &map, 0, 0, head, places.row, places.outer, barrier);
            });
            ring.advance(filling.turn);
        };
        fill(p.k_map, KBox::kBytes / kTurnRows);
        fill(p.v_map, VBox::kBytes / kTurnRows);
    }
}

// The columns of a work: whose queries they are, and where their results go.
struct WorkColumns {
    const DecodeParams& p;
    RowsOfQ rows_of_q;
    int head_team;
    int first;
    int of_head;  // of a cache head in all

    static DEVICE WorkColumns of(const DecodeParams& p, const Work& work) {
        const auto rows_of_q = RowsOfQ::of(p, work.request);
        return {p, rows_of_q, work.head_team, work.column_block * kColumns, rows_of_q.columns(p)};
    }

    DEVICE int used() const { return max_of(0, min_of(kColumns, of_head - first)); }
    DEVICE QueryPlace place(int head_in_team, int column) const {
        return rows_of_q.place(p, head_team * kHeads + head_in_team, first + column);
    }
    // Among the columns of all cache heads.
    DEVICE int in_all(int head_in_team, int column) const {
        return (head_team * kHeads + head_in_team) * p.columns + first + column;
    }

    DEVICE Queries::Asked ask(const Lane& lane) const {
        return Queries::ask(
            [&](int head_in_team, int column) {
                // Columns without a query of their own repeat the last one; nothing reads their results.
                const QueryPlace from = place(head_in_team, min_of(column, of_head - 1 - first));
                return p.q + from.from(p.q_stride_request, p.q_stride_head);
            },
            lane);
    }

    // Brings the queries into the L2 cache.
    DEVICE void fetch_ahead(const Lane& lane) const {
        for (int i = lane.index(); i < kHeads * used(); i += 32) {
            const u8* row = p.q + place(i / used(), i % used()).from(p.q_stride_request, p.q_stride_head);
            for (int byte = 0; byte < kHeadDim * QFormat::kBytes; byte += 128) ptx::prefetch(row + byte);
        }
    }

    DEVICE void put(int head_in_team, int column, const SoftmaxState& state, int dim, const float4& sum,
                    float factor) const {
        const QueryPlace to = place(head_in_team, column);
        u8* out = p.out + to.from(p.out_stride_request, p.out_stride_head);
        *reinterpret_cast<uint2*>(out + dim * QFormat::kBytes) =
            make_uint2(QFormat::Operand::pack(sum.x * factor, sum.y * factor),
                       QFormat::Operand::pack(sum.z * factor, sum.w * factor));
        if (dim == 0 && p.lse) p.lse[to.from(p.num_kv_heads * p.group_size.value, 1)] = state.log2_sum() * p.lse_unit;
    }

    DEVICE void put_part(int part, int head_in_team, int column, const SoftmaxState& state, int dim, const float4& sum,
                         float factor) const {
        const i64 row = static_cast<i64>(part) * (p.num_kv_heads * p.columns) + in_all(head_in_team, column);
        *reinterpret_cast<float4*>(p.partial_out + row * kHeadDim + dim) =
            make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor);
        if (dim == 0) *reinterpret_cast<float2*>(p.partial_state + row * 2) = make_float2(state.reference, state.sum);
    }
};

// One work of a CTA, by its first kWarps warps. The ring is not filled before this asks for the first q.
DEVICE void attend(const DecodeParams& p, const Work& work, bool is_first, KVRing::Turn& turn, const KVRing& ring,
                   const Lane& lane, u8* shared) {
    const RowRange range = work.rows;
    const int kv_len = work.kv_len;
    const int head_of_team = lane.warp % kHeads;
    const int kv_head = work.head_team * kHeads + head_of_team;
    const auto k_rows = Layout::k_rows(p, work.request, kv_head).from(Keys::Slice::begin(lane.thread));
    const auto v_rows = Layout::v_rows(p, work.request, kv_head).from(Values::Slice::begin(lane.group));

    typename Layout::template Places<kSubtiles> places(p, work.request, range, lane);

    Keys keys;
    Values values;
    // The warps of all CTAs that share a request take turns over its tiles, so that what is read at one time lies close
    // together. plan.split_rows is the same formula.
    const int step = step_of(work);
    const int row_in_turn = lane.warp / kHeads * kTileRows;
    int first_row = first_turn_of(work);  // of the rows that the warps take together
    // What is asked for first arrives first: rows that go to registers; q, where a ring is filled a moment later.
    if (!kHasRing && first_row + row_in_turn < range.end) {
        const int row = first_row + row_in_turn;
        places.ask(row);
        places.find(row, step);
        keys.load(places.of_k(k_rows, row), range, row, lane);
        if (kAhead > 0) values.load(places.of_v(v_rows, row), range, row, lane);
    }

    const auto work_columns = WorkColumns::of(p, work);
    const auto asked = work_columns.ask(lane);
    float scale = Scale::at(p.logit_scale, p.k_scale, p.k_scale_stride, kv_head);
    scale = Scale::at(scale, p.q_scale, 0, 0) * KFormat::kGain;
    if constexpr (!kSoftCap) scale *= kLog2E;  // a soft cap needs natural logits first
    if (kHasRing && is_first) ptx::sync_threads();  // now the ring may be filled
    const Queries queries(asked, head_of_team, lane, shared + WarpCombine::kSharedBytes);
    WarpColumns columns;
    // A ring has rows for all warps as long as it has any; registers only what is in the range.
    for (; first_row + (kHasRing ? 0 : row_in_turn) < range.end; first_row += step) {
        const int row = first_row + row_in_turn, next = row + step;
        const bool more = next < range.end;
        float scores[kSubtiles][kColumnTiles][4] = {};
        if constexpr (kHasRing) {
            const u8* box = ring.wait(turn);
            keys.load(KBox::rows(box, head_of_team, first_row, Keys::Slice::begin(lane.thread)), range, row, lane);
        }
        if constexpr (kAhead == 2) {
            // Converted before the next rows are asked for, so that those take the registers of these.
            u32 rows[kSubtiles][Queries::kSteps][4];
#pragma unroll
            for (int r = 0; r < kSubtiles; r++)
#pragma unroll
                for (int s = 0; s < Queries::kSteps; s++) Queries::rows_of(keys, r, s, rows[r][s]);
            if (more) {
                places.find(next, step);
                keys.load(places.of_k(k_rows, next), range, next, lane);
            }
            queries.multiply<1>(
                [&](int r, int s, u32(&a)[4]) {
#pragma unroll
                    for (int i = 0; i < 4; i++) a[i] = rows[r][s][i];
                },
                scores);
        } else {
            queries.multiply<kChains>([&](int r, int s, u32(&a)[4]) { Queries::rows_of(keys, r, s, a); }, scores);
            if (kAhead == 1 && more) {
                places.find(next, step);
                keys.load(places.of_k(k_rows, next), range, next, lane);
            }
            if (kAhead == 0 && !kHasRing) {
                values.load(places.of_v(v_rows, row), range, row, lane);
                if (more) places.find(next, step);
            }
        }
        const auto head_of = [&](int column) { return work_columns.place(head_of_team, column).head; };
        to_logits(scores, queries, p, scale, row, head_of, kv_len, range, lane);
        columns.update(scores);
        // Not earlier, though K has been used: a CTA of two warps a head that waits for its loads there falls into step
        // with its neighbours, which made two waves of them 7 % slower.
        if constexpr (kHasRing) {
            ring.release(turn, lane, keys.bits_of_loads());
            ring.advance(turn);
        }
        if constexpr (kHasRing) {
            const u8* box = ring.wait(turn);
            values.load(VBox::rows(box, head_of_team, first_row, Values::Slice::begin(lane.group)), range, row, lane);
        } else {
            // The compiler would wait for V before the exponentials, to pair its bytes early; nothing moves up across
            // this.
            ptx::sync_warp();
        }
        const u32 bits = values.bits_of_loads();
        // A weight of 0 does not hide an infinity.
        if (!range.covers<kFromBefore>(row, kTileRows)) values.clear_beyond<kFromBefore>(range, row, lane);
#pragma unroll
        for (int r = 0; r < kSubtiles; r++) {
            constexpr int kTerms = VFormat::Operand::kWeightTerms;
            u32 weights[kColumnTiles][kTerms][2];
            WarpColumns::fragments<typename VFormat::Operand, kTerms>(scores[r], weights);
            values.accumulate(r, weights, columns.out);
        }
        if constexpr (kHasRing) {
            ring.release(turn, lane, bits);
            ring.advance(turn);
        }

        if (kAhead > 0 && more) values.load(places.of_v(v_rows, next), range, next, lane);
        if (kAhead == 0 && !kHasRing && more) {
            // The compiler would make addresses while V is still in the registers, and spill.
            if constexpr (Layout::kLooksUp) ptx::sync_warp();
            keys.load(places.of_k(k_rows, next), range, next, lane);
        }
    }
    columns.finish();
    // merge.cu, or the next call: it waits for the results where it starts.
    if (work.is_last) ptx::let_next_kernel_start();

    const auto results = WorkColumns::of(p, work);  // again: registers are worth more before
    WarpCombine::run<Values>(
        columns, results.used(), lane, shared,
        [&](int head_in_team, int column, const SoftmaxState& state, int dim, const float4& sum) {
            const float out_scale = VFormat::kGain * Scale::at(p.out_scale, p.v_scale, p.v_scale_stride,
                                                               work.head_team * kHeads + head_in_team);
            if (Schedule::kHasShares ? work.is_whole : work.splits == 1)
                results.put(head_in_team, column, state, dim, sum, state.normalizer() * out_scale);
            else
                results.put_part(work.part, head_in_team, column, state, dim, sum, out_scale);
        });
}

// After a work that has a part of a request: merges all parts if this was the last one. By the CTA's first kWarps
// warps.
DEVICE void merge_if_complete(const DecodeParams& p, const Work& work, const Lane& lane, u8* shared) {
    constexpr int kMergers = 32 * kWarps;
    int* verdict = reinterpret_cast<int*>(shared);
    auto& space = *reinterpret_cast<MergeShared<kMergers>*>(shared + WarpCombine::kStateBytes);
    if (!all_are_written<kMergers>(p, work, lane, verdict)) return;
    take_tags_away<kMergers>(p, work, lane);
    const auto columns = WorkColumns::of(p, work);
    const int used = columns.used();
    merge_parts<kMergers>(
        p, work.parts, kHeads * used, kHeadDim / 4, lane.in_cta, space,
        [&](int i) { return columns.in_all(i / used, i % used); },
        [&](int i, const SoftmaxState& state, int quad, const float4& sum) {
            columns.put(i / used, i % used, state, 4 * quad, sum, state.normalizer());
        });
}

// A CTA with one work.
template <class Chosen, class At>
DEVICE void work_once(const DecodeParams& p, const At& place, const KVRing& ring, const Lane& lane, u8* shared) {
    if (kHasRing && lane.warp == kWarps) {
        if (lane.index() == 0) ring.init(&p.k_map, &p.v_map);
        ptx::sync_threads();  // the others come when they have asked for q
        ptx::wait_for_previous_kernel();
        const Work work = Chosen::template work<Layout>(p, place);
        Filling filling;
        if (lane.index() < kFeeders) feed(p, work, ring, filling, lane);
        return;
    }
    ptx::wait_for_previous_kernel();  // nothing before this reads memory
    const Work work = Chosen::template work<Layout>(p, place);
    KVRing::Turn turn;
    if (!Chosen::kHasSurplus || work.splits) attend(p, work, true, turn, ring, lane, shared);
}

// A CTA that stays for one work after the other.
template <class Chosen, class At>
DEVICE void work_on(const DecodeParams& p, const At& place, const KVRing& ring, const Lane& lane, u8* shared) {
    Queue& queue = *reinterpret_cast<Queue*>(shared);
    shared += kQueueBytes;
    if (lane.warp == kWarps) {
        if (lane.index() == 0) {
            ring.init(&p.k_map, &p.v_map);
            queue.init();
        }
        ptx::sync_threads();
        ptx::wait_for_previous_kernel();
        typename Chosen::template Works<Layout> works(p, place);
        Filling filling;
        for (int number = 0;; number++) {
            Work work;
            const bool is_one = works.next(work);
            if (!is_one) work.request = Work::kNone;
            queue.put(number, work, lane);
            if (number == 0) ptx::sync_threads();  // the others come when they have asked for q
            if (!is_one) return;
            if (number > 0) WorkColumns::of(p, work).fetch_ahead(lane);
            if (lane.index() < kFeeders) feed(p, work, ring, filling, lane);
        }
    }
    ptx::sync_threads();
    ptx::wait_for_previous_kernel();
    // Between two works: q has been used up before the warps meet to combine, and what they combine, or merge, has been
    // read before they meet over the next q.
    KVRing::Turn turn;
    for (int number = 0;;) {
        auto& entry = queue.wait(number);
        const bool is_first = number == 0;
        if (entry.work.request == Work::kNone) {
            if (is_first) ptx::sync_threads();  // where the warp that feeds waits
            return;
        }
        // merge.cu has to find what there is to merge, and does so meanwhile.
        if (Chosen::kHasShares && is_first && p.tag == 0) ptx::let_next_kernel_start();
        // Not the lane and the number from before: they, and what follows from them, would be kept in registers.
        const Lane here = Lane::of(ptx::thread_index());
        attend(p, entry.work, is_first, turn, ring, here, shared);
        if (Chosen::kHasShares && !entry.work.is_whole && p.tag) merge_if_complete(p, entry.work, here, shared);
        number = entry.number + 1;
        queue.release(entry, here);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    const auto place = Schedule::place(p, blockIdx.x);
    const KVRing ring(shared, kHasRing ? p.stages : 0);
    if constexpr (Schedule::kManyWorks)
        work_on<Schedule>(p, place, ring, Lane::self(), shared + ring.bytes());
    else
        work_once<Schedule>(p, place, ring, Lane::self(), shared + ring.bytes());
}
