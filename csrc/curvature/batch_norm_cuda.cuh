// batch_norm_tangent, batch_norm_adjoint and its tangent on CUDA; curvature/channels_cuda.cuh has the
// threads. Shared memory: the warps' sums, at most 448 bytes where pixels are inner, 28 KiB where channels
// are. Numerics: sums in double; below, those of a pack, or of 128 rows of a column, in the accumulation
// type. Memory: pixels inner, the tensors are read once for the sums, and again from cache, as a team has as
// many
//   blocks as keep the channels in flight within it; channels inner, they are read twice.
#pragma once

#include "curvature/batch_norm.h"
#include "curvature/channels_cuda.cuh"

namespace blokern {

// v where the gate, of a pack that may be missing, is open.
template <class A, int kSize>
struct Gate {
  Pack<A, kSize> output;
  bool given;

  template <class T>
  BLOKERN_DEVICE Gate(const T* gate, int64_t i, Part<kSize> part) : given(gate != nullptr) {
    if (given) output = load<A>(gate + i, part);
  }
  BLOKERN_DEVICE A operator()(int k, A v) const { return where(!given || less(A(0), output[k]), v, A(0)); }
};

struct BatchNormTangentOp {
  static constexpr int kSums = 2, kFactors = 3;

  template <class T>
  static BLOKERN_INLINE bool needs_sums(const BatchNormTangent<T>& p) {
    return p.train;
  }
  template <class T>
  static BLOKERN_DEVICE const T* out(const BatchNormTangent<T>& p) {
    return p.y_dot;
  }

  template <class T, class Part, class Mu>
  static BLOKERN_DEVICE auto terms(const BatchNormTangent<T>& p, int64_t i, Part part, Mu mu) {
    using A = Accum<T>;
    return [v = load<A>(p.x_dot + i, part), x = load<A>(p.x + i, part), mu](int k, A* s) {
      s[0] += v[k];
      s[1] += v[k] * (x[k] - mu(k));
    };
  }

  template <class T>
  static BLOKERN_DEVICE void factors(const BatchNormTangent<T>& p, int64_t c, const double* sums, double* f) {
    const double count = static_cast<double>(p.shape.samples * p.shape.pixels);
    const auto found = tangent_factors(p.values.rstd[c], p.values.gamma(c), p.values.gamma_dot(c),
                                       p.values.beta_dot(c), {sums[0] / count, sums[1] / count});
    f[0] = found.x_dot;
    f[1] = found.x;
    f[2] = found.constant;
  }
  template <class T>
  static BLOKERN_DEVICE void finish(const BatchNormTangent<T>&, int64_t, const double*) {}

  template <class T, class Part, class Mu, class Factors>
  static BLOKERN_DEVICE void write(const BatchNormTangent<T>& p, int64_t i, Part part, Mu mu, Factors f) {
    using A = Accum<T>;
    const auto v = load<A>(p.x_dot + i, part), x = load<A>(p.x + i, part);
    const Gate<A, Part::size> gate(p.gate, i, part);
    store(p.y_dot + i,
          each<A>(part, [&](int k) { return gate(k, f(0, k) * v[k] + f(1, k) * (x[k] - mu(k)) + f(2, k)); }),
          part);
  }
};

struct BatchNormAdjointOp {
  static constexpr int kSums = 2, kFactors = 3;

  template <class T>
  static BLOKERN_INLINE bool needs_sums(const BatchNormAdjoint<T>& p) {
    return p.train || p.weight_bar != nullptr;
  }
  template <class T>
  static BLOKERN_DEVICE const T* out(const BatchNormAdjoint<T>& p) {
    return p.x_bar;
  }

  template <class T, class Part, class Mu>
  static BLOKERN_DEVICE auto terms(const BatchNormAdjoint<T>& p, int64_t i, Part part, Mu mu) {
    using A = Accum<T>;
    return [gate = Gate<A, Part::size>(p.gate, i, part), grad = load<A>(p.grad + i, part),
            x = load<A>(p.x + i, part), mu](int k, A* s) {
      const A g = gate(k, grad[k]);
      s[0] += g;
      s[1] += g * (x[k] - mu(k));
    };
  }

  template <class T>
  static BLOKERN_DEVICE void factors(const BatchNormAdjoint<T>& p, int64_t c, const double* sums, double* f) {
    const double per = p.train ? 1 / static_cast<double>(p.shape.samples * p.shape.pixels) : 0;
    const auto found = adjoint_factors(p.values.rstd[c], p.values.gamma(c), {sums[0] * per, sums[1] * per});
    f[0] = found.grad;
    f[1] = found.x;
    f[2] = found.constant;
  }
  template <class T>
  static BLOKERN_DEVICE void finish(const BatchNormAdjoint<T>& p, int64_t c, const double* sums) {
    if (p.weight_bar == nullptr) return;
    p.weight_bar[c] = p.values.rstd[c] * sums[1];
    p.bias_bar[c] = sums[0];
  }

  template <class T, class Part, class Mu, class Factors>
  static BLOKERN_DEVICE void write(const BatchNormAdjoint<T>& p, int64_t i, Part part, Mu mu, Factors f) {
    using A = Accum<T>;
    const auto grad = load<A>(p.grad + i, part), x = load<A>(p.x + i, part);
    const Gate<A, Part::size> gate(p.gate, i, part);
    store(
        p.x_bar + i,
        each<A>(part, [&](int k) { return f(0, k) * gate(k, grad[k]) + f(1, k) * (x[k] - mu(k)) + f(2, k); }),
        part);
  }
};

struct BatchNormAdjointTangentOp {
  static constexpr int kSums = 7, kFactors = 8;

  template <class T>
  static BLOKERN_INLINE bool needs_sums(const BatchNormAdjoint<T>& p) {
    return p.train || p.weight_bar != nullptr;
  }
  template <class T>
  static BLOKERN_DEVICE const T* out(const BatchNormAdjoint<T>& p) {
    return p.x_bar_dot;
  }

  template <class T, class Part, class Mu>
  static BLOKERN_DEVICE auto terms(const BatchNormAdjoint<T>& p, int64_t i, Part part, Mu mu) {
    using A = Accum<T>;
    return [gate = Gate<A, Part::size>(p.gate, i, part), grad = load<A>(p.grad + i, part),
            grad_dot = load<A>(p.grad_dot + i, part), v = load<A>(p.x_dot + i, part),
            x = load<A>(p.x + i, part), mu](int k, A* s) {
      const A centred = x[k] - mu(k), g = gate(k, grad[k]), g_dot = gate(k, grad_dot[k]);
      s[0] += v[k];
      s[1] += v[k] * centred;
      s[2] += g;
      s[3] += g * centred;
      s[4] += g_dot;
      s[5] += g_dot * centred;
      s[6] += g * v[k];
    };
  }

  template <class T>
  static BLOKERN_DEVICE void factors(const BatchNormAdjoint<T>& p, int64_t c, const double* sums, double* f) {
    const double r = p.values.rstd[c], gamma = p.values.gamma(c);
    const Means m(p, sums);
    const auto found = adjoint_tangent_factors(r, gamma, p.values.gamma_dot(c), m.t, m.a, m.d);
    const auto own = adjoint_factors(r, gamma, m.a);
    const double all[kFactors] = {found.grad_dot, found.grad, found.x_dot, found.x,
                                  found.constant, own.grad,   own.x,       own.constant};
    for (int j = 0; j < kFactors; ++j) f[j] = all[j];
  }
  template <class T>
  static BLOKERN_DEVICE void finish(const BatchNormAdjoint<T>& p, int64_t c, const double* sums) {
    if (p.weight_bar == nullptr) return;
    const double r = p.values.rstd[c];
    const Means m(p, sums);
    const double count = static_cast<double>(p.shape.samples * p.shape.pixels);
    const double moved = p.train ? count * normal_dot_grad(r, m.t, m.a, m.d.x_dot_grad) : r * sums[6];
    p.weight_bar[c] = r * sums[5] + moved;
    p.bias_bar[c] = sums[4];
  }

  template <class T, class Part, class Mu, class Factors>
  static BLOKERN_DEVICE void write(const BatchNormAdjoint<T>& p, int64_t i, Part part, Mu mu, Factors f) {
    using A = Accum<T>;
    const auto x = load<A>(p.x + i, part), v = load<A>(p.x_dot + i, part);
    const auto grad = load<A>(p.grad + i, part), grad_dot = load<A>(p.grad_dot + i, part);
    const Gate<A, Part::size> gate(p.gate, i, part);
    Pack<A, Part::size> bars, bars_dot;
#pragma unroll
    for (int k = 0; k < Part::size; ++k) {
      const A centred = x[k] - mu(k), g = gate(k, grad[k]), g_dot = gate(k, grad_dot[k]);
      bars_dot[k] = f(0, k) * g_dot + f(1, k) * g + f(2, k) * v[k] + f(3, k) * centred + f(4, k);
      bars[k] = f(5, k) * g + f(6, k) * centred + f(7, k);
    }
    store(p.x_bar_dot + i, bars_dot, part);
    if (p.x_bar != nullptr) store(p.x_bar + i, bars, part);
  }

 private:
  struct Means {
    TangentMeans t;
    AdjointMeans a;
    AdjointTangentMeans d;

    template <class T>
    BLOKERN_DEVICE Means(const BatchNormAdjoint<T>& p, const double* sums) {
      const double per = p.train ? 1 / static_cast<double>(p.shape.samples * p.shape.pixels) : 0;
      t = {sums[0] * per, sums[1] * per};
      a = {sums[2] * per, sums[3] * per};
      d = {sums[4] * per, sums[5] * per, sums[6] * per};
    }
  };
};

}  // namespace blokern
