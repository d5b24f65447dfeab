// activation_adjoint_tangent on CUDA. Threads: a thread four packs, a pack the 128 bits of neighbouring
// elements, on the boundaries of `x_bar_dot`. No shared memory. Four tensors are read, one or two written.
#pragma once

#include "curvature/activation.h"
#include "curvature/rows_cuda.cuh"

namespace blokern {

// All elements are one row, whose blocks do not know of each other.
template <class Phi>
struct ActivationRow {
  static constexpr int kSlots = 0;

  template <class T>
  struct Params {
    Activation<T> at;
    Phi phi;
  };

  template <class P>
  static BLOKERN_INLINE int64_t rows(const P&) {
    return 1;
  }

  template <class T, class Team>
  static BLOKERN_DEVICE void row(const Params<T>& p, int64_t, Team& team) {
    using A = Accum<T>;
    const Phi phi = p.phi;
    const T *const saved = p.at.saved, *const x_dot = p.at.x_dot;
    const T *const grad = p.at.grad, *const grad_dot = p.at.grad_dot;
    T *const x_bar = p.at.x_bar, *const x_bar_dot = p.at.x_bar_dot;
    const auto walk = team.template walk<kPackSize<T>>(p.at.size, misalignment(x_bar_dot));
    walk.sweep([=](int64_t i, auto part) {
      const auto at = load<A>(saved + i, part), v = load<A>(x_dot + i, part);
      const auto g = load<A>(grad + i, part), g_dot = load<A>(grad_dot + i, part);
      Pack<A, part.size> bars, moved;
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        const Slopes<A> slopes = phi(at[k]);
        bars[k] = slopes.first * g[k];
        moved[k] = slopes.first * g_dot[k] + slopes.second * v[k] * g[k];
      }
      store(x_bar_dot + i, moved, part);
      if (x_bar != nullptr) store(x_bar + i, bars, part);
    });
  }
};

}  // namespace blokern
