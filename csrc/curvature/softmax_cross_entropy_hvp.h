// Cross-entropy of softmax(z), its gradient g and its Hessian times ż, of each row of logits in one pass.
// With the target's weights q, Q = Σ q, and p = softmax(z):
//
//   ℓ = Q log Σ e^z − Σ q z,   g = Q p − q,   H ż = Q p (ż − Σ p ż)
//
// A class y has q = (1 − s) w_y at y and s w / C everywhere, for label smoothing s and class weights w; soft
// targets t have q = w ((1 − s) t + s / C).
#pragma once

#include <cstdint>

#include "support/cuda/call.h"
#include "support/math.h"

namespace blokern {

template <class T>
struct SoftmaxCrossEntropyHvp {
  int64_t rows;
  int64_t classes;
  const T* logits;  // [rows, classes], as all that follow
  const T* tangent;
  const T* target;         // soft targets, or null:
  const int64_t* labels;   // [rows]
  const Accum<T>* weight;  // [classes], or null: 1
  int64_t ignore_index;    // rows of this label are all zero
  double label_smoothing;
  double factor;        // of every result,
  const double* count;  // and what divides it: one value, or null for 1
  T* grad;
  T* hvp;
  double* loss;  // [rows]

  BLOKERN_INLINE double weight_of(int64_t c) const { return weight != nullptr ? weight[c] : 1; }
  // Infinite for a mean over nothing: then 0 · scale is NaN, as torch's loss is.
  BLOKERN_INLINE double scale() const { return count != nullptr ? factor / *count : factor; }
};

// What a mean over labels divides by: Σ w_y over those that are not ignored.
struct LabelWeights {
  const int64_t* labels;  // [rows]
  int64_t rows;
  int64_t classes;
  const double* weight;  // [classes], or null: 1
  int64_t ignore_index;
};

// A class's share of q but for its label's own: of a soft target's t, or of none, t = 0.
template <class V>
BLOKERN_INLINE V spread_weight(V kept, V t, V floor) {
  return kept * t + floor;
}

template <class V>
BLOKERN_INLINE V cross_entropy_grad(V p, V q, V total, V scale) {
  return scale * (total * p - q);
}

template <class V>
BLOKERN_INLINE V cross_entropy_hvp(V p, V tangent, V mean_tangent, V total, V scale) {
  return scale * (total * p * (tangent - mean_tangent));
}

// CPU kernel; [begin, end) counts rows.
template <class T>
void softmax_cross_entropy_hvp(const SoftmaxCrossEntropyHvp<T>& p, int64_t begin, int64_t end);

// CUDA kernels, queued on the call's stream; the latter's result is one double at `total`. A label out of
// range is not seen by the host: its row is NaN.
template <class T>
void softmax_cross_entropy_hvp(const SoftmaxCrossEntropyHvp<T>& p, const CudaCall& call);
void label_weights(const LabelWeights& p, double* total, const CudaCall& call);

}  // namespace blokern
