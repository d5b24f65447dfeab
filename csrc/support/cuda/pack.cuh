// Packs: the few neighbouring elements that a thread handles at once, so that its accesses to memory have 128
// bits. A row is walked in packs that lie on the boundaries of one of its tensors; of the packs at the row's
// ends, and of a tensor that lies otherwise, the elements are accessed one by one.
#pragma once

#include <cstdint>
#include <cstring>

#include "support/cuda/launch.cuh"
#include "support/dtypes.h"

namespace blokern {

// How much of a pack is in play, a bit an element.
template <int kSize>
struct Part {
  static constexpr int size = kSize;
  static constexpr unsigned kWhole = (1u << kSize) - 1;
  unsigned bits;

  BLOKERN_DEVICE bool is_whole() const { return bits == kWhole; }
  BLOKERN_DEVICE bool has(int k) const { return (bits >> k & 1) != 0; }
};

template <class A, int kSize>
struct Pack {
  A v[kSize];
  BLOKERN_DEVICE A& operator[](int k) { return v[k]; }
  BLOKERN_DEVICE const A& operator[](int k) const { return v[k]; }
};

// Elements of a pack: 16 bytes of the narrowest type.
template <class T, class... Ts>
constexpr int kPackSize = kPackSize<T> > kPackSize<Ts...> ? kPackSize<T> : kPackSize<Ts...>;
template <class T>
constexpr int kPackSize<T> = 16 / sizeof(T);

// What one access moves.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// The same as elements.
template <class T, int kSize>
struct Access {
  static constexpr int size = kSize * sizeof(T) < 16 ? kSize : 16 / sizeof(T);
  using Bits = typename Word<size * sizeof(T)>::type;
  T v[size];
};

template <class T, int kSize>
BLOKERN_DEVICE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Access<T, kSize>) == 0;
}

// Elements that are not in play are zero.
template <class A, class T, int kSize>
BLOKERN_DEVICE Pack<A, kSize> load(const T* p, Part<kSize> part) {
  using Unit = Access<T, kSize>;
  Pack<A, kSize> pack;
  if (part.is_whole() && is_aligned<T, kSize>(p)) {
#pragma unroll
    for (int first = 0; first < kSize; first += Unit::size) {
      const auto bits = *reinterpret_cast<const typename Unit::Bits*>(p + first);
      Unit unit;
      std::memcpy(&unit, &bits, sizeof(unit));
#pragma unroll
      for (int k = 0; k < Unit::size; ++k) pack[first + k] = static_cast<A>(unit.v[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) pack[k] = part.has(k) ? static_cast<A>(p[k]) : A(0);
  }
  return pack;
}

template <class T, class A, int kSize>
BLOKERN_DEVICE void store(T* p, const Pack<A, kSize>& pack, Part<kSize> part) {
  using Unit = Access<T, kSize>;
  if (part.is_whole() && is_aligned<T, kSize>(p)) {
#pragma unroll
    for (int first = 0; first < kSize; first += Unit::size) {
      Unit unit;
#pragma unroll
      for (int k = 0; k < Unit::size; ++k) unit.v[k] = static_cast<T>(pack[first + k]);
      typename Unit::Bits bits;
      std::memcpy(&bits, &unit, sizeof(unit));
      // An instruction by name: the compiler takes a plain vector store apart, to share its parts with those
      // below.
      __stcg(reinterpret_cast<typename Unit::Bits*>(p + first), bits);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (part.has(k)) p[k] = static_cast<T>(pack[k]);
    }
  }
}

// formula(k) for each element of a pack, its results as a pack.
template <class A, int kSize, class Formula>
BLOKERN_DEVICE Pack<A, kSize> each(Part<kSize>, Formula formula) {
  Pack<A, kSize> pack;
#pragma unroll
  for (int k = 0; k < kSize; ++k) pack[k] = formula(k);
  return pack;
}

// What of the pack that begins at i lies in a row of `size` elements: one of it does.
template <int kSize>
BLOKERN_DEVICE Part<kSize> part_within(int64_t i, int64_t size) {
  constexpr unsigned whole = Part<kSize>::kWhole;
  unsigned bits = whole;
  if (i < 0) bits = whole << -i;
  if (size - i < kSize) bits &= whole >> (kSize - (size - i));
  return {bits & whole};
}

// The same of a pack that begins in the row, or beyond its end.
template <int kSize>
BLOKERN_DEVICE Part<kSize> part_at(int64_t i, int64_t size) {
  const int64_t rest = size - i;
  if (rest >= kSize) return {Part<kSize>::kWhole};
  return {rest <= 0 ? 0 : Part<kSize>::kWhole >> (kSize - rest)};
}

// A thread's share of a row of `size` elements: of its packs the thread takes number `first`, and every
// `step`-th from there.
template <int kSize>
struct Walk {
  int64_t size;
  int64_t first, step;
  int shift;  // by how many elements the first pack begins before the row

  // body(i, part) for each pack, whose first element is i.
  template <class Body>
  BLOKERN_DEVICE void sweep(Body body) const {
#pragma unroll 1
    for (int64_t i = first * kSize - shift; i < size; i += step * kSize) body(i, part_within<kSize>(i, size));
  }
};

// By how many elements `row` lies past a 16-byte boundary: packs that begin so much earlier are aligned.
template <class T>
BLOKERN_DEVICE int misalignment(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

}  // namespace blokern
