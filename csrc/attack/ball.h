// The projections onto {‖δ‖ ≤ eps} and the image box, an element at a time: scalar on host and device, lanes
// on the CPU. And what is made of a sample's sums, which the kernels form.
//
// T is what the result is stored as. As a half type it is in the ball and in the box as stored: bounds are
// rounded towards x (support/rounding.h), and a box is one of T's own numbers (box_in). Floats and doubles
// are rounded to the nearest, as in a loop of torch's ops, whose bits L∞ has.
#pragma once

#include "attack/batch.h"
#include "support/rounding.h"

namespace blokern {

// A radius in the type of the arithmetic.
template <class T>
BLOKERN_INLINE Accum<T> radius_in(double eps) {
  if constexpr (kIsHalf<T>) return float_below(eps);
  return static_cast<Accum<T>>(eps);
}

// The part of a box that T has numbers of: none where min > max.
template <class T>
BLOKERN_INLINE Box box_in(Box box) {
  if constexpr (kIsHalf<T>) {
    return {-static_cast<double>(floor_to<T>(float_below(-box.min))),
            static_cast<double>(floor_to<T>(float_below(box.max)))};
  }
  return box;
}

// L∞: to the ball, then to the box. The box wins where the two do not meet.
template <class T, class V>
BLOKERN_INLINE V linf_project(V x_adv, V x, V eps, V lo, V hi) {
  return clamp(clamp_around<T>(x_adv, x, eps), lo, hi);
}

// L2, with scale = min(1, eps / ‖δ‖): to the ball, then to the box.
template <class T, class V>
BLOKERN_INLINE V scale_and_clip(V delta, V x, V scale, V lo, V hi) {
  return clamp(move_within<T>(x, scale * delta), lo, hi);
}

// L1 and box together, the Euclidean projection: soft-threshold δ by the sample's τ, then to the box.
template <class T, class V>
BLOKERN_INLINE V l1_project(V delta, V x, V tau, V lo, V hi) {
  return clamp(move_within<T>(x, sign(delta) * larger(absolute(delta) - tau, V(0))), lo, hi);
}

// τ is the root of Σ|projected δ(τ)| = eps. Each |projected δ| is floor + clamp(size − τ, 0, cap):
// floor is what the box itself forces (zero for x inside it), cap how far above that the box lets it go.
template <class V>
struct L1Term {
  V floor, size, cap;
};

template <class V>
BLOKERN_INLINE L1Term<V> l1_term(V delta, V x, V lo, V hi) {
  const auto negative = less(delta, V(0));  // mirrored, so that δ ≥ 0 lies in [lower, upper]
  const V lower = where(negative, x - hi, lo - x);
  const V upper = where(negative, x - lo, hi - x);
  const V floor = larger(larger(lower, -upper), V(0));
  return {floor, absolute(delta) - floor, larger(upper - floor, V(0))};
}

// The search of that root. f(τ) = Σ clamp(size − τ, 0, cap) falls, in straight pieces: Newton's steps, each
// from inside a bracket that must halve every second step, else it is bisected; no sort, exact once the piece
// is found. The sums at tau() are for the caller to form, until improve() is content.
template <class A>
class L1Root {
 public:
  // largest: the largest size.
  BLOKERN_INLINE L1Root(double radius, double largest)
      : radius_(radius), high_(largest), last_width_(largest) {}

  BLOKERN_INLINE A tau() const { return static_cast<A>(tau_); }

  // value: f(tau()); slope: the number of its terms that fall there. Whether there is a better tau().
  BLOKERN_INLINE bool improve(double value, double slope) {
    const double excess = value - radius_;
    constexpr double tolerance = 4 * static_cast<double>(std::numeric_limits<A>::epsilon());
    if (!(absolute(excess) > tolerance * radius_) || step_ == 200) return false;
    (excess > 0 ? low_ : high_) = tau_;
    double next = slope > 0 ? tau_ + excess / slope : high_;
    const bool stalls = step_ % 2 == 1 && high_ - low_ > 0.5 * last_width_;
    if (step_ % 2 == 1) last_width_ = high_ - low_;
    if (stalls || !(next > low_ && next < high_)) next = 0.5 * (low_ + high_);
    if (static_cast<A>(next) == static_cast<A>(tau_)) return false;
    tau_ = next;
    ++step_;
    return true;
  }

 private:
  double radius_, low_ = 0, high_, last_width_, tau_ = 0;
  int step_ = 0;
};

// Whether a sum of squares (or of magnitudes) of A's has lost nothing to underflow or overflow, and its
// reciprocal is an A. False for NaN.
template <class A>
BLOKERN_INLINE bool is_safe_norm(double total) {
  constexpr double least = 1e10 * static_cast<double>(std::numeric_limits<A>::min());
  constexpr double most = 0.1 * static_cast<double>(std::numeric_limits<A>::max());
  return total > least && total < most;
}

BLOKERN_INLINE double shrink_to(double eps, double norm) { return norm > eps ? eps / norm : 1; }

// A norm in double whatever the exponents: the squares of a float32 gradient of 1e-25 are zero in float.
struct ScaledNorm {
  double scale;  // the largest |entry|
  double norm;   // ‖entries / scale‖
};

// δ after a step along grad / ‖grad‖, for gradients of any magnitude.
template <class A>
BLOKERN_INLINE A scaled_step(double x_adv, double x, double grad, double step_size, ScaledNorm norm) {
  const double direction = norm.norm == 0 ? 0 : grad / norm.scale / norm.norm;
  return static_cast<A>(x_adv - x + step_size * direction);
}

}  // namespace blokern
