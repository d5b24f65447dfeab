// Working memory of one thread, kept between calls: a fresh large block costs more in page faults than the
// arithmetic done on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace blokern {

// A block of at least `count` A's, valid until this thread's next call with the same A and slot.
template <class A, int kSlot = 0>
inline A* scratch(int64_t count) {
  thread_local std::unique_ptr<A[]> block;
  thread_local int64_t capacity = 0;
  if (capacity < count) {
    block.reset();
    capacity = 0;
    block.reset(new A[static_cast<size_t>(count)]);
    capacity = count;
  }
  return block.get();
}

}  // namespace blokern
