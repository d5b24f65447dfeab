// y = γ r (x − μ) + β, normalised over a group of elements with μ = ⟨x⟩ and r = (⟨(x − μ)²⟩ + ε)^−½,
// differentiated: its tangent, its adjoint, and the adjoint's tangent. All three are, in a group of one γ,
// linear in what they read:
//
//   ẏ = A ẋ + B (x − μ) + C,   x̄ = A g + B (x − μ) + C,   x̄˙ = A ġ + B g + C ẋ + D (x − μ) + E
//
// with factors from a few means over the group; where μ and r are constants, those means are zero. A dot is a
// tangent, a bar an adjoint; blokern/curvature/rules/normalization.py has the algebra.
#pragma once

#include "support/math.h"

namespace blokern {

// Means over a group; x is x − μ.
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

}  // namespace blokern
