// Writes keys and values of new tokens into a cache, paged or padded: converted as they are written, or byte by byte.
//
// A padded cache is a paged one in which request b has the one page b. A row is one head of one token; `lanes`
// neighbouring threads write it. K and V are two sides of one launch, of which CTAs take turns. The specialisation
// defines Writer (row_writer.cuh), kStoredMax, the largest finite value of the cache's format, and kLargestRounded, the
// largest float that rounds to it.
#include "base/divide.cuh"
#include "params.cuh"
#include "scale/amax.cuh"
#include "scale/head.cuh"

constexpr int kThreads = 256;

// K or V.
struct Side {
    const u8* values;
    u8* cache;
    float* token_scales;
    const float* scales;
    float scale;
    int scale_stride;
    i64 stride_outer, stride_inner, stride_head;
    i64 cache_stride_page, cache_stride_row, cache_stride_head;
    i64 scales_stride_page, scales_stride_row, scales_stride_head;

    static DEVICE Side of(const AppendParams& p, int side) {
        if (side == 0)
            return {p.k, p.k_cache, p.k_token_scales, p.k_scales, p.k_scale, p.k_scale_stride,
                    p.k_stride_outer, p.k_stride_inner, p.k_stride_head,
                    p.k_cache_stride_page, p.k_cache_stride_row, p.k_cache_stride_head,
                    p.k_scales_stride_page, p.k_scales_stride_row, p.k_scales_stride_head};
        return {p.v, p.v_cache, p.v_token_scales, p.v_scales, p.v_scale, p.v_scale_stride,
                p.v_stride_outer, p.v_stride_inner, p.v_stride_head,
                p.v_cache_stride_page, p.v_cache_stride_row, p.v_cache_stride_head,
                p.v_scales_stride_page, p.v_scales_stride_row, p.v_scales_stride_head};
    }
};

// Where a token goes. Nobody has checked tables on the device: a token whose place would be outside the cache, or past
// the pages of its request, is not written.
struct Place {
    int page;  // negative: nowhere
    int slot;

    static DEVICE Place nowhere() { return {-1, 0}; }

    static DEVICE Place of(const AppendParams& p, int token) {
        int request;
        i64 position;
        if (p.batch_indices) {
            request = p.batch_indices[token];
            position = p.positions[token];
            if (request < 0 || request >= p.batch) return nowhere();
        } else {
            int behind;  // tokens of the request from this one on
            if (p.append_indptr) {
                request = request_of(p, token);
                if (request < 0) return nowhere();
                behind = p.append_indptr[request + 1] - token;
            } else {
                request = p.tokens_each.quotient(token);
                behind = p.tokens_each.value - p.tokens_each.remainder(token, request);
                if (request >= p.batch) return nowhere();
            }
            position = kv_len(p, request) - behind;
        }
        if (position < 0) return nowhere();
        if (!p.kv_indptr) return position < p.page_size ? Place{request, static_cast<int>(position)} : nowhere();
        const i64 first = p.kv_indptr[request], index = first + position / p.page_size;
        if (first < 0 || index >= p.kv_indptr[request + 1] || index >= p.num_indices) return nowhere();
        const int page = p.kv_indices[index];
        if (page < 0 || page >= p.num_pages) return nowhere();
        return {page, static_cast<int>(position % p.page_size)};
    }

  private:
    // The request whose part of the tokens `token` is in, or -1.
    static DEVICE int request_of(const AppendParams& p, int token) {
        int low = 0, high = p.batch;
        while (high - low > 1) {
            const int middle = low + (high - low) / 2;
            if (p.append_indptr[middle] <= token) low = middle;
            else high = middle;
        }
        return p.batch > 0 && p.append_indptr[low] <= token && token < p.append_indptr[low + 1] ? low : -1;
    }

    // With the tokens that are appended.
    static DEVICE i64 kv_len(const AppendParams& p, int request) {
        if (!p.kv_indptr) return p.kv_lens[request];
        const i64 pages = static_cast<i64>(p.kv_indptr[request + 1]) - p.kv_indptr[request];
        return pages > 0 ? (pages - 1) * p.page_size + p.kv_lens[request] : 0;
    }
};

// What a thread has seen on the way, for those who ask: kept until it changes heads.
struct Seen {
    const AppendParams& p;
    int side;
    int head = 0;
    u32 amax = 0;
    u32 saturated = 0, nan = 0;

    DEVICE Seen(const AppendParams& p, int side) : p(p), side(side) {}

    DEVICE void change_to(int other) {
        if (other != head) flush();
        head = other;
    }
    DEVICE void add(const float4& x, const float4& stored) {
        amax = max_of(amax, finite_magnitude(x));
        count(stored.x);
        count(stored.y);
        count(stored.z);
        count(stored.w);
    }
    DEVICE void finish() {
        flush();
        if (saturated) ptx::atomic_add(&p.counts[side], saturated);
        if (nan) ptx::atomic_add(&p.counts[2 + side], nan);
    }

  private:
    DEVICE void count(float x) {
        const u32 magnitude = ptx::float_bits(x) & 0x7fffffffu;
        saturated += magnitude > ptx::float_bits(kLargestRounded) && magnitude <= 0x7f800000u;
        nan += magnitude > 0x7f800000u;
    }
    DEVICE void flush() {
        if (amax) ptx::atomic_max(&p.amax[side * p.num_heads.value + head], amax);
        amax = 0;
    }
};

// One row, by `lanes` threads; `written` is false where it goes nowhere, but then threads still exchange maxima.
template <class Writer>
DEVICE void write_row(const AppendParams& p, const Side& side, const Place& place, const u8* values, u8* to, int head,
                      int lane, bool written, Seen& seen) {
    if constexpr (Writer::kConverts) {
        float scale = HeadScale::at(side.scale, side.scales, side.scale_stride, head);
        if (side.token_scales) {
            u32 amax = 0;
            for (int d = 4 * lane; written && d < p.head_dim; d += 4 * p.lanes)
                amax = max_of(amax, finite_magnitude(Writer::load(values + d * Writer::kBytes)));
            for (int mask = p.lanes / 2; mask; mask /= 2)
                amax = max_of(amax, ptx::float_bits(ptx::shuffle_xor(ptx::bits_float(amax), mask)));
            scale = scale_of(amax, kStoredMax);
            if (written && lane == 0)
                side.token_scales[place.page * side.scales_stride_page + place.slot * side.scales_stride_row +
                                  head * side.scales_stride_head] = scale;
        }
        if (p.counts) seen.change_to(head);
        for (int d = 4 * lane; written && d < p.head_dim; d += 4 * p.lanes) {
            const float4 x = Writer::load(values + d * Writer::kBytes);
            const float4 stored = make_float4(ptx::divide(x.x, scale), ptx::divide(x.y, scale),
                                              ptx::divide(x.z, scale), ptx::divide(x.w, scale));
            Writer::store(to + d * Writer::kStoredBytes, stored);
            if (p.counts) seen.add(x, stored);
        }
    } else {
        for (int d = 4 * lane; written && d < p.head_dim; d += 4 * p.lanes)
            Writer::copy(to + d * Writer::kStoredBytes, values + d * Writer::kBytes);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 6) append(const __grid_constant__ AppendParams p) {
    const int side_index = p.first_side + static_cast<int>(blockIdx.x) % p.sides;
    const Side side = Side::of(p, side_index);
    const int thread = static_cast<int>(threadIdx.x), lane = thread & (p.lanes - 1);
    const int per_cta = kThreads / p.lanes;
    const int step = static_cast<int>(gridDim.x) / p.sides * per_cta;
    Seen seen(p, side_index);

    // All threads take as many turns, because those of a warp exchange maxima.
    for (int begin = static_cast<int>(blockIdx.x) / p.sides * per_cta; begin < p.rows; begin += step) {
        const int row = begin + thread / p.lanes;
        const bool exists = row < p.rows;
        const int token = exists ? p.num_heads.quotient(row) : 0, head = exists ? p.num_heads.remainder(row, token) : 0;
        const Place place = exists ? Place::of(p, token) : Place::nowhere();
        const bool written = place.page >= 0;
        if (exists && !written && p.counts && p.counts_skipped && side_index == p.first_side && head == 0 && lane == 0)
            ptx::atomic_add(&p.counts[4], 1);

        const int outer = p.inner.quotient(token), inner = p.inner.remainder(token, outer);
        const u8* values = side.values + outer * side.stride_outer + inner * side.stride_inner;
        u8* to = side.cache + place.page * side.cache_stride_page + place.slot * side.cache_stride_row;
        write_row<Writer>(p, side, place, values + head * side.stride_head, to + head * side.cache_stride_head, head,
                          lane, written, seen);
    }
    if (p.counts) seen.finish();
}
