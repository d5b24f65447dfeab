// What the registrations of the sparse ops share on torch's side, whatever the device: dtypes and checks. A
// Device is a struct, Cpu of torch_cpu.h or Cuda of torch_cuda.h: run(like, count, cost, kernel) calls
// kernel(where...) where the tensor `like` is, `where` being a part [begin, end) of `count` rows, each worth
// `cost` elements of work, or the CudaCall that takes all of them; apply_mask(mask, weight, to, where...)
// writes weight ⊙ mask.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include "checks.h"
#include "sparse/stream.h"

namespace blokern {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class F>
void dispatch(at::ScalarType type, F&& f) {
  if (type == at::kDouble) return f.template operator()<double>();
  if (type == at::kFloat) return f.template operator()<float>();
  if (type == at::kHalf) return f.template operator()<at::Half>();
  f.template operator()<at::BFloat16>();
}

inline void check_factor(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  checks::same_device(t, name, like, like_name);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name, ", ",
                   like.scalar_type(), ", got ", t.scalar_type());
}

// What indices of a kernel fit in: more columns no tensor has.
inline constexpr int64_t kMostIndices = std::numeric_limits<int32_t>::max();

inline MaskWords new_words(const Tensor& words, int64_t cols) {
  return {words.size(0), cols, static_cast<uint64_t*>(words.mutable_data_ptr())};
}

// A mask to be read. Bits beyond its last column would be entries beyond the weight's end; the host does not
// look for them on a device, which it would have to wait for.
inline MaskWords words_of(const Tensor& words, int64_t cols) {
  TORCH_CHECK_TYPE(words.scalar_type() == at::kLong, "words must be int64, got ", words.scalar_type());
  TORCH_CHECK_VALUE(cols >= 0 && cols <= kMostIndices, "a mask must have from 0 to 2^31 - 1 columns, got ",
                    cols);
  TORCH_CHECK_VALUE(words.dim() == 2 && words.size(1) == row_words(cols) && words.is_contiguous(),
                    "words must be contiguous [rows, ", row_words(cols), "] for ", cols, " columns, got ",
                    words.sizes());
  // The kernels that only read take the same struct.
  const MaskWords mask{words.size(0), cols,
                       static_cast<uint64_t*>(const_cast<void*>(words.const_data_ptr()))};
  for (int64_t r = 0; words.is_cpu() && cols % 64 != 0 && r < mask.rows; ++r) {
    TORCH_CHECK_VALUE(mask.words[(r + 1) * row_words(cols) - 1] >> (cols % 64) == 0,
                      "words must have no bit beyond the ", cols, " columns of the mask, and has in row ", r);
  }
  return mask;
}

// The same, of a matrix [rows, cols].
inline MaskWords words_of(const Tensor& words, int64_t rows, int64_t cols) {
  const MaskWords mask = words_of(words, cols);
  TORCH_CHECK_VALUE(mask.rows == rows, "words must have ", rows, " rows, got ", words.sizes());
  return mask;
}

// The stream of a [rows, cols] matrix, by its shape: what start and column hold is for the device to trust or
// to check.
inline Stream shaped_stream(const Tensor& start, const Tensor& column, int64_t rows, int64_t cols,
                            int64_t block) {
  TORCH_CHECK_TYPE(start.scalar_type() == at::kInt && column.scalar_type() == at::kInt,
                   "start and column must be int32, got ", start.scalar_type(), " and ",
                   column.scalar_type());
  const Stream stream{rows, cols, block, start.const_data_ptr<int32_t>(), column.const_data_ptr<int32_t>()};
  TORCH_CHECK_VALUE(rows >= 0 && rows <= kMostIndices && cols <= kMostIndices && block > 0 &&
                        block <= kMostIndices && start.is_contiguous() && column.is_contiguous() &&
                        start.numel() == stream.blocks() * rows + 1,
                    "the mask's stream is not that of a [", rows, ", ", cols, "] matrix");
  return stream;
}

// What a mask is handed over as lies where the factors do; a part may be missing.
template <class... Parts>
void check_mask_device(const Tensor& like, const Parts&... parts) {
  const auto check = [&](const auto& part) {
    if constexpr (std::is_same_v<std::decay_t<decltype(part)>, Tensor>)
      checks::same_device(part, "the mask", like, "the factors");
    else if (part.has_value())
      checks::same_device(*part, "the mask", like, "the factors");
  };
  (check(parts), ...);
}

// weight ⊙ mask, contiguous, of a weight [rows, ...].
template <class Device>
Tensor masked_weight(const Tensor& weight, const Tensor& words) {
  const Tensor dense = weight.contiguous();
  Tensor masked = at::empty(weight.sizes(), weight.options());
  if (weight.numel() == 0) return masked;
  checks::same_device(words, "the mask", weight, "weight");
  const MaskWords mask = words_of(words, weight.size(0), weight.numel() / weight.size(0));
  dispatch(weight.scalar_type(), [&]<class T>() {
    Device::run(weight, mask.rows, mask.cols, [&](const auto&... where) {
      Device::apply_mask(mask, dense.const_data_ptr<T>(), masked.mutable_data_ptr<T>(), where...);
    });
  });
  return masked;
}

// A product that is left to torch runs as ours do, whatever the caller's autocast.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;
inline constexpr c10::DispatchKeySet kAutocast{c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA};

}  // namespace blokern
