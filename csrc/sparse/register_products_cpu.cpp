// The sparse family's masks and products on CPU tensors: checks, layout, threads. Arithmetic: stream_cpu.cpp,
// spmm_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <tuple>

#include "checks.h"
#include "sparse/spmm.h"
#include "sparse/stream.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

// ---- Masks

Tensor mask_words(const Tensor& mask) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "mask must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.dim() == 2, "mask must be [rows, cols], got ", mask.sizes());
  const Tensor dense = mask.contiguous();
  const int64_t rows = dense.size(0), cols = dense.size(1);
  Tensor words = at::empty({rows, row_words(cols)}, dense.options().dtype(at::kLong));
  const MaskWords to = words_of(words, cols);
  at::parallel_for(0, rows, grain(cols),
                   [&](int64_t b, int64_t e) { pack_mask(dense.const_data_ptr<bool>(), to, b, e); });
  return words;
}

Tensor words_mask(const Tensor& words, int64_t cols) {
  const MaskWords from = words_of(words, cols);
  Tensor mask = at::empty({from.rows, cols}, words.options().dtype(at::kBool));
  bool* const data = mask.mutable_data_ptr<bool>();
  at::parallel_for(0, from.rows, grain(cols), [&](int64_t b, int64_t e) { unpack_mask(from, data, b, e); });
  return mask;
}

Tensor count_words(const Tensor& words) {
  TORCH_CHECK_TYPE(words.scalar_type() == at::kLong, "words must be int64, got ", words.scalar_type());
  const Tensor dense = words.contiguous();
  const auto* const data = static_cast<const uint64_t*>(dense.const_data_ptr());
  Tensor count = at::empty({}, words.options());
  *count.mutable_data_ptr<int64_t>() =
      std::accumulate(data, data + dense.numel(), int64_t(0),
                      [](int64_t sum, uint64_t word) { return sum + std::popcount(word); });
  return count;
}

Tensor transpose_words(const Tensor& words, int64_t cols) {
  const MaskWords from = words_of(words, cols);
  Tensor transposed = at::empty({cols, row_words(from.rows)}, words.options());
  const MaskWords to = words_of(transposed, from.rows);
  at::parallel_for(0, row_words(from.rows), grain(64 * cols),
                   [&](int64_t b, int64_t e) { transpose_mask(from, to, b, e); });
  return transposed;
}

std::tuple<Tensor, Tensor> mask_stream(const Tensor& words, int64_t cols, int64_t block) {
  const MaskWords mask = words_of(words, cols);
  TORCH_CHECK_VALUE(block > 0 && block % 64 == 0, "block must be a positive multiple of 64, got ", block);
  TORCH_CHECK_VALUE(mask.rows * cols <= std::numeric_limits<int32_t>::max(),
                    "mask must have fewer than 2^31 entries, got [", mask.rows, ", ", cols, "]");
  const int64_t parts = (cols + block - 1) / block * mask.rows;
  Tensor start = at::empty({parts + 1}, words.options().dtype(at::kInt));
  int32_t* const starts = start.mutable_data_ptr<int32_t>();
  starts[0] = 0;
  at::parallel_for(0, mask.rows, grain(cols),
                   [&](int64_t b, int64_t e) { count_stream(mask, block, starts, b, e); });
  std::partial_sum(starts, starts + parts + 1, starts);
  Tensor column = at::empty({starts[parts]}, words.options().dtype(at::kInt));
  int32_t* const columns = column.mutable_data_ptr<int32_t>();
  at::parallel_for(0, mask.rows, grain(cols),
                   [&](int64_t b, int64_t e) { fill_stream(mask, block, starts, columns, b, e); });
  return {start, column};
}

// ---- Products

template <class T>
Matrix<const T> matrix(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

void check_matrix(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble || t.scalar_type() == at::kBFloat16,
      name, " must be float64, float32 or bfloat16, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 2, name, " must be a matrix, got shape ", t.sizes());
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

// y [rows, samples] in x's layout: samples innermost, or (x is the transpose of a batch) rows innermost.
Tensor empty_product(int64_t rows, const Tensor& x) {
  const int64_t samples = x.size(1);
  if (x.stride(0) == 1 && x.stride(1) != 1) return at::empty_strided({rows, samples}, {1, rows}, x.options());
  return at::empty({rows, samples}, x.options());
}

Tensor spmm_op(const Tensor& weight, const Tensor& x, const OptionalTensor& bias, const Tensor& start,
               const Tensor& column, int64_t block, const OptionalTensor& start_t,
               const OptionalTensor& column_t, int64_t block_t, bool /*dense_grad*/) {
  check_matrix(weight, "weight");
  check_matrix(x, "x");
  check_factor(x, "x", weight, "weight");
  const int64_t rows = weight.size(0), cols = weight.size(1), samples = x.size(1);
  TORCH_CHECK_VALUE(x.size(0) == cols, "x must have ", cols, " features, one a column of weight, got ",
                    x.size(0));
  if (bias.has_value()) {
    check_factor(*bias, "bias", weight, "weight");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows, "bias must have shape [", rows, "], got ",
                      bias->sizes());
  }
  const Stream stream = stream_of(start, column, rows, cols, block);
  Tensor y = empty_product(rows, x);
  if (y.numel() == 0) return y;
  if (cols == 0) return bias.has_value() ? y.copy_(bias->unsqueeze(1)) : y.zero_();
  const Tensor offsets = bias.has_value() ? bias->contiguous() : Tensor();
  dispatch(weight.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    const A* const panels = packed<T, kFactor>(x);
    A* const value = scratch<A, kValues>(column.numel());
    const T* const offset = offsets.defined() ? offsets.const_data_ptr<T>() : nullptr;
    const Matrix<T> out{y.mutable_data_ptr<T>(), y.stride(0), y.stride(1)};
    const bool transposed = start_t.has_value() && weight.stride(0) == 1 && weight.stride(1) != 1;
    if (transposed) {
      const Stream other = stream_of(*start_t, *column_t, cols, rows, block_t);
      at::parallel_for(
          0, stream.blocks(), grain(kept_entries(stream) / stream.blocks()),
          [&](int64_t b, int64_t e) { gather_transposed<T>(stream, other, matrix<T>(weight), value, b, e); });
    }
    over_rows(stream, samples, [&](int64_t b, int64_t e) {
      if (!transposed) gather_values<T>(stream, matrix<T>(weight), value, b, e);
      spmm<T>(stream, value, panels, offset, out, samples, b, e);
    });
  });
  return y;
}

Tensor sddmm_op(const Tensor& a, const Tensor& b, const Tensor& start, const Tensor& column, int64_t block,
                const OptionalTensor& /*start_t*/, const OptionalTensor& /*column_t*/, int64_t /*block_t*/) {
  check_matrix(a, "a");
  check_matrix(b, "b");
  check_factor(b, "b", a, "a");
  TORCH_CHECK_VALUE(a.size(1) == b.size(1), "b must have the samples of a, ", a.size(1), ", got ", b.size(1));
  const int64_t rows = a.size(0), cols = b.size(0), samples = a.size(1);
  const Stream stream = stream_of(start, column, rows, cols, block);
  Tensor product = at::empty({rows, cols}, a.options());
  if (samples == 0) return product.zero_();
  dispatch(a.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    const A* const a_panels = packed<T, kFactor>(a);
    const A* const b_panels = packed<T, kOtherFactor>(b);
    A* const value = scratch<A, kValues>(column.numel());
    T* const dense = product.mutable_data_ptr<T>();
    over_rows(stream, samples, [&](int64_t first, int64_t last) {
      sddmm<A>(stream, a_panels, b_panels, value, samples, first, last);
      std::fill(dense + first * cols, dense + last * cols, T(0));
      scatter_values<T>(stream, value, {dense, cols, 1}, first, last);
    });
  });
  return product;
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("mask_words", mask_words);
  m.impl("words_mask", words_mask);
  m.impl("count_words", count_words);
  m.impl("transpose_words", transpose_words);
  m.impl("mask_stream", mask_stream);
  m.impl("spmm", spmm_op);
  m.impl("sddmm", sddmm_op);
}

}  // namespace blokern
