// How the ops' work on CPU tensors is shared among torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

namespace blokern {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread's wake-up

// at::parallel_for's grain, for items of so many elements each.
inline int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

}  // namespace blokern
