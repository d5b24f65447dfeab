// bip_score_step: descent on BiP's scores s, along ∇_m F = (θ − m ⊙ g / γ) ⊙ g (Zhang et al., NeurIPS 2022).
#pragma once

#include <cstdint>

#include "sparse/sgd.h"

namespace blokern {

// implicit: 1 / γ.
template <class V, class M>
BLOKERN_INLINE V bip_score_gradient(V weight, V grad, M kept, V implicit) {
  return (weight - where(kept, implicit * grad, V(0))) * grad;
}

// CPU kernel, for rows [begin, end): p.value are the scores.
template <class T>
void bip_score_step(const SgdLayer<T>& p, double implicit, int64_t begin, int64_t end);

// CUDA kernel, for all layers, queued on the call's stream.
template <class T>
void bip_score_step(std::span<const SgdLayer<T>> layers, double implicit, const CudaCall& call);

}  // namespace blokern
