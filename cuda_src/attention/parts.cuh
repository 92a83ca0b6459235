// The partial results of a request, and their sum: what merge.cu does, or the CTAs of decode.cu that share the request
// (attention/told_parts.cuh).
#pragma once
#include "params.cuh"
#include "softmax_state.cuh"

// Where the partial results of a request are: parts first + lead, first + stride, first + 2 * stride …
struct PartRange {
    int first;
    int stride;
    int lead;
    int count;

    DEVICE int at(int i) const { return first + i * stride + (i ? 0 : lead); }
};

// Of four head dimensions of a column: a softmax state, and results without its normaliser.
struct Part {
    SoftmaxState state;
    float4 out;

    static DEVICE Part empty() { return {SoftmaxState::empty(), make_float4(0.0f, 0.0f, 0.0f, 0.0f)}; }

    DEVICE void add(const Part& other) {
        const float reference = max_of(state.reference, other.state.reference);
        scale(out, state.move_to(reference));
        const float factor = other.state.factor_to(reference);
        ::add(state.sum, other.state.sum, factor);
        ::add(out, other.out, factor);
    }
};

// Parts that a kernel has left for the next one, for the four head dimensions from 4 * quad on.
class LeftParts {
  public:
    static constexpr bool kMayBeMissing = false;
    struct Raw {
        float2 state;
        float4 out;
    };

    DEVICE LeftParts(const DecodeParams& p, int column, int quad)
        : state_step_(p.num_kv_heads * p.columns * 2), out_step_(p.num_kv_heads * p.columns * p.head_dim),
          states_(p.partial_state + column * 2), outs_(p.partial_out + column * p.head_dim + 4 * quad) {}

    DEVICE Raw load(int part) const {
        return {ptx::load_fresh_8(states_ + static_cast<i64>(part) * state_step_),
                ptx::load_fresh_16(outs_ + static_cast<i64>(part) * out_step_)};
    }
    static DEVICE Raw none() { return {make_float2(SoftmaxState::empty().reference, 0.0f), Part::empty().out}; }
    static DEVICE bool unpack(const Raw& raw, Part& part) {
        part = {{raw.state.x, raw.state.y}, raw.out};
        return true;
    }
    DEVICE void clear(int) const {}

  private:
    int state_step_;  // floats from part to part
    int out_step_;
    const float* states_;
    const float* outs_;
};

// Parts are summed up in chunks, and chunks in their order: so whoever does it, the bits are the same.
constexpr int kChunk = 8;
// Of more parts most of those who ask would read much for nothing: they look at some of each first. Not at the same for
// all dimensions: who finds one complete takes its tags away, and may not have found another, which is there by now.
constexpr int kFewParts = 4;

// The sum of the chunk that begins with number `first`; `complete` becomes false if a part is missing.
template <class Source>
DEVICE Part sum_of_chunk(const Source& source, const PartRange& parts, int first, bool& complete) {
    // All loads before the first use: what is slow here is the way to memory and back.
    if constexpr (Source::kMayBeMissing) {
        if (parts.count > kFewParts) {
            bool missing = false;
#pragma unroll
            for (int i = 0; i < kChunk; i++) missing |= source.is_missing(parts.at(min_of(first + i, parts.count - 1)));
            complete &= !missing;
            if (missing) return Part::empty();
        }
    }
    typename Source::Raw raw[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
        raw[i] = Source::none();
        if (first + i < parts.count) raw[i] = source.load(parts.at(first + i));
    }
    Part given[kChunk];
    Part sum = Part::empty();
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
        given[i] = Part::empty();
        if (first + i < parts.count) complete &= source.unpack(raw[i], given[i]);
        sum.state.reference = max_of(sum.state.reference, given[i].state.reference);
    }
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
        const float factor = given[i].state.factor_to(sum.state.reference);
        add(sum.state.sum, given[i].state.sum, factor);
        add(sum.out, given[i].out, factor);
    }
    return sum;
}

// What merging with THREADS threads shares: the sums of chunks, and whether these had all of their parts.
template <int THREADS>
struct MergeShared {
    float4 outs[THREADS];
    SoftmaxState states[THREADS];
    bool complete[THREADS];
};

// Sums up the parts of `count` columns with all THREADS of a CTA or warp, and calls store(i, part, quad) for four head
// dimensions at a time, if no part of them is missing. `source(i, quad)`: the parts of column i. `quads`: head_dim / 4;
// `thread`: this one's number. Without `shared`, which must be the same for all, each thread takes all parts.
template <int THREADS, class SourceOf, class Store>
DEVICE void merge_parts(const PartRange& parts, int count, int quads, int thread, MergeShared<THREADS>* shared,
                        SourceOf source_of, Store store) {
    const int tasks = count * quads, chunks = ceil_div(parts.count, kChunk);
    if (tasks == 0) return;
    // Threads that fewer columns leave idle take other chunks of the same ones.
    const bool is_divided = shared && chunks > 1 && chunks * tasks <= THREADS;
    const int own = is_divided ? thread / tasks : 0;  // chunk
    for (int task = thread - own * tasks; is_divided || task < tasks; task += THREADS) {
        // Of one column the compiler knows this, and divisions take long.
        const int i = count == 1 ? 0 : task / quads, quad = count == 1 ? task : task % quads;
        const auto source = source_of(i, quad);
        bool complete = true;
        Part sum = Part::empty();
        if (own < chunks) sum = sum_of_chunk(source, parts, own * kChunk, complete);
        if (is_divided) {
            if (own < chunks) {
                shared->outs[thread] = sum.out;
                shared->states[thread] = sum.state;
                if (source.kMayBeMissing) shared->complete[thread] = complete;
            }
            ptx::sync_first<THREADS>();
            for (int other = 0; other < chunks; other++) {
                const int at = other * tasks + task;
                if (other > 0 && own == 0) sum.add({shared->states[at], shared->outs[at]});
                if (source.kMayBeMissing) complete &= shared->complete[at];
            }
        } else {
            for (int chunk = 1; chunk < chunks; chunk++)
                sum.add(sum_of_chunk(source, parts, chunk * kChunk, complete));
        }
        if (complete && own == 0) store(i, sum, quad);
        if (source.kMayBeMissing && complete && own < chunks) {
            const int end = is_divided ? min_of(parts.count, (own + 1) * kChunk) : parts.count;
            for (int number = own * kChunk; number < end; number++) source.clear(parts.at(number));
        }
        if (is_divided) break;
    }
}
