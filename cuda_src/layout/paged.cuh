// Paged caches: the rows of a request lie in pages, row r in the page that entry r / page_size of its table names.
//
// The lanes of a warp share the work of finding a tile's rows: each looks up one of every 32, and those that load a row
// ask the lane that knows it. Entries are on their way a tile ahead of the rows that they are for.
#pragma once
#include "base/types.cuh"
#include "layout/padded.cuh"
#include "mask.cuh"
#include "params.cuh"

// Rows of one cache head in page 0, from some byte of theirs on.
struct PageRows {
    const u8* first;

    DEVICE PageRows from(int offset) const { return {first + offset}; }
};

// The rows of one tile. To be used by the whole warp together.
template <int PARTS>
struct PlacedRows {
    const u8* first;
    int unit;
    int first_row;
    const u32 (&units)[PARTS];

    // The lane that knows this row has put one that may be read in place of one past the range.
    DEVICE GlobalRow row(int index, const RowRange&) const {
        const int in_tile = index - first_row;
        // Not units[in_tile / 32]: the compiler would put the array into memory before it knows which.
        const u32 known = PARTS == 1 || in_tile < 32 ? units[0] : units[PARTS - 1];
        const int units_from_first = static_cast<int>(ptx::shuffle(known, in_tile % 32));
        return {first + static_cast<i64>(units_from_first) * unit};
    }
};

struct PagedLayout {
    static constexpr bool kLooksUp = true;

    // Tables on the device cannot be checked before the launch: rows that a request's pages do not have are cut off.
    static DEVICE int kv_len(const DecodeParams& p, int request) {
        const int rows = p.kv_lens[request];
        if (!p.page_indptr) return max_of(0, min_of(rows, p.kv_len));
        const int full = p.page_indptr[request + 1] - p.page_indptr[request] - 1;
        if (full < 0) return 0;
        const i64 len = static_cast<i64>(full) * p.page_size.value + max_of(0, min_of(rows, p.page_size.value));
        return static_cast<int>(min_of<i64>(len, p.kv_len));
    }

    static DEVICE PageRows k_rows(const DecodeParams& p, int, int head) { return {p.k + head * p.k_stride_head}; }
    static DEVICE PageRows v_rows(const DecodeParams& p, int, int head) { return {p.v + head * p.v_stride_head}; }

    // Where the copy engine finds rows: the coordinates of a box that begins with a row. A page has whole boxes.
    class BoxPlaces {
      public:
        int row;
        int outer;

        DEVICE BoxPlaces() {}
        DEVICE BoxPlaces(const DecodeParams& p, int request)
            : first_entry_(p.page_indptr ? p.page_indptr[request] : request * p.block_table_stride) {}

        // Asks for the entry of a row, or in place of one past the range of its last.
        DEVICE void ask(const DecodeParams& p, int row_of_request, const RowRange& range) {
            const int entry = first_entry_ + p.page_size.quotient(range.clamp(row_of_request));
            page_ = static_cast<int>(ptx::load_4(p.page_indices + entry));
        }

        // Of the row that was asked for last.
        DEVICE void find(const DecodeParams& p, int row_of_request) {
            row = p.page_size.remainder(row_of_request, p.page_size.quotient(row_of_request));
            outer = page_;
        }

      private:
        int first_entry_;
        int page_;
    };

    // As PaddedLayout; CTAs take turns over the pages.
    static DEVICE void fetch_ahead(const DecodeParams& p, const Lane& lane) {
        PaddedLayout::fetch_table(p.kv_lens, p.batch, 0, lane);
        if (p.page_indptr) PaddedLayout::fetch_table(p.page_indptr, p.batch + 1, 0, lane);
        PaddedLayout::fetch_table(p.page_indices, p.page_entries, 32ll * blockIdx.x, lane);
    }

    // A box holds 2^box_shift rows of one page, which begin at a multiple of as many.
    static DEVICE int box_begin(const DecodeParams& p, int row) { return row >> p.box_shift << p.box_shift; }

    // Where the rows of a warp's tiles lie.
    template <int SUBTILES>
    class Places {
        static constexpr int kRows = 16 * SUBTILES;
        static constexpr int kParts = ceil_div(kRows, 32);
        static_assert(kParts <= 2, "a lane looks up at most two rows of a tile");

      public:
        DEVICE Places(const DecodeParams& p, int request, const RowRange& range, const Lane& lane)
            : p_(p), range_(range), lane_(lane.index() % kRows),
              first_entry_(p.page_indptr ? p.page_indptr[request] : request * p.block_table_stride) {}

        // Asks for the entries of the tile from `row` on. The range is not empty.
        DEVICE void ask(int row) {
#pragma unroll
            for (int i = 0; i < kParts; i++) {
                const int entry = first_entry_ + p_.page_size.quotient(known_row(row, i));
                pages_[i] = static_cast<int>(ptx::load_4(p_.page_indices + entry));
            }
        }

        // Finds the rows of the tile from `row` on, whose entries were asked for last, and asks for those of the tile
        // `step` rows further.
        DEVICE void find(int row, int step) {
#pragma unroll
            for (int i = 0; i < kParts; i++) {
                const int index = known_row(row, i);
                const int in_page = p_.page_size.remainder(index, p_.page_size.quotient(index));
                k_units_[i] = static_cast<u32>(pages_[i] * p_.k_units_page + in_page * p_.k_units_row);
                v_units_[i] = static_cast<u32>(pages_[i] * p_.v_units_page + in_page * p_.v_units_row);
            }
            ask(row + step);
        }

        // The tile from `row` on, which was found last.
        DEVICE PlacedRows<kParts> of_k(const PageRows& rows, int row) const {
            return {rows.first, p_.k_unit, row, k_units_};
        }
        DEVICE PlacedRows<kParts> of_v(const PageRows& rows, int row) const {
            return {rows.first, p_.v_unit, row, v_units_};
        }

      private:
        // The row that this lane looks up among the i-th 32 of a tile; the last of the range in place of one past it.
        DEVICE int known_row(int first, int i) const { return range_.clamp(first + 32 * i + lane_); }

        const DecodeParams& p_;
        const RowRange& range_;
        int lane_;
        int first_entry_;  // of the request; 32 bits, like all numbers of entries
        int pages_[kParts];
        u32 k_units_[kParts];
        u32 v_units_[kParts];
    };
};
