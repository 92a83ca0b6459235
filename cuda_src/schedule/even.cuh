// Which CTA does what, where a CTA stays for one share of all rows: the requests' rows lie end to end on a line, which
// is cut into equal shares, one for each place on the device. A share begins and ends anywhere in a request and may
// hold many; a CTA goes through them one after the other, and its ring does not run empty in between.
//
// Every warp finds its share itself, from the lengths alone: a sum over all requests, then one over a few. So there is
// no list to make and to wait for. cupy_fp8kv/schedule.py has the same in Python.
#pragma once
#include "base/warp_sum.cuh"
#include "schedule/work.cuh"

// What it costs to begin and to end a request, in turns.
constexpr int kTurnsOfARequest = 1;

// A request on the line: its turns (what the warps of a CTA take together), one at least, and what it costs.
struct Stretch {
    int kv_len;
    RowRange rows;
    int first_row;  // where its turns begin
    int turns;

    template <class Layout>
    static DEVICE Stretch of(const DecodeParams& p, int request) {
        const int kv_len = Layout::kv_len(p, request);
        const RowRange rows = RowRange::of_request(kv_len, p.window_left);
        const int first_row = Layout::box_begin(p, rows.begin);
        return {kv_len, rows, first_row, max_of(1, p.turn_rows.quotient(rows.end - first_row + p.turn_rows.value - 1))};
    }
    DEVICE u32 weight() const { return static_cast<u32>(turns + kTurnsOfARequest); }
};

// The equal shares of the line. The first `longer` ones have one more than `each`.
struct Shares {
    int count;
    u64 each;
    u64 longer;

    // No more of them than have least_turns.
    static DEVICE Shares of(const DecodeParams& p, u64 line) {
        const u64 most = divide(line, p.least_turns);
        const int count = static_cast<int>(max_of<u64>(1, min_of<u64>(most, p.list_parts.value)));
        const u64 each = divide(line, count);
        return {count, each, line - each * count};
    }

    DEVICE u64 begin(int share) const { return each * share + min_of<u64>(share, longer); }

    // The share that a place on the line belongs to.
    DEVICE int of_place(u64 place) const {
        const u64 of_longer = longer * (each + 1);
        if (place < of_longer) return static_cast<int>(divide(place, each + 1));
        return static_cast<int>(longer + divide(place - of_longer, each));
    }

  private:
    // A division of 64 bits takes some hundred instructions, and lines are mostly short.
    static DEVICE u64 divide(u64 a, u64 b) {
        if ((a | b) >> 32) return a / b;
        return static_cast<u32>(a) / static_cast<u32>(b);
    }
};

// A request, and where it begins on the line.
struct Spot {
    int request;
    u64 place;
};

// A warp's view of the line: a lane has summed up the weights of neighbouring requests.
template <class Layout>
class Line {
  public:
    DEVICE explicit Line(const DecodeParams& p) : p_(p), lane_(threadIdx.x % 32), each_(ceil_div(p.batch, 32)) {
        const int first = lane_ * each_;
        u64 sum = 0;
#pragma unroll 4
        for (int i = 0; i < each_; i++) sum += weight(first + i);
        end_ = inclusive_sum(sum, lane_);
        begin_ = end_ - sum;
    }

    DEVICE u64 length() const { return shuffle_any(end_, 31); }

    // The request that a place on the line belongs to. For the whole warp together.
    DEVICE Spot find(u64 place) const {
        const int owner = ptx::lowest_bit(ptx::ballot(begin_ <= place && place < end_));
        u64 at = shuffle_any(begin_, owner);
        for (int first = owner * each_;; first += 32) {
            const u64 mine = weight(first + lane_), end = at + inclusive_sum(mine, lane_);
            const u32 beyond = ptx::ballot(end > place);
            if (beyond) {
                const int found = ptx::lowest_bit(beyond);
                return {first + found, shuffle_any(end - mine, found)};
            }
            at = shuffle_any(end, 31);
        }
    }

  private:
    DEVICE u64 weight(int request) const {
        return request < p_.batch ? Stretch::of<Layout>(p_, request).weight() : 0;
    }

    const DecodeParams& p_;
    int lane_;
    int each_;
    u64 begin_;
    u64 end_;
};

struct EvenSchedule {
    static constexpr bool kHasSurplus = true;
    static constexpr bool kManyWorks = true;

    static DEVICE Place place(const DecodeParams& p, int index) { return Place::of(p, index); }

    // What a CTA does, one after the other. To be made by whole warps.
    template <class Layout>
    class Works {
      public:
        DEVICE Works(const DecodeParams& p, const Place& place) : p_(p), place_(place), request_(p.batch) {
            const Line<Layout> line(p);
            shares_ = Shares::of(p, line.length());
            if (place.part >= shares_.count) return;
            begin_ = shares_.begin(place.part);
            end_ = shares_.begin(place.part + 1);
            const Spot spot = line.find(begin_);
            request_ = spot.request;
            at_ = spot.place;
            stretch_ = Stretch::of<Layout>(p, request_);
            if (begin_ - at_ >= stretch_.turns) go_on();  // what is left of it is its end
        }

        // False if there is nothing more to do.
        DEVICE bool next(Work& work) {
            if (!has_one()) return false;
            const int turn_rows = p_.turn_rows.value, turns = stretch_.turns;
            // The turns of the request before and in this share.
            const int before = at_ < begin_ ? static_cast<int>(begin_ - at_) : 0;
            const int until = at_ + turns > end_ ? static_cast<int>(end_ - at_) : turns;
            const bool is_begun = before > 0, is_left = until < turns;
            const int first_row = stretch_.first_row + before * turn_rows;
            work = {request_, place_.head_team, place_.column_block, stretch_.kv_len,
                    {is_begun ? first_row : stretch_.rows.begin,
                     is_left ? stretch_.first_row + until * turn_rows : stretch_.rows.end},
                    first_row, 0, 1, !is_begun && !is_left, 2 * place_.part + (is_begun ? 0 : 1), 0, 0};
            if (!work.is_whole) {
                const int first = shares_.of_place(at_);
                work.first_part = 2 * first;
                work.parts = shares_.of_place(at_ + turns - 1) - first + 1;
            }
            go_on();
            return true;
        }

      private:
        DEVICE bool has_one() const { return request_ < p_.batch && at_ < end_; }

        DEVICE void go_on() {
            at_ += stretch_.weight();
            if (++request_ < p_.batch) stretch_ = Stretch::of<Layout>(p_, request_);
        }

        const DecodeParams& p_;
        const Place& place_;
        Shares shares_;
        int request_;
        u64 begin_;  // of the share
        u64 end_;
        u64 at_;  // where the request begins
        Stretch stretch_;
    };

    // A share has at most two parts of requests: one whose beginning belongs to shares before it, and one whose
    // beginning is its own. So numbers of neighbouring shares are two apart, and a first part has the one beside.
    static DEVICE PartRange parts_of(const DecodeParams&, const Work& work) {
        return {work.first_part, 2, 1, work.parts};
    }

    // What is to be merged, by the cut between two shares that is the first in a request.
    static DEVICE int most_merges(const DecodeParams& p) {
        return (p.list_parts.value - 1) * p.num_kv_heads * p.group_size;
    }

    template <class Layout>
    static DEVICE Parts parts(const DecodeParams& p, int index) {
        const int num_qo_heads = p.num_kv_heads * p.group_size;
        const int cut = index / num_qo_heads + 1, head = index % num_qo_heads;
        const Line<Layout> line(p);
        const Shares shares = Shares::of(p, line.length());
        Parts found = {0, head, {0, 2, 1, Parts::kNoMore}};
        if (cut >= shares.count) return found;
        const u64 place = shares.begin(cut);
        const Spot spot = line.find(place);
        const u64 last_turn = spot.place + Stretch::of<Layout>(p, spot.request).turns - 1;
        const int first = shares.of_place(spot.place);
        found.range.count = 0;
        if (place <= spot.place || place > last_turn || first + 1 != cut) return found;
        return {spot.request, head, {2 * first, 2, 1, shares.of_place(last_turn) - first + 1}};
    }
};
