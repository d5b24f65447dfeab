#include "attack/random_start.h"

#include <array>

#include "attack/rows_cpu.h"
#include "support/dtypes.h"

namespace blokern {
namespace {

constexpr int kCounters = 16;  // side by side, so that the compiler keeps a round in vector registers
constexpr int kWords = 4 * kCounters;

using Words = std::array<uint32_t, kWords>;

// The words of the elements [first, first + kWords) of sample n; first is a multiple of four.
Words words_at(uint64_t seed, int64_t first, int64_t n, Stream stream) {
  uint32_t c[4][kCounters];
  for (int l = 0; l < kCounters; ++l) {
    const uint64_t block = static_cast<uint64_t>(first) / 4 + static_cast<uint64_t>(l);
    c[0][l] = static_cast<uint32_t>(block);
    c[1][l] = static_cast<uint32_t>(block >> 32);
    c[2][l] = static_cast<uint32_t>(n);
    c[3][l] = stream;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int l = 0; l < kCounters; ++l) philox_round(c[0][l], c[1][l], c[2][l], c[3][l], k0, k1);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  Words words;
  for (int l = 0; l < kCounters; ++l) {
    for (int j = 0; j < 4; ++j) words[4 * l + j] = c[j][l];
  }
  return words;
}

// body(i, count, words) over a row, words covering the elements [i, i + count).
template <class Body>
void for_each_words(uint64_t seed, int64_t n, int64_t size, Body&& body) {
  for (int64_t i = 0; i < size; i += kWords) {
    body(i, static_cast<int>(std::min<int64_t>(kWords, size - i)), words_at(seed, i, n, kElements));
  }
}

uint32_t sample_word(uint64_t seed, int64_t n) { return words_at(seed, 0, n, kSample)[0]; }

template <class T, class A>
void finish_row(const A* delta, const T* x, double scale, Box clip, T* out, int64_t size) {
  const Lanes<A> s(static_cast<A>(scale)), lo(static_cast<A>(clip.min)), hi(static_cast<A>(clip.max));
  sweep<A>(0, size, [=](int64_t i, auto w) {
    store(out + i, scale_and_clip<T>(load<A>(delta + i, w), load<A>(x + i, w), s, lo, hi), w);
  });
}

}  // namespace

template <class T>
void random_start_linf(const RandomStart<T>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const Lanes<A> lo(static_cast<A>(p.clip.min)), hi(static_cast<A>(p.clip.max));
  A* const delta = scratch<A>(p.batch.size);
  for (int64_t n = begin; n < end; ++n) {
    for_each_words(p.seed, p.first + n, p.batch.size, [&](int64_t i, int count, const Words& words) {
      for (int j = 0; j < count; ++j) delta[i + j] = linf_draw<A>(words[j]);
    });
    const T* const x = p.x[n];
    T* const out = p.out[n];
    const Lanes<A> eps(radius_in<T>(p.eps[n]));
    sweep<A>(0, p.batch.size, [=](int64_t i, auto w) {
      const auto original = load<A>(x + i, w);
      store(out + i, linf_project<T>(original + eps * load<A>(delta + i, w), original, eps, lo, hi), w);
    });
  }
}

// A Gaussian's direction (Box-Muller: a pair of words, a pair of values) and a uniform
// point's radius, u^(1/size).
template <class T>
void random_start_l2(const RandomStart<T>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const int64_t size = p.batch.size;
  A* const delta = scratch<A>(size);
  for (int64_t n = begin; n < end; ++n) {
    double squared = 0;
    for_each_words(p.seed, p.first + n, size, [&](int64_t i, int count, const Words& words) {
      for (int j = 0; j < count; j += 2) {
        const Gaussians<A> pair = gaussians<A>(words[j], words[j + 1]);
        for (int k = 0; k < 2 && j + k < count; ++k) {
          delta[i + j + k] = pair.v[k];
          squared += static_cast<double>(pair.v[k]) * static_cast<double>(pair.v[k]);
        }
      }
    });
    const double radius = radius_draw(sample_word(p.seed, p.first + n), size);
    finish_row(delta, p.x[n], p.eps[n] * radius / std::sqrt(squared), p.clip, p.out[n], size);
  }
}

// size + 1 exponentials over their sum are uniform on the simplex; the last is the slack, the lowest
// bit the sign.
template <class T>
void random_start_l1(const RandomStart<T>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const int64_t size = p.batch.size;
  A* const delta = scratch<A>(size);
  for (int64_t n = begin; n < end; ++n) {
    double total = exponential<double>(sample_word(p.seed, p.first + n));
    for_each_words(p.seed, p.first + n, size, [&](int64_t i, int count, const Words& words) {
      for (int j = 0; j < count; ++j) {
        delta[i + j] = signed_exponential<A>(words[j]);
        total += static_cast<double>(absolute(delta[i + j]));
      }
    });
    finish_row(delta, p.x[n], p.eps[n] / total, p.clip, p.out[n], size);
  }
}

#define INSTANTIATE(T)                                                         \
  template void random_start_linf<T>(const RandomStart<T>&, int64_t, int64_t); \
  template void random_start_l2<T>(const RandomStart<T>&, int64_t, int64_t);   \
  template void random_start_l1<T>(const RandomStart<T>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern
