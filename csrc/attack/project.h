// project: x_adv ← P(x_adv), onto {‖x_adv − x‖ ≤ eps} and the box: L∞ and L2 first the ball, then the box;
// L1 the exact Euclidean projection onto their intersection.
#pragma once

#include <cstdint>

#include "attack/ball.h"
#include "attack/batch.h"
#include "support/cuda/call.h"

namespace blokern {

template <class T>
struct Project {
  using Image = T;
  Batch batch;
  Rows<const T> x_adv, x;
  Rows<T> out;  // may be x_adv
  PerSample eps;
  Box clip;
};

// CPU kernels. L∞ is elementwise: [begin, end) counts elements of the whole batch; elsewhere
// it counts samples.
template <class T>
void project_linf(const Project<T>& p, int64_t begin, int64_t end);
template <class T>
void project_l2(const Project<T>& p, int64_t begin, int64_t end);
template <class T>
void project_l1(const Project<T>& p, int64_t begin, int64_t end);

// CUDA kernels: the whole batch, queued on the call's stream.
template <class T>
void project_linf(const Project<T>& p, const CudaCall& call);
template <class T>
void project_l2(const Project<T>& p, const CudaCall& call);
template <class T>
void project_l1(const Project<T>& p, const CudaCall& call);

}  // namespace blokern
