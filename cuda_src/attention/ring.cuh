// A ring of boxes in shared memory, which the copy engine (TMA, sm_90 and later) keeps filling while warps read from
// it.
//
// A warp of its own asks for boxes of ROWS rows of HEADS neighbouring cache heads, of K and of V in turn, as far ahead
// as the ring is long: bytes in flight cost no registers, and rows of neighbouring heads, which NHD puts side by side,
// are read together. A stage holds one box and has two barriers: filled, which counts the bytes of a copy, and free,
// which counts the warps that are done with the box.
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

template <class KBox, class VBox, int WARPS>
class Ring {
  public:
    static constexpr int kStageBytes = max_of(KBox::kPitch, VBox::kPitch);

    // `shared`: bytes() of them, aligned to 1024.
    DEVICE Ring(u8* shared, int stages)
        : count_(stages), boxes_(shared), barriers_(reinterpret_cast<u64*>(shared + stages * kStageBytes)) {}

    DEVICE int bytes() const { return count_ * (kStageBytes + 2 * 8); }

    // To be called by the thread that feeds, before the others meet it at a barrier. Fetches the descriptions of the
    // caches meanwhile.
    DEVICE void init(const TensorMap* k, const TensorMap* v) const {
        ptx::prefetch_tensor_map(k);
        ptx::prefetch_tensor_map(v);
        for (int s = 0; s < count_; s++) {
            ptx::barrier_init(filled(s), 1);
            ptx::barrier_init(free(s), WARPS);
        }
        ptx::barrier_init_done();
    }

    // Where a walk round the ring stands.
    struct Turn {
        int stage = 0;
        u32 parity = 0;
    };

    DEVICE void advance(Turn& turn) const {
        if (++turn.stage == count_) turn.stage = 0, turn.parity ^= 1;
    }

    // Asks for a box once the warps are done with what was there; `first`: nothing was there yet. LANES of the warp
    // take part; copy(lane's box, barrier) asks for what they share, `bytes` in all.
    template <int LANES, class Copy>
    DEVICE void fill(const Turn& turn, bool first, int bytes, const Lane& lane, Copy copy) const {
        if (!first) ptx::barrier_wait(free(turn.stage), turn.parity ^ 1);
        if (LANES == 1 || lane.index() == 0) ptx::barrier_arrive_expecting(filled(turn.stage), bytes);
        if (LANES > 1) ptx::sync_warp();  // a copy that ends before it was announced would end the phase
        copy(box(turn.stage), filled(turn.stage));
    }

    // The box, once it is there.
    DEVICE const u8* wait(const Turn& turn) const {
        ptx::barrier_wait(filled(turn.stage), turn.parity);
        return box(turn.stage);
    }

    // A warp is done with a box. `bits`, of all loads from it, are not known before they have ended, nor is therefore
    // where to arrive. Without, the compiler arrives while loads are on their way, and puts what uses them behind; the
    // copy engine does not wait for loads, and where banks conflict it was seen to be faster than they.
    DEVICE void release(const Turn& turn, const Lane& lane, u32 bits) const {
        const u32 none = static_cast<u32>(count_) >> 16;  // which the compiler does not know
        const bool never = ptx::any(bits & none);
        ptx::sync_warp();  // a vote orders no memory
        if (lane.index() == 0) ptx::barrier_arrive(free(turn.stage) + never);
    }

  private:
    DEVICE u8* box(int stage) const { return boxes_ + stage * kStageBytes; }
    DEVICE u64* filled(int stage) const { return barriers_ + stage; }
    DEVICE u64* free(int stage) const { return barriers_ + count_ + stage; }

    int count_;
    u8* boxes_;
    u64* barriers_;
};
