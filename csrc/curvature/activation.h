// Activations y = φ(x), differentiated twice: x̄ = φ′ g and its tangent x̄˙ = φ′ ġ + φ″ ẋ g. Each is a formula
// for φ′ and φ″ from what the forward pass has saved, x or y.
#pragma once

#include <cstdint>

#include "support/cuda/call.h"
#include "support/math.h"

namespace blokern {

template <class V>
struct Slopes {
  V first, second;
};

template <class V>
BLOKERN_INLINE V logistic(V x) {
  return V(1) / (V(1) + exponential(-x));
}

// From y.
struct Tanh {
  template <class V>
  BLOKERN_INLINE Slopes<V> operator()(V y) const {
    const V d = V(1) - y * y;
    return {d, -(V(2) * y) * d};
  }
};

// From y.
struct Sigmoid {
  template <class V>
  BLOKERN_INLINE Slopes<V> operator()(V y) const {
    const V d = y * (V(1) - y);
    return {d, d * (V(1) - V(2) * y)};
  }
};

struct Silu {
  template <class V>
  BLOKERN_INLINE Slopes<V> operator()(V x) const {
    const V s = logistic(x), rest = V(1) - s;
    return {s * (V(1) + x * rest), s * rest * (V(2) + x * (rest - s))};
  }
};

// Beyond this a GELU is 0 or x to the last digit, and its formulas' powers of x must not overflow.
template <class V>
BLOKERN_INLINE V gelu_range(V x) {
  return clamp(x, V(-40), V(40));
}

// x Φ(x), Φ the normal distribution.
struct Gelu {
  template <class V>
  BLOKERN_INLINE Slopes<V> operator()(V input) const {
    const V x = gelu_range(input);
    const V bell = exponential(-(V(0.5) * x * x));
    const V tail = normal_tail(absolute(x), bell);
    const V density = V(0.3989422804014327) * bell;
    const V below = where(less(x, V(0)), tail, V(1) - tail);
    return {below + x * density, (V(2) - x * x) * density};
  }
};

// x (1 + tanh u) / 2, u = √(2/π) (x + 0.044715 x³).
struct GeluTanh {
  template <class V>
  BLOKERN_INLINE Slopes<V> operator()(V input) const {
    const V x = gelu_range(input);
    constexpr double c = 0.7978845608028654, k = 0.044715;
    const V square = x * x;
    const V t = V(1) - V(2) / (V(1) + exponential(V(2 * c) * x * (V(1) + V(k) * square)));
    const V first = V(c) * (V(1) + V(3 * k) * square), second = V(6 * c * k) * x;
    const V slope = V(1) - t * t, half = V(0.5) * x;
    return {V(0.5) * (V(1) + t) + half * slope * first,
            slope * (first + half * (second - V(2) * t * first * first))};
  }
};

// log(1 + e^βx) / β, or x where βx is above the threshold.
struct Softplus {
  double beta, threshold;
  template <class V>
  BLOKERN_INLINE Slopes<V> operator()(V x) const {
    const V b(beta), s = logistic(b * x);
    const auto straight = less(V(threshold), b * x);
    return {where(straight, V(1), s), where(straight, V(0), b * s * (V(1) - s))};
  }
};

// s x for x > 0, else s α (e^ix − 1).
struct Elu {
  double alpha, scale, input_scale;
  template <class V>
  BLOKERN_INLINE Slopes<V> operator()(V x) const {
    const V bent = V(scale * alpha * input_scale) * exponential(V(input_scale) * x);
    // At 0 the slope is that of the left, and the second derivative 0: as torch has them.
    return {where(less(V(0), x), V(scale), bent), where(less(x, V(0)), V(input_scale) * bent, V(0))};
  }
};

template <class T>
struct Activation {
  int64_t size;
  const T* saved;
  const T* x_dot;
  const T* grad;
  const T* grad_dot;
  T* x_bar;  // or null
  T* x_bar_dot;
};

// CPU kernel; [begin, end) counts elements.
template <class T, class Phi>
void activation_adjoint_tangent(const Activation<T>& p, Phi phi, int64_t begin, int64_t end);

// CUDA kernel, queued on the call's stream.
template <class T, class Phi>
void activation_adjoint_tangent(const Activation<T>& p, Phi phi, const CudaCall& call);

#define BLOKERN_FOR_ACTIVATION(DO, T) \
  DO(T, Tanh) DO(T, Sigmoid) DO(T, Silu) DO(T, Gelu) DO(T, GeluTanh) DO(T, Softplus) DO(T, Elu)

}  // namespace blokern
