// What reading costs: two arrays streamed with the loads that decode.cu uses, and nothing done with what arrives.
//
// The benchmark takes the fastest of some specialisations as the time that no kernel over the same bytes can beat.
// CTAs take tiles of kUnroll * kThreads 16-byte words in turn. The specialisation defines kUnroll and kThreads.
#include "base/ptx.cuh"
#include "params.cuh"

constexpr int kStep = 16 * kThreads;
constexpr int kTile = kUnroll * kStep;
// The loads must not be optimised away, so a value that no real data are expected to give would be stored.
constexpr u32 kUnlikely = 0x5bd1e995u;

extern "C" __global__ void __launch_bounds__(kThreads) read_limit(const __grid_constant__ ReadParams p) {
    const i64 k_tiles = (p.k_bytes + kTile - 1) / kTile, v_tiles = (p.v_bytes + kTile - 1) / kTile;
    u32 folded = 0;
    for (i64 tile = blockIdx.x; tile < k_tiles + v_tiles; tile += gridDim.x) {
        const bool of_k = tile < k_tiles;
        const i64 begin = (of_k ? tile : tile - k_tiles) * kTile;
        const i64 left = (of_k ? p.k_bytes : p.v_bytes) - begin - 16 * threadIdx.x;
        const u8* from = (of_k ? p.k : p.v) + begin + 16 * threadIdx.x;
        u32 words[kUnroll][4];
        if (left > (kUnroll - 1) * kStep) {
#pragma unroll
            for (int i = 0; i < kUnroll; i++) ptx::load_once<16>(words[i], from + i * kStep);
        } else {
#pragma unroll
            for (int i = 0; i < kUnroll; i++) {
                for (u32& word : words[i]) word = 0;
                if (i * kStep < left) ptx::load_once<16>(words[i], from + i * kStep);
            }
        }
#pragma unroll
        for (int i = 0; i < kUnroll; i++) folded ^= words[i][0] ^ words[i][1] ^ words[i][2] ^ words[i][3];
    }
    if (folded == kUnlikely) *p.sink = folded;
}
