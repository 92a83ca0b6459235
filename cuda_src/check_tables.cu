// Looks through the page tables of a call for what may not be there: one CTA a request. A debug switch asks for it.
#include "base/ptx.cuh"
#include "params.cuh"

constexpr int kThreads = 128;
// What is found, the gravest first, above the number of the page; of equals the first page.
constexpr u32 kPageBits = 29;
constexpr u32 kNoPage = 1, kLength = 2, kBounds = 3;

DEVICE void report(const CheckTablesParams& p, u32 what, int page) {
    constexpr u32 most = (1u << kPageBits) - 1;
    ptx::atomic_max(&p.found[blockIdx.x], what << kPageBits | (most - min_of(static_cast<u32>(page), most)));
}

extern "C" __global__ void __launch_bounds__(kThreads) check_tables(const __grid_constant__ CheckTablesParams p) {
    const int request = blockIdx.x;
    const int rows = p.kv_lens[request];
    i64 first = static_cast<i64>(request) * p.block_table_stride, pages;
    if (p.page_indptr) {
        first = p.page_indptr[request];
        pages = p.page_indptr[request + 1] - first;
        if (first < 0 || pages < 0 || first + pages > p.entries) return report(p, kBounds, 0);
        if (pages && (rows < 1 || rows > p.page_size)) report(p, kLength, 0);
    } else {
        pages = (static_cast<i64>(rows) + p.page_size - 1) / p.page_size;
        if (rows < 0 || pages > p.entries) return report(p, kLength, 0);
    }
    for (int i = threadIdx.x; i < pages; i += kThreads) {
        const int page = p.page_indices[first + i];
        if (page < 0 || page >= p.num_pages) return report(p, kNoPage, i);
    }
}
