#include "sparse/skinny.h"

#include <algorithm>
#include <array>

#include "sparse/walk_cpu.h"

namespace blokern {
namespace {

template <class A>
using IntOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A>
using IntVectorOf = typename Vector<IntOf<A>>::type;

template <class A>
constexpr IntVectorOf<A> element_bits() {
  IntVectorOf<A> bits{};
  for (int i = 0; i < Vector<A>::size; ++i) bits[i] = IntOf<A>(1) << i;
  return bits;
}

// v's elements whose bit is set, among the lowest of `word`; else zeros, whatever v has there.
template <class A>
BLOKERN_INLINE VectorOf<A> masked(VectorOf<A> v, uint64_t word) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return bit_copy<VectorOf<A>>(_mm512_maskz_mov_ps(static_cast<__mmask16>(word), bit_copy<__m512>(v)));
  else
    return bit_copy<VectorOf<A>>(_mm512_maskz_mov_pd(static_cast<__mmask8>(word), bit_copy<__m512d>(v)));
#endif
  const IntVectorOf<A> bits = static_cast<IntOf<A>>(word) - IntVectorOf<A>{};
  return (bits & element_bits<A>()) != 0 ? v : VectorOf<A>{};
}

// 64 columns of a row, or the fewer that its end leaves.
constexpr int64_t kWordColumns = 64;

// body(word's index, pointers to where each row's columns lie) for the words [begin, end) of kRows rows from
// r on, those of beyond the last row the last again. A row's last word, where it is not whole, is copied,
// zeros at its end.
template <int kRows, class T, class Body>
BLOKERN_INLINE void for_each_word(const MaskWords& mask, const Matrix<const T>& weight, int64_t r,
                                  int64_t r_end, int64_t begin, int64_t end, Body&& body) {
  const int64_t whole = std::min(end, mask.cols / kWordColumns);
  std::array<const T*, kRows> row;
  std::array<const uint64_t*, kRows> words;
  for (int k = 0; k < kRows; ++k) {
    const int64_t at = std::min(r + k, r_end - 1);
    row[k] = weight.at(at, 0);
    words[k] = mask.words + at * row_words(mask.cols);
  }
  const auto call = [&](int64_t w, const std::array<const T*, kRows>& from) {
    std::array<uint64_t, kRows> bits;
    uint64_t any = 0;
    for (int k = 0; k < kRows; ++k) any |= bits[k] = words[k][w];
    if (any != 0) body(w, from, bits);
  };
  for (int64_t w = begin; w < whole; ++w) {
    std::array<const T*, kRows> from;
    for (int k = 0; k < kRows; ++k) from[k] = row[k] + w * kWordColumns;
    call(w, from);
  }
  if (whole == end) return;
  T tail[kRows][kWordColumns] = {};
  std::array<const T*, kRows> from;
  for (int k = 0; k < kRows; ++k) {
    std::copy(row[k] + whole * kWordColumns, row[k] + mask.cols, tail[k]);
    from[k] = tail[k];
  }
  call(whole, from);
}

// The sums of kRows rows with kSamples samples, each of one vector: sums[k · kSamples + s].
template <class T, int kRows, int kSamples>
BLOKERN_INLINE void multiply_rows(const MaskWords& mask, const Matrix<const T>& weight,
                                  const SkinnyRows<Accum<T>>& x, int64_t s, int64_t r, int64_t r_end,
                                  VectorOf<Accum<T>> (&sums)[kRows * kSamples]) {
  using A = Accum<T>;
  constexpr int n = Vector<A>::size;
  for_each_word<kRows>(
      mask, weight, r, r_end, 0, row_words(mask.cols), [&](int64_t w, const auto& from, const auto& bits) {
        for (int v = 0; v < kWordColumns / n; ++v) {
          VectorOf<A> values[kRows];
          for (int k = 0; k < kRows; ++k)
            values[k] = masked<A>(load_vector(from[k] + v * n), bits[k] >> (v * n));
#pragma GCC unroll 16
          for (int j = 0; j < kSamples; ++j) {
            const VectorOf<A> other = load_vector(x.row(s + j) + w * kWordColumns + v * n);
            for (int k = 0; k < kRows; ++k)
              sums[k * kSamples + j] = multiply_add(values[k], other, sums[k * kSamples + j]);
          }
        }
      });
}

template <class A>
BLOKERN_INLINE A sum_of(VectorOf<A> v) {
  A sum = 0;
  for (int i = 0; i < Vector<A>::size; ++i) sum += v[i];
  return sum;
}

// The same, added up, with the bias, as Y's elements.
template <class T, int kRows, int kSamples>
void multiply_block(const MaskWords& mask, const Matrix<const T>& weight, const SkinnyRows<Accum<T>>& x,
                    const T* bias, const Matrix<T>& y, int64_t s, int64_t r, int64_t r_end) {
  using A = Accum<T>;
  VectorOf<A> sums[kRows * kSamples] = {};
  multiply_rows<T, kRows, kSamples>(mask, weight, x, s, r, r_end, sums);
  for (int64_t k = 0; k < std::min<int64_t>(kRows, r_end - r); ++k) {
    const A offset = bias == nullptr ? A(0) : static_cast<A>(bias[r + k]);
    for (int j = 0; j < kSamples; ++j)
      *y.at(r + k, s + j) = static_cast<T>(sum_of<A>(sums[k * kSamples + j]) + offset);
  }
}

}  // namespace

template <class T>
void pack_rows(const Matrix<const T>& x, int64_t samples, const SkinnyRows<Accum<T>>& to, int64_t begin,
               int64_t end) {
  copy_in<Accum<T>, T>({x.at(begin, 0), x.col_stride, x.row_stride}, to.data + begin, to.stride, samples,
                       end - begin);
}

template <class T>
void skinny_multiply(const MaskWords& mask, const Matrix<const T>& weight, const SkinnyRows<Accum<T>>& x,
                     const T* bias, const Matrix<T>& y, int64_t samples, int64_t begin, int64_t end) {
  constexpr int kRows = 4, kSamples = 4;
  for (int64_t r = begin; r < end; r += kRows) {
    int64_t s = 0;
    for (; s + kSamples <= samples; s += kSamples)
      multiply_block<T, kRows, kSamples>(mask, weight, x, bias, y, s, r, end);
    for (; s < samples; ++s) multiply_block<T, kRows, 1>(mask, weight, x, bias, y, s, r, end);
  }
}

template <class T>
void skinny_multiply_transposed(const MaskWords& mask, const Matrix<const T>& weight,
                                const Matrix<const T>& a, const SkinnyRows<Accum<T>>& sums, int64_t samples,
                                int64_t begin, int64_t end) {
  using A = Accum<T>;
  constexpr int n = Vector<A>::size, kRows = 4;
  for (int64_t s = 0; s < samples; ++s)
    std::fill(sums.row(s) + begin * kWordColumns, sums.row(s) + end * kWordColumns, A(0));
  for (int64_t r = 0; r < mask.rows; r += kRows) {
    A factor[kSkinnySamples][kRows];  // zero for rows beyond the last, which are the last again
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t k = 0; k < kRows; ++k)
        factor[s][k] = r + k < mask.rows ? static_cast<A>(*a.at(r + k, s)) : A(0);
    }
    for_each_word<kRows>(mask, weight, r, mask.rows, begin, end,
                         [&](int64_t w, const auto& from, const auto& bits) {
                           for (int v = 0; v < kWordColumns / n; ++v) {
                             VectorOf<A> values[kRows];
                             for (int k = 0; k < kRows; ++k)
                               values[k] = masked<A>(load_vector(from[k] + v * n), bits[k] >> (v * n));
                             for (int64_t s = 0; s < samples; ++s) {
                               A* const to = sums.row(s) + w * kWordColumns + v * n;
                               VectorOf<A> sum = load_vector(to);
                               for (int k = 0; k < kRows; ++k)
                                 sum = multiply_add(broadcast(factor[s][k]), values[k], sum);
                               store_vector(to, sum);
                             }
                           }
                         });
  }
}

template <class T>
void skinny_outer(const MaskWords& mask, const Matrix<const T>& a, const SkinnyRows<Accum<T>>& b, T* product,
                  int64_t samples, int64_t begin, int64_t end) {
  using A = Accum<T>;
  constexpr int n = Vector<A>::size;
  const bool past_cache = goes_past_cache(product, mask.rows * mask.cols, mask.cols);
  for (int64_t r = begin; r < end; ++r) {
    A factor[kSkinnySamples];
    for (int64_t s = 0; s < samples; ++s) factor[s] = static_cast<A>(*a.at(r, s));
    T* const row = product + r * mask.cols;
    const uint64_t* const words = mask.words + r * row_words(mask.cols);
    for (int64_t c = 0; c < mask.cols; c += n) {
      const uint64_t bits = words[c / kWordColumns] >> (c % kWordColumns);
      VectorOf<A> sum{};
      if ((bits & ((uint64_t(1) << n) - 1)) != 0) {
        for (int64_t s = 0; s < samples; ++s)
          sum = multiply_add(broadcast(factor[s]), load_vector(b.row(s) + c), sum);
      }
      sum = masked<A>(sum, bits);
      if constexpr (std::is_same_v<T, A>) {
        if (past_cache) {
          stream_vector(row + c, sum);
          continue;
        }
      }
      if (c + n <= mask.cols) {
        store_vector(row + c, sum);
      } else {
        for (int64_t i = 0; c + i < mask.cols; ++i) row[c + i] = static_cast<T>(sum[i]);
      }
    }
  }
  if (past_cache) streamed();
}

template <class T>
void apply_mask(const MaskWords& mask, const Matrix<const T>& weight, T* to, int64_t begin, int64_t end) {
  using A = Accum<T>;
  constexpr int n = Vector<A>::size;
  for (int64_t r = begin; r < end; ++r) {
    const T* const from = weight.at(r, 0);
    T* const row = to + r * mask.cols;
    const uint64_t* const words = mask.words + r * row_words(mask.cols);
    int64_t c = 0;
    for (; c + n <= mask.cols && weight.col_stride == 1; c += n)
      store_vector(row + c, masked<A>(load_vector(from + c), words[c / kWordColumns] >> (c % kWordColumns)));
    for (; c < mask.cols; ++c)
      row[c] = (words[c / kWordColumns] >> (c % kWordColumns)) & 1 ? from[c * weight.col_stride] : T(0);
  }
}

#define INSTANTIATE(T)                                                                                      \
  template void pack_rows<T>(const Matrix<const T>&, int64_t, const SkinnyRows<Accum<T>>&, int64_t,         \
                             int64_t);                                                                      \
  template void skinny_multiply<T>(const MaskWords&, const Matrix<const T>&, const SkinnyRows<Accum<T>>&,   \
                                   const T*, const Matrix<T>&, int64_t, int64_t, int64_t);                  \
  template void skinny_multiply_transposed<T>(const MaskWords&, const Matrix<const T>&,                     \
                                              const Matrix<const T>&, const SkinnyRows<Accum<T>>&, int64_t, \
                                              int64_t, int64_t);                                            \
  template void skinny_outer<T>(const MaskWords&, const Matrix<const T>&, const SkinnyRows<Accum<T>>&, T*,  \
                                int64_t, int64_t, int64_t);                                                 \
  template void apply_mask<T>(const MaskWords&, const Matrix<const T>&, T*, int64_t, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace blokern
