// What reading costs: two arrays streamed with the loads that decode.cu uses, and nothing done with what arrives.
//
// The benchmark takes the fastest of some specialisations as the time that no kernel over the same bytes can beat.
// CTAs take tiles of kUnroll * kThreads 16-byte words in turn. The specialisation defines kUnroll, kThreads and kPaged:
// whether the arrays are pools of pages, whose words follow each other as a list of pages puts them in order.
#include "base/ptx.cuh"
#include "params.cuh"

constexpr int kStep = 16 * kThreads;
constexpr int kTile = kUnroll * kStep;
// The loads must not be optimised away, so a value that no real data are expected to give would be stored.
constexpr u32 kUnlikely = 0x5bd1e995u;

// Where the bytes lie that are read as number `begin` and after.
DEVICE const u8* place(const ReadParams& p, const u8* array, const Divisor& page_words, i64 begin) {
    if constexpr (!kPaged) return array + begin;
    const int word = static_cast<int>(begin / 16), entry = page_words.quotient(word);
    const i64 page = static_cast<int>(ptx::load_4(p.page_indices + entry));
    return array + 16 * (page * page_words.value + page_words.remainder(word, entry));
}

extern "C" __global__ void __launch_bounds__(kThreads) read_limit(const __grid_constant__ ReadParams p) {
    const i64 k_tiles = (p.k_bytes + kTile - 1) / kTile, v_tiles = (p.v_bytes + kTile - 1) / kTile;
    u32 folded = 0;
    for (i64 tile = blockIdx.x; tile < k_tiles + v_tiles; tile += gridDim.x) {
        const bool of_k = tile < k_tiles;
        const i64 begin = (of_k ? tile : tile - k_tiles) * kTile + 16 * threadIdx.x;
        const i64 left = (of_k ? p.k_bytes : p.v_bytes) - begin;
        const u8* array = of_k ? p.k : p.v;
        const Divisor page_words = of_k ? p.k_page_words : p.v_page_words;
        const u8* places[kUnroll];
        u32 words[kUnroll][4];
        // All places before the first load: loads are issued in order, and each would wait for its entry of the list.
        if (left > (kUnroll - 1) * kStep) {
#pragma unroll
            for (int i = 0; i < kUnroll; i++) places[i] = place(p, array, page_words, begin + i * kStep);
#pragma unroll
            for (int i = 0; i < kUnroll; i++) ptx::load_once<16>(words[i], places[i]);
        } else {
#pragma unroll
            for (int i = 0; i < kUnroll; i++) {
                for (u32& word : words[i]) word = 0;
                if (i * kStep < left) ptx::load_once<16>(words[i], place(p, array, page_words, begin + i * kStep));
            }
        }
#pragma unroll
        for (int i = 0; i < kUnroll; i++) folded ^= words[i][0] ^ words[i][1] ^ words[i][2] ^ words[i][3];
    }
    if (folded == kUnlikely) *p.sink = folded;
}
