// Layer and group normalisation's derivatives: curvature/normalization.h, a row being a group, with a γ for
// every element. With h = γ g in the place of g, and ḣ = γ ġ + γ̇ g, the factors are those of γ = 1.
#pragma once

#include <cstdint>

#include "curvature/normalization.h"
#include "support/cuda/call.h"
#include "support/math.h"

namespace blokern {

// Rows of `size` dense elements; row m has the weights of row m mod `kinds`. Weights' pointers are null where
// there are none: γ is then 1, and tangents are 0.
template <class T>
struct NormRows {
  int64_t rows;
  int64_t size;
  int64_t kinds;
  const T* x;
  const double* mean;  // [rows]
  const double* rstd;
  const Accum<T>* weight;  // [kinds, size], as the others
  const Accum<T>* weight_dot;
  const Accum<T>* bias_dot;
};

template <class T>
struct LayerNormTangent {
  NormRows<T> at;
  const T* x_dot;
  T* y_dot;
};

// x_bar may be null, and is not written then. The weights' adjoints are summed in blocks of rows, [kinds,
// size] each, so that they do not depend on threads: on the CPU of kNormBlock rows that follow each other, on
// CUDA of every (blocks · kinds)-th row for each kind.
constexpr int64_t kNormBlock = 128;

template <class T>
struct LayerNormAdjointTangent {
  NormRows<T> at;
  int64_t blocks;
  const T* x_dot;
  const T* grad;
  const T* grad_dot;
  T* x_bar;
  T* x_bar_dot;
  Accum<T>* weight_bar_dot;  // [blocks, kinds, size], zero at first
  Accum<T>* bias_bar_dot;
};

// CPU kernels; [begin, end) counts rows, or blocks of rows.
template <class T>
void layer_norm_tangent(const LayerNormTangent<T>& p, int64_t begin, int64_t end);
template <class T>
void layer_norm_adjoint_tangent(const LayerNormAdjointTangent<T>& p, int64_t begin, int64_t end);

// CUDA kernels, queued on the call's stream, and how many blocks they are best given.
template <class T>
void layer_norm_tangent(const LayerNormTangent<T>& p, const CudaCall& call);
template <class T>
void layer_norm_adjoint_tangent(const LayerNormAdjointTangent<T>& p, const CudaCall& call);
int64_t layer_norm_blocks(int64_t rows, int64_t kinds);

}  // namespace blokern
