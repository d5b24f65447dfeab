// The sparse ops on CPU tensors: how their work is shared among threads.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "sparse/skinny.h"
#include "sparse/stream.h"
#include "sparse/torch_ops.h"
#include "support/scratch.h"
#include "threads.h"

namespace blokern {

struct Cpu {
  template <class Kernel>
  static void run(const Tensor& /*like*/, int64_t count, int64_t cost, Kernel kernel) {
    at::parallel_for(0, count, grain(cost), [&](int64_t begin, int64_t end) { kernel(begin, end); });
  }

  template <class T>
  static void apply_mask(const MaskWords& mask, const T* weight, T* to, int64_t begin, int64_t end) {
    blokern::apply_mask<T>(mask, {weight, mask.cols, 1}, to, begin, end);
  }
};

inline Tensor masked_weight(const Tensor& weight, const Tensor& words) {
  return masked_weight<Cpu>(weight, words);
}

// A product of fewer multiplications is not worth the choice between sparse and dense; and torch has no fast
// float64 convolution.
inline bool may_be_dense(const Tensor& weight, int64_t positions) {
  return weight.scalar_type() != at::kDouble && weight.numel() * positions >= 1 << 20;
}

// The stream of a [rows, cols] matrix. Its start is checked to the last, since wherever it points is read and
// written; what `column` holds is checked by those who walk it.
inline Stream stream_of(const Tensor& start, const Tensor& column, int64_t rows, int64_t cols,
                        int64_t block) {
  const Stream stream = shaped_stream(start, column, rows, cols, block);
  const int64_t parts = stream.blocks() * rows;
  bool is_sorted = stream.start[0] == 0;
  for (int64_t i = 0; i < parts; ++i) is_sorted &= stream.start[i] <= stream.start[i + 1];
  TORCH_CHECK_VALUE(is_sorted && stream.start[parts] == column.numel(),
                    "the mask's stream is not that of a [", rows, ", ", cols, "] matrix");
  return stream;
}

// Each place of the stream's rows [begin, end) must be in [0, count). Threads check theirs as they come to
// them, so that the walk then has them in its cache.
inline void check_places(const Stream& stream, int64_t count, const char* name, int64_t begin, int64_t end) {
  uint32_t most = 0;
  bool any = false;
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    most = std::max(most, largest_place(stream.column + start[begin], start[end] - start[begin]));
    any |= start[begin] < start[end];
  }
  TORCH_CHECK_VALUE(!any || most < count, "the stream's ", name, " must be in [0, ", count, "), got ",
                    static_cast<int32_t>(most));
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
