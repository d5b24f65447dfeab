// Masks as bits, and the forms in which products walk them, on tensors of any device: checks and memory. A
// Device runs kernels, see sparse/torch_ops.h; count(words) is how many bits are set, as a tensor, and
// sum_up(start) makes running sums of int32 counts and returns the last.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "sparse/stream.h"
#include "sparse/torch_ops.h"

namespace blokern::mask_ops {

template <class Device>
Tensor mask_words(const Tensor& mask) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "mask must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.dim() == 2, "mask must be [rows, cols], got ", mask.sizes());
  const Tensor dense = mask.contiguous();
  const int64_t rows = dense.size(0), cols = dense.size(1);
  Tensor words = at::empty({rows, row_words(cols)}, dense.options().dtype(at::kLong));
  const MaskWords to = new_words(words, cols);
  Device::run(mask, rows, cols,
              [&](const auto&... where) { pack_mask(dense.const_data_ptr<bool>(), to, where...); });
  return words;
}

template <class Device>
Tensor words_mask(const Tensor& words, int64_t cols) {
  const MaskWords from = words_of(words, cols);
  Tensor mask = at::empty({from.rows, cols}, words.options().dtype(at::kBool));
  bool* const data = mask.mutable_data_ptr<bool>();
  Device::run(words, from.rows, cols, [&](const auto&... where) { unpack_mask(from, data, where...); });
  return mask;
}

template <class Device>
Tensor count_words(const Tensor& words) {
  TORCH_CHECK_TYPE(words.scalar_type() == at::kLong, "words must be int64, got ", words.scalar_type());
  return Device::count(words.contiguous());
}

template <class Device>
Tensor transpose_words(const Tensor& words, int64_t cols) {
  const MaskWords from = words_of(words, cols);
  Tensor transposed = at::empty({cols, row_words(from.rows)}, words.options());
  const MaskWords to = new_words(transposed, from.rows);
  Device::run(words, row_words(from.rows), 64 * cols,
              [&](const auto&... where) { transpose_mask(from, to, where...); });
  return transposed;
}

template <class Device>
std::tuple<Tensor, Tensor> mask_stream(const Tensor& words, int64_t cols, int64_t block) {
  const MaskWords mask = words_of(words, cols);
  TORCH_CHECK_VALUE(block > 0 && block <= kMostIndices && block % 64 == 0,
                    "block must be a positive multiple of 64, got ", block);
  TORCH_CHECK_VALUE(cols == 0 || mask.rows <= kMostIndices / cols,
                    "mask must have fewer than 2^31 entries, got [", mask.rows, ", ", cols, "]");
  const int64_t parts = (cols + block - 1) / block * mask.rows;
  Tensor start = at::empty({parts + 1}, words.options().dtype(at::kInt));
  int32_t* const starts = start.mutable_data_ptr<int32_t>();
  start.narrow(0, 0, 1).zero_();
  Device::run(words, mask.rows, cols,
              [&](const auto&... where) { count_stream(mask, block, starts, where...); });
  Tensor column = at::empty({Device::sum_up(start)}, words.options().dtype(at::kInt));
  int32_t* const columns = column.mutable_data_ptr<int32_t>();
  Device::run(words, mask.rows, cols,
              [&](const auto&... where) { fill_stream(mask, block, starts, columns, where...); });
  return {start, column};
}

template <class Device>
void implement(torch::Library& m) {
  m.impl("mask_words", &mask_words<Device>);
  m.impl("words_mask", &words_mask<Device>);
  m.impl("count_words", &count_words<Device>);
  m.impl("transpose_words", &transpose_words<Device>);
  m.impl("mask_stream", &mask_stream<Device>);
}

}  // namespace blokern::mask_ops
