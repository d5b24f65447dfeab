// What the pruning steps share: one layer's step of SGD with momentum and decay, in torch.optim.SGD's order.
#pragma once

#include <cstdint>
#include <span>

#include "sparse/stream.h"
#include "support/cuda/call.h"
#include "support/math.h"

namespace blokern {

struct SgdRates {
  double lr, momentum, weight_decay;
};

// A layer [rows, cols], row-major.
template <class T>
struct SgdLayer {
  int64_t rows, cols;
  T* value;
  const T* weight;  // θ, of a step whose values are scores, or null
  const T* grad;
  T* buffer;              // the momentum's, or null: none
  const uint64_t* words;  // the mask's bits, see stream.h, or null: not asked for
  SgdRates rates;
};

template <class V>
struct SgdStep {
  V value, buffer;
};

template <class V>
BLOKERN_INLINE SgdStep<V> sgd_step(V value, V grad, V buffer, V lr, V momentum, V weight_decay) {
  buffer = momentum * buffer + (grad + weight_decay * value);
  return {value - lr * buffer, buffer};
}

}  // namespace blokern
