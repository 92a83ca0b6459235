// Moves rows of paged caches, byte by byte: pages to other pages, and the pages of requests to padded arrays.
//
// A CTA takes a page of K or V at a time, and its threads the words of it: `words` words a row of a head, rows of
// `heads` heads. Where these lie side by side the host makes one long row of them. The specialisation defines
// kWordBytes: 16 for rows of a cache, 4 for scales stored beside them.
#include "base/divide.cuh"
#include "params.cuh"

constexpr int kThreads = 128;

struct Word {
    u32 bits[kWordBytes / 4];

    static DEVICE Word zero() { return {}; }
    static DEVICE Word load(const u8* from) {
        Word word;
        ptx::load_once<kWordBytes>(word.bits, from);
        return word;
    }
    DEVICE void store(u8* to) const {
        if constexpr (kWordBytes == 16) {
            *reinterpret_cast<float4*>(to) = make_float4(ptx::bits_float(bits[0]), ptx::bits_float(bits[1]),
                                                         ptx::bits_float(bits[2]), ptx::bits_float(bits[3]));
        } else {
            *reinterpret_cast<u32*>(to) = bits[0];
        }
    }
};

// Word `index` of a page: its row, and how far it is from the page's beginning.
struct InPage {
    int row, head, word;

    static DEVICE InPage of(int index, const Divisor& heads, const Divisor& words) {
        const int of_head = words.quotient(index), row = heads.quotient(of_head);
        return {row, heads.remainder(of_head, row), words.remainder(index, of_head)};
    }
    DEVICE i64 offset(i64 stride_row, i64 stride_head) const {
        return row * stride_row + head * stride_head + word * kWordBytes;
    }
};

extern "C" __global__ void __launch_bounds__(kThreads) copy_pages(const __grid_constant__ CopyPagesParams p) {
    for (int unit = blockIdx.x; unit < p.pairs * p.sides; unit += gridDim.x) {
        const bool of_k = p.first_side + unit % p.sides == 0;
        const int pair = unit / p.sides, source = p.sources[pair], target = p.targets[pair];
        // Nobody has checked tables on the device.
        if (source < 0 || source >= p.num_pages || target < 0 || target >= p.num_pages) continue;
        u8* pages = of_k ? p.k : p.v;
        const i64 stride_page = of_k ? p.k_stride_page : p.v_stride_page;
        const i64 stride_row = of_k ? p.k_stride_row : p.v_stride_row;
        const i64 stride_head = of_k ? p.k_stride_head : p.v_stride_head;
        for (int i = threadIdx.x; i < p.page_words; i += kThreads) {
            const i64 offset = InPage::of(i, p.heads, p.words).offset(stride_row, stride_head);
            Word::load(pages + source * stride_page + offset).store(pages + target * stride_page + offset);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ GatherParams p) {
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        const bool of_k = p.first_side + unit % p.sides == 0;
        const int chunk_of_all = unit / p.sides;
        const int request = p.chunks.quotient(chunk_of_all), chunk = p.chunks.remainder(chunk_of_all, request);
        const i64 first = p.kv_indptr[request], pages = p.kv_indptr[request + 1] - first;
        // Nobody has checked tables on the device: what they put outside the cache comes as zeros.
        int rows = 0, page = 0;
        if (chunk < pages && first >= 0 && first + chunk < p.num_indices) {
            page = p.kv_indices[first + chunk];
            rows = chunk + 1 < pages ? p.page_size : max_of(0, min_of(p.kv_last_page_len[request], p.page_size));
            if (page < 0 || page >= p.num_pages) rows = page = 0;
        }
        const i64 first_row = static_cast<i64>(chunk) * p.page_size;
        const int out_rows = static_cast<int>(min_of<i64>(p.page_size, p.max_kv_len - first_row));
        const u8* from = (of_k ? p.k + page * p.k_stride_page : p.v + page * p.v_stride_page);
        u8* to = of_k ? p.k_out + request * p.k_out_stride_request + first_row * p.k_out_stride_row
                      : p.v_out + request * p.v_out_stride_request + first_row * p.v_out_stride_row;
        const i64 stride_row = of_k ? p.k_stride_row : p.v_stride_row;
        const i64 stride_head = of_k ? p.k_stride_head : p.v_stride_head;
        const i64 out_stride_row = of_k ? p.k_out_stride_row : p.v_out_stride_row;
        const i64 out_stride_head = of_k ? p.k_out_stride_head : p.v_out_stride_head;
        for (int i = threadIdx.x; i < out_rows * p.row_words; i += kThreads) {
            const InPage at = InPage::of(i, p.heads, p.words);
            const Word word = at.row < rows ? Word::load(from + at.offset(stride_row, stride_head)) : Word::zero();
            word.store(to + at.offset(out_stride_row, out_stride_head));
        }
    }
}
