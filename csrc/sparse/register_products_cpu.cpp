// The masked products on CPU tensors: which kernel, threads. Arithmetic: spmm_cpu.cpp, skinny_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "sparse/register_products.h"
#include "sparse/skinny.h"
#include "sparse/spmm.h"
#include "sparse/stream.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

using namespace product_ops;

template <class T>
Matrix<const T> matrix(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

template <class T, int kSlot>
const Accum<T>* packed(const Tensor& x) {
  using A = Accum<T>;
  const int64_t features = x.size(0), samples = x.size(1);
  A* const panels = scratch<A, kSlot>(features * padded<A>(samples));
  at::parallel_for(0, features, grain(samples), [&](int64_t b, int64_t e) {
    pack_panels<T>(matrix<T>(x), features, samples, panels, b, e);
  });
  return panels;
}

template <class A, int kSlot>
SkinnyRows<A> skinny_scratch(int64_t features, int64_t samples) {
  const int64_t stride = 64 * row_words(features);
  return {scratch<A, kSlot>(stride * samples), stride};
}

// X [features, samples] with its samples as rows.
template <class T>
SkinnyRows<Accum<T>> skinny_rows(const Tensor& x) {
  using A = Accum<T>;
  const int64_t features = x.size(0), samples = x.size(1);
  const SkinnyRows<A> rows = skinny_scratch<A, kFactor>(features, samples);
  pack_rows<T>(matrix<T>(x), samples, rows, 0, features);
  for (int64_t s = 0; s < samples; ++s) std::fill(rows.row(s) + features, rows.row(s) + rows.stride, A(0));
  return rows;
}

// X [features, samples] as a stream's products read it, and those products.
template <class T>
class Samples {
  using A = Accum<T>;

 public:
  explicit Samples(const Tensor& x) : count_(x.size(1)) {
    if (count_ > kFewSamples) {
      panels_ = packed<T, kFactor>(x);
    } else {
      const SkinnyRows<A> rows = skinny_rows<T>(x);
      rows_ = {rows.data, rows.stride, 1};
    }
  }

  // Rows [begin, end) of y = W X + offsets.
  void multiply(const Stream& stream, const A* values, const T* offset, const Matrix<T>& y, int64_t begin,
                int64_t end) const {
    if (count_ > kFewSamples)
      spmm<T>(stream, values, panels_, offset, y, count_, begin, end);
    else
      spmm_few<T>(stream, values, rows_, offset, y, count_, begin, end);
  }

 private:
  int64_t count_;
  const A* panels_ = nullptr;
  Matrix<const A> rows_{};
};

// Y = W X + offsets, where W's rows are contiguous and `words` their mask's.
template <class T>
void skinny_spmm(const Tensor& weight, const Tensor& words, const Tensor& x, const T* offset,
                 const Matrix<T>& y) {
  const MaskWords mask = words_of(words, weight.size(0), weight.size(1));
  const SkinnyRows<Accum<T>> rows = skinny_rows<T>(x);
  at::parallel_for(0, mask.rows, grain(mask.cols), [&](int64_t b, int64_t e) {
    skinny_multiply<T>(mask, matrix<T>(weight), rows, offset, y, x.size(1), b, e);
  });
}

// The same where its columns are, and `words` the transposed mask's.
template <class T>
void skinny_spmm_transposed(const Tensor& weight, const Tensor& words, const Tensor& x, const T* offset,
                            const Matrix<T>& y) {
  using A = Accum<T>;
  const int64_t rows = weight.size(0), samples = x.size(1);
  const MaskWords mask = words_of(words, weight.size(1), rows);
  const SkinnyRows<A> sums = skinny_scratch<A, kSums>(rows, samples);
  at::parallel_for(0, row_words(rows), grain(64 * mask.rows), [&](int64_t b, int64_t e) {
    skinny_multiply_transposed<T>(mask, matrix<T>(weight.t()), matrix<T>(x), sums, samples, b, e);
  });
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t r = 0; r < rows; ++r)
      *y.at(r, s) = static_cast<T>(sums.row(s)[r] + (offset == nullptr ? A(0) : static_cast<A>(offset[r])));
  }
}

// Whether torch's dense product is faster than ours; measured at 2048 × 2048 and 128 samples.
bool dense_pays(const Tensor& weight, int64_t kept, int64_t samples) {
  return samples > kSkinnySamples && may_be_dense(weight, samples) &&
         static_cast<double>(kept) > 0.45 * static_cast<double>(weight.numel());
}

Tensor spmm_op(const Tensor& weight, const Tensor& x, const OptionalTensor& bias, const Tensor& start,
               const Tensor& column, int64_t block, const OptionalTensor& words,
               const OptionalTensor& start_t, const OptionalTensor& column_t, int64_t block_t,
               const OptionalTensor& words_t, bool /*dense_grad*/) {
  check_spmm(weight, x, bias);
  check_mask_device(weight, start, column, words, start_t, column_t, words_t);
  const int64_t rows = weight.size(0), cols = weight.size(1), samples = x.size(1);
  const Stream stream = stream_of(start, column, rows, cols, block);
  Tensor y = empty_product(rows, x);
  if (y.numel() == 0) return y;
  if (cols == 0) return bias.has_value() ? y.copy_(bias->unsqueeze(1)) : y.zero_();
  if (dense_pays(weight, column.numel(), samples)) {
    if (words_t.has_value() && weight.stride(0) == 1)
      return dense_spmm(masked_weight(weight.t(), *words_t).t(), x, bias);
    if (words.has_value()) return dense_spmm(masked_weight(weight, *words), x, bias);
  }
  const Tensor offsets = bias.has_value() ? bias->contiguous() : Tensor();
  dispatch(weight.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    const T* const offset = offsets.defined() ? offsets.const_data_ptr<T>() : nullptr;
    const Matrix<T> out{y.mutable_data_ptr<T>(), y.stride(0), y.stride(1)};
    if (is_skinny(column.numel(), rows, cols, samples)) {
      if (words.has_value() && weight.stride(1) == 1) return skinny_spmm<T>(weight, *words, x, offset, out);
      if (words_t.has_value() && weight.stride(0) == 1)
        return skinny_spmm_transposed<T>(weight, *words_t, x, offset, out);
    }
    const Samples<T> in(x);
    const bool transposed = start_t.has_value() && weight.stride(0) == 1 && weight.stride(1) != 1;
    // Twice as many where a transpose leads through them: one that is of another mask ends within.
    A* const value = scratch<A, kValues>((transposed ? 2 : 1) * column.numel());
    if (transposed) {
      TORCH_CHECK_VALUE(column_t.has_value() && column_t->numel() == column.numel(),
                        "the transposed mask's stream must have the mask's ", column.numel(), " entries");
      const Stream other = stream_of(*start_t, *column_t, cols, rows, block_t);
      over_rows(stream, 1, [&](int64_t b, int64_t e) { check_places(stream, cols, "columns", b, e); });
      over_rows(other, 1,
                [&](int64_t b, int64_t e) { check_places(other, rows, "transposed columns", b, e); });
      at::parallel_for(
          0, stream.blocks(), grain(kept_entries(stream) / stream.blocks()),
          [&](int64_t b, int64_t e) { gather_transposed<T>(stream, other, matrix<T>(weight), value, b, e); });
    }
    over_rows(stream, samples, [&](int64_t b, int64_t e) {
      if (!transposed) {
        check_places(stream, cols, "columns", b, e);
        gather_values<T>(stream, matrix<T>(weight), value, b, e);
      }
      in.multiply(stream, value, offset, out, b, e);
    });
  });
  return y;
}

// The kept weights, in the stream's order.
Tensor packed_values_op(const Tensor& weight, const Tensor& start, const Tensor& column, int64_t block) {
  check_matrix(weight, "weight");
  check_mask_device(weight, start, column);
  const Stream stream = stream_of(start, column, weight.size(0), weight.size(1), block);
  const Tensor values = at::empty({column.numel()}, weight.options().dtype(sum_type(weight.scalar_type())));
  dispatch(weight.scalar_type(), [&]<class T>() {
    Accum<T>* const value = values.mutable_data_ptr<Accum<T>>();
    over_rows(stream, 1, [&](int64_t b, int64_t e) {
      check_places(stream, stream.cols, "columns", b, e);
      gather_values<T>(stream, matrix<T>(weight), value, b, e);
    });
  });
  return values;
}

Tensor packed_spmm_op(const Tensor& values, const Tensor& x, const OptionalTensor& bias, const Tensor& start,
                      const Tensor& column, int64_t block, int64_t rows) {
  check_packed(values, x, bias, start, column, rows);
  const int64_t cols = x.size(0), samples = x.size(1);
  const Stream stream = stream_of(start, column, rows, cols, block);
  Tensor y = empty_product(rows, x);
  if (y.numel() == 0) return y;
  if (cols == 0) return bias.has_value() ? y.copy_(bias->unsqueeze(1)) : y.zero_();
  const Tensor offsets = bias.has_value() ? bias->contiguous() : Tensor();
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    const T* const offset = offsets.defined() ? offsets.const_data_ptr<T>() : nullptr;
    const Samples<T> in(x);
    const A* const value = values.const_data_ptr<A>();
    const Matrix<T> out{y.mutable_data_ptr<T>(), y.stride(0), y.stride(1)};
    over_rows(stream, samples, [&](int64_t b, int64_t e) {
      check_places(stream, cols, "columns", b, e);
      in.multiply(stream, value, offset, out, b, e);
    });
  });
  return y;
}

Tensor sddmm_op(const Tensor& a, const Tensor& b, const Tensor& start, const Tensor& column, int64_t block,
                const OptionalTensor& words, const OptionalTensor& start_t, const OptionalTensor& column_t,
                int64_t /*block_t*/, const OptionalTensor& words_t) {
  check_sddmm(a, b);
  check_mask_device(a, start, column, words, start_t, column_t, words_t);
  const int64_t rows = a.size(0), cols = b.size(0), samples = a.size(1);
  const Stream stream = stream_of(start, column, rows, cols, block);
  Tensor product = at::empty({rows, cols}, a.options());
  if (samples == 0) return product.zero_();
  if (words.has_value() && dense_pays(product, column.numel(), samples)) {
    const NoAutocast guard(kAutocast);
    return masked_weight(at::mm(a, b.t()), *words);
  }
  dispatch(a.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    T* const dense = product.mutable_data_ptr<T>();
    if (words.has_value() && samples <= kSkinnySamples) {
      const MaskWords mask = words_of(*words, rows, cols);
      const SkinnyRows<A> b_rows = skinny_rows<T>(b);
      return at::parallel_for(0, rows, grain(cols), [&](int64_t first, int64_t last) {
        skinny_outer<T>(mask, matrix<T>(a), b_rows, dense, samples, first, last);
      });
    }
    const A* const a_panels = packed<T, kFactor>(a);
    const A* const b_panels = packed<T, kOtherFactor>(b);
    A* const value = scratch<A, kValues>(column.numel());
    over_rows(stream, samples, [&](int64_t first, int64_t last) {
      check_places(stream, cols, "columns", first, last);
      sddmm<A>(stream, a_panels, b_panels, value, samples, first, last);
      spread_values<T>(stream, value, dense, first, last);
    });
  });
  return product;
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("spmm", spmm_op);
  m.impl("sddmm", sddmm_op);
  m.impl("packed_values", packed_values_op);
  m.impl("packed_spmm", packed_spmm_op);
}

}  // namespace blokern
