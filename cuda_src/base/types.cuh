// Integer names and the function qualifier of everything that is not an entry point. NVRTC has no <cstdint>.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// What the driver's cuTensorMapEncodeTiled makes of an array: the copy engine's description of it.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

#define DEVICE __device__ __forceinline__

// How a warp looks at the fragments of mma.m16n8k16: lane = 4 * group + thread (PTX ISA, "Matrix fragments").
struct Lane {
    int group;   // 0..7: a row of A and C, a column of B
    int thread;  // 0..3: a pair of columns of A and C, a pair of rows of B

    int warp;
    int in_cta;

    static DEVICE Lane self() { return of(threadIdx.x); }
    static DEVICE Lane of(u32 thread) {
        const int lane = thread % 32;
        return {lane / 4, lane % 4, static_cast<int>(thread / 32), static_cast<int>(thread)};
    }
    DEVICE int index() const { return 4 * group + thread; }
};

template <class T>
DEVICE constexpr T min_of(T a, T b) {
    return a < b ? a : b;
}

template <class T>
DEVICE constexpr T max_of(T a, T b) {
    return a > b ? a : b;
}

DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
