// Working memory of one thread, kept between calls: a fresh large block costs more in page faults than the
// arithmetic done on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace blokern {

// A block of at least `count` A's, valid until this thread's next call with the same A and slot. On a cache
// line's boundary: a vector that straddles two lines is loaded at half the speed.
template <class A, int kSlot = 0>
inline A* scratch(int64_t count) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(A* block) const { operator delete(block, kLine); }
  };
  thread_local std::unique_ptr<A, Free> block;
  thread_local int64_t capacity = 0;
#ifdef __SANITIZE_ADDRESS__
  capacity = -1;  // a block of exactly the size that was asked for, so that a step past its end is seen
#endif
  if (capacity < count) {
    block.reset();
    capacity = 0;
    block.reset(static_cast<A*>(operator new(static_cast<size_t>(count) * sizeof(A), kLine)));
    capacity = count;
  }
  return block.get();
}

}  // namespace blokern
