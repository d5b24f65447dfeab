// What the attack family's CPU kernels do to one sample. δ comes in a thread's scratch row, in the
// accumulation type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attack/ball.h"
#include "attack/batch.h"
#include "support/scratch.h"
#include "support/vec.h"

namespace blokern {

// body(n, begin, end) over the part of each sample n that the batch's elements [begin, end) cover.
template <class Body>
inline void for_each_row(const Batch& batch, int64_t begin, int64_t end, Body&& body) {
  for (int64_t n = begin / batch.size; begin < end; ++n) {
    const int64_t first = begin - n * batch.size;
    const int64_t last = std::min(batch.size, end - n * batch.size);
    body(n, first, last);
    begin += last - first;
  }
}

template <class T>
inline void copy_row(const T* from, T* to, int64_t begin, int64_t end) {
  if (from != to) std::copy(from + begin, from + end, to + begin);
}

// delta ← x_adv − x.
template <class T, class A>
inline void fill_delta(const T* x_adv, const T* x, A* delta, int64_t size) {
  sweep<A>(0, size,
           [=](int64_t i, auto w) { store(delta + i, load<A>(x_adv + i, w) - load<A>(x + i, w), w); });
}

template <int P, class G>
inline ScaledNorm scaled_norm(const G* grad, int64_t size) {
  double scale = 0, total = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double g = std::abs(static_cast<double>(grad[i]));
    if (!(g <= scale)) scale = g;  // a NaN is taken, and then stays
    if (std::isnan(scale)) break;
  }
  if (scale == 0) return {1, 0};
  for (int64_t i = 0; i < size; ++i) {
    const double g = std::abs(static_cast<double>(grad[i])) / scale;
    total += P == 2 ? g * g : g;
  }
  return {scale, P == 2 ? std::sqrt(total) : total};
}

// delta ← (x_adv − x) + step_size · grad / ‖grad‖_P for gradients of any magnitude; slow, and rarely needed.
template <int P, class T, class G, class A>
inline void fill_step_scaled(const T* x_adv, const T* x, const G* grad, double step_size, A* delta,
                             int64_t size) {
  const ScaledNorm norm = scaled_norm<P>(grad, size);
  for (int64_t i = 0; i < size; ++i) {
    delta[i] = scaled_step<A>(static_cast<double>(x_adv[i]), static_cast<double>(x[i]),
                              static_cast<double>(grad[i]), step_size, norm);
  }
}

// out ← clip(x + δ · min(1, eps / ‖δ‖₂)).
template <class T, class A, class Out>
inline void l2_project_row(const A* delta, const T* x, double eps, Box clip, Out* out, int64_t size) {
  const auto [squared] = sums<A, 1>(size, [=](int64_t i, auto w, auto& s) {
    const auto d = load<A>(delta + i, w);
    s[0] = s[0] + d * d;
  });
  double norm = std::sqrt(squared);
  if (!is_safe_norm<A>(squared)) {
    const auto [scale, scaled] = scaled_norm<2>(delta, size);
    norm = scale * scaled;
  }
  const Lanes<A> shrink(static_cast<A>(shrink_to(eps, norm)));
  const Lanes<A> lo(static_cast<A>(clip.min)), hi(static_cast<A>(clip.max));
  sweep<A>(0, size, [=](int64_t i, auto w) {
    store(out + i, scale_and_clip<Out>(load<A>(delta + i, w), load<A>(x + i, w), shrink, lo, hi), w);
  });
}

// The root τ ≥ 0 of Σ clamp(size − τ, 0, cap) = radius.
template <class A>
inline A l1_threshold(const A* size, const A* cap, int64_t count, double radius) {
  Lanes<A> largest;
  sweep<A>(0, count, [=, &largest](int64_t i, auto w) { largest = larger(largest, load<A>(size + i, w)); });
  L1Root<A> root(radius, static_cast<double>(maximum(largest)));
  for (bool better = true; better;) {
    const Lanes<A> tau(root.tau()), zero, one(A(1));
    const auto [value, slope] = sums<A, 2>(count, [=](int64_t i, auto w, auto& s) {
      const auto c = load<A>(cap + i, w);
      const auto over = load<A>(size + i, w) - tau;
      s[0] = s[0] + clamp(over, zero, c);
      s[1] = s[1] + where(less(zero, over) & less(over, c), one, zero);
    });
    better = root.improve(value, slope);
  }
  return root.tau();
}

// Lanes beyond the tail are `rest`.
template <class A, class T>
BLOKERN_INLINE Lanes<A> load_or(const T* p, Full full, A /*rest*/) {
  return load<A>(p, full);
}
template <class A, class T>
BLOKERN_INLINE Lanes<A> load_or(const T* p, Tail tail, A rest) {
  Lanes<A> lanes = load<A>(p, tail);
  for (int64_t i = tail.count; i < Lanes<A>::size(); ++i)
    lanes.v[i / Vector<A>::size][i % Vector<A>::size] = rest;
  return lanes;
}

// out ← the point of {‖δ‖₁ ≤ eps} ∩ box nearest to x + δ. `work` holds 2 · size A's.
template <class T, class A, class Out>
inline void l1_project_row(const A* delta, const T* x, double eps, Box clip, Out* out, A* work,
                           int64_t size) {
  const Lanes<A> lo(static_cast<A>(clip.min)), hi(static_cast<A>(clip.max)), zero;
  A* const sizes = work;
  A* const caps = work + size;
  const auto [floors, total] = sums<A, 2>(size, [=](int64_t i, auto w, auto& s) {
    // Beyond the tail an x in the box, so that the box forces nothing there.
    const auto original = load_or<A>(x + i, w, static_cast<A>(clip.min));
    const auto term = l1_term(load<A>(delta + i, w), original, lo, hi);
    store(sizes + i, term.size, w);
    store(caps + i, term.cap, w);
    s[0] = s[0] + term.floor;
    s[1] = s[1] + clamp(term.size, zero, term.cap);
  });
  const double radius = eps - floors;
  A tau = 0;
  if (total > radius) {
    // No radius left: every δ goes to what the box forces.
    tau = radius > 0 ? l1_threshold(sizes, caps, size, radius) : std::numeric_limits<A>::infinity();
  }
  sweep<A>(0, size, [=](int64_t i, auto w) {
    store(out + i, l1_project<Out>(load<A>(delta + i, w), load<A>(x + i, w), Lanes<A>(tau), lo, hi), w);
  });
}

}  // namespace blokern
