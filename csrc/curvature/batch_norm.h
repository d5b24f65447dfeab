// Batch normalisation's derivatives: curvature/normalization.h, a channel being a group. In train mode μ and
// r are the batch's own and move with x, in eval mode they are constants. A gate, the output of a ReLU that
// follows, stops ẏ, g and ġ where it is not positive.
#pragma once

#include <cstdint>

#include "curvature/normalization.h"
#include "support/cuda/call.h"
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

// CPU kernels; [begin, end) counts channels, or groups of `channel_group` of them where channels are inner.
template <class T>
int64_t channel_group();
template <class T>
void batch_norm_tangent(const BatchNormTangent<T>& p, int64_t begin, int64_t end);
template <class T>
void batch_norm_adjoint(const BatchNormAdjoint<T>& p, int64_t begin, int64_t end);

// CUDA kernels, queued on the call's stream.
template <class T>
void batch_norm_tangent(const BatchNormTangent<T>& p, const CudaCall& call);
template <class T>
void batch_norm_adjoint(const BatchNormAdjoint<T>& p, const CudaCall& call);

}  // namespace blokern
