// Which CTA does what, where a CTA stays for one share of all rows: the requests' rows lie end to end on a line, which
// is cut into equal shares, one for each place on the device. A share begins and ends with any box of a request and may
// hold many; a CTA goes through them one after the other, and its ring does not run empty in between.
//
// A CTA finds its share itself, from the lengths alone: a sum over all requests, then one over a few. So there is no
// list to make and to wait for. cupy_fp8kv/schedule.py has the same in Python.
#pragma once
#include "base/warp_sum.cuh"
#include "schedule/work.cuh"

// A request on the line: its boxes of 2^box_shift rows, one at least, and what it costs.
struct Stretch {
    int kv_len;
    RowRange rows;
    int first_row;  // where its boxes begin
    int boxes;

    template <class Layout>
    static DEVICE Stretch of(const DecodeParams& p, int request) {
        const int kv_len = Layout::kv_len(p, request);
        const RowRange rows = RowRange::of_request(kv_len, p.window_left);
        const int first_row = Layout::box_begin(p, rows.begin);
        return {kv_len, rows, first_row, max_of(1, (rows.end - first_row + (1 << p.box_shift) - 1) >> p.box_shift)};
    }
    DEVICE u32 weight(const DecodeParams& p) const { return static_cast<u32>(boxes + p.request_boxes); }
};

// The equal shares of the line. The first `longer` ones have one more than `each`.
struct Shares {
    int count;
    u64 each;
    u64 longer;

    // No more of them than have least_boxes.
    static DEVICE Shares of(const DecodeParams& p, u64 line) {
        const u64 most = divide(line, p.least_boxes);
        const int count = static_cast<int>(max_of<u64>(1, min_of<u64>(most, p.shares)));
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
        return request < p_.batch ? Stretch::of<Layout>(p_, request).weight(p_) : 0;
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
    static constexpr bool kHasShares = true;

    static DEVICE Place place(const DecodeParams& p, int index) { return Place::of(p, index); }

    // What a CTA does, one after the other. To be made by whole warps.
    template <class Layout>
    class Works {
      public:
        DEVICE Works(const DecodeParams& p, const Place& place) : p_(p), place_(place), request_(p.batch), at_(0) {
            const Line<Layout> line(p);
            shares_ = Shares::of(p, line.length());
            if (place.part >= shares_.count) return;
            const Spot spot = line.find(begin());
            request_ = spot.request;
            at_ = spot.place;
            const Stretch stretch = Stretch::of<Layout>(p, request_);
            if (begin() - at_ >= stretch.boxes) go_on(stretch);  // what is left of it is its end
        }

        // False if there is nothing more to do.
        DEVICE bool next(Work& work) {
            if (!has_one()) return false;
            const Stretch stretch = Stretch::of<Layout>(p_, request_);
            const int boxes = stretch.boxes;
            // The boxes of the request before and in this share.
            const int before = at_ < begin() ? static_cast<int>(begin() - at_) : 0;
            const int until = at_ + boxes > end() ? static_cast<int>(end() - at_) : boxes;
            const bool is_begun = before > 0, is_left = until < boxes;
            const int first_row = stretch.first_row + (before << p_.box_shift);
            work = {request_, place_.head_team, place_.column_block, stretch.kv_len,
                    {is_begun ? first_row : stretch.rows.begin,
                     is_left ? stretch.first_row + (until << p_.box_shift) : stretch.rows.end},
                    first_row, 0, 1, !is_begun && !is_left, 2 * place_.part + (is_begun ? 0 : 1), false, {}};
            if (!work.is_whole) work.parts = parts_of(shares_, at_, boxes);
            go_on(stretch);
            work.is_last = !has_one();
            return true;
        }

      private:
        DEVICE u64 begin() const { return shares_.begin(place_.part); }
        DEVICE u64 end() const { return shares_.begin(place_.part + 1); }
        DEVICE bool has_one() const { return request_ < p_.batch && at_ < end(); }

        DEVICE void go_on(const Stretch& stretch) {
            at_ += stretch.weight(p_);
            request_++;
        }

        const DecodeParams& p_;
        const Place& place_;
        Shares shares_;
        int request_;
        u64 at_;  // where it begins
    };

    // The parts of the request at a place on the line. A share has at most two parts of requests: one whose beginning
    // belongs to shares before it, and one whose beginning is its own. So numbers of neighbouring shares are two apart,
    // and a first part has the one beside.
    static DEVICE PartRange parts_of(const Shares& shares, u64 at, int boxes) {
        const int first = shares.of_place(at);
        return {2 * first, 2, 1, shares.of_place(at + boxes - 1) - first + 1};
    }

    // What is to be merged, by the cut between two shares that is the first in a request.
    static DEVICE int most_merges(const DecodeParams& p) {
        return (p.shares - 1) * p.num_kv_heads * p.columns;
    }

    template <class Layout>
    static DEVICE Parts parts(const DecodeParams& p, int index) {
        const int columns = p.num_kv_heads * p.columns;
        const int cut = index / columns + 1, column = index % columns;
        const Line<Layout> line(p);
        const Shares shares = Shares::of(p, line.length());
        Parts found = {0, column, {0, 2, 1, Parts::kNoMore}};
        if (cut >= shares.count) return found;
        const u64 place = shares.begin(cut);
        const Spot spot = line.find(place);
        const int boxes = Stretch::of<Layout>(p, spot.request).boxes;
        found.range.count = 0;
        if (place <= spot.place || place >= spot.place + boxes || shares.of_place(spot.place) + 1 != cut) return found;
        return {spot.request, column, parts_of(shares, spot.place, boxes)};
    }
};
