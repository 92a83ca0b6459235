// A ring of tiles in shared memory, which the copy engine (TMA, sm_90 and later) keeps filling while warps read from
// it.
//
// One thread asks for boxes of ROWS rows of HEADS neighbouring cache heads, K and V in turn, as far ahead as the ring
// is long: bytes in flight cost no registers, and rows of neighbouring heads, which NHD puts side by side, are read
// together. A stage has four barriers: K and V are filled, which counts the bytes of a copy, and K and V are free,
// which counts the warps that are done with them.
#pragma once
#include "mask.cuh"

// The box of one cache, [ROWS][HEADS][kPieces][kPieceBytes]: NHD memory from front to back, a row in pieces of 128
// bytes or as a whole. Where the length of a piece is a power of two, the copy engine exchanges 16-byte chunks of
// neighbouring lines of 128 bytes, so that a warp's fragment loads spread over the banks; jit/tensor_map.py asks for
// the same.
template <int ROW_BYTES, int ROWS, int HEADS>
struct RingBox {
    static constexpr int kPieceBytes = ROW_BYTES % 128 == 0 ? 128 : ROW_BYTES;
    static constexpr int kPieces = ROW_BYTES / kPieceBytes;
    static constexpr int kBytes = ROWS * HEADS * ROW_BYTES;
    // The exchange repeats every 1024 bytes.
    static constexpr int kPitch = ceil_div(kBytes, 1024) * 1024;
    static constexpr int kSwizzle = kPieceBytes == 128 ? 7 : kPieceBytes == 64 ? 3 : kPieceBytes == 32 ? 1 : 0;

    struct Row {
        const u8* box;
        u32 share;  // where this lane's share of the row begins in the box

        template <int BYTES>
        DEVICE void load(u32* dst, int offset) const {
            const u32 at = share + offset;
            ptx::load_shared<BYTES>(dst, box + (at ^ (at / 128 & kSwizzle) * 16));
        }
    };

    // The rows of one head. Where they lie in the box is the same in every turn, so the compiler keeps it.
    struct Rows {
        const u8* box;
        int first_row;
        u32 begin;

        // The box has all of its rows, and those past the range are masked.
        DEVICE Row row(int index, const RowRange&) const {
            return {box, static_cast<u32>(index - first_row) * (HEADS * ROW_BYTES) + begin};
        }
    };

    static DEVICE Rows rows(const u8* box, int head, int first_row, int begin) {
        return {box, first_row, static_cast<u32>(head * ROW_BYTES + begin)};
    }
};

template <class KBox, class VBox, int STAGES, int WARPS>
class Ring {
  public:
    static constexpr int kStageBytes = KBox::kPitch + VBox::kPitch;
    static constexpr int kBarrierBytes = 4 * STAGES * 8;
    static constexpr int kSharedBytes = STAGES * kStageBytes + kBarrierBytes;

    // `shared`: kSharedBytes, aligned to 1024.
    explicit DEVICE Ring(u8* shared)
        : stages_(shared), barriers_(reinterpret_cast<u64*>(shared + STAGES * kStageBytes)) {}

    // To be called by the thread that feeds, before the others meet it at a barrier. Fetches the descriptions of the
    // caches meanwhile.
    DEVICE void init(const TensorMap* k, const TensorMap* v) const {
        ptx::prefetch_tensor_map(k);
        ptx::prefetch_tensor_map(v);
        for (int s = 0; s < STAGES; s++) {
            ptx::barrier_init(barrier(kFilled, kK, s), 1);
            ptx::barrier_init(barrier(kFilled, kV, s), 1);
            ptx::barrier_init(barrier(kFree, kK, s), WARPS);
            ptx::barrier_init(barrier(kFree, kV, s), WARPS);
        }
        ptx::barrier_init_done();
    }

    // Where a walk round the ring stands.
    struct Turn {
        int stage = 0;
        u32 parity = 0;

        DEVICE void advance() {
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    };

    // Asks for a box of K and one of V once the warps are done with what was there; `first`: nothing was there yet.
    DEVICE void fill(const Turn& turn, bool first, const TensorMap* k, const TensorMap* v, int row, int head,
                     int request) const {
        fill_one<KBox>(turn, first, kK, k, row, head, request);
        fill_one<VBox>(turn, first, kV, v, row, head, request);
    }

    DEVICE const u8* wait_for_k(const Turn& turn) const { return wait_for(turn, kK); }
    DEVICE const u8* wait_for_v(const Turn& turn) const { return wait_for(turn, kV); }

    // A warp is done with K, or V: what it loaded has arrived, because it has been used. A load that has only been
    // issued may still be on its way when the copy engine writes the next box.
    DEVICE void release_k(const Turn& turn, const Lane& lane) const { release(turn, kK, lane); }
    DEVICE void release_v(const Turn& turn, const Lane& lane) const { release(turn, kV, lane); }

  private:
    static constexpr int kFilled = 0, kFree = 1, kK = 0, kV = 1;

    template <class Box>
    DEVICE void fill_one(const Turn& turn, bool first, int which, const TensorMap* map, int row, int head,
                         int request) const {
        u64* filled = barrier(kFilled, which, turn.stage);
        if (!first) ptx::barrier_wait(barrier(kFree, which, turn.stage), turn.parity ^ 1);
        ptx::barrier_arrive_expecting(filled, Box::kBytes);
        ptx::copy_box(box(turn, which), map, 0, 0, head, row, request, filled);
    }

    DEVICE const u8* wait_for(const Turn& turn, int which) const {
        ptx::barrier_wait(barrier(kFilled, which, turn.stage), turn.parity);
        return box(turn, which);
    }

    DEVICE void release(const Turn& turn, int which, const Lane& lane) const {
        ptx::sync_warp();
        if (lane.index() == 0) ptx::barrier_arrive(barrier(kFree, which, turn.stage));
    }

    DEVICE u8* box(const Turn& turn, int which) const {
        return stages_ + turn.stage * kStageBytes + which * KBox::kPitch;
    }
    DEVICE u64* barrier(int what, int which, int stage) const {
        return barriers_ + (2 * what + which) * STAGES + stage;
    }

    u8* stages_;
    u64* barriers_;
};
