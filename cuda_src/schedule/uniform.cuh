// Which CTA does what, known from the grid alone: every request is cut into the same number of parts.
#pragma once
#include "params.cuh"

// One CTA's share: some query heads of one team of cache heads, over one part of the rows of one request.
struct Work {
    int request;
    int head_team;
    int column_block;
    int split;
};

struct UniformSchedule {
    // CTAs of one request's heads are neighbours: in NHD their rows are neighbours in memory. Column blocks of one head
    // read the same rows, so they are closest.
    static DEVICE Work work(const DecodeParams& p, int index) {
        Work w;
        const int columns = p.column_blocks.quotient(index);
        w.column_block = p.column_blocks.remainder(index, columns);
        const int teams = p.head_teams.quotient(columns);
        w.head_team = p.head_teams.remainder(columns, teams);
        w.request = p.splits.quotient(teams);
        w.split = p.splits.remainder(teams, w.request);
        return w;
    }
};
