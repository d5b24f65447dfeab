// bip_released_step: the score step of BiP's released code, whose scores are the weights themselves. With
// magnitudes ranked and the gradient passed straight through, that of a score is |θ| ⊙ g; in the implicit
// term's place is −lr2 (θ ⊙ g)².
#pragma once

#include <cstdint>

#include "sparse/sgd.h"

namespace blokern {

// implicit: lr2.
template <class V>
BLOKERN_INLINE V bip_released_gradient(V weight, V grad, V implicit) {
  const V product = weight * grad;
  return absolute(weight) * grad - implicit * product * product;
}

// CPU kernel, for rows [begin, end); asks for no mask.
template <class T>
void bip_released_step(const SgdLayer<T>& p, double implicit, int64_t begin, int64_t end);

// CUDA kernel, for all layers, queued on the call's stream.
template <class T>
void bip_released_step(std::span<const SgdLayer<T>> layers, double implicit, const CudaCall& call);

}  // namespace blokern
