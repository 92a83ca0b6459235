// Padded caches: request b owns rows [0, kv_lens[b]) of the block [b, :, :, :].
#pragma once
#include "base/types.cuh"
#include "mask.cuh"
#include "params.cuh"

// Where the rows of one request and head lie.
struct GlobalRow {
    const u8* first;

    template <int BYTES>
    DEVICE void load(u32* dst, int offset) const {
        ptx::load_once<BYTES>(dst, first + offset);
    }
};

struct StridedRows {
    const u8* first;
    int stride;

    // The same rows, each from its byte `offset` on.
    DEVICE StridedRows from(int offset) const { return {first + offset, stride}; }
    // Row `index`, or in place of one past the range a row of it: nothing beyond is read.
    DEVICE GlobalRow row(int index, const RowRange& range) const {
        return {first + static_cast<i64>(range.clamp(index)) * stride};
    }
};

struct PaddedLayout {
    // Where a tile's rows lie follows from their numbers.
    static constexpr bool kLooksUp = false;

    template <int SUBTILES>
    struct Places {
        DEVICE Places(const DecodeParams&, int, const RowRange&, const Lane&) {}
        DEVICE void ask(int) {}
        DEVICE void find(int, int) {}
        DEVICE StridedRows of_k(const StridedRows& rows, int) const { return rows; }
        DEVICE StridedRows of_v(const StridedRows& rows, int) const { return rows; }
    };

    // Where the copy engine finds rows: the coordinates of a box that begins with a row.
    struct BoxPlaces {
        int row;
        int outer;

        DEVICE BoxPlaces() {}
        DEVICE BoxPlaces(const DecodeParams&, int request) : outer(request) {}
        DEVICE void ask(const DecodeParams&, int, const RowRange&) {}
        DEVICE void find(const DecodeParams&, int row_of_request) { row = row_of_request; }
    };

    // Brings what says how long requests are into the L2 cache. By a warp of each CTA, before the kernel before has
    // ended: what that still writes is written there.
    static DEVICE void fetch_ahead(const DecodeParams& p, const Lane& lane) {
        if (p.kv_lens) fetch_table(p.kv_lens, p.batch, 0, lane);
    }

    // 32 lines of a table, from number `first` on.
    static DEVICE void fetch_table(const int* table, int entries, i64 first, const Lane& lane) {
        constexpr int kLine = 128 / sizeof(int);
        const i64 entry = (first + lane.index()) * kLine;
        if (entry < entries) ptx::prefetch(reinterpret_cast<const u8*>(table + entry));
    }

    // The row that boxes are to begin with, so that one of them begins or holds `row`.
    static DEVICE int box_begin(const DecodeParams&, int row) { return row; }

    // A length on the device cannot be checked before the launch: what lies outside the cache is cut off here.
    static DEVICE int kv_len(const DecodeParams& p, int request) {
        return p.kv_lens ? max_of(0, min_of(p.kv_lens[request], p.kv_len)) : p.kv_len;
    }

    static DEVICE StridedRows k_rows(const DecodeParams& p, int request, int head) {
        return {p.k + request * p.k_stride_request + head * p.k_stride_head, p.k_stride_row};
    }

    static DEVICE StridedRows v_rows(const DecodeParams& p, int request, int head) {
        return {p.v + request * p.v_stride_request + head * p.v_stride_head, p.v_stride_row};
    }
};
