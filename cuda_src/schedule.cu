// Lengths to a work list, for decode.cu and merge.cu with a ListedSchedule: one CTA, nothing that the host has to know.
//
// Rows are counted in turns, what the warps of a CTA of decode.cu take together. A chunk is what every place on the
// device would get of all turns; a request longer than that is cut into equal parts of at most about a chunk, and parts
// are listed largest first, so that the device fills up with small ones at the end. cupy_fp8kv/schedule.py is the same
// in Python.
//
// A warp takes 32 neighbouring requests at a time. Where their entries go depends on their order alone, so the list is
// the same whenever the lengths are. Other kernels wait for this one, so what counts is the longest chain: barriers are
// few, and whatever a warp can compute of the others' results itself, each does.
//
// The specialisation defines Layout.
#include "base/warp_sum.cuh"
#include "mask.cuh"
#include "params.cuh"
#include "schedule/listed.cuh"

constexpr int kMostWarps = 32;
constexpr int kBuckets = 32;  // of sizes, a lane each
// A request may exceed its parts' chunks by this share of one, rather than have another part.
constexpr int kSlackShare = 8;

// Of numbers below 2^52.
DEVICE u64 sum_of_lanes(u64 x) {
    constexpr int kBits = 26;
    const u32 low = ptx::sum_of_lanes(static_cast<u32>(x) & ((1u << kBits) - 1));
    return (static_cast<u64>(ptx::sum_of_lanes(static_cast<u32>(x >> kBits))) << kBits) + low;
}

DEVICE int turns_of(const DecodeParams& p, int kv_len) {
    const RowRange range = RowRange::of_request(kv_len, p.window_left);
    return p.turn_rows.quotient(range.end - range.begin + p.turn_rows.value - 1);
}

// How requests are cut.
struct Cut {
    int chunk;
    int slack;
    float buckets_per_turn;

    static DEVICE Cut of(const DecodeParams& p, u64 turns) {
        const int most = p.list_parts.value;
        // The usual way is a multiplication.
        const u64 wanted = turns <= 1u << 30 ? p.list_parts.quotient(static_cast<int>(turns) + most - 1)
                                             : (turns + most - 1) / most;
        const int chunk = max_of(p.least_turns, static_cast<int>(min_of<u64>(wanted, 1u << 30)));
        const int slack = chunk / kSlackShare;
        return {chunk, slack, ptx::divide(kBuckets, static_cast<float>(chunk + slack))};
    }

    DEVICE int parts(int turns) const { return turns <= chunk + slack ? 1 : (turns - slack - 1) / chunk + 1; }

    // By the size of a part, the largest in bucket 0.
    DEVICE int bucket(int turns, int parts) const {
        const float size = ptx::divide(static_cast<float>(turns), static_cast<float>(parts));
        return max_of(0, kBuckets - 1 - static_cast<int>(size * buckets_per_turn));
    }
};

// A request as it is listed.
struct Item {
    int request;
    int kv_len;
    int parts;  // 0: there is no such request
    int bucket;

    static DEVICE Item of(const DecodeParams& p, const Cut& cut, int request) {
        if (request >= p.batch) return {request, 0, 0, 0};
        const int kv_len = Layout::kv_len(p, request);
        const int turns = turns_of(p, kv_len), parts = cut.parts(turns);
        return {request, kv_len, parts, cut.bucket(turns, parts)};
    }
};

// Counts entries, and split requests with their parts, while a warp takes in its requests.
struct Tally {
    u32 entries;  // of the bucket of this lane's number
    u32 splits;   // parts of split requests, and 2^16 for each of them; the same in all lanes

    // What was counted before an item.
    struct Before {
        u32 entries;  // of its bucket
        u32 splits;
    };

    DEVICE Before take(const Item& item, int lane) {
        Before before = {0, 0};
        const u32 mine = static_cast<u32>(item.parts) * kBuckets + item.bucket;
#pragma unroll
        for (int from = 0; from < 32; from++) {
            const u32 theirs = ptx::shuffle_word(mine, from);
            const int bucket = static_cast<int>(theirs % kBuckets);
            const u32 so_far = ptx::shuffle_word(entries, bucket);
            if (lane == from) before.entries = so_far;
            if (lane == bucket) entries += theirs / kBuckets;
        }
        const u32 split = item.parts > 1 ? item.parts + (1u << 16) : 0;
        const u32 sum = inclusive_sum(split, lane);
        before.splits = splits + sum - split;
        splits += ptx::shuffle_word(sum, 31);
        return before;
    }
};

DEVICE void write(const WorkList& list, const Item& item, const Tally::Before& before, int lane) {
    const u32 parts = item.parts;
    const int slot = parts > 1 ? static_cast<int>(before.splits & 0xffffu) : 0;
    if (parts > 1) list.split_requests[before.splits >> 16] = {item.request, slot, item.parts, 0};
    const auto write_part = [&](u32 first, int request, int kv_len, u32 count, int first_slot, u32 i) {
        list.entries[first + i] = {request, kv_len, count << 16 | i, first_slot + static_cast<int>(i)};
    };
    // A thread writes what is not much; what is left of a request the whole warp.
    constexpr u32 kOwn = 12;
    for (u32 i = 0; i < min_of(parts, kOwn); i++)
        write_part(before.entries, item.request, item.kv_len, parts, slot, i);
    for (u32 left = ptx::ballot(parts > kOwn); left; left &= left - 1) {
        const int from = ptx::lowest_bit(left);
        const auto of_it = [&](u32 x) { return ptx::shuffle_word(x, from); };
        const int request = of_it(item.request), kv_len = of_it(item.kv_len), first_slot = of_it(slot);
        const u32 count = of_it(parts), first = of_it(before.entries);
        for (u32 i = kOwn + lane; i < count; i += 32) write_part(first, request, kv_len, count, first_slot, i);
    }
}

extern "C" __global__ void __launch_bounds__(32 * kMostWarps) schedule(const __grid_constant__ DecodeParams p) {
    __shared__ u64 turns_of_warp[kMostWarps];
    __shared__ u32 entries_of_warp[kMostWarps][kBuckets];
    __shared__ u32 splits_of_warp[kMostWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, threads = blockDim.x;

    // The kernel behind this one takes its places now and waits there.
    ptx::let_next_kernel_start();
    if (warp == 0) Layout::fetch_ahead(p, Lane::self());
    ptx::wait_for_previous_kernel();
    u64 turns = 0;
    for (int request = threadIdx.x; request < p.batch; request += threads)
        turns += turns_of(p, Layout::kv_len(p, request));
    turns = sum_of_lanes(turns);
    if (lane == 0) turns_of_warp[warp] = turns;
    ptx::sync_threads();
    const Cut cut = Cut::of(p, sum_of_lanes(lane < warps ? turns_of_warp[lane] : 0));

    // A batch of one round keeps its items; a larger one finds them again when it writes them.
    const bool once = p.batch <= threads;
    Tally tally = {0, 0};
    Item item;
    Tally::Before before;
    for (int first = 0; first < p.batch; first += threads) {
        item = Item::of(p, cut, first + threadIdx.x);
        before = tally.take(item, lane);
    }
    entries_of_warp[warp][lane] = tally.entries;
    if (lane == 0) splits_of_warp[warp] = tally.splits;
    ptx::sync_threads();

    // Before this warp's entries of a bucket: all of larger buckets, and those of earlier warps.
    u32 of_bucket = 0, of_earlier = 0;
    for (int w = 0; w < warps; w++) {
        if (w == warp) of_earlier = of_bucket;
        of_bucket += entries_of_warp[w][lane];
    }
    const u32 entries = inclusive_sum(of_bucket, lane);
    const u32 of_one_warp = lane < warps ? splits_of_warp[lane] : 0;
    const u32 splits = inclusive_sum(of_one_warp, lane);
    tally = {entries - of_bucket + of_earlier, ptx::shuffle_word(splits - of_one_warp, warp)};

    const WorkList list = WorkList::of(p);
    const u32 all_entries = ptx::shuffle_word(entries, 31), all_splits = ptx::shuffle_word(splits, 31);
    if (threadIdx.x == 0) *list.head = {static_cast<int>(all_entries), static_cast<int>(all_splits >> 16), {0, 0}};
    for (int first = 0; first < p.batch; first += threads) {
        if (once) {
            before.entries += ptx::shuffle_word(tally.entries, item.bucket);
            before.splits += tally.splits;
        } else {
            item = Item::of(p, cut, first + threadIdx.x);
            before = tally.take(item, lane);
        }
        write(list, item, before, lane);
    }
}
