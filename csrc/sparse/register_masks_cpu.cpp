// Masks as bits on CPU tensors, and the forms in which products walk them. Arithmetic: stream_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <bit>
#include <limits>
#include <numeric>
#include <tuple>

#include "checks.h"
#include "sparse/stream.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

Tensor mask_words(const Tensor& mask) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "mask must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.dim() == 2, "mask must be [rows, cols], got ", mask.sizes());
  const Tensor dense = mask.contiguous();
  const int64_t rows = dense.size(0), cols = dense.size(1);
  Tensor words = at::empty({rows, row_words(cols)}, dense.options().dtype(at::kLong));
  const MaskWords to = new_words(words, cols);
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
  const MaskWords to = new_words(transposed, from.rows);
  at::parallel_for(0, row_words(from.rows), grain(64 * cols),
                   [&](int64_t b, int64_t e) { transpose_mask(from, to, b, e); });
  return transposed;
}

std::tuple<Tensor, Tensor> mask_stream(const Tensor& words, int64_t cols, int64_t block) {
  const MaskWords mask = words_of(words, cols);
  TORCH_CHECK_VALUE(block > 0 && block <= kMostIndices && block % 64 == 0,
                    "block must be a positive multiple of 64, got ", block);
  TORCH_CHECK_VALUE(cols == 0 || mask.rows <= kMostIndices / cols,
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

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("mask_words", mask_words);
  m.impl("words_mask", words_mask);
  m.impl("count_words", count_words);
  m.impl("transpose_words", transpose_words);
  m.impl("mask_stream", mask_stream);
}

}  // namespace blokern
