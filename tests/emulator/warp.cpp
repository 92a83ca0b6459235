// What the lanes of a warp compute together. Fragments lie as the PTX ISA has them: lane 4 g + t.
#include "numbers.h"
#include "runtime.h"

namespace {

struct MmaIn {
    const unsigned* a;
    unsigned b[2];
    const float* c;
};

template <float (*TO_FLOAT)(uint32_t)>
void multiply(const void* const* ins, void* const* outs) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const MmaIn& in = *static_cast<const MmaIn*>(ins[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int h = 0; h < 2; h++) {
            for (int i = 0; i < 4; i++)
                A[g + 8 * (i % 2)][2 * t + h + 8 * (i / 2)] = TO_FLOAT((in.a[i] >> (16 * h)) & 0xffffu);
            for (int i = 0; i < 2; i++) B[2 * t + h + 8 * i][g] = TO_FLOAT((in.b[i] >> (16 * h)) & 0xffffu);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        const float* c = static_cast<const MmaIn*>(ins[lane])->c;
        float* out = static_cast<float*>(outs[lane]);
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = c[i];
            for (int k = 0; k < 16; k++) sum += static_cast<double>(A[row][k]) * B[k][column];
            out[i] = static_cast<float>(sum);
        }
    }
}

template <float (*TO_FLOAT)(uint32_t)>
void mma(const char* name, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const emulator::Site& at) {
    const MmaIn in = {a, {b0, b1}, c};
    float out[4];
    emulator::meet(name, &in, out, multiply<TO_FLOAT>, emulator::ALIGNED, at);
    for (int i = 0; i < 4; i++) c[i] = out[i];
}

}  // namespace

namespace emulator {

void mma_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const Site& at) {
    mma<numbers::f16_float>("mma_f16", c, a, b0, b1, at);
}

void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const Site& at) {
    mma<numbers::bf16_float>("mma_bf16", c, a, b0, b1, at);
}

unsigned transpose_8x8(unsigned pair, const Site& at) {
    unsigned out;
    const Combine transpose = [](const void* const* ins, void* const* outs) {
        unsigned m[8][8];
        for (int lane = 0; lane < 32; lane++)
            for (int h = 0; h < 2; h++)
                m[lane / 4][2 * (lane % 4) + h] = (*static_cast<const unsigned*>(ins[lane]) >> (16 * h)) & 0xffffu;
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            *static_cast<unsigned*>(outs[lane]) = m[2 * t][g] | m[2 * t + 1][g] << 16;
        }
    };
    meet("transpose_8x8", &pair, &out, transpose, ALIGNED, at);
    return out;
}

namespace {

unsigned vote(const char* name, bool predicate, const Site& at) {
    unsigned out;
    const Combine collect = [](const void* const* ins, void* const* outs) {
        unsigned found = 0;
        for (int i = 0; i < 32; i++) found |= static_cast<unsigned>(*static_cast<const bool*>(ins[i])) << i;
        for (int i = 0; i < 32; i++) *static_cast<unsigned*>(outs[i]) = found;
    };
    meet(name, &predicate, &out, collect, !ALIGNED, at);
    return out;
}

}  // namespace

bool any(bool predicate, const Site& at) { return vote("any", predicate, at) != 0; }
unsigned ballot(bool predicate, const Site& at) { return vote("ballot", predicate, at); }

unsigned sum_of_lanes(unsigned x, const Site& at) {
    unsigned out;
    const Combine add = [](const void* const* ins, void* const* outs) {
        unsigned sum = 0;
        for (int i = 0; i < 32; i++) sum += *static_cast<const unsigned*>(ins[i]);
        for (int i = 0; i < 32; i++) *static_cast<unsigned*>(outs[i]) = sum;
    };
    meet("sum_of_lanes", &x, &out, add, !ALIGNED, at);
    return out;
}

struct ShuffleIn {
    unsigned x;
    int from;
};

unsigned shuffle(unsigned x, int from, const Site& at) {
    const ShuffleIn in = {x, from & 31};
    unsigned out;
    const Combine exchange = [](const void* const* ins, void* const* outs) {
        for (int i = 0; i < 32; i++) {
            const int source = static_cast<const ShuffleIn*>(ins[i])->from;
            *static_cast<unsigned*>(outs[i]) = static_cast<const ShuffleIn*>(ins[source])->x;
        }
    };
    meet("shuffle", &in, &out, exchange, !ALIGNED, at);
    return out;
}

}  // namespace emulator
