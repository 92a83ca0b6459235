// The argument block of each kernel. The Python side reads this file and derives its packing from it (jit/params.py),
// so a field is declared once, one field a line; a Divisor stands for its three.
//
// B requests, L rows, Hq query heads, Hkv cache heads, D head_dim. Strides are in bytes.
#pragma once
#include "base/divide.cuh"

// decode.cu; merge.cu behind it, and schedule.cu before it for a list.
struct DecodeParams {
    TensorMap k_map;         // K and V as decode.cu's ring copies them: boxes of rows and heads
    TensorMap v_map;
    // What changes from call to call comes first, and of that addresses, which mostly do.
    float* partial_out;      // [parts, Hkv * columns, D]; null without splits. With a tag, attention/told_parts.cuh
    float* partial_state;    // [parts, Hkv * columns, 2]: reference and sum of the softmax state
    u8* work_list;           // schedule/listed.cuh
    u8* out;                 // like q
    float* lse;              // [B, Hq], or null
    float lse_unit;          // 1 for base 2, ln 2 for base e
    const u8* q;             // [B, Hq, D], or with many queries a request, [q_indptr[B], Hq, D]
    const u8* k;             // [B, L, Hkv, D]
    const u8* v;             // [B, L, Hkv, D]
    const int* kv_lens;      // [B], or null: every request has kv_len rows; with page_indptr, rows of the last page
    const int* page_indptr;  // [B + 1], where a request's pages begin in page_indices, or null: they are a block table
    const int* page_indices; // pages of all requests, or [B, >= pages of a request]; null for a padded cache
    int page_entries;        // of page_indices, of all requests
    const int* q_indptr;     // [B + 1], where the rows of q of a request begin; of specialisations with kManyQueries
    const float* q_scale;    // [1], or null
    const float* k_scale;    // [1] or [Hkv], or null
    const float* v_scale;    // [1] or [Hkv], or null
    float logit_scale;       // sm_scale and every scale the host knows
    float out_scale;         // v_scale, if the host knows it
    float soft_cap;          // used by specialisations with kSoftCap
    int window_left;         // negative: no window
    int k_scale_stride;      // 1: one scale a head, 0: one for all
    int v_scale_stride;
    // What a plan fixes.
    i64 q_stride_request;
    i64 q_stride_head;
    i64 k_stride_request;
    i64 k_stride_head;
    i64 v_stride_request;
    i64 v_stride_head;
    i64 out_stride_request;
    i64 out_stride_head;
    int kv_len;              // L
    int k_stride_row;        // 32 bits: a row's address is then one multiply-add
    int v_stride_row;
    int columns;             // of a cache head: group_size, times the most queries that a request has
    int head_dim;            // D
    int num_kv_heads;        // Hkv
    int stages;              // of a ring
    Divisor group_size;      // Hq / Hkv
    Divisor head_teams;      // Hkv / kHeads: CTAs that share the cache heads of one request
    Divisor column_blocks;   // CTAs that share the query heads of one cache head
    Divisor splits;          // CTAs that share the rows of one request
    int tag;                 // of parts that CTAs tell each other; 0: merge.cu merges
    // Of schedules that lengths decide on.
    int batch;               // B
    int most_split;          // requests that a list may split: min(B, list_parts)
    int least_turns;         // that are worth a part of their own
    Divisor list_parts;      // parts that a list may have beyond one for each request
    Divisor shares;          // equal ones of all rows, at most
    Divisor least_boxes;     // that are worth a share of their own
    int request_boxes;       // what it costs to begin and to end a request
    Divisor turn_rows;       // rows that the warps of a CTA take together
    int box_shift;           // of equal shares: boxes that a ring is filled with have 2^box_shift rows
    // Of a paged cache. Its rows lie at multiples of a unit of bytes, so that 32 bits tell them apart.
    Divisor page_size;       // rows of a page
    int block_table_stride;  // in page_indices, from one request to the next
    int k_unit;
    int k_units_page;        // from one page to the next
    int k_units_row;         // from one row of a page to the next
    int v_unit;
    int v_units_page;
    int v_units_row;
};

// Rows of D elements on three axes; what has fewer axes has size 1 there.
struct QuantizeParams {
    const u8* values;        // [n0, n1, n2, D]: floats, or codes for dequantize
    u8* out;                 // [n0, n1, n2, D], contiguous: codes, or floats for dequantize
    float* scales;           // one for each (i0, i1, i2) by the scale strides, or null; amax writes it
    float scale;             // the scale of all, where `scales` is null
    i64 stride0;             // of `values`
    i64 stride1;
    i64 stride2;
    i64 rows;                // n0 * n1 * n2
    int n1;
    int n2;
    int scale_stride0;       // in elements of `scales`
    int scale_stride1;
    int scale_stride2;
    int head_dim;
    int scale_count;
};

// States (v, s) of N tokens and H heads, S states each: the first state, and S - 1 others side by side. Strides of s in
// elements.
struct MergeStatesParams {
    u8* out;                 // [N, H, D], the type of v; may be v
    float* lse;              // [N, H]; may be s
    const u8* v;             // [N, H, D]
    const float* s;          // [N, H]
    const u8* v_other;       // [N, S - 1, H, D]
    const float* s_other;    // [N, S - 1, H]
    const u8* mask;          // [N]: tokens with 0 are left as they are; or null
    i64 mask_stride;
    // What a kind of call fixes.
    i64 out_stride_row;
    i64 out_stride_head;
    i64 lse_stride_row;
    i64 lse_stride_head;
    i64 v_stride_row;
    i64 v_stride_head;
    i64 s_stride_row;
    i64 s_stride_head;
    i64 v_other_stride_row;
    i64 v_other_stride_state;
    i64 v_other_stride_head;
    i64 s_other_stride_row;
    i64 s_other_stride_state;
    i64 s_other_stride_head;
    float s_unit;            // 1 for base 2, log2(e) for base e
    float lse_unit;          // 1 for base 2, ln 2 for base e
    int rows;                // N * H
    int rows_per_cta;
    int num_states;          // S
    int parts;               // groups of threads that share the states of a row
    Divisor team;            // shares * parts: threads of a row
    Divisor shares;          // threads of a state of a row: as many as it has 16 bytes
    Divisor num_heads;       // H
};

// N new tokens of a batch of B, H heads of D, into a cache of pages of R rows; a padded cache has B pages of L rows.
struct AppendParams {
    const u8* k;             // [N, H, D], or [outer, inner, H, D]
    const u8* v;             // likewise
    u8* k_cache;             // [pages, R, H, D]
    u8* v_cache;             // likewise
    float* k_token_scales;   // [pages, R, H]: written, and what K is divided by; or null
    float* v_token_scales;   // likewise
    const float* k_scales;   // [1] or [H], or null: what K is divided by, times k_scale
    const float* v_scales;   // likewise
    float k_scale;
    float v_scale;
    int k_scale_stride;      // 1: one scale a head, 0: one for all
    int v_scale_stride;
    const int* append_indptr;   // [B + 1]: the tokens of each request, its last ones; or null
    const int* batch_indices;   // [N]: the request of each token; or null
    const int* positions;    // [N]: its row there; with batch_indices
    const int* kv_indptr;    // [B + 1]: the pages of each request; null: padded
    const int* kv_indices;   // [num_indices]: pages
    const int* kv_lens;      // [B]: rows of each request's last page, or (padded) of the request, after appending
    u64* counts;             // [5]: saturated of K and V, NaN of K and V, tokens left out; or null
    u32* amax;               // [2, H]: bits of floats; with counts
    int batch;               // B
    int num_indices;
    // What a kind of call fixes.
    i64 k_stride_outer;
    i64 k_stride_inner;
    i64 k_stride_head;
    i64 v_stride_outer;
    i64 v_stride_inner;
    i64 v_stride_head;
    i64 k_cache_stride_page;
    i64 k_cache_stride_row;
    i64 k_cache_stride_head;
    i64 v_cache_stride_page;
    i64 v_cache_stride_row;
    i64 v_cache_stride_head;
    i64 k_scales_stride_page;   // in elements
    i64 k_scales_stride_row;
    i64 k_scales_stride_head;
    i64 v_scales_stride_page;
    i64 v_scales_stride_row;
    i64 v_scales_stride_head;
    int rows;                // N * H
    int head_dim;            // D
    int num_pages;
    int lanes;               // threads of a row, a power of two up to 32
    int first_side;          // 0: K, 1: V
    int sides;               // 2: both in this launch
    int counts_skipped;      // 1: this launch counts tokens that are left out
    Divisor page_size;       // R
    Divisor num_heads;       // H
    Divisor inner;           // size of that axis, 1 if there is none
    Divisor tokens_each;     // tokens of every request, where nothing else says which are whose
};

// Pages of K and V, or of the scales beside them. Rows of `heads` heads of `words` words; see pages.cu.
struct CopyPagesParams {
    u8* k;                   // [pages, R, H, words]
    u8* v;                   // likewise
    const int* sources;      // [pairs]
    const int* targets;      // [pairs]
    int pairs;
    // What a kind of call fixes.
    i64 k_stride_page;
    i64 k_stride_row;
    i64 k_stride_head;
    i64 v_stride_page;
    i64 v_stride_row;
    i64 v_stride_head;
    int num_pages;
    int page_words;          // R * H * words
    int first_side;          // 0: K, 1: V
    int sides;               // 2: both in this launch
    Divisor heads;
    Divisor words;
};

// Likewise, to padded arrays.
struct GatherParams {
    u8* k_out;               // [B, max_kv_len, H, words]
    u8* v_out;               // likewise
    const u8* k;             // [pages, R, H, words]
    const u8* v;             // likewise
    const int* kv_indptr;    // [B + 1]
    const int* kv_indices;   // [num_indices]
    const int* kv_last_page_len;   // [B]
    int num_indices;
    // What a kind of call fixes.
    i64 k_stride_page;
    i64 k_stride_row;
    i64 k_stride_head;
    i64 v_stride_page;
    i64 v_stride_row;
    i64 v_stride_head;
    i64 k_out_stride_request;
    i64 k_out_stride_row;
    i64 k_out_stride_head;
    i64 v_out_stride_request;
    i64 v_out_stride_row;
    i64 v_out_stride_head;
    int num_pages;
    int page_size;           // R
    int max_kv_len;
    int row_words;           // H * words
    int units;               // B * chunks * sides
    int first_side;
    int sides;
    Divisor chunks;          // pages that max_kv_len rows take
    Divisor heads;
    Divisor words;
};

// Page tables, as in DecodeParams.
struct CheckTablesParams {
    u32* found;              // [B], zeros: what is wrong with each request
    const int* kv_lens;      // [B]
    const int* page_indptr;  // [B + 1], or null
    const int* page_indices; // [entries], or [B, entries]
    int block_table_stride;
    int entries;
    int page_size;
    int num_pages;
};

struct ReadParams {
    const u8* k;             // k_bytes of anything, at a multiple of 16 bytes; or pages, of which so many are read
    const u8* v;
    u32* sink;               // [1], never written
    i64 k_bytes;             // multiples of 16
    i64 v_bytes;
    // Of pages.
    const int* page_indices; // pages of K and of V, in the order in which they are read; or null
    Divisor k_page_words;    // 16-byte words of a page
    Divisor v_page_words;
};
