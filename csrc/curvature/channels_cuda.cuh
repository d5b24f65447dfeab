// How CUDA kernels go over a batch's channels: sums over each channel, factors made of them, and a result
// made of the factors. An Op, for its parameters P with a `shape` and `values`:
//
//   kSums, kFactors
//   needs_sums(p)                    whether there are any; else they are zero
//   terms(p, i, part, mu)            a pack's terms of the sums, as add(k, s), see Summing::sums
//   factors(p, c, sums, f)           channel c's factors
//   finish(p, c, sums)               writes what there is one of for channel c
//   write(p, i, part, mu, f)         a pack of results; f(j, k) and mu(k) are the factors of its element k
//
// Pixels inner: a channel is a row for a team of blocks (support/cuda/team.cuh), whose packs lie in planes,
// one for each sample. Channels inner: a block has a strip of channels, 8 packs wide, and 32 of the batch's
// rows at a time; sums, factors and results are three launches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "curvature/batch_norm.h"
#include "curvature/rows_cuda.cuh"

namespace blokern {

// ---- Pixels inner

// A thread's share of a channel's packs. Each plane has the same number, with one that may be empty, and
// packs begin on the boundaries of the tensor that is `misaligned` by that many elements.
template <int kSize>
struct PlaneWalk {
  int64_t samples, pixels;
  int64_t start, stride;  // of the first plane; from plane to plane
  int64_t first, step;
  int misaligned;

  template <class Body>
  BLOKERN_DEVICE void sweep(Body body) const {
    const int64_t packs = (pixels + 2 * kSize - 2) / kSize;
    const int64_t planes_a_step = step / packs, packs_a_step = step % packs;
    int64_t plane = first / packs, pack = first % packs;
#pragma unroll 1
    while (plane < samples) {
      const int64_t row = start + plane * stride;
      const int64_t i = pack * kSize - (misaligned + row) % kSize;
      if (i < pixels) body(row + i, part_within<kSize>(i, pixels));
      plane += planes_a_step;
      pack += packs_a_step;
      if (pack >= packs) {
        pack -= packs;
        ++plane;
      }
    }
  }
};

template <class Op>
struct PlanesRow {
  static constexpr int kSlots = Op::kSums;

  template <class P>
  static BLOKERN_INLINE int64_t rows(const P& p) {
    return p.shape.channels;
  }

  template <template <class> class P, class T, class Team>
  static BLOKERN_DEVICE void row(const P<T>& p, int64_t channel, Team& team) {
    using A = Accum<T>;
    constexpr int kSize = kPackSize<T>;
    const Channels& s = p.shape;
    const auto turns = team.template walk<kSize>(0, 0);
    const PlaneWalk<kSize> walk{s.samples,   s.pixels,   channel * s.pixels,      s.channels * s.pixels,
                                turns.first, turns.step, misalignment(Op::out(p))};
    const A mean = static_cast<A>(p.values.mean[channel]);
    const auto mu = [=](int) { return mean; };
    Sums<Op::kSums> sums{};
    if (Op::needs_sums(p)) {
      sums = team.template sums<A, Op::kSums>(
          walk, [&](int64_t i, auto part) { return Op::terms(p, i, part, mu); });
    }
    if (team.leads()) Op::finish(p, channel, sums.v);
    double wide[Op::kFactors];
    Op::factors(p, channel, sums.v, wide);
    Pack<A, Op::kFactors> factors;
#pragma unroll
    for (int j = 0; j < Op::kFactors; ++j) factors[j] = static_cast<A>(wide[j]);
    walk.sweep(
        [=, &p](int64_t i, auto part) { Op::write(p, i, part, mu, [&](int j, int) { return factors[j]; }); });
  }
};

// ---- Channels inner

constexpr int kStripPacks = 8, kStripRows = kTeamThreads / kStripPacks;
// Elements of a column's pack: more would need more than 128 registers, for each has sums and factors
// of its own.
template <class T>
constexpr int kColumnPack = kPackSize<T> < 4 ? kPackSize<T> : 4;
constexpr int kSumRows = 128;  // that a thread adds up before its sums become double

// A block's part of the batch, and its thread's columns of it.
template <int kSize>
struct Strip {
  int64_t channel;  // the thread's first
  Part<kSize> part;
  int64_t begin, end;  // the block's rows
  int64_t block;

  BLOKERN_DEVICE Strip(const Channels& s, int64_t blocks) {
    constexpr int64_t width = kStripPacks * kSize;
    const int64_t strips = (s.channels - 1) / width + 1, rows = s.samples * s.pixels;
    const int64_t rows_a_block = (rows - 1) / blocks + 1;
    block = blockIdx.x / strips;
    channel = blockIdx.x % strips * width + threadIdx.x % kStripPacks * kSize;
    part = channel < s.channels ? part_within<kSize>(channel, s.channels) : Part<kSize>{0};
    begin = block * rows_a_block;
    end = begin + rows_a_block < rows ? begin + rows_a_block : rows;
  }
};

// Values of a pack's channels, as a function of its elements.
template <class A, int kSize>
BLOKERN_DEVICE Pack<A, kSize> means_of(const double* mean, const Strip<kSize>& strip) {
  return load<A>(mean + strip.channel, strip.part);
}

// sums: [blocks, kSums, channels], of each block's rows.
template <class Op, template <class> class P, class T>
__global__ void __launch_bounds__(kTeamThreads, 2) column_sums(P<T> p, int64_t blocks, double* sums) {
  using A = Accum<T>;
  constexpr int kSize = kColumnPack<T>, kWidth = kStripPacks * kSize, kSums = Op::kSums;
  BLOKERN_SHARED(double, of_warp, kWarps * kSums * kWidth);
  const Strip<kSize> strip(p.shape, blocks);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int column = static_cast<int>(threadIdx.x) % kStripPacks * kSize;
  double* const mine = of_warp + warp * kSums * kWidth + column;
  const bool adds = threadIdx.x % kWarpSize < kStripPacks;
  if (adds) {
    for (int k = 0; k < kSums; ++k) {
      for (int e = 0; e < kSize; ++e) mine[k * kWidth + e] = 0;
    }
  }
  const auto means = means_of<A>(p.values.mean, strip);
  const auto mu = [=](int k) { return means[k]; };
#pragma unroll 1
  for (int64_t from = strip.begin; from < strip.end; from += kSumRows * kStripRows) {
    const int64_t to = from + kSumRows * kStripRows < strip.end ? from + kSumRows * kStripRows : strip.end;
    A s[kSize][kSums] = {};
#pragma unroll 1
    for (int64_t m = from + threadIdx.x / kStripPacks; m < to; m += kStripRows) {
      const auto add = Op::terms(p, m * p.shape.channels + strip.channel, strip.part, mu);
#pragma unroll
      for (int e = 0; e < kSize; ++e) add(e, s[e]);
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        double sum = s[e][k];
        for (int lanes = kStripPacks; lanes < kWarpSize; lanes *= 2) {
          sum += __shfl_xor_sync(kFullWarp, sum, lanes);
        }
        if (adds) mine[k * kWidth + e] += sum;
      }
    }
  }
  __syncthreads();
  const int64_t first = strip.channel - column;
  for (int i = static_cast<int>(threadIdx.x); i < kSums * kWidth; i += kTeamThreads) {
    const int64_t channel = first + i % kWidth;
    if (channel >= p.shape.channels) continue;
    double total = 0;
    for (int other = 0; other < kWarps; ++other) total += of_warp[other * kSums * kWidth + i];
    sums[(strip.block * kSums + i / kWidth) * p.shape.channels + channel] = total;
  }
}

// factors: [kFactors, channels].
template <class Op, template <class> class P, class T>
__global__ void __launch_bounds__(kTeamThreads, 2)
    column_factors(P<T> p, int64_t blocks, const double* sums, Accum<T>* factors) {
  const int64_t channels = p.shape.channels;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kTeamThreads + threadIdx.x;
  if (c >= channels) return;
  double total[Op::kSums] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    for (int k = 0; k < Op::kSums; ++k) total[k] += sums[(block * Op::kSums + k) * channels + c];
  }
  Op::finish(p, c, total);
  double wide[Op::kFactors];
  Op::factors(p, c, total, wide);
  for (int j = 0; j < Op::kFactors; ++j) factors[j * channels + c] = static_cast<Accum<T>>(wide[j]);
}

template <class Op, template <class> class P, class T>
__global__ void __launch_bounds__(kTeamThreads, 2)
    column_results(P<T> p, int64_t blocks, const Accum<T>* factors) {
  using A = Accum<T>;
  constexpr int kSize = kColumnPack<T>;
  const Strip<kSize> strip(p.shape, blocks);
  const auto means = means_of<A>(p.values.mean, strip);
  Pack<A, kSize> own[Op::kFactors];
#pragma unroll
  for (int j = 0; j < Op::kFactors; ++j) {
    own[j] = load<A>(factors + j * p.shape.channels + strip.channel, strip.part);
  }
#pragma unroll 1
  for (int64_t m = strip.begin + threadIdx.x / kStripPacks; m < strip.end; m += kStripRows) {
    Op::write(
        p, m * p.shape.channels + strip.channel, strip.part, [&](int k) { return means[k]; },
        [&](int j, int k) { return own[j][k]; });
  }
}

// ---- Both

template <class Op, template <class> class P, class T>
void launch_channels(const P<T>& p, int tensors, const CudaCall& call) {
  const Channels& s = p.shape;
  const int64_t rows = s.samples * s.pixels;
  if (rows == 0 || s.channels == 0) return;
  constexpr int64_t width = kStripPacks * kColumnPack<T>;
  if (!s.channels_inner) {
    return launch_teams(each_row<PlanesRow<Op>, Team, P<T>>, p, s.channels, rows, kPackSize<T>,
                        rows * tensors * static_cast<int64_t>(sizeof(T)), Op::kSums, call);
  }
  // A few blocks of sums for each multiprocessor; of results, whose blocks talk to nobody, as many as have
  // some work.
  const int64_t strips = (s.channels - 1) / width + 1, most = (rows - 1) / (kStripRows * kPacksAThread) + 1;
  const int64_t filling = 4 * device_attribute(cudaDevAttrMultiProcessorCount) / strips;
  const int64_t blocks = std::clamp<int64_t>(filling, 1, most);
  const bool needs_sums = Op::needs_sums(p);
  const int64_t doubles = needs_sums ? blocks * Op::kSums * s.channels : 0;
  auto* const sums = static_cast<double*>(
      call.zeros(doubles * sizeof(double) + Op::kFactors * s.channels * sizeof(Accum<T>)));
  auto* const factors = reinterpret_cast<Accum<T>*>(sums + doubles);
  if (needs_sums) {
    launch(column_sums<Op, P, T>, strips * blocks, kTeamThreads, false, call, p, blocks, sums);
  }
  launch(column_factors<Op, P, T>, (s.channels - 1) / kTeamThreads + 1, kTeamThreads, false, call, p,
         needs_sums ? blocks : 0, sums, factors);
  const int64_t parts = std::min<int64_t>(most, std::max<int64_t>(1, (int64_t{1} << 20) / strips));
  launch(column_results<Op, P, T>, strips * parts, kTeamThreads, false, call, p, parts, factors);
}

}  // namespace blokern
