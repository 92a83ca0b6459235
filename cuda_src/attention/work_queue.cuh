// How the warp that feeds a ring tells the others what there is to do, where a CTA stays for one work after the other.
//
// It finds works by itself and is some ahead. The others read them where they lie, in shared memory: their registers
// are worth more to what they work on.
#pragma once
#include "schedule/work.cuh"

template <int WARPS>
class WorkQueue {
    static constexpr int kSlots = 4;

  public:
    static constexpr int kSharedBytes = 512;

    struct Entry {
        Work work;
        int number;
        u64 filled;
        u64 free;
    };

    // By one thread, before all meet at a barrier.
    DEVICE void init() {
        for (Entry& entry : entries_) {
            ptx::barrier_init(&entry.filled, 1);
            ptx::barrier_init(&entry.free, WARPS);
        }
        ptx::barrier_init_done();
    }

    // By the warp that feeds: the work of this number.
    DEVICE void put(int number, const Work& work, const Lane& lane) {
        Entry& entry = entries_[number % kSlots];
        if (number >= kSlots) ptx::barrier_wait(&entry.free, round(number) ^ 1);
        if (lane.index() == 0) {
            entry.work = work;
            entry.number = number;
            ptx::barrier_arrive(&entry.filled);
        }
    }

    // By each of the others: what there is under a number, once it is known; and that the warp is done with it.
    DEVICE Entry& wait(int number) {
        Entry& entry = entries_[number % kSlots];
        ptx::barrier_wait(&entry.filled, round(number));
        return entry;
    }
    static DEVICE void release(Entry& entry, const Lane& lane) {
        ptx::sync_warp();
        if (lane.index() == 0) ptx::barrier_arrive(&entry.free);
    }

  private:
    // The parity of the walks through the slots.
    static DEVICE u32 round(int number) { return number / kSlots % 2; }

    Entry entries_[kSlots];
};
static_assert(sizeof(WorkQueue<1>) <= WorkQueue<1>::kSharedBytes, "spec.py and the kernel disagree");
