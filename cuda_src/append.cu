// Writes keys and values of new tokens into a cache, paged or padded: converted as they are written, or byte by byte.
//
// A padded cache is a paged one in which request b has the one page b. A row is one head of one token; `lanes`
// neighbouring threads write it, in shares of 16 bytes of what comes in, which they take in turn. K and V are two sides
// of one launch, of which CTAs take turns. The specialisation defines Writer (row_writer.cuh), kStoredMax, the largest
// finite value of the cache's format, and kLargestRounded, the largest float that rounds to it.
#include "base/divide.cuh"
#include "params.cuh"
#include "scale/amax.cuh"
#include "scale/quotients.cuh"

constexpr int kThreads = 256;
// Rows that a thread has on the way, shares of each, and CTAs of an SM: 64 KiB of values. The latter two are in
// backends/cuda_append.py, too.
constexpr int kRows = 2;
constexpr int kShares = 2;
constexpr int kCtas = 4;
constexpr int kElements = Writer::kElements;
// Whether the format of the cache reaches down to where quotients are not right by themselves.
constexpr bool kExact = kStoredMax > kPlainScale;

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

    // What does not depend on each other is loaded before any of it is looked at.
    static DEVICE Place of(const AppendParams& p, int token) {
        int request, behind = 0;  // tokens of the request from this one on
        if (p.batch_indices) {
            request = p.batch_indices[token];
        } else if (p.append_indptr) {
            request = request_of(p, token, behind);
        } else {
            request = p.tokens_each.quotient(token);
            behind = p.tokens_each.value - p.tokens_each.remainder(token, request);
        }
        if (request < 0 || request >= p.batch) return nowhere();

        const i64 first = p.kv_indptr ? p.kv_indptr[request] : 0, end = p.kv_indptr ? p.kv_indptr[request + 1] : 0;
        i64 position;
        if (p.batch_indices) {
            position = p.positions[token];
        } else {
            // kv_lens has the tokens that are appended.
            const i64 pages = end - first, len = p.kv_lens[request];
            if (!p.kv_indptr) position = len - behind;
            else position = (pages > 0 ? (pages - 1) * p.page_size.value + len : 0) - behind;
        }
        if (position < 0 || position > kMostPosition) return nowhere();
        const int row = static_cast<int>(position);
        if (!p.kv_indptr) return row < p.page_size.value ? Place{request, row} : nowhere();
        const int nth = p.page_size.quotient(row);
        const i64 index = first + nth;
        if (first < 0 || index >= end || index >= p.num_indices) return nowhere();
        const int page = p.kv_indices[index];
        if (page < 0 || page >= p.num_pages) return nowhere();
        return {page, p.page_size.remainder(row, nth)};
    }

  private:
    // Requests have fewer rows (problem.py); what a table on the device makes more of lies in no page.
    static constexpr i64 kMostPosition = 0x7fffffff;

    // The request whose part of the tokens `token` is in, or -1; `behind`: how many there are from it on.
    static DEVICE int request_of(const AppendParams& p, int token, int& behind) {
        if (p.batch <= 0) return -1;
        int low = 0, high = p.batch;
        while (high - low > 1) {
            const int middle = low + (high - low) / 2;
            if (p.append_indptr[middle] <= token) low = middle;
            else high = middle;
        }
        const int begin = p.append_indptr[low], end = p.append_indptr[low + 1];
        behind = end - token;
        return begin <= token && token < end ? low : -1;
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
    DEVICE void add(const float (&x)[kElements], const float (&stored)[kElements]) {
#pragma unroll
        for (int i = 0; i < kElements; i++) {
            amax = max_of(amax, finite_magnitude(x[i]));
            count(stored[i]);
        }
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

// One head of one token: where its values lie, and where they go.
struct Row {
    int token, head;
    const u8* values;
    float scale;
    i64 to;  // bytes from row 0 of page 0 on
    i64 token_scale;

    // No row lies there: strides are even, negative ones too.
    static constexpr i64 kNowhere = -1;
    static DEVICE Row none() { return {0, 0, nullptr, 0.0f, kNowhere, 0}; }

    // From `scale` on `find` knows.
    static DEVICE Row at(const AppendParams& p, const Side& side, int index) {
        Row row = none();
        row.token = p.num_heads.quotient(index);
        row.head = p.num_heads.remainder(index, row.token);
        const int outer = p.inner.quotient(row.token), inner = p.inner.remainder(row.token, outer);
        row.values = side.values + outer * side.stride_outer + inner * side.stride_inner + row.head * side.stride_head;
        return row;
    }

    DEVICE void find(const AppendParams& p, const Side& side) {
        // Asked for before the tables, looked at after them.
        float read = 0.0f;
        if (side.scales) read = side.scales[static_cast<i64>(head) * side.scale_stride];
        const Place place = Place::of(p, token);
        scale = side.scales ? side.scale * read : side.scale;
        if (place.page < 0) return;
        to = place.page * side.cache_stride_page + place.slot * side.cache_stride_row + head * side.cache_stride_head;
        token_scale = place.page * side.scales_stride_page + place.slot * side.scales_stride_row +
                      head * side.scales_stride_head;
    }
};

// A lane's number or pointer, for all lanes.
DEVICE i64 shuffle(i64 x, int lane) {
    const u32 low = ptx::shuffle(static_cast<u32>(x), lane), high = ptx::shuffle(static_cast<u32>(x >> 32), lane);
    return static_cast<i64>(static_cast<u64>(high) << 32 | low);
}
DEVICE const u8* shuffle(const u8* x, int lane) {
    return reinterpret_cast<const u8*>(shuffle(reinterpret_cast<i64>(x), lane));
}

// A thread's shares of a row: those from element `first` on, `lanes` shares apart.
struct Shares {
    u32 words[kShares][4];

    static DEVICE int step(const AppendParams& p) { return kElements * p.lanes; }

    DEVICE void load(const AppendParams& p, const u8* values, int first) {
#pragma unroll
        for (int i = 0; i < kShares; i++) {
            const int d = first + i * step(p);
            if (d >= p.head_dim) break;
            ptx::load_once<16>(words[i], values + d * Writer::kBytes);
        }
    }

    // `take(d, words)` for all shares of row number `index`, from element d on. The first ones are here before, and
    // again after it.
    template <class Take>
    DEVICE void for_each(const AppendParams& p, const Side& side, int index, int lane, Take take) {
        const int begin = kElements * lane, round = kShares * step(p);
        for (int first = begin; first < p.head_dim;) {
#pragma unroll
            for (int i = 0; i < kShares; i++) {
                const int d = first + i * step(p);
                if (d >= p.head_dim) break;
                take(d, words[i]);
            }
            first += round;
            if (p.head_dim <= round) break;
            load(p, Row::at(p, side, index).values, first < p.head_dim ? first : begin);
        }
    }
};

// Row number `index`. `found` is what lane `finder` of the warp knows about it. Threads of a row that goes nowhere
// exchange maxima all the same.
template <class Writer>
DEVICE void write_row(const AppendParams& p, const Side& side, int index, const Row& found, int finder, int lane,
                      Shares& shares, Seen& seen) {
    const i64 at = shuffle(found.to, finder);
    const bool written = at != Row::kNowhere;
    u8* to = side.cache + at;
    if constexpr (Writer::kConverts) {
        float x[kElements], quotients[kElements];
        float scale = ptx::shuffle(found.scale, finder);
        if (side.token_scales) {
            const i64 token_scale = shuffle(found.token_scale, finder);
            u32 amax = 0;
            if (written) {
                shares.for_each(p, side, index, lane, [&](int, const u32 (&words)[4]) {
                    Writer::floats_of(words, x);
#pragma unroll
                    for (int i = 0; i < kElements; i++) amax = max_of(amax, finite_magnitude(x[i]));
                });
            }
            for (int mask = p.lanes / 2; mask; mask /= 2)
                amax = max_of(amax, ptx::float_bits(ptx::shuffle_xor(ptx::bits_float(amax), mask)));
            scale = scale_of(amax, kStoredMax);
            if (written && lane == 0) side.token_scales[token_scale] = scale;
        }
        if (!written) return;
        const float reciprocal = ptx::divide(1.0f, scale);
        if (p.counts) seen.change_to(p.num_heads.remainder(index, p.num_heads.quotient(index)));
        shares.for_each(p, side, index, lane, [&](int d, const u32 (&words)[4]) {
            Writer::floats_of(words, x);
            divide_all<kExact>(quotients, x, scale, reciprocal);
            Writer::store(to + d * Writer::kStoredBytes, quotients);
            if (p.counts) seen.add(x, quotients);
        });
    } else if (written) {
        shares.for_each(p, side, index, lane, [&](int d, const u32 (&words)[4]) {
            store_words(to + d * Writer::kStoredBytes, words);
        });
    }
}

// `side_index` is a constant, so that what belongs to the side is read where it is used.
DEVICE void append_side(const AppendParams& p, int side_index) {
    const Side side = Side::of(p, side_index);
    const int thread = static_cast<int>(threadIdx.x), lane = thread & (p.lanes - 1);
    const int log2_lanes = ptx::lowest_bit(p.lanes), per_cta = kThreads >> log2_lanes;
    const int cta = static_cast<int>(blockIdx.x) >> (p.sides - 1), ctas = static_cast<int>(gridDim.x) >> (p.sides - 1);
    const int step = ctas * per_cta;
    // Lanes see to one row each, and tell the others of its team.
    const int at_once = min_of(kRows, p.lanes), team = thread % 32 - lane;
    Seen seen(p, side_index);

    // All threads take as many turns, because those of a warp exchange what they know.
    for (int begin = cta * per_cta; begin < p.rows; begin += at_once * step) {
        const int first = begin + (thread >> log2_lanes), mine = first + lane * step;
        const bool exists = lane < at_once && mine < p.rows;
        Row row = exists ? Row::at(p, side, mine) : Row::none();
        // Values are asked for before the tables, of rows that go nowhere too.
        Shares shares[kRows];
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            if (i >= at_once || begin + i * step >= p.rows) break;
            const u8* values = shuffle(row.values, team + i);
            if (values) shares[i].load(p, values, kElements * lane);
        }
        if (exists) row.find(p, side);
        if (exists && row.to == Row::kNowhere && row.head == 0) {
            if (p.counts && p.counts_skipped && side_index == p.first_side) ptx::atomic_add(&p.counts[4], 1);
        }

        // One loop rather than four copies of it: the row whose turn it is comes first.
#pragma unroll 1
        for (int i = 0; i < at_once && begin + i * step < p.rows; i++) {
            write_row<Writer>(p, side, first + i * step, row, team + i, lane, shares[0], seen);
#pragma unroll
            for (int next = 1; next < kRows; next++) shares[next - 1] = shares[next];
        }
    }
    if (p.counts) seen.finish();
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtas) append(const __grid_constant__ AppendParams p) {
    if (p.first_side + (static_cast<int>(blockIdx.x) & (p.sides - 1)) == 0) append_side(p, 0);
    else append_side(p, 1);
}
