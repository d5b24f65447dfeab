#include "sparse/clear_masked.h"

#include <algorithm>

namespace blokern {
namespace {

// Whether any of the values whose bit is set, of as many as a U has bits, is not all zeros.
template <class U>
bool any_set(const U* values, U bits) {
  U any = 0;
  for (int i = 0; i < static_cast<int>(8 * sizeof(U)); ++i)
    any |= values[i] & static_cast<U>(U(0) - static_cast<U>(bits >> i & 1));
  return any != 0;
}

template <class U>
void clear(U* values, uint64_t bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if ((bits >> i & 1) != 0 && values[i] != 0) values[i] = 0;
  }
}

}  // namespace

template <class U>
void clear_masked(const MaskWords& mask, U* values, int64_t begin, int64_t end) {
  constexpr int kBits = 8 * sizeof(U);
  const int64_t words = row_words(mask.cols);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t masked = ~mask.words[r * words + w];
      U* const at = values + r * mask.cols + 64 * w;
      const int64_t count = std::min<int64_t>(64, mask.cols - 64 * w);
      if (masked == 0) continue;
      if (count < 64) {
        clear(at, masked, count);
        continue;
      }
      for (int64_t i = 0; i < 64; i += kBits) {
        if (const U bits = static_cast<U>(masked >> i); bits != 0 && any_set(at + i, bits))
          clear(at + i, masked >> i, kBits);
      }
    }
  }
}

template void clear_masked<uint16_t>(const MaskWords&, uint16_t*, int64_t, int64_t);
template void clear_masked<uint32_t>(const MaskWords&, uint32_t*, int64_t, int64_t);
template void clear_masked<uint64_t>(const MaskWords&, uint64_t*, int64_t, int64_t);

}  // namespace blokern
