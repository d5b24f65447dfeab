#include "sparse/topk_mask.h"

#include <algorithm>

#include "support/dtypes.h"

namespace blokern {
namespace {

// body(first, keys, count): the scores' keys, block by block in a buffer that stays in the first-level cache,
// so that making keys is a loop of its own, which the compiler turns into vector instructions.
template <class K, class T, class Body>
inline void for_each_block(const T* scores, int64_t size, Body&& body) {
  constexpr int64_t block = 1024;
  K keys[block];
  for (int64_t first = 0; first < size; first += block) {
    const int64_t count = std::min(block, size - first);
    for (int64_t i = 0; i < count; ++i) keys[i] = order_key<K>(scores[first + i]);
    body(first, keys, count);
  }
}

// Moves the keys that the digit admits to the front, and returns their number. Without a branch: which keys
// those are is hard to foretell.
template <class K>
inline int64_t gather_admitted(const Digit<K>& digit, K* keys, int64_t count) {
  int64_t admitted = 0;
  for (int64_t i = 0; i < count; ++i) {
    const K key = keys[i];
    keys[admitted] = key;
    admitted += digit.admits(key);
  }
  return admitted;
}

}  // namespace

template <class K, class T>
void count_digits(const T* scores, int64_t size, const Digit<K>& digit, int64_t* counts) {
  for_each_block<K>(scores, size, [digit, counts](int64_t, K* keys, int64_t count) {
    if (!digit.is_first()) count = gather_admitted(digit, keys, count);
    for (int64_t i = 0; i < count; ++i) ++counts[digit.of(keys[i])];
  });
}

template <class K, class T>
int64_t mask_largest(const T* scores, int64_t size, K threshold, int64_t ties, bool* mask) {
  for_each_block<K>(scores, size, [&](int64_t first, const K* keys, int64_t count) {
    bool* const out = mask + first;
    K equal = 0;
    for (int64_t i = 0; i < count; ++i) {
      out[i] = keys[i] > threshold;
      equal += keys[i] == threshold;
    }
    if (equal == 0) return;
    for (int64_t i = 0; ties > 0 && i < count; ++i) {
      if (keys[i] != threshold) continue;
      out[i] = true;
      --ties;
    }
  });
  return ties;
}

#define INSTANTIATE(K, T)                                                         \
  template void count_digits<K, T>(const T*, int64_t, const Digit<K>&, int64_t*); \
  template int64_t mask_largest<K, T>(const T*, int64_t, K, int64_t, bool*);
#define INSTANTIATE_WIDE(T) INSTANTIATE(uint64_t, T)
BLOKERN_FOR_IMAGE(INSTANTIATE_WIDE)
INSTANTIATE(uint32_t, float)
INSTANTIATE(uint32_t, c10::BFloat16)
INSTANTIATE(uint32_t, c10::Half)
#undef INSTANTIATE_WIDE
#undef INSTANTIATE

}  // namespace blokern
