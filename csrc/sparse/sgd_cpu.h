// The walk of the pruning steps: one pass over a layer, with its mask's bits as lanes.
#pragma once

#include <cstdint>

#include "sparse/sgd.h"
#include "support/vec.h"

namespace blokern {

// Element i of a vector of A's has bit i of a word.
template <class A>
struct ElementBits;
template <>
struct ElementBits<float> {
  using Int = int32_t;
  static constexpr Int kBit[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                   1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
};
template <>
struct ElementBits<double> {
  using Int = int64_t;
  static constexpr Int kBit[8] = {1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7};
};

// Where a mask's row keeps the columns c and on; c is a multiple of the lanes' number, which divides 64.
template <class A>
BLOKERN_INLINE Mask<A> load_mask(const uint64_t* row, int64_t c) {
  using Bits = ElementBits<A>;
  using V = typename Mask<A>::V;
  constexpr int n = Vector<A>::size;
  const V bit = load_raw<V>(Bits::kBit);
  const uint64_t word = row[c / 64] >> (c % 64);
  Mask<A> mask;
  for (int k = 0; k < kParts; ++k) {
    const auto part = static_cast<typename Bits::Int>((word >> (k * n)) & ((uint64_t{1} << n) - 1));
    mask.v[k] = ((part - V{}) & bit) != 0;
  }
  return mask;
}

// Rows [begin, end). gradient(value, i, row, c, width): of the elements i and on, which are columns c and on
// of their row, whose mask's words are at `row`.
template <class T, class Gradient>
__attribute__((flatten)) inline void descend(const SgdLayer<T>& p, int64_t begin, int64_t end,
                                             Gradient gradient) {
  const Lanes<T> lr(static_cast<T>(p.rates.lr)), momentum(static_cast<T>(p.rates.momentum)),
      weight_decay(static_cast<T>(p.rates.weight_decay));
  T* const value = p.value;
  T* const buffer = p.buffer;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = r * p.cols;
    const uint64_t* const row = p.words == nullptr ? nullptr : p.words + r * row_words(p.cols);
    sweep<T>(0, p.cols, [=](int64_t c, auto w) {
      const int64_t i = first + c;
      const auto old = load<T>(value + i, w);
      const auto grad = gradient(old, i, row, c, w);
      const auto before = buffer == nullptr ? Lanes<T>() : load<T>(buffer + i, w);
      const auto step = sgd_step(old, grad, before, lr, momentum, weight_decay);
      store(value + i, step.value, w);
      if (buffer != nullptr) store(buffer + i, step.buffer, w);
    });
  }
}

}  // namespace blokern
