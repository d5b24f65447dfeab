// How the curvature family's CUDA kernels are launched over rows: a warp a short row, a team of blocks
// a long one.
#pragma once

#include <cstdint>

#include "support/cuda/pack.cuh"
#include "support/cuda/team.cuh"

namespace blokern {

constexpr int kWarpPacks = 8;  // that a lane has of a row at most, where a warp takes it

// Op::row(p, n, team) for each of Op::rows(p). The bound of 128 registers is for two blocks a multiprocessor.
template <class Op, class Team, class P>
__global__ void __launch_bounds__(kTeamThreads, 2) each_row(P p, Teams teams) {
  Team team(teams);
  for (int64_t n = team.index(); n < Op::rows(p); n += team.count()) Op::row(p, n, team);
}

// Rows of `size` elements, walked in packs of `pack`; `row_bytes` is what a row's tensors take.
template <class Op, class P>
void launch_each_row(const P& p, int64_t size, int pack, int64_t row_bytes, const CudaCall& call) {
  if (size <= int64_t{kWarpPacks} * kWarpSize * pack) {
    launch_warps(each_row<Op, WarpTeam, P>, p, Op::rows(p), call);
  } else {
    launch_teams(each_row<Op, Team, P>, p, Op::rows(p), size, pack, row_bytes, Op::kSlots, call);
  }
}

}  // namespace blokern
