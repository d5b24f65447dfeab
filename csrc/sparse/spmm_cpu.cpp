#include "sparse/spmm.h"

#include <algorithm>

#include "sparse/walk_cpu.h"
#include "support/scratch.h"

namespace blokern {

template <class A>
int64_t padded(int64_t samples) {
  int64_t total = 0;
  for_each_panel<A>(samples, [&](int64_t, int64_t lanes) { total += lanes; });
  return total;
}

template <class T>
void pack_panels(const Matrix<const T>& x, int64_t features, int64_t samples, Accum<T>* panels, int64_t begin,
                 int64_t end) {
  for_each_panel<Accum<T>>(samples, [&](int64_t first, int64_t lanes) {
    const int64_t count = std::min(lanes, samples - first);
    Accum<T>* const panel = panels + features * first + begin * lanes;
    copy_in<Accum<T>, T>({x.at(begin, first), x.row_stride, x.col_stride}, panel, lanes, end - begin, count);
    if (count == lanes) return;
    for (int64_t f = 0; f < end - begin; ++f)
      std::fill(panel + f * lanes + count, panel + (f + 1) * lanes, Accum<T>(0));
  });
}

template <class T>
void gather_values(const Stream& stream, const Matrix<const T>& weight, Accum<T>* values, int64_t begin,
                   int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* const row = weight.at(r, 0);
    for (int64_t b = 0; b < stream.blocks(); ++b) {
      const int32_t* const start = stream.start + b * stream.rows + r;
      for (int32_t i = start[0]; i < start[1]; ++i)
        values[i] = static_cast<Accum<T>>(row[stream.column[i] * weight.col_stride]);
    }
  }
}

template <class T>
void gather_transposed(const Stream& stream, const Stream& other, const Matrix<const T>& weight,
                       Accum<T>* values, int64_t begin, int64_t end) {
  int32_t* const next = scratch<int32_t>(stream.rows);  // where each row's next value goes
  for (int64_t b = begin; b < end; ++b) {
    std::copy_n(stream.start + b * stream.rows, stream.rows, next);
    const int64_t last = std::min((b + 1) * stream.block, stream.cols);
    for (int64_t c = b * stream.block; c < last; ++c) {
      const T* const column = weight.at(0, c);
      for (int64_t o = 0; o < other.blocks(); ++o) {
        const int32_t* const start = other.start + o * other.rows + c;
        for (int32_t i = start[0]; i < start[1]; ++i) {
          const int32_t r = other.column[i];
          values[next[r]++] = static_cast<Accum<T>>(column[r]);
        }
      }
    }
  }
}

template <class T>
void scatter_values(const Stream& stream, const Accum<T>* values, const Matrix<T>& weight, int64_t begin,
                    int64_t end) {
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      T* const row = weight.at(r, 0);
      for (int32_t i = start[r]; i < start[r + 1]; ++i)
        row[stream.column[i] * weight.col_stride] = static_cast<T>(values[i]);
    }
  }
}

template <class T>
void spread_values(const Stream& stream, const Accum<T>* values, T* product, int64_t begin, int64_t end) {
  constexpr int n = Vector<Accum<T>>::size;
  const bool past_cache = goes_past_cache(product, stream.rows * stream.cols, stream.cols);
  T* const buffer = scratch<T, kTile>(stream.cols);
  for (int64_t r = begin; r < end; ++r) {
    T* const row = product + r * stream.cols;
    T* const to = past_cache ? buffer : row;
    std::fill_n(to, stream.cols, T(0));
    for (int64_t b = 0; b < stream.blocks(); ++b) {
      const int32_t* const start = stream.start + b * stream.rows + r;
      for (int32_t i = start[0]; i < start[1]; ++i) to[stream.column[i]] = static_cast<T>(values[i]);
    }
    if constexpr (std::is_same_v<T, Accum<T>>) {
      for (int64_t c = 0; past_cache && c < stream.cols; c += n)
        stream_vector(row + c, load_vector(buffer + c));
    }
  }
  if (past_cache) streamed();
}

template <class T>
void spmm(const Stream& stream, const Accum<T>* values, const Accum<T>* panels, const T* bias,
          const Matrix<T>& y, int64_t samples, int64_t begin, int64_t end) {
  using A = Accum<T>;
  constexpr int n = Vector<A>::size;
  A* const tile = scratch<A>((end - begin) * kWideLanes<A>);
  for_each_panel<A>(samples, [&](int64_t first, int64_t lanes) {
    const A* const panel = panels + stream.cols * first;
    if (lanes == kWideLanes<A>)
      multiply<A, T, kWideLanes<A> / n, 1>(stream, values, panel, 0, bias, tile, lanes, begin, end);
    else
      multiply<A, T, kNarrowLanes<A> / n, 1>(stream, values, panel, 0, bias, tile, lanes, begin, end);
    const Matrix<T> to{y.at(begin, first), y.row_stride, y.col_stride};
    copy_out<A, T>(tile, lanes, to, end - begin, std::min(lanes, samples - first));
  });
}

namespace {

// The first `count` elements of p, or of those that lie in x at p; the lanes beyond are zero.
template <class A>
BLOKERN_INLINE VectorOf<A> load_first(const A* p, int count) {
  VectorOf<A> v{};
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(A) == 4)
    return bit_copy<VectorOf<A>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p));
  else
    return bit_copy<VectorOf<A>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p));
#endif
  if (count == Vector<A>::size) return load_vector(p);
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class A>
BLOKERN_INLINE VectorOf<A> gather_first(const A* x, const int32_t* p, int count) {
  VectorOf<A> v{};
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(A) == 4) {
    const auto mask = static_cast<__mmask16>(lanes);
    return bit_copy<VectorOf<A>>(
        _mm512_mask_i32gather_ps(bit_copy<__m512>(v), mask, _mm512_maskz_loadu_epi32(mask, p), x, sizeof(A)));
  } else {
    const auto mask = static_cast<__mmask8>(lanes);
    return bit_copy<VectorOf<A>>(_mm512_mask_i32gather_pd(bit_copy<__m512d>(v), mask,
                                                          _mm256_maskz_loadu_epi32(mask, p), x, sizeof(A)));
  }
#elif defined(__AVX2__)
  if (count == Vector<A>::size) {  // by the masked instruction, as gcc 12 warns of the other
    const __m256i all = _mm256_set1_epi32(-1);
    if constexpr (sizeof(A) == 4)
      return bit_copy<VectorOf<A>>(_mm256_mask_i32gather_ps(bit_copy<__m256>(v), x, load_raw<__m256i>(p),
                                                            bit_copy<__m256>(all), sizeof(A)));
    else
      return bit_copy<VectorOf<A>>(_mm256_mask_i32gather_pd(bit_copy<__m256d>(v), x, load_raw<__m128i>(p),
                                                            bit_copy<__m256d>(all), sizeof(A)));
  }
#endif
  for (int i = 0; i < count; ++i) v[i] = x[p[i]];
  return v;
}

// For samples [0, kSamples): a row's entries lie in the lanes, whose sums are added up when all are there, of
// as many rows at once as a vector has elements.
template <class T, int kSamples>
void multiply_few(const Stream& stream, const Accum<T>* values, const Matrix<const Accum<T>>& x,
                  const T* bias, const Matrix<T>& y, int64_t begin, int64_t end) {
  using A = Accum<T>;
  constexpr int n = Vector<A>::size;
  A* const sums = scratch<A>((end - begin) * kSamples * n);  // [rows][samples][n]
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      A* const to = sums + (r - begin) * kSamples * n;
      VectorOf<A> sum[kSamples];
      for (int s = 0; s < kSamples; ++s) sum[s] = b == 0 ? VectorOf<A>{} : load_vector(to + s * n);
      for (int32_t i = start[r]; i < start[r + 1]; i += n) {
        const int count = std::min<int32_t>(n, start[r + 1] - i);
        const VectorOf<A> weight = load_first(values + i, count);
        for (int s = 0; s < kSamples; ++s)
          sum[s] = multiply_add(weight, gather_first(x.at(s, 0), stream.column + i, count), sum[s]);
      }
      for (int s = 0; s < kSamples; ++s) store_vector(to + s * n, sum[s]);
    }
  }
  for (int64_t r = begin; r < end; r += n) {
    const int64_t count = std::min<int64_t>(n, end - r);
    for (int s = 0; s < kSamples; ++s) {
      VectorOf<A> parts[n] = {};
      for (int64_t k = 0; k < count; ++k) parts[k] = load_vector(sums + ((r - begin + k) * kSamples + s) * n);
      A totals[n];
      store_vector(totals, sums_of<A>(parts));
      for (int64_t k = 0; k < count; ++k)
        *y.at(r + k, s) = static_cast<T>(totals[k] + (bias == nullptr ? A(0) : static_cast<A>(bias[r + k])));
    }
  }
}

}  // namespace

template <class T>
void spmm_few(const Stream& stream, const Accum<T>* values, const Matrix<const Accum<T>>& x, const T* bias,
              const Matrix<T>& y, int64_t samples, int64_t begin, int64_t end) {
  const auto multiply = [&]<int kSamples>() {
    multiply_few<T, kSamples>(stream, values, x, bias, y, begin, end);
  };
  samples == 1   ? multiply.template operator()<1>()
  : samples == 2 ? multiply.template operator()<2>()
                 : multiply.template operator()<3>();
}

template <class A>
void sddmm(const Stream& stream, const A* a_panels, const A* b_panels, A* values, int64_t samples,
           int64_t begin, int64_t end) {
  constexpr int n = Vector<A>::size;
  for_each_panel<A>(samples, [&](int64_t first, int64_t lanes) {
    const A* const a = a_panels + stream.rows * first;
    const A* const b = b_panels + stream.cols * first;
    if (lanes == kWideLanes<A>)
      inner_products<A, kWideLanes<A> / n>(stream, a, lanes, b, {1, 1, 0, 0}, values, first > 0, begin, end);
    else
      inner_products<A, kNarrowLanes<A> / n>(stream, a, lanes, b, {1, 1, 0, 0}, values, first > 0, begin,
                                             end);
  });
}

#define INSTANTIATE(T)                                                                                 \
  template void pack_panels<T>(const Matrix<const T>&, int64_t, int64_t, Accum<T>*, int64_t, int64_t); \
  template void gather_values<T>(const Stream&, const Matrix<const T>&, Accum<T>*, int64_t, int64_t);  \
  template void gather_transposed<T>(const Stream&, const Stream&, const Matrix<const T>&, Accum<T>*,  \
                                     int64_t, int64_t);                                                \
  template void scatter_values<T>(const Stream&, const Accum<T>*, const Matrix<T>&, int64_t, int64_t); \
  template void spread_values<T>(const Stream&, const Accum<T>*, T*, int64_t, int64_t);                \
  template void spmm<T>(const Stream&, const Accum<T>*, const Accum<T>*, const T*, const Matrix<T>&,   \
                        int64_t, int64_t, int64_t);                                                    \
  template void spmm_few<T>(const Stream&, const Accum<T>*, const Matrix<const Accum<T>>&, const T*,   \
                            const Matrix<T>&, int64_t, int64_t, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE
#define INSTANTIATE(A)                 \
  template int64_t padded<A>(int64_t); \
  template void sddmm<A>(const Stream&, const A*, const A*, A*, int64_t, int64_t, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
#undef INSTANTIATE

}  // namespace blokern
