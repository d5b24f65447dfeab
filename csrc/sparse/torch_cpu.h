// What the registrations of the sparse products share on torch's side: dtypes, checks, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "sparse/skinny.h"
#include "sparse/stream.h"
#include "support/scratch.h"

namespace blokern {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16384;  // elements that are worth a thread's wake-up

inline int64_t grain(int64_t elements_a_row) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_a_row));
}

template <class F>
void dispatch(at::ScalarType type, F&& f) {
  if (type == at::kDouble) return f.template operator()<double>();
  if (type == at::kFloat) return f.template operator()<float>();
  f.template operator()<at::BFloat16>();
}

inline void check_float(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble || t.scalar_type() == at::kBFloat16,
      name, " must be float64, float32 or bfloat16, got ", t.scalar_type());
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

// A mask to be read. Bits beyond its last column would be entries beyond the weight's end.
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
  for (int64_t r = 0; cols % 64 != 0 && r < mask.rows; ++r) {
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

// weight ⊙ mask, contiguous, of a weight [rows, ...].
inline Tensor masked_weight(const Tensor& weight, const Tensor& words) {
  const Tensor dense = weight.contiguous();
  Tensor masked = at::empty(weight.sizes(), weight.options());
  const int64_t cols = weight.numel() / weight.size(0);
  const MaskWords mask = words_of(words, weight.size(0), cols);
  dispatch(weight.scalar_type(), [&]<class T>() {
    at::parallel_for(0, mask.rows, grain(cols), [&](int64_t b, int64_t e) {
      apply_mask<T>(mask, {dense.const_data_ptr<T>(), cols, 1}, masked.mutable_data_ptr<T>(), b, e);
    });
  });
  return masked;
}

// A product that is left to torch runs as ours do, whatever the caller's autocast.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;
inline constexpr c10::DispatchKeySet kAutocast{c10::DispatchKey::AutocastCPU};

// A product of fewer multiplications is not worth the choice between sparse and dense; and torch has no fast
// float64 convolution.
inline bool may_be_dense(const Tensor& weight, int64_t positions) {
  return weight.scalar_type() != at::kDouble && weight.numel() * positions >= 1 << 20;
}

// The stream of a [rows, cols] matrix. Its start is checked to the last, since wherever it points is read and
// written; what `column` holds is checked by check_places, by those who walk it.
inline Stream stream_of(const Tensor& start, const Tensor& column, int64_t rows, int64_t cols,
                        int64_t block) {
  TORCH_CHECK_TYPE(start.scalar_type() == at::kInt && column.scalar_type() == at::kInt,
                   "start and column must be int32, got ", start.scalar_type(), " and ",
                   column.scalar_type());
  const Stream stream{rows, cols, block, start.const_data_ptr<int32_t>(), column.const_data_ptr<int32_t>()};
  const auto begins = [&](int64_t parts) {
    bool sorted = stream.start[0] == 0;
    for (int64_t i = 0; i < parts; ++i) sorted &= stream.start[i] <= stream.start[i + 1];
    return sorted && stream.start[parts] == column.numel();
  };
  TORCH_CHECK_VALUE(block > 0 && block <= kMostIndices && cols <= kMostIndices && start.is_contiguous() &&
                        column.is_contiguous() && start.numel() == stream.blocks() * rows + 1 &&
                        begins(stream.blocks() * rows),
                    "the mask's stream is not that of a [", rows, ", ", cols, "] matrix");
  return stream;
}

// Each of a stream's places must be in [0, count). A pass over integers, beside the walk's over panels.
inline void check_places(const Tensor& places, int64_t count, const char* name) {
  const int32_t* const place = places.const_data_ptr<int32_t>();
  uint32_t most = 0;
  for (int64_t i = 0; i < places.numel(); ++i) most = std::max(most, static_cast<uint32_t>(place[i]));
  TORCH_CHECK_VALUE(places.numel() == 0 || most < count, "the stream's ", name, " must be in [0, ", count,
                    "), got ", static_cast<int32_t>(most));
}

inline int64_t kept_entries(const Stream& stream) { return stream.start[stream.blocks() * stream.rows]; }

// body(begin, end) over rows with about the same number of entries, one part a thread. What a row's sum is
// does not depend on the parts.
template <class Body>
void over_rows(const Stream& stream, int64_t work_an_entry, Body&& body) {
  const int64_t entries = kept_entries(stream);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + entries * work_an_entry / kGrain);
  if (threads == 1) return body(0, stream.rows);
  std::vector<int64_t> ends(threads, stream.rows);
  int64_t seen = 0, part = 0;
  for (int64_t r = 0; r < stream.rows && part < threads - 1; ++r) {
    for (int64_t b = 0; b < stream.blocks(); ++b) {
      const int32_t* const start = stream.start + b * stream.rows + r;
      seen += start[1] - start[0];
    }
    // An empty row costs its output alone: counting it as one entry spreads those too.
    while (part < threads - 1 && (seen + r + 1) * threads >= (part + 1) * (entries + stream.rows))
      ends[part++] = r + 1;
  }
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) body(t == 0 ? 0 : ends[t - 1], ends[t]);
  });
}

}  // namespace blokern
