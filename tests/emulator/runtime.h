// What a kernel sees of CUDA on a CPU: keywords, vector types, indices, and what its host bodies call in the runtime.
// Included before a kernel's own text, which is compiled as it is. runtime.cpp and warp.cpp are objects of their own,
// never instrumented by a sanitizer: what they do for all threads at once is not an access of any thread.
#pragma once
#include <stdio.h>
#include <string.h>

#include "numbers.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// A CTA is an OS thread and its CUDA threads are fibers on it; inside a function a thread_local object is static too.
#define __shared__ thread_local

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Where a kernel called. As the last argument of a host body, `CALL_SITE` is the line of the kernel that calls it.
struct Site {
    const char* file;
    int line;
};
#define CALL_SITE emulator::Site at = {__builtin_FILE(), __builtin_LINE()}

// Ends the launch; the first error is what it returns.
[[noreturn]] void fail(const char* message, const Site& at);

// Fails on a misaligned read, and on one of a byte that the test says nobody may read.
void check_read(const void* address, int bytes, const Site& at);

// Meeting points. Only sync_threads and sync_warp order memory, as on a GPU.
void sync_threads(const Site& at);
void sync_warp(const Site& at);
// The first `count` threads of the CTA meet.
void sync_first(int count, const Site& at);

// Barriers that count arrivals and bytes, known by their address; and the copy engine. A copy shows its worst: from when
// it is asked for, its destination is NaN, until somebody waits for it.
void barrier_init(const void* barrier, int arrivals, const Site& at);
void barrier_arrive(const void* barrier, int bytes, const Site& at);
void barrier_wait(const void* barrier, unsigned parity, const Site& at);
void copy_bytes(void* dst, const void* from, int bytes, const void* barrier, const Site& at);
void copy_box(void* dst, const void* map, const int (&first)[5], const void* barrier, const Site& at);

// Operations that all 32 lanes take part in. `ALIGNED`: from the same place of the program, too.
using Combine = void (*)(const void* const* ins, void* const* outs);
constexpr bool ALIGNED = true;
void meet(const char* operation, const void* in, void* out, Combine combine, bool aligned, const Site& at);
void mma_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const Site& at);
void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const Site& at);
unsigned transpose_8x8(unsigned pair, const Site& at);
bool any(bool predicate, const Site& at);
unsigned sum_of_lanes(unsigned x, const Site& at);
unsigned ballot(bool predicate, const Site& at);
unsigned shuffle(unsigned x, int from, const Site& at);

// A fence, and an atomic operation that publishes: what was written before the fence is seen by whoever finds the
// result of the operation after it and then passes a fence. To be called right before the operation itself.
void fence();
void publish(const void* address);

// An allocation of which only some bytes may be read: `readable` has one byte for each of its bytes.
struct Watched {
    unsigned char* base;
    unsigned long long size;
    const unsigned char* readable;
};

struct Launch {
    void* params;
    unsigned grid, threads, shared_bytes;
    unsigned order;  // seeds the order in which threads run; 0: by number
    const Watched* watched;
    int watched_count;
};

// Runs one CTA after the other. Returns an error, or an empty string.
const char* launch(void (*entry)(void*), const Launch& launch);

}  // namespace emulator
