// Which CTA does what, where a CTA stays for one share of all rows: the requests' rows lie end to end on a line, which
// is cut into equal shares, one for each place on the device. A share begins and ends with any box of a request and may
// hold many; a CTA goes through them one after the other, and its ring does not run empty in between.
//
// A CTA finds its share itself, from the lengths alone: a sum over all requests, then one over a few. So there is no
// list to make and to wait for. cupy_fp8kv/schedule.py has the same in Python.
#pragma once
#include "base/warp_sum.cuh"
#include "schedule/work.cuh"

// A request on the line, of units of 2^shift rows: one at least, and what it costs beside them.
struct Stretch {
    int kv_len;
    RowRange rows;
    int first_row;  // where its units begin
    int units;

    template <class Layout>
    static DEVICE Stretch of(const DecodeParams& p, int request, int shift) {
        const int kv_len = Layout::kv_len(p, request);
        const RowRange rows = RowRange::of_request(kv_len, p.window_left);
        const int first_row = Layout::box_begin(p, rows.begin);
        // Not rounded up by adding: a request may have nearly 2^31 rows.
        const int last = rows.end - first_row - 1;
        return {kv_len, rows, first_row, last < 0 ? 1 : (last >> shift) + 1};
    }
    DEVICE u32 weight(const DecodeParams& p) const { return static_cast<u32>(units + p.request_boxes); }
};

// The equal shares of the line. The first `longer` ones have one more than `each`.
struct Shares {
    u32 count;
    u32 each;
    u32 longer;

    // No more of them than have least_boxes. Divisions of numbers that the host knows are multiplications.
    static DEVICE Shares of(const DecodeParams& p, u32 line) {
        const u32 most = p.least_boxes.quotient(line);
        const bool all = most >= static_cast<u32>(p.shares.value);
        const u32 count = all ? p.shares.value : max_of(1u, most);
        const u32 each = all ? p.shares.quotient(line) : line / count;
        return {count, each, line - each * count};
    }

    DEVICE u32 begin(u32 share) const { return each * share + min_of(share, longer); }

    // The share that a place on the line belongs to.
    DEVICE int of_place(u32 place) const {
        const u32 of_longer = longer * (each + 1);
        return static_cast<int>(place < of_longer ? place / (each + 1) : longer + (place - of_longer) / each);
    }
};

// A request, and where it begins on the line.
struct Spot {
    int request;
    u32 place;
};

// A warp's view of the line: a lane has summed up the weights of neighbouring requests.
template <class Layout>
class Line {
    static constexpr int kLaneBits = 26;  // of the sum of a lane; so 31 of the whole

  public:
    DEVICE explicit Line(const DecodeParams& p)
        : p_(p), lane_(threadIdx.x % 32), each_(ceil_div(p.batch, 32)), shift_(p.box_shift) {
        u64 sum = sum_of_lane();
        // Requests that share pages may have any number of rows together: then a unit is several boxes.
        while (ptx::any(sum >> kLaneBits)) {
            shift_++;
            sum = sum_of_lane();
        }
        end_ = inclusive_sum(static_cast<u32>(sum), lane_);
        begin_ = end_ - static_cast<u32>(sum);
    }

    DEVICE u32 length() const { return shuffle_any(end_, 31); }
    // A unit of the line is 2^shift rows.
    DEVICE int shift() const { return shift_; }

    // The request that a place on the line belongs to. For the whole warp together.
    DEVICE Spot find(u32 place) const {
        const int owner = ptx::lowest_bit(ptx::ballot(begin_ <= place && place < end_));
        u32 at = shuffle_any(begin_, owner);
        if (each_ == 1) return {owner, at};
        for (int first = owner * each_;; first += 32) {
            const u32 mine = weight(first + lane_), end = at + inclusive_sum(mine, lane_);
            const u32 beyond = ptx::ballot(end > place);
            if (beyond) {
                const int found = ptx::lowest_bit(beyond);
                return {first + found, shuffle_any(end - mine, found)};
            }
            at = shuffle_any(end, 31);
        }
    }

  private:
    DEVICE u64 sum_of_lane() const {
        u64 sum = 0;
#pragma unroll 4
        for (int i = 0; i < each_; i++) sum += weight(lane_ * each_ + i);
        return sum;
    }
    DEVICE u32 weight(int request) const {
        return request < p_.batch ? Stretch::of<Layout>(p_, request, shift_).weight(p_) : 0;
    }

    const DecodeParams& p_;
    int lane_;
    int each_;
    int shift_;
    u32 begin_;
    u32 end_;
};

struct EvenSchedule {
    static constexpr bool kHasSurplus = true;
    static constexpr bool kManyWorks = true;
    static constexpr bool kHasShares = true;

    static DEVICE Place place(const DecodeParams& p, int index) { return Place::of(p, index); }

    // What a CTA does, one after the other. To be made by whole warps.
    //
    // The part of a request that the next share goes on with comes second, not last: the next share begins with the
    // rest. So parts are merged while other requests are read, and a share ends with a request of its own, if it can.
    template <class Layout>
    class Works {
      public:
        DEVICE Works(const DecodeParams& p, const Place& place)
            : p_(p), place_(place), line_(p), shares_(Shares::of(p, line_.length())), next_{p.batch, 0}, until_(0) {
            if (place.part >= static_cast<int>(shares_.count)) return;
            until_ = end();
            next_ = line_.find(begin());
            const Stretch stretch = stretch_of(next_);
            if (begin() - next_.place >= static_cast<u32>(stretch.units)) go_on(stretch);  // its end is left of it
        }

        // False if there is nothing more to do. Without `parts`, which are found out when they are asked for.
        DEVICE bool next(Work& work) {
            if (!has_one()) return false;
            Spot spot = next_;
            if (number_++ == 1) {
                const Spot last = line_.find(end() - 1);
                if (end() - last.place < static_cast<u32>(stretch_of(last).units)) {
                    spot = last;
                    until_ = last.place;
                }
            }
            const Stretch stretch = stretch_of(spot);
            work = work_of(spot, stretch);
            if (spot.request == next_.request) go_on(stretch);
            work.is_last = !has_one();
            return true;
        }

        // All parts of the request that the last work has one of.
        DEVICE PartRange parts() const { return parts_of(shares_, of_last_.at, of_last_.units); }

      private:
        struct OnLine {
            u32 at;
            int units;
        };

        DEVICE u32 begin() const { return shares_.begin(place_.part); }
        DEVICE u32 end() const { return shares_.begin(place_.part + 1); }
        DEVICE bool has_one() const { return next_.request < p_.batch && next_.place < until_; }
        DEVICE Stretch stretch_of(const Spot& spot) const {
            return Stretch::of<Layout>(p_, spot.request, line_.shift());
        }

        DEVICE Work work_of(const Spot& spot, const Stretch& stretch) {
            of_last_ = {spot.place, stretch.units};
            // The units of the request before and in this share.
            const int shift = line_.shift(), before = spot.place < begin() ? static_cast<int>(begin() - spot.place) : 0;
            const int until = static_cast<int>(min_of(static_cast<u32>(stretch.units), end() - spot.place));
            const bool is_begun = before > 0, is_left = until < stretch.units;
            const int first_row = stretch.first_row + (before << shift);
            return {spot.request, place_.head_team, place_.column_block, stretch.kv_len,
                    {is_begun ? first_row : stretch.rows.begin,
                     is_left ? stretch.first_row + (until << shift) : stretch.rows.end},
                    first_row, 0, 1, !is_begun && !is_left, 2 * place_.part + (is_begun ? 0 : 1), false, {}};
        }

        DEVICE void go_on(const Stretch& stretch) {
            next_.place += stretch.weight(p_);
            next_.request++;
        }

        const DecodeParams& p_;
        const Place& place_;
        const Line<Layout> line_;
        const Shares shares_;
        int number_ = 0;  // of works so far
        Spot next_;       // on the way through the share
        u32 until_;       // where it ends
        OnLine of_last_;
    };

    // The parts of the request at a place on the line. A share has at most two parts of requests: one whose beginning
    // belongs to shares before it, and one whose beginning is its own. So numbers of neighbouring shares are two apart,
    // and a first part has the one beside.
    static DEVICE PartRange parts_of(const Shares& shares, u32 at, int units) {
        const int first = shares.of_place(at);
        return {2 * first, 2, 1, shares.of_place(at + units - 1) - first + 1};
    }

    // What is to be merged, by the cut between two shares that is the first in a request.
    static DEVICE int most_merges(const DecodeParams& p) {
        return (p.shares.value - 1) * p.num_kv_heads * p.columns;
    }

    template <class Layout>
    static DEVICE Parts parts(const DecodeParams& p, int index) {
        const int columns = p.num_kv_heads * p.columns;
        const int cut = index / columns + 1, column = index % columns;
        const Line<Layout> line(p);
        const Shares shares = Shares::of(p, line.length());
        Parts found = {0, column, {0, 2, 1, Parts::kNoMore}};
        if (cut >= static_cast<int>(shares.count)) return found;
        const u32 place = shares.begin(cut);
        const Spot spot = line.find(place);
        const int units = Stretch::of<Layout>(p, spot.request, line.shift()).units;
        found.range.count = 0;
        if (place <= spot.place || place >= spot.place + units || shares.of_place(spot.place) + 1 != cut) return found;
        return {spot.request, column, parts_of(shares, spot.place, units)};
    }
};
