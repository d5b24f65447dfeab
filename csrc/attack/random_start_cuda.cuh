// random_start on CUDA: the CPU's numbers, from the same counters.
// Threads: packs of at least four elements, which are a counter's words, from the row's first element on. L∞,
// a
//   thread four packs; L2 and L1, a team of blocks a sample, which draws twice: for the sum, and for the
//   result.
// Shared memory: the warps' sums, 64 bytes.
// Numerics: the formulas of random_start.h; log, sin and cos are the device's, and may round otherwise.
// Memory: one tensor is read, one written.
#pragma once

#include "attack/random_start.h"
#include "attack/rows_cuda.cuh"

namespace blokern {

// The words of a sample's elements.
class Draws {
 public:
  BLOKERN_DEVICE Draws(uint64_t seed, int64_t n) : seed_(seed), n_(static_cast<uint32_t>(n)) {}

  BLOKERN_DEVICE uint32_t of_sample() const { return philox(0, 0, n_, kSample, seed_).v[0]; }

  // draw(word) for elements that are drawn by themselves.
  template <class A, int kSize, class Draw>
  BLOKERN_DEVICE Pack<A, kSize> singles(int64_t i, Part<kSize>, Draw draw) const {
    Pack<A, kSize> pack;
#pragma unroll
    for (int first = 0; first < kSize; first += 4) {
      const PhiloxWords words = block((i + first) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) pack[first + j] = draw(words.v[j]);
    }
    return pack;
  }

  // Normal values, two of two words.
  template <class A, int kSize>
  BLOKERN_DEVICE Pack<A, kSize> normals(int64_t i, Part<kSize>) const {
    Pack<A, kSize> pack;
#pragma unroll
    for (int first = 0; first < kSize; first += 4) {
      const PhiloxWords words = block((i + first) / 4);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const auto pair = gaussians<A>(words.v[j], words.v[j + 1]);
        pack[first + j] = pair.v[0];
        pack[first + j + 1] = pair.v[1];
      }
    }
    return pack;
  }

 private:
  BLOKERN_DEVICE PhiloxWords block(int64_t index) const {
    return philox(static_cast<uint32_t>(index), static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32), n_,
                  kElements, seed_);
  }

  uint64_t seed_;
  uint32_t n_;
};

template <class T>
constexpr int kDraws = kPackSize<T> > 4 ? kPackSize<T> : 4;

// out ← clip(x + scale · δ).
template <class A, class T, int kSize, class Delta>
BLOKERN_DEVICE void finish_start(const RandomStart<T>& p, int64_t n, const Walk<kSize>& walk, double scale,
                                 Delta delta) {
  finish_row<A>(walk, p.x[n], p.out[n], delta, L2Projection<T>{static_cast<A>(scale), Limits<A>(p.clip)});
}

struct RandomStartLinf {
  static constexpr int kSlots = 0;

  template <class T>
  static BLOKERN_DEVICE void row(const RandomStart<T>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const Draws draws(p.seed, p.first + n);
    const T* const x = p.x[n];
    T* const out = p.out[n];
    const A eps = radius_in<T>(p.eps[n]);
    const Limits<A> box(p.clip);
    team.walk<kDraws<T>>(p.batch.size, 0).sweep([=](int64_t i, auto part) {
      const auto original = load<A>(x + i, part);
      const auto draw = draws.singles<A>(i, part, [](uint32_t word) { return linf_draw<A>(word); });
      store(out + i,
            each<A>(part,
                    [&](int k) {
                      return linf_project<T>(original[k] + eps * draw[k], original[k], eps, box.lo, box.hi);
                    }),
            part);
    });
  }
};

struct RandomStartL2 {
  static constexpr int kSlots = 1;

  template <class T>
  static BLOKERN_DEVICE void row(const RandomStart<T>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const Draws draws(p.seed, p.first + n);
    const auto walk = team.walk<kDraws<T>>(p.batch.size, 0);
    const auto delta = [=](int64_t i, auto part) { return draws.normals<A>(i, part); };
    const double squared = team.sum<A>(walk, [&](int64_t i, auto part) {
      const auto d = delta(i, part);
      return each<A>(part, [&](int k) { return d[k] * d[k]; });
    });
    const double radius = radius_draw(draws.of_sample(), p.batch.size);
    finish_start<A>(p, n, walk, p.eps[n] * radius / std::sqrt(squared), delta);
  }
};

struct RandomStartL1 {
  static constexpr int kSlots = 1;

  template <class T>
  static BLOKERN_DEVICE void row(const RandomStart<T>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const Draws draws(p.seed, p.first + n);
    const auto walk = team.walk<kDraws<T>>(p.batch.size, 0);
    const auto delta = [=](int64_t i, auto part) {
      return draws.singles<A>(i, part, [](uint32_t word) { return signed_exponential<A>(word); });
    };
    const double total = team.sum<A>(walk, [&](int64_t i, auto part) {
      const auto d = delta(i, part);
      return each<A>(part, [&](int k) { return absolute(d[k]); });
    });
    finish_start<A>(p, n, walk, p.eps[n] / (total + exponential<double>(draws.of_sample())), delta);
  }
};

}  // namespace blokern
