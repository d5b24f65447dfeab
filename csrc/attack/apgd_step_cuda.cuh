// apgd_step on CUDA.
// Threads: as in pgd_step_cuda.cuh, packs on the boundaries of `x_adv`.
// Shared memory: the warps' sums, 64 bytes each; L1 also a histogram of 256 counts.
// Numerics: L∞ has the CPU's bits; L2 and L1 its formulas, and sums in another order.
// Memory: four tensors are read, two written, once for L∞; L2 has up to three passes more, and L1 as many as
// the
//   searches for the threshold and for both τ take, from cache.
#pragma once

#include <cstring>

#include "attack/apgd_step.h"
#include "attack/pgd_step.h"
#include "attack/rows_cuda.cuh"

namespace blokern {

struct ApgdStepLinf {
  static constexpr int kSlots = 0;

  template <class T, class G>
  static BLOKERN_DEVICE void row(const ApgdStep<T, G>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    if (p.batch.skips(n)) return;
    T* const x_adv = p.x_adv[n];
    T* const x_prev = p.x_prev[n];
    const T* const x = p.x[n];
    const G* const grad = p.grad[n];
    const A step_size = static_cast<A>(p.step_size[n]), eps = radius_in<T>(p.eps[n]);
    const A momentum = static_cast<A>(p.momentum);
    const bool has_momentum = p.momentum != 1;
    const Limits<A> box(p.clip);
    const auto walk = team.walk<kPackSize<T, G>>(p.batch.size, misalignment(x_adv));
    walk.sweep([=](int64_t i, auto part) {
      const auto current = load<A>(x_adv + i, part), original = load<A>(x + i, part),
                 g = load<A>(grad + i, part);
      auto next = each<A>(part, [&](int k) {
        return linf_project<T>(current[k] + step_size * sign(g[k]), original[k], eps, box.lo, box.hi);
      });
      if (has_momentum) {
        const auto previous = load<A>(x_prev + i, part);
        next = each<A>(part, [&](int k) {
          return linf_project<T>(with_momentum(next[k], current[k], previous[k], momentum), original[k], eps,
                                 box.lo, box.hi);
        });
      }
      store(x_prev + i, current, part);
      store(x_adv + i, next, part);
    });
  }
};

// What L2 and L1 do with δ after the step: project, mix with the last step, project again.
template <class Norm, class T, class G, int kSize, class Delta>
BLOKERN_DEVICE void finish_apgd(const ApgdStep<T, G>& p, int64_t n, Team& team, const Walk<kSize>& walk,
                                Delta delta) {
  using A = Accum<T>;
  T* const x_adv = p.x_adv[n];
  T* const x_prev = p.x_prev[n];
  const T* const x = p.x[n];
  const auto take = [=](const auto& next, const auto& project) {
    walk.sweep([&](int64_t i, auto part) {
      const auto d = next(i, part), original = load<A>(x + i, part), current = load<A>(x_adv + i, part);
      store(x_prev + i, current, part);
      store(x_adv + i, each<A>(part, [&](int k) { return project(d[k], original[k]); }), part);
    });
  };
  if (p.momentum == 1) return take(delta, Norm::template fit<T>(team, walk, x, p.eps[n], p.clip, delta));
  const auto first = Norm::template fit<A>(team, walk, x, p.eps[n], p.clip, delta);
  const A momentum = static_cast<A>(p.momentum);
  const auto mixed = [=](int64_t i, auto part) {
    const auto d = delta(i, part), original = load<A>(x + i, part);
    const auto current = load<A>(x_adv + i, part), previous = load<A>(x_prev + i, part);
    return each<A>(part, [&](int k) {
      return with_momentum(first(d[k], original[k]), current[k], previous[k], momentum) - original[k];
    });
  };
  take(mixed, Norm::template fit<T>(team, walk, x, p.eps[n], p.clip, mixed));
}

struct ApgdStepL2 {
  static constexpr int kSlots = 2;

  template <class T, class G>
  static BLOKERN_DEVICE void row(const ApgdStep<T, G>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    if (p.batch.skips(n)) return;
    const T* const x_adv = p.x_adv[n];
    const G* const grad = p.grad[n];
    const auto walk = team.walk<kPackSize<T, G>>(p.batch.size, misalignment(x_adv));
    const auto gradient = [=](int64_t i, auto part) { return load<A>(grad + i, part); };
    const NormedStep<A> step(norm_of<2, A>(team, walk, gradient), p.step_size[n]);
    finish_apgd<L2>(p, n, team, walk, delta_of<A>(x_adv, p.x[n], grad, step));
  }
};

// The bits of a magnitude, which order as it does; a NaN has no order, and its sign is zero.
template <class A>
BLOKERN_DEVICE auto magnitude_bits(A value) {
  using Bits = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;
  const A magnitude = value == value ? absolute(value) : A(0);
  Bits bits;
  std::memcpy(&bits, &magnitude, sizeof(A));
  return bits & ~(Bits{1} << (8 * sizeof(A) - 1));  // of −0
}

// The k-th largest |grad|: a radix selection, a histogram for each byte from the highest on, of the entries
// that have the bytes chosen so far.
template <class A, int kSize, class Gradient>
BLOKERN_DEVICE A kth_magnitude(Team& team, const Walk<kSize>& walk, Gradient gradient, int64_t k) {
  constexpr int kDigits = 256;
  static_assert(kDigits == kTeamThreads);  // thread t has the count of digit t
  BLOKERN_SHARED(unsigned, histogram, kDigits);
  BLOKERN_SHARED(double, of_warp, kWarps);
  BLOKERN_SHARED(double, above_chosen, 1);
  BLOKERN_SHARED(unsigned, chosen, 1);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  decltype(magnitude_bits(A(0))) prefix = 0;
  double wanted = static_cast<double>(k);
  for (int byte = static_cast<int>(sizeof(A)) - 1; byte >= 0; --byte) {
    histogram[thread] = 0;
    __syncthreads();
    walk.sweep([&](int64_t i, auto part) {
      const auto g = gradient(i, part);
#pragma unroll
      for (int j = 0; j < part.size; ++j) {
        const auto bits = magnitude_bits(g[j]) >> (8 * byte);
        if (part.has(j) && bits >> 8 == prefix) atomicAdd(&histogram[bits & 255], 1u);
      }
    });
    __syncthreads();
    // The entries of this digit and those above: a sum from the warp's end, then over the warps behind.
    const double mine = team.sum_of_blocks(static_cast<double>(histogram[thread]));
    double from_here = mine;
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const double behind = __shfl_down_sync(kFullWarp, from_here, lanes);
      if (lane + lanes < kWarpSize) from_here += behind;
    }
    if (lane == 0) of_warp[warp] = from_here;
    __syncthreads();
    for (int other = warp + 1; other < kWarps; ++other) from_here += of_warp[other];
    const double above = from_here - mine;
    if (above < wanted && wanted <= from_here) {
      chosen[0] = static_cast<unsigned>(thread);
      above_chosen[0] = above;
    }
    __syncthreads();
    prefix = prefix << 8 | chosen[0];
    wanted -= above_chosen[0];
  }
  A kth;
  std::memcpy(&kth, &prefix, sizeof(A));
  return kth;
}

struct ApgdStepL1 {
  static constexpr int kSlots = kTeamThreads;  // a histogram's counts

  template <class T, class G>
  static BLOKERN_DEVICE void row(const ApgdStep<T, G>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    if (p.batch.skips(n)) return;
    const G* const grad = p.grad[n];
    const auto walk = team.walk<kPackSize<T, G>>(p.batch.size, misalignment(p.x_adv[n]));
    const auto gradient = [=](int64_t i, auto part) { return load<A>(grad + i, part); };
    const bool follows_all = p.keep == nullptr || p.keep[n] >= p.batch.size;
    const A threshold = follows_all ? A(0) : kth_magnitude<A>(team, walk, gradient, p.keep[n]);
    const double count = team.sum<A>(walk, [&](int64_t i, auto part) {
      const auto g = gradient(i, part);
      return each<A>(part, [&](int k) { return absolute(followed_sign(g[k], threshold)); });
    });
    const A scale = static_cast<A>(count > 0 ? p.step_size[n] / count : 0);
    finish_apgd<L1>(
        p, n, team, walk,
        delta_of<A>(static_cast<const T*>(p.x_adv[n]), p.x[n], grad, [=](A current, A original, A g) {
          return (current - original) + scale * followed_sign(g, threshold);
        }));
  }
};

}  // namespace blokern
