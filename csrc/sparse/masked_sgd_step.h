// masked_sgd_step: torch.optim.SGD's step for the gradient m ⊙ g.
#pragma once

#include <cstdint>

#include "sparse/sgd.h"

namespace blokern {

// CPU kernel, for rows [begin, end).
template <class T>
void masked_sgd_step(const SgdLayer<T>& p, int64_t begin, int64_t end);

// CUDA kernel, for all layers, queued on the call's stream.
template <class T>
void masked_sgd_step(std::span<const SgdLayer<T>> layers, const CudaCall& call);

}  // namespace blokern
