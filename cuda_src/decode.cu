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
#include "attention/soft_cap.cuh"
#include "attention/tile.cuh"
#include "attention/told_parts.cuh"
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
// Of many works, three more warps merge: beside 8 and the one that feeds, they take no registers from others.
constexpr int kMergers = 32 * 3;
constexpr int kThreads = 32 * (kWarps + kHasRing) + (Schedule::kManyWorks ? kMergers : 0);
using KBox = RingBox<kHeadDim * KFormat::kBytes, kTurnRows, kHeads>;
using VBox = RingBox<kHeadDim * VFormat::kBytes, kTurnRows, kHeads>;
using KVRing = Ring<KBox, VBox, kWarps>;
// With little else to wait for, the chain of products is what a tile takes long for.
constexpr int kChains = kHasRing && kSubtiles * kColumnTiles == 1 ? 2 : 1;
// Queries of two tiles of columns take room that a ring is longer by.
using Queue = WorkQueue<kWarps, kColumnTiles == 1 ? 4 : 2, kHeads * kColumns * kHeadDim * QFormat::kBytes>;
using Told = ToldParts<kHeadDim>;
constexpr int kQueueBytes = Schedule::kManyWorks ? sizeof(Queue) : 0;
static_assert(kSharedBytes == WarpCombine::kSharedBytes + Queries::kSharedBytes + kQueueBytes,
              "spec.py and the kernel disagree");
static_assert(sizeof(MergeShared<32 * kWarps>) <= WarpCombine::kSharedBytes, "merging needs more");
static_assert(!kHasRing || kAhead == 0, "a ring is ahead by itself");
static_assert(!kHasRing || !Schedule::kHasSurplus || Schedule::kManyWorks,
              "the warp that feeds a ring would wait for warps that have left");
static_assert(kHasRing || !Schedule::kManyWorks, "who feeds the ring says what there is to do");
// Where lengths decide on the shares of rings, many small boxes make a turn, so that little is read beyond the end of a
// request, and none crosses from page to page. Lanes of the warp that feeds take one each.
constexpr int kFeeders = Schedule::kHasShares ? 32 : 1;
static_assert(!Schedule::kManyWorks || kFeeders == 32, "the whole warp finds works and goes on with them");
// Turns then begin with a box, which may be before the first row that the query sees.
constexpr bool kFromBefore = Schedule::kHasShares && Layout::kLooksUp;

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

// Keeps the ring full: what the first kFeeders lanes of a warp of its own do.
class Feeder {
  public:
    DEVICE Feeder(const DecodeParams& p, const KVRing& ring, const Lane& lane)
        : p_(p), ring_(ring), lane_(lane), before_(kFeeders == 1 ? 0 : lane.index() << p.box_shift) {}

    // Asks for the places of the first boxes of a work.
    DEVICE void ask(const Work& work, Layout::BoxPlaces& places) const {
        places = typename Layout::BoxPlaces(p_, work.request);
        const int row = first_turn_of(work);
        if (row < work.rows.end) places.ask(p_, row + before_, work.rows);
    }

    // Asks for the boxes of a work. Calls `begun` behind the first, which is on its way then, and before the second.
    template <class Begun>
    DEVICE void feed(const Work& work, Layout::BoxPlaces places, Begun begun) {
        const RowRange range = work.rows;
        const int first_row = first_turn_of(work), step = step_of(work), head = work.head_team * kHeads;
        if (first_row >= range.end) begun();
        for (int row = first_row; row < range.end; row += step) {
            const int rows = kFeeders == 1 ? kTurnRows : min_of(kTurnRows, whole_boxes(range.end - row));
            places.find(p_, row + before_);
            if (row + step < range.end) places.ask(p_, row + step + before_, range);
            fill(p_.k_map, KBox::kBytes / kTurnRows, rows, head, places);
            if (row == first_row) begun();
            fill(p_.v_map, VBox::kBytes / kTurnRows, rows, head, places);
        }
    }

  private:
    DEVICE int whole_boxes(int rows) const { return (rows + (1 << p_.box_shift) - 1) >> p_.box_shift << p_.box_shift; }

    DEVICE void fill(const TensorMap& map, int row_bytes, int rows, int head, const Layout::BoxPlaces& places) {
        const bool first = boxes_++ < p_.stages;
        ring_.template fill<kFeeders>(turn_, first, rows * row_bytes, lane_, [&](u8* box, u64* barrier) {
            if (before_ < rows)
                ptx::copy_box(box + before_ * row_bytes, &map, 0, 0, head, places.row, places.outer, barrier);
        });
        ring_.advance(turn_);
    }

    const DecodeParams& p_;
    const KVRing& ring_;
    const Lane& lane_;
    int before_;     // rows of a turn before this lane's box
    KVRing::Turn turn_;
    int boxes_ = 0;  // so far
};

// The columns of a work: whose queries they are, and where their results go.
struct WorkColumns {
    static constexpr int kQueryBytes = kHeadDim * QFormat::kBytes;

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

    DEVICE const u8* query(int head_in_team, int column) const {
        return p.q + place(head_in_team, column).from(p.q_stride_request, p.q_stride_head);
    }

    // The queries from where they are, or with many works from where they have been copied to.
    DEVICE Queries::Asked ask(const u8* copied, const Lane& lane) const {
        return Queries::template ask<Schedule::kManyWorks>(
            [&](int head_in_team, int column) {
                // Columns without a query of their own repeat the last one; nothing reads their results.
                const int used_column = max_of(0, min_of(column, of_head - 1 - first));
                return Schedule::kManyWorks ? copied + (head_in_team * kColumns + used_column) * kQueryBytes
                                            : query(head_in_team, used_column);
            },
            lane);
    }

    DEVICE int query_bytes() const { return kHeads * used() * kQueryBytes; }

    // Has the queries copied into shared memory, where ask() looks for them.
    DEVICE void copy_queries(u8* to, u64* barrier, const Lane& lane) const {
        for (int i = lane.index(); i < kHeads * used(); i += 32) {
            const int head_in_team = i / used(), column = i % used();
            ptx::copy_bytes(to + (head_in_team * kColumns + column) * kQueryBytes, query(head_in_team, column),
                            kQueryBytes, barrier);
        }
    }

    // Brings the queries into the L2 cache.
    DEVICE void fetch_ahead(const Lane& lane) const {
        for (int i = lane.index(); i < kHeads * used(); i += 32)
            for (int byte = 0; byte < kQueryBytes; byte += 128) ptx::prefetch(query(i / used(), i % used()) + byte);
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
        const int in_all = this->in_all(head_in_team, column);
        const float4 scaled = make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor);
        if (Schedule::kHasShares && p.tag) {
            Told(p, in_all, dim / 4).store(part, state, scaled);
            return;
        }
        const i64 row = static_cast<i64>(part) * (p.num_kv_heads * p.columns) + in_all;
        *reinterpret_cast<float4*>(p.partial_out + row * kHeadDim + dim) = scaled;
        if (dim == 0) *reinterpret_cast<float2*>(p.partial_state + row * 2) = make_float2(state.reference, state.sum);
    }
};

// One work of a CTA, by its first kWarps warps. `copied`: where q has been copied to, of many works. Of a single one,
// the ring is not filled before this has asked for q.
DEVICE void attend(const DecodeParams& p, const Work& work, const u8* copied, KVRing::Turn& turn, const KVRing& ring,
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
    const auto asked = work_columns.ask(copied, lane);
    float scale = Scale::at(p.logit_scale, p.k_scale, p.k_scale_stride, kv_head);
    scale = Scale::at(scale, p.q_scale, 0, 0) * KFormat::kGain;
    if constexpr (!kSoftCap) scale *= kLog2E;  // a soft cap needs natural logits first
    if (kHasRing && !Schedule::kManyWorks) ptx::sync_threads();  // now the ring may be filled
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
            // Twice the same, but the number of splits is an argument of the kernel, which takes no register.
            if (Schedule::kHasShares ? work.is_whole : work.splits == 1)
                results.put(head_in_team, column, state, dim, sum, state.normalizer() * out_scale);
            else
                results.put_part(work.part, head_in_team, column, state, dim, sum, out_scale);
        });
}

// When a part of a request is stored: merges what all parts are there of. By THREADS threads, those that attend or
// those that merge beside them.
template <int THREADS>
DEVICE void merge_if_complete(const DecodeParams& p, const Work& work, const Lane& lane, u8* shared) {
    constexpr bool kIsBeside = THREADS == kMergers;
    static_assert(kMergers != 32 * kWarps, "these are told apart by their number");
    const auto columns = WorkColumns::of(p, work);
    ptx::fence_device();
    // Whoever stored what this thread will look at has passed a fence too: of those beside, this thread for them.
    if constexpr (!kIsBeside) ptx::sync_first<THREADS>();
    const int thread = kIsBeside ? lane.in_cta - (kThreads - kMergers) : lane.in_cta;
    const int used = columns.used();
    merge_parts<THREADS>(
        work.parts, kHeads * used, kHeadDim / 4, thread, reinterpret_cast<MergeShared<THREADS>*>(shared),
        [&](int i, int quad) { return Told(p, columns.in_all(i / used, i % used), quad); },
        [&](int i, const Part& sum, int quad) {
            columns.put(i / used, i % used, sum.state, 4 * quad, sum.out, sum.state.normalizer());
        });
}

// What a CTA reads first, into the L2 cache: what is written before this kernel may, goes there too. Worth it where
// requests are split, for then one wave has little to read; and possible where the host knows the lengths.
template <class Chosen, class At>
DEVICE void fetch_ahead(const DecodeParams& p, const At& place, const Lane& lane) {
    if (lane.warp == 0) Layout::fetch_ahead(p, lane);
    if (!kHasRing || Layout::kLooksUp || kManyQueries || p.kv_lens || p.splits.value == 1) return;
    const Work work = Chosen::template work<Layout>(p, place);
    if (lane.warp == 0) WorkColumns::of(p, work).fetch_ahead(lane);
    if (lane.warp < kWarps || lane.index() > 0) return;
    typename Layout::BoxPlaces places(p, work.request);
    int boxes = p.stages;
    for (int row = first_turn_of(work); row < work.rows.end && boxes > 0; row += step_of(work), boxes -= 2) {
        places.find(p, row);
        ptx::prefetch_box(&p.k_map, 0, 0, work.head_team * kHeads, places.row, places.outer);
        ptx::prefetch_box(&p.v_map, 0, 0, work.head_team * kHeads, places.row, places.outer);
    }
}

// A CTA with one work.
template <class Chosen, class At>
DEVICE void work_once(const DecodeParams& p, const At& place, const KVRing& ring, const Lane& lane, u8* shared) {
    if (kHasRing && lane.warp == kWarps) {
        if (lane.index() == 0) ring.init(&p.k_map, &p.v_map);
        if constexpr (!Chosen::kHasSurplus) fetch_ahead<Chosen>(p, place, lane);
        ptx::sync_threads();  // the others come when they have asked for q
        ptx::wait_for_previous_kernel();
        const Work work = Chosen::template work<Layout>(p, place);
        Feeder feeder(p, ring, lane);
        typename Layout::BoxPlaces places;
        feeder.ask(work, places);
        if (lane.index() < kFeeders) feeder.feed(work, places, [] {});
        return;
    }
    if constexpr (!Chosen::kHasSurplus) fetch_ahead<Chosen>(p, place, lane);
    ptx::wait_for_previous_kernel();  // nothing before this reads memory
    const Work work = Chosen::template work<Layout>(p, place);
    KVRing::Turn turn;
    if (!Chosen::kHasSurplus || work.splits) attend(p, work, nullptr, turn, ring, lane, shared);
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
        Layout::fetch_ahead(p, lane);
        ptx::sync_threads();
        ptx::wait_for_previous_kernel();
        typename Chosen::template Works<Layout> works(p, place);
        Feeder feeder(p, ring, lane);
        Work work;
        typename Layout::BoxPlaces places;
        bool is_one = works.next(work);
        if (is_one) feeder.ask(work, places);
        int number = 0;
        for (; is_one; number++) {
            const auto columns = WorkColumns::of(p, work);
            queue.put(number, work, columns.query_bytes(), lane,
                      [&](u8* to, u64* barrier) { columns.copy_queries(to, barrier, lane); });
            Work coming;
            typename Layout::BoxPlaces coming_places;
            feeder.feed(work, places, [&] {
                // Divisions take long, and parts are not asked for before the second box is there.
                if (!work.is_whole) queue.add_parts(number, works.parts(), lane);
                // Where the next rows are, which takes a way to memory, is known when it is their turn.
                is_one = works.next(coming);
                if (is_one) feeder.ask(coming, coming_places);
            });
            work = coming, places = coming_places;
        }
        work.request = Work::kNone;
        queue.put(number, work, 0, lane, [](u8*, u64*) {});
        return;
    }
    ptx::sync_threads();
    ptx::wait_for_previous_kernel();
    if (lane.warp > kWarps) {
        const auto merge = [&](const Work& work) { merge_if_complete<kMergers>(p, work, lane, nullptr); };
        if (p.tag) queue.for_each_part(merge);
        return;
    }
    // Between two works: q has been used up before the warps meet to combine, and what they combine has been read
    // before they meet over the next q.
    KVRing::Turn turn;
    int handed_over = 0;
    for (int number = 0;;) {
        auto& entry = queue.wait(number);
        const Work& work = entry.work;
        // Not the lane and the number from before: they, and what follows from them, would be kept in registers.
        const Lane here = Lane::of(ptx::thread_index());
        if (work.request == Work::kNone) {
            queue.hand_over_no_more(handed_over, work, here);
            return;
        }
        // merge.cu has to find what there is to merge, and does so meanwhile.
        if (number == 0 && p.tag == 0) ptx::let_next_kernel_start();
        attend(p, work, entry.queries, turn, ring, here, shared);
        if (p.tag && !work.is_whole) {
            // Nobody here has anything else to do after the last one.
            if (work.is_last) merge_if_complete<32 * kWarps>(p, work, here, shared);
            else queue.hand_over(handed_over, work, here);
        }
        number = entry.number + 1;
        queue.release(entry);
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
