// How the lanes of a warp share one row of a cache, so that a row is read with the widest loads there are.
//
// LANES lanes read a row of ROW_BYTES together, ROW_BYTES / LANES each: as many 16-byte loads as fit, then at most one
// each of 8, 4 and 2 bytes. Within one load neighbouring lanes touch neighbouring bytes, so a lane's share is not
// contiguous in the row; `offset` says where each of its bytes lies. Attention does not care about the order of the
// head dimension as long as Q (or the output) uses the same one.
#pragma once
#include "base/ptx.cuh"

template <int ROW_BYTES, int LANES>
struct RowSlice {
    static_assert(ROW_BYTES % (2 * LANES) == 0, "head_dim must be a multiple of 16");
    static constexpr int kBytes = ROW_BYTES / LANES;
    static constexpr int kWords = (kBytes + 3) / 4;

    // Width of the load that begins at byte `start` of the share. (No loops here: the compiler folds straight lines.)
    static DEVICE constexpr int load_width(int start) {
        const int left = kBytes - start;
        return left >= 16 ? 16 : left >= 8 ? 8 : left >= 4 ? 4 : 2;
    }

    // First byte of the load that byte `at` of the share comes with.
    static DEVICE constexpr int load_start(int at) {
        constexpr int in_16 = kBytes / 16 * 16, in_8 = in_16 + (kBytes & 8), in_4 = in_8 + (kBytes & 4);
        return at < in_16 ? at / 16 * 16 : at < in_8 ? in_16 : at < in_4 ? in_8 : in_4;
    }

    // Byte of the row where byte `at` of lane `lane`'s share lies.
    static DEVICE constexpr int offset(int at, int lane) {
        const int start = load_start(at);
        return LANES * start + lane * load_width(start) + (at - start);
    }

    // Where a lane's share begins in the row. Rows are handed to `load` from there, so that no load adds it again.
    static DEVICE int begin(int lane) { return lane * load_width(0); }

    // `share`: where a lane's share begins; it gives `load<BYTES>(dst, offset)`.
    template <class Share>
    static DEVICE void load(u32 (&words)[kWords], const Share& share, int lane) {
        load_from<0>(words, share, lane);
    }

    // Some bits of every load, so that it is not known before all of them have ended.
    static DEVICE u32 bits_of_loads(const u32 (&words)[kWords]) { return bits_from<0>(words); }

  private:
    template <int START>
    static DEVICE u32 bits_from(const u32 (&words)[kWords]) {
        if constexpr (START < kBytes) return words[START / 4] | bits_from<START + load_width(START)>(words);
        return 0;
    }

    template <int START, class Share>
    static DEVICE void load_from(u32 (&words)[kWords], const Share& share, int lane) {
        if constexpr (START < kBytes) {
            constexpr int width = load_width(START);
            share.template load<width>(&words[START / 4], LANES * START + lane * (width - load_width(0)));
            load_from<START + width>(words, share, lane);
        }
    }
};
