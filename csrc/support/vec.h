// Lanes: a fixed number of elements at once, in the compiler's own vector types (g++ and clang), which become
// whatever registers the instruction set has: SSE2, AVX2, AVX-512, NEON. Gives support/math.h's words, loads
// and stores with conversion, and reductions of a fixed order. CPU only.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "support/math.h"

namespace blokern {

// One register.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int size = kVectorBytes / sizeof(A);
};

// 128 bytes, in as many registers as that takes: sums then run in the same order on every instruction set,
// and never as one chain.
constexpr int kParts = 128 / kVectorBytes;

template <class A>
struct Lanes {
  using V = typename Vector<A>::type;
  V v[kParts];

  static constexpr int64_t size() { return kParts * Vector<A>::size; }

  BLOKERN_INLINE Lanes() : v{} {}
  BLOKERN_INLINE Lanes(A value) {  // NOLINT: a scalar broadcasts wherever a formula has a constant
    for (V& part : v) part = value - V{};
  }

  friend BLOKERN_INLINE Lanes operator+(Lanes p, const Lanes& q) {
    for (int k = 0; k < kParts; ++k) p.v[k] += q.v[k];
    return p;
  }
  friend BLOKERN_INLINE Lanes operator-(Lanes p, const Lanes& q) {
    for (int k = 0; k < kParts; ++k) p.v[k] -= q.v[k];
    return p;
  }
  friend BLOKERN_INLINE Lanes operator*(Lanes p, const Lanes& q) {
    for (int k = 0; k < kParts; ++k) p.v[k] *= q.v[k];
    return p;
  }
  friend BLOKERN_INLINE Lanes operator/(Lanes p, const Lanes& q) {
    for (int k = 0; k < kParts; ++k) p.v[k] /= q.v[k];
    return p;
  }
  friend BLOKERN_INLINE Lanes operator-(Lanes p) {
    for (V& part : p.v) part = -part;
    return p;
  }
};

// A comparison's outcome: all bits of an element set where it holds.
template <class A>
struct Mask {
  using V = decltype(typename Lanes<A>::V{} < typename Lanes<A>::V{});
  V v[kParts];

  friend BLOKERN_INLINE Mask operator&(Mask p, const Mask& q) {
    for (int k = 0; k < kParts; ++k) p.v[k] &= q.v[k];
    return p;
  }
};

template <class A>
BLOKERN_INLINE Mask<A> less(const Lanes<A>& p, const Lanes<A>& q) {
  Mask<A> m;
  for (int k = 0; k < kParts; ++k) m.v[k] = p.v[k] < q.v[k];
  return m;
}

template <class A>
BLOKERN_INLINE Lanes<A> where(const Mask<A>& m, Lanes<A> p, const Lanes<A>& q) {
  for (int k = 0; k < kParts; ++k) p.v[k] = m.v[k] ? p.v[k] : q.v[k];
  return p;
}

template <class A>
BLOKERN_INLINE Lanes<A> clamp(Lanes<A> v, const Lanes<A>& lo, const Lanes<A>& hi) {
  v = where(less(v, lo), lo, v);
  return where(less(hi, v), hi, v);
}

template <class A>
BLOKERN_INLINE Lanes<A> larger(const Lanes<A>& p, const Lanes<A>& q) {
  return where(less(q, p), p, q);
}

template <class A>
BLOKERN_INLINE Lanes<A> absolute(const Lanes<A>& v) {
  return where(less(v, Lanes<A>()), -v, v);
}

template <class A>
BLOKERN_INLINE Lanes<A> sign(const Lanes<A>& v) {
  const Lanes<A> zero, one(A(1));
  return where(less(zero, v), one, where(less(v, zero), -one, zero));
}

template <class A>
BLOKERN_INLINE double sum(const Lanes<A>& lanes) {
  double total = 0;
  for (const auto& part : lanes.v) {
    for (int i = 0; i < Vector<A>::size; ++i) total += static_cast<double>(part[i]);
  }
  return total;
}

template <class A>
BLOKERN_INLINE A maximum(const Lanes<A>& lanes) {
  A top = lanes.v[0][0];
  for (const auto& part : lanes.v) {
    for (int i = 0; i < Vector<A>::size; ++i) top = larger<A>(top, part[i]);
  }
  return top;
}

// ---- One vector from and to memory, converting half types.

using Floats = Vector<float>::type;
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));

template <class To, class From>
BLOKERN_INLINE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
BLOKERN_INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <uint32_t kDropped>
BLOKERN_INLINE Lanes<float> floor_bits(Lanes<float> v) {
  for (Floats& part : v.v) part = bit_copy<Floats>(floored<kDropped>(bit_copy<Bits32>(part)));
  return v;
}

BLOKERN_INLINE Lanes<float> mirrored(const Lanes<float>& v, const Lanes<float>& by) {
  Lanes<float> turned;
  for (int k = 0; k < kParts; ++k)
    turned.v[k] = bit_copy<Floats>(bit_copy<Bits32>(v.v[k]) ^ (bit_copy<Bits32>(by.v[k]) & 0x80000000u));
  return turned;
}

BLOKERN_INLINE Lanes<float> next_lower_where(const Mask<float>& wanted, Lanes<float> v) {
  for (int k = 0; k < kParts; ++k)
    v.v[k] = bit_copy<Floats>(next_lower(bit_copy<Bits32>(v.v[k]), bit_copy<Bits32>(wanted.v[k])));
  return v;
}

BLOKERN_INLINE Lanes<float> add_down(const Lanes<float>& a, const Lanes<float>& b) {
#if defined(__AVX512F__)
  Lanes<float> sum;
  for (int k = 0; k < kParts; ++k) {
    sum.v[k] =
        bit_copy<Floats>(_mm512_maskz_add_round_ps(0xffff, bit_copy<__m512>(a.v[k]), bit_copy<__m512>(b.v[k]),
                                                   _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  }
  return sum;
#else
  return add_down_exactly(a, b);
#endif
}

// The largest float16 that is at most v.
BLOKERN_INLINE Lanes<float> floor_to_half(Lanes<float> v) {
#if defined(__AVX512F__)
  for (Floats& part : v.v) {
    const __m256i half =
        _mm512_maskz_cvtps_ph(0xffff, bit_copy<__m512>(part), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    part = bit_copy<Floats>(_mm512_maskz_cvtph_ps(0xffff, half));
  }
  return v;
#elif defined(__AVX2__) && defined(__F16C__)
  for (Floats& part : v.v) {
    const __m128i half = _mm256_cvtps_ph(bit_copy<__m256>(part), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    part = bit_copy<Floats>(_mm256_cvtph_ps(half));
  }
  return v;
#else
  return floor_to_half_by_steps(v);
#endif
}

BLOKERN_INLINE Vector<double>::type load_vector(const double* p) { return load_raw<Vector<double>::type>(p); }
BLOKERN_INLINE Floats load_vector(const float* p) { return load_raw<Floats>(p); }
BLOKERN_INLINE void store_vector(double* p, Vector<double>::type v) { std::memcpy(p, &v, sizeof(v)); }
BLOKERN_INLINE void store_vector(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }

// Past the caches, which a plain store would first read the line into: for results that nobody reads soon.
// `p` lies on a vector's boundary. Call `streamed` before another thread may read them.
template <class A>
BLOKERN_INLINE void stream_vector(A* p, typename Vector<A>::type v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_copy<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_copy<__m256i>(v));
#else
  store_vector(p, v);
#endif
}

inline void streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// gcc 12 takes __builtin_convertvector apart into half registers and shuffles; one instruction does it.
// AVX-512 in its masked forms: gcc 12 warns of its own headers in the plain ones.
BLOKERN_INLINE Bits32 widen(Bits16 v) {
#if defined(__AVX512F__)
  return bit_copy<Bits32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_copy<__m256i>(v)));
#elif defined(__AVX2__)
  return bit_copy<Bits32>(_mm256_cvtepu16_epi32(bit_copy<__m128i>(v)));
#else
  return __builtin_convertvector(v, Bits32);
#endif
}

// Of values below 2^16.
BLOKERN_INLINE Bits16 narrow(Bits32 v) {
#if defined(__AVX512F__)
  return bit_copy<Bits16>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_copy<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(bit_copy<__m256i>(v), __m256i{});  // each half by itself
  return bit_copy<Bits16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
#else
  return __builtin_convertvector(v, Bits16);
#endif
}

// A bfloat16 is a float's upper half.
BLOKERN_INLINE Floats load_vector(const c10::BFloat16* p) {
  return bit_copy<Floats>(widen(load_raw<Bits16>(p)) << 16);
}

// To the nearest, ties to even; a NaN stays one.
BLOKERN_INLINE void store_vector(c10::BFloat16* p, Floats v) {
  const auto bits = bit_copy<Bits32>(v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto half = narrow(v != v ? Bits32{} + 0x7fc0u : rounded);
  std::memcpy(p, &half, sizeof(half));
}

BLOKERN_INLINE Floats load_vector(const c10::Half* p) {
#if defined(__AVX512F__)
  return bit_copy<Floats>(_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return bit_copy<Floats>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
  Floats v;
  for (int i = 0; i < Vector<float>::size; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

BLOKERN_INLINE void store_vector(c10::Half* p, Floats v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, bit_copy<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof(half));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(bit_copy<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof(half));
#else
  for (int i = 0; i < Vector<float>::size; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
}

// a · b + c: fused, one rounding, where the instruction set can; elsewhere two. For products, whose bits may
// differ between instruction sets as those of any BLAS do.
template <class V>
BLOKERN_INLINE V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Floats>)
    return bit_copy<V>(_mm512_fmadd_ps(bit_copy<__m512>(a), bit_copy<__m512>(b), bit_copy<__m512>(c)));
  else
    return bit_copy<V>(_mm512_fmadd_pd(bit_copy<__m512d>(a), bit_copy<__m512d>(b), bit_copy<__m512d>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<V, Floats>)
    return bit_copy<V>(_mm256_fmadd_ps(bit_copy<__m256>(a), bit_copy<__m256>(b), bit_copy<__m256>(c)));
  else
    return bit_copy<V>(_mm256_fmadd_pd(bit_copy<__m256d>(a), bit_copy<__m256d>(b), bit_copy<__m256d>(c)));
#else
  return a * b + c;
#endif
}

// ---- Lanes from and to memory.

// How much of a Lanes is in play: all of it, or the first `count` at a row's end.
struct Full {};
struct Tail {
  int64_t count;
};

template <class A, class T>
BLOKERN_INLINE Lanes<A> load(const T* p, Full) {
  Lanes<A> lanes;
  for (int k = 0; k < kParts; ++k) lanes.v[k] = load_vector(p + k * Vector<A>::size);
  return lanes;
}

// Lanes beyond the tail are zero.
template <class A, class T>
BLOKERN_INLINE Lanes<A> load(const T* p, Tail tail) {
  std::array<T, Lanes<A>::size()> buffer{};
  for (int64_t i = 0; i < tail.count; ++i) buffer[i] = p[i];
  return load<A>(buffer.data(), Full{});
}

template <class A, class T>
BLOKERN_INLINE void store(T* p, const Lanes<A>& v, Full) {
  for (int k = 0; k < kParts; ++k) store_vector(p + k * Vector<A>::size, v.v[k]);
}

template <class A, class T>
BLOKERN_INLINE void store(T* p, const Lanes<A>& v, Tail tail) {
  std::array<T, Lanes<A>::size()> buffer;
  store(buffer.data(), v, Full{});
  for (int64_t i = 0; i < tail.count; ++i) p[i] = buffer[i];
}

template <class A>
BLOKERN_INLINE void store(bool* p, const Mask<A>& m, Full) {
  for (int k = 0; k < kParts; ++k) {
    for (int i = 0; i < Vector<A>::size; ++i) p[k * Vector<A>::size + i] = m.v[k][i] != 0;
  }
}

template <class A>
BLOKERN_INLINE void store(bool* p, const Mask<A>& m, Tail tail) {
  std::array<bool, Lanes<A>::size()> buffer;
  store(buffer.data(), m, Full{});
  for (int64_t i = 0; i < tail.count; ++i) p[i] = buffer[i];
}

// ---- Walks over a row.

// flatten: the body, whatever it calls, is the loop's own code. Bodies capture by value ([=]): what they hold
// then stays in registers, where the loop's stores would have the compiler read it anew through a reference.

// body(i, width) over the elements [begin, end): full lanes, then at most one tail.
template <class A, class Body>
__attribute__((flatten)) inline void sweep(int64_t begin, int64_t end, Body body) {
  constexpr int64_t width = Lanes<A>::size();
  int64_t i = begin;
  for (; i + width <= end; i += width) body(i, Full{});
  if (i < end) body(i, Tail{end - i});
}

// K sums over [0, n): body(i, width, sums) adds into lanes; every block of lanes is then added up in double,
// so that rounding does not grow with n.
template <class A, int K, class Body>
__attribute__((flatten)) inline std::array<double, K> sums(int64_t n, Body body) {
  constexpr int64_t block = 128 * Lanes<A>::size();
  std::array<double, K> total{};
  for (int64_t begin = 0; begin < n; begin += block) {
    std::array<Lanes<A>, K> part{};
    sweep<A>(begin, begin + block < n ? begin + block : n,
             [&](int64_t i, auto width) { body(i, width, part); });
    for (int k = 0; k < K; ++k) total[k] += sum(part[k]);
  }
  return total;
}

}  // namespace blokern
