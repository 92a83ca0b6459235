// Who merges the parts of a request, where no other kernel does: the last of the CTAs that have one.
//
// Nobody counts CTAs, for a counter would have to be cleared first. Instead each leaves a tag when its part is written,
// and then looks for the tags of the others; a fence between the two in every CTA makes that the last one sees all. If
// two do, both write the same bits, because parts are summed in their order. A tag is a number that memory does not
// hold by chance, and who has merged takes the tags away before the next call.
#pragma once
#include "schedule/work.cuh"

DEVICE u64* tag_of(const DecodeParams& p, const Work& work, int part) {
    const int per_part = p.head_teams.value * p.column_blocks.value;
    return p.tags + (part * per_part + work.head_team * p.column_blocks.value + work.column_block);
}

// Leaves the tag of a work's part, whose results the CTA's first THREADS threads have written, and says whether all
// parts of the request have theirs. `verdict`: in shared memory.
template <int THREADS>
DEVICE bool all_are_written(const DecodeParams& p, const Work& work, const Lane& lane, int* verdict) {
    ptx::sync_first<THREADS>();
    if (lane.warp == 0) {
        if (lane.index() == 0) {
            ptx::fence_device();
            ptx::store_tag(tag_of(p, work, work.part), p.tag);
        }
        ptx::sync_warp();
        ptx::fence_device();
        bool missing = false;
        for (int i = lane.index(); i < work.parts.count; i += 32)
            missing |= ptx::load_tag(tag_of(p, work, work.parts.at(i))) != static_cast<u64>(p.tag);
        missing = ptx::any(missing);
        if (lane.index() == 0) *verdict = !missing;
        ptx::fence_device();
    }
    ptx::sync_first<THREADS>();
    return *verdict != 0;
}

template <int THREADS>
DEVICE void take_tags_away(const DecodeParams& p, const Work& work, const Lane& lane) {
    for (int i = lane.in_cta; i < work.parts.count; i += THREADS)
        ptx::store_tag(tag_of(p, work, work.parts.at(i)), 0);
}
