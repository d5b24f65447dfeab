// at::parallel_for on std::thread, included before all else in the build for TSan, which sees these threads
// begin and end; it does not see libgomp's, and would call every loop a race.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#define INTRA_OP_PARALLEL  // ATen/Parallel-inl.h then calls invoke_parallel

namespace at {

__attribute__((visibility("default"))) int get_num_threads();

namespace internal {

template <class F>
inline void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  const int64_t most = (end - begin + grain_size - 1) / std::max<int64_t>(1, grain_size);
  const int64_t count = std::clamp<int64_t>(most, 1, get_num_threads());
  const int64_t size = (end - begin + count - 1) / count;
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        const int64_t first = begin + i * size;
        if (first < end) f(first, std::min(end, first + size));
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace internal
}  // namespace at
