// CUDA's execution model on one CPU thread, as far as the kernels use it: a fiber for each CUDA thread, meeting points
// for warps and CTAs, shared memory, and a launch. Included before a kernel's own text, which is compiled as it is.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// All fibers run on one thread, so a thread_local object is shared by them; inside a function it is static as well.
#define __shared__ thread_local

struct uint2 { unsigned x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kSharedBytes = 228 * 1024;

// What the lanes of a warp bring to an operation that all of them take part in.
struct Meeting {
    const char* operation = nullptr;
    int arrived = 0;
    unsigned generation = 0;
    const void* in[32];
    void* out[32];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

struct Cta {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    ucontext_t scheduler;
    int current = 0;
    int alive = 0;
    int at_barrier = 0;
    unsigned barrier_generation = 0;
    unsigned long long progress = 0;
    char error[256] = "";
    void (*entry)(void*);
    void* params;
};

inline Cta* cta = nullptr;

// An allocation of which only some bytes may be read: `readable` has one byte for each of its bytes.
struct Watched {
    unsigned long long base, size;
    const unsigned char* readable;
};

inline const Watched* watched = nullptr;
inline int watched_count = 0;

inline void yield() {
    const int self = cta->current;
    swapcontext(&cta->fibers[self].context, &cta->scheduler);
}

// Ends the launch: the first error is what it returns.
[[noreturn]] inline void fail(const char* message) {
    if (!cta->error[0])
        snprintf(cta->error, sizeof cta->error, "%s (CTA %u, thread %d)", message, blockIdx.x, cta->current);
    for (;;) yield();
}

inline void check_read(const void* address, int bytes) {
    const unsigned long long at = reinterpret_cast<unsigned long long>(address);
    if (at % bytes) fail("a misaligned read");
    for (int i = 0; i < watched_count; i++) {
        const Watched& w = watched[i];
        if (at < w.base || at >= w.base + w.size) continue;
        for (int b = 0; b < bytes; b++)
            if (at + b >= w.base + w.size || !w.readable[at + b - w.base]) fail("a read of what nobody may read");
    }
}

// All 32 lanes bring `in` and take `out`; the last to come computes for all of them.
template <class In, class Out, class Combine>
void meet(const char* operation, const In& in, Out& out, Combine combine) {
    Meeting& m = cta->warps[cta->current / 32];
    const int lane = cta->current % 32;
    if (m.arrived == 0)
        m.operation = operation;
    else if (strcmp(m.operation, operation))
        fail("lanes of a warp are at different operations");
    m.in[lane] = &in;
    m.out[lane] = &out;
    const unsigned generation = m.generation;
    if (++m.arrived == 32) {
        const In* ins[32];
        Out* outs[32];
        for (int i = 0; i < 32; i++) ins[i] = static_cast<const In*>(m.in[i]), outs[i] = static_cast<Out*>(m.out[i]);
        combine(ins, outs);
        m.arrived = 0;
        m.generation++;
        cta->progress++;
        return;
    }
    while (m.generation == generation) yield();
}

inline void barrier() {
    const unsigned generation = cta->barrier_generation;
    if (++cta->at_barrier == cta->alive) {
        cta->at_barrier = 0;
        cta->barrier_generation++;
        cta->progress++;
        return;
    }
    while (cta->barrier_generation == generation) yield();
}

inline void fiber_main() {
    cta->entry(cta->params);
    Fiber& self = cta->fibers[cta->current];
    self.done = true;
    cta->alive--;
    cta->progress++;
    // Threads that have left no longer count at the barrier.
    if (cta->alive && cta->at_barrier == cta->alive) {
        cta->at_barrier = 0;
        cta->barrier_generation++;
    }
    for (;;) yield();
}

}  // namespace emulator

thread_local __attribute__((aligned(16))) unsigned char shared[emulator::kSharedBytes];

namespace emulator {

// Runs one CTA after the other. Returns an error, or an empty string. `order` seeds the order in which fibers run.
inline const char* launch(void (*entry)(void*), void* params, unsigned grid, unsigned threads, unsigned order) {
    static char error[256];
    error[0] = 0;
    gridDim = {grid, 1, 1};
    blockDim = {threads, 1, 1};
    Cta block;
    block.fibers.resize(threads);
    for (Fiber& fiber : block.fibers) fiber.stack.reset(new char[kStackBytes]);
    block.entry = entry;
    block.params = params;
    cta = &block;
    for (unsigned index = 0; index < grid && !error[0]; index++) {
        blockIdx = {index, 0, 0};
        memset(shared, 0xff, sizeof shared);  // NaN: nothing may count on what another CTA left
        block.warps.assign(threads / 32, Meeting());
        block.alive = threads;
        block.at_barrier = 0;
        for (unsigned i = 0; i < threads; i++) {
            Fiber& fiber = block.fibers[i];
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStackBytes;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, fiber_main, 0);
        }
        const auto resume = [&](unsigned i) {
            block.current = static_cast<int>(i);
            if (block.fibers[i].done || block.error[0]) return;
            threadIdx = {i, 0, 0};
            swapcontext(&block.scheduler, &block.fibers[i].context);
        };
        while (block.alive && !block.error[0]) {
            const unsigned long long before = block.progress;
            for (unsigned i = 0; i < threads; i++) {
                // Warps in an order that changes from pass to pass; lanes rotate.
                order = order * 1664525u + 1013904223u;
                const unsigned warps = threads / 32;
                const unsigned warp = order ? (i / 32 + order % warps) % warps : i / 32;
                const unsigned lane = order ? (i + order / 7) % 32 : i % 32;
                resume(warp * 32 + lane);
            }
            if (before == block.progress && !block.error[0]) {
                // A random order may miss a fiber: a full pass in order decides.
                for (unsigned i = 0; i < threads; i++) resume(i);
                if (before == block.progress && !block.error[0])
                    snprintf(block.error, sizeof block.error, "deadlock: threads wait for each other (CTA %u)", index);
            }
        }
        memcpy(error, block.error, sizeof error);
    }
    cta = nullptr;
    return error;
}

}  // namespace emulator
