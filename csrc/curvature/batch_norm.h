// Batch normalisation y = γ r (x − μ) + β, differentiated: its tangent, its adjoint, and the adjoint's
// tangent. In train mode μ and r = (⟨(x − μ)²⟩ + ε)^−½ are the batch's own and move with x, in eval mode they
// are constants. All three are, in a channel, linear in what they read:
//
//   ẏ = A ẋ + B (x − μ) + C,   x̄ = A g + B (x − μ) + C,   x̄˙ = A ġ + B g + C ẋ + D (x − μ) + E
//
// with coefficients from a few means over the channel. A gate, the output of a ReLU that follows, stops ẏ, g
// and ġ where it is not positive. A dot is a tangent, a bar an adjoint;
// blokern/curvature/rules/normalization.py has the algebra.
#pragma once

#include <cstdint>

#include "support/math.h"

namespace blokern {

// Where the elements of a channel are.
struct Channels {
  int64_t samples;
  int64_t channels;
  int64_t pixels;       // of a sample, dense
  bool channels_inner;  // element (n, c, s) at (n · pixels + s) · channels + c, else at (n · channels + c) ·
                        // pixels + s
};

// One value a channel; the last four are null where there is none: γ is then 1, and tangents are 0.
struct ChannelValues {
  const double* mean;
  const double* rstd;
  const double* weight;
  const double* weight_dot;
  const double* bias_dot;

  BLOKERN_INLINE double gamma(int64_t c) const { return weight != nullptr ? weight[c] : 1; }
  BLOKERN_INLINE double gamma_dot(int64_t c) const { return weight_dot != nullptr ? weight_dot[c] : 0; }
  BLOKERN_INLINE double beta_dot(int64_t c) const { return bias_dot != nullptr ? bias_dot[c] : 0; }
};

template <class T>
struct BatchNormTangent {
  Channels shape;
  ChannelValues values;
  bool train;
  const T* x;
  const T* x_dot;
  const T* gate;  // or null
  T* y_dot;
};

// The adjoint, and where grad_dot is given its tangent; outputs that are null are not written.
template <class T>
struct BatchNormAdjoint {
  Channels shape;
  ChannelValues values;
  bool train;
  const T* x;
  const T* x_dot;
  const T* grad;
  const T* grad_dot;
  const T* gate;  // or null
  T* x_bar;
  T* x_bar_dot;
  double* weight_bar;  // of the adjoint, or of its tangent where that is asked for
  double* bias_bar;
};

// Means over a channel; x is x − μ.
struct TangentMeans {
  double x_dot, x_x_dot;
};
struct AdjointMeans {
  double grad, x_grad;
};
struct AdjointTangentMeans {
  double grad_dot, x_grad_dot, x_dot_grad;
};

struct TangentFactors {
  double x_dot, x, constant;
};

BLOKERN_INLINE TangentFactors tangent_factors(double r, double gamma, double gamma_dot, double beta_dot,
                                              TangentMeans m) {
  return {gamma * r, gamma_dot * r - gamma * r * r * r * m.x_x_dot, beta_dot - gamma * r * m.x_dot};
}

struct AdjointFactors {
  double grad, x, constant;
};

BLOKERN_INLINE AdjointFactors adjoint_factors(double r, double gamma, AdjointMeans m) {
  return {gamma * r, -gamma * r * r * r * m.x_grad, -gamma * r * m.grad};
}

struct AdjointTangentFactors {
  double grad_dot, grad, x_dot, x, constant;
};

// ⟨x̂̇ g⟩ for x̂ = r (x − μ).
BLOKERN_INLINE double normal_dot_grad(double r, TangentMeans t, AdjointMeans a, double x_dot_grad) {
  return r * (x_dot_grad - t.x_dot * a.grad - r * r * t.x_x_dot * a.x_grad);
}

BLOKERN_INLINE AdjointTangentFactors adjoint_tangent_factors(double r, double gamma, double gamma_dot,
                                                             TangentMeans t, AdjointMeans a,
                                                             AdjointTangentMeans d) {
  const double shrink = r * r * t.x_x_dot;  // −ṙ / r
  const double slope = gamma * r * a.x_grad;
  const double bent = gamma * normal_dot_grad(r, t, a, d.x_dot_grad);
  const double along = r * (gamma * d.x_grad_dot + gamma_dot * a.x_grad);
  const double level = gamma * d.grad_dot + gamma_dot * a.grad;
  return {gamma * r, r * (gamma_dot - shrink * gamma), -r * r * slope,
          r * r * (2 * shrink * slope - along - bent),
          r * (shrink * gamma * a.grad + r * slope * t.x_dot - level)};
}

// CPU kernels; [begin, end) counts channels, or groups of `channel_group` of them where channels are inner.
template <class T>
int64_t channel_group();
template <class T>
void batch_norm_tangent(const BatchNormTangent<T>& p, int64_t begin, int64_t end);
template <class T>
void batch_norm_adjoint(const BatchNormAdjoint<T>& p, int64_t begin, int64_t end);

}  // namespace blokern
