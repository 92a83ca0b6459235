// How the warp that feeds a ring tells the others what there is to do, where a CTA stays for one work after the other.
//
// It finds works by itself and is some ahead. The warps that attend read them where they lie, in shared memory: their
// registers are worth more to what they work on. The queries of a work are there with it, copied meanwhile. Parts of
// requests are handed over to warps that merge, if there is a next work for those that attend.
#pragma once
#include "schedule/work.cuh"

// WARPS: those that attend. SLOTS: works with their queries, of Q_BYTES.
template <int WARPS, int SLOTS, int Q_BYTES>
class WorkQueue {
    static constexpr int kMostParts = 2;  // of a share: one that shares before it have begun, one that others end

  public:
    struct Entry {
        Work work;
        int number;
        u64 filled;  // the work is known, and its queries are there
        u64 free;
        alignas(16) u8 queries[Q_BYTES];
    };

    // By one thread, before all meet at a barrier.
    DEVICE void init() {
        for (Entry& entry : entries_) {
            ptx::barrier_init(&entry.filled, 1);
            ptx::barrier_init(&entry.free, 32 * WARPS);
        }
        for (Stored& stored : stored_) ptx::barrier_init(&stored.by_all, WARPS);
        ptx::barrier_init_done();
    }

    // By the warp that feeds: the work of this number. copy(queries, barrier) has `bytes` of queries copied.
    template <class Copy>
    DEVICE void put(int number, const Work& work, int bytes, const Lane& lane, Copy copy) {
        Entry& entry = entries_[number % SLOTS];
        if (number >= SLOTS) ptx::barrier_wait(&entry.free, round(number) ^ 1);
        if (lane.index() == 0) {
            entry.work = work;
            entry.number = number;
            ptx::barrier_arrive_expecting(&entry.filled, bytes);
        }
        ptx::sync_warp();  // a copy that ends before it was announced would end the phase
        copy(entry.queries, &entry.filled);
    }
    // And what it has beside, before what those that attend wait for next.
    DEVICE void add_parts(int number, const PartRange& parts, const Lane& lane) {
        if (lane.index() == 0) entries_[number % SLOTS].work.parts = parts;
    }

    // By all threads that attend: what there is under a number, once it is known; and that they are done with it.
    DEVICE Entry& wait(int number) {
        Entry& entry = entries_[number % SLOTS];
        ptx::barrier_wait(&entry.filled, round(number));
        return entry;
    }
    // Every lane for itself, as it has read by itself.
    static DEVICE void release(Entry& entry) { ptx::barrier_arrive(&entry.free); }

    // That it has stored its results of a part; `handed_over` counts them.
    DEVICE void hand_over(int& handed_over, const Work& work, const Lane& lane) {
        Stored& stored = stored_[handed_over++];
        ptx::sync_warp();
        if (lane.in_cta == 0) stored.work = work;
        if (lane.index() == 0) ptx::barrier_arrive(&stored.by_all);
    }
    // And that there will be no more.
    DEVICE void hand_over_no_more(int handed_over, const Work& none, const Lane& lane) {
        while (handed_over < kMostParts) hand_over(handed_over, none, lane);
    }

    // By those that merge: calls merge(work) for each part that is handed over.
    template <class Merge>
    DEVICE void for_each_part(Merge merge) {
        for (Stored& stored : stored_) {
            ptx::barrier_wait(&stored.by_all, 0);
            if (stored.work.request == Work::kNone) return;
            merge(stored.work);
        }
    }

  private:
    struct Stored {
        Work work;
        u64 by_all;
    };

    // The parity of the walks through the slots.
    static DEVICE u32 round(int number) { return number / SLOTS % 2; }

    Entry entries_[SLOTS];
    Stored stored_[kMostParts];
};
