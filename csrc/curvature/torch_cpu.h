// How the curvature ops on CPU tensors share their work among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "curvature/stacks.h"

namespace blokern {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread's wake-up

inline int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

}  // namespace blokern
