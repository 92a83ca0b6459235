// Which CTA does what, read from a list that schedule.cu has made of the lengths: long requests in many parts, short
// ones in one, largest parts first. The grid is as large as the list may become, and what it is too large by has
// nothing to do. cupy_fp8kv/schedule.py has the same list in Python, and what bounds it.
#pragma once
#include "schedule/work.cuh"

// One part of one request.
struct alignas(16) ListEntry {
    int request;
    int kv_len;
    u32 parts_and_split;  // the parts of the request in the upper half
    int slot;             // of its partial results
};

// A request of several parts, whose partial results are in neighbouring slots.
struct alignas(16) SplitRequest {
    int request;
    int slot;
    int parts;
    int unused;
};

struct alignas(16) ListHead {
    int entries;
    int split_requests;
    int unused[2];
};

// The list in memory: ListHead, SplitRequest[most_split], ListEntry[B + list_parts].
struct WorkList {
    ListHead* head;
    SplitRequest* split_requests;
    ListEntry* entries;

    static DEVICE WorkList of(const DecodeParams& p) {
        ListHead* head = reinterpret_cast<ListHead*>(p.work_list);
        SplitRequest* split_requests = reinterpret_cast<SplitRequest*>(head + 1);
        return {head, split_requests, reinterpret_cast<ListEntry*>(split_requests + p.most_split)};
    }
};

struct ListedSchedule {
    static constexpr bool kHasSurplus = true;
    static constexpr bool kManyWorks = false;
    static constexpr bool kHasShares = false;

    static DEVICE Place place(const DecodeParams& p, int index) { return Place::of(p, index); }

    // `splits` is 0 for a CTA that the list has nothing for.
    template <class Layout>
    static DEVICE Work work(const DecodeParams& p, const Place& place) {
        const WorkList list = WorkList::of(p);
        const ListEntry entry = list.entries[place.part];  // on its way together with the head
        const bool exists = place.part < list.head->entries;
        const RowRange rows = RowRange::of_request(entry.kv_len, p.window_left);
        const int splits = exists ? static_cast<int>(entry.parts_and_split >> 16) : 0;
        return {entry.request, place.head_team, place.column_block, entry.kv_len, rows, rows.begin,
                static_cast<int>(entry.parts_and_split & 0xffffu), splits, splits == 1, entry.slot, true, {}};
    }

    static DEVICE int most_merges(const DecodeParams& p) { return p.most_split * p.num_kv_heads * p.columns; }

    template <class Layout>
    static DEVICE Parts parts(const DecodeParams& p, int index) {
        const WorkList list = WorkList::of(p);
        const int columns = p.num_kv_heads * p.columns;
        const SplitRequest split = list.split_requests[index / columns];
        const bool exists = index / columns < list.head->split_requests;
        return {split.request, index % columns, {split.slot, 1, 0, exists ? split.parts : Parts::kNoMore}};
    }
};
