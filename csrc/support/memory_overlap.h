// Which memory strided tensors take. Torch's own at::get_overlap_status leaves it open ("too hard") for all
// that is not dense, as every slice of columns is, and looks at storages, of which one numpy array may have
// several.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace blokern::memory {

struct Dim {
  int64_t size, stride;
};
using Dims = c10::SmallVector<Dim, 6>;

// Dimensions of more than one element, the smallest stride first.
inline Dims dims_of(const at::Tensor& t) {
  Dims dims;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.push_back({t.size(d), t.stride(d)});
  }
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  return dims;
}

// Whether each dimension steps over all that the smaller ones reach: so that every element has a place of its
// own.
inline bool is_nested(const at::Tensor& t) {
  if (t.numel() == 0 || t.is_contiguous()) return true;
  int64_t reach = 0;
  for (const auto& [size, stride] : dims_of(t)) {
    if (stride <= reach) return false;
    reach += (size - 1) * stride;
  }
  return true;
}

// The first byte, and the one after the last.
inline const char* begin_of(const at::Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
inline const char* end_of(const at::Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return begin_of(t) + (last + 1) * static_cast<int64_t>(t.element_size());
}

inline bool are_same(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         a.const_data_ptr() == b.const_data_ptr() &&
         std::equal(a.strides().begin(), a.strides().end(), b.strides().begin());
}

// Whether Σ kᵢ strideᵢ = distance for some |kᵢ| < sizeᵢ, of nested dimensions: those below the largest reach
// less than its stride, so that two of its kᵢ are possible.
inline bool meet(int64_t distance, const Dim* dims, size_t count) {
  if (count == 0) return distance == 0;
  const auto [size, stride] = dims[count - 1];
  const int64_t k = std::abs(distance) / stride, rest = std::abs(distance) % stride;
  return (k < size && meet(rest, dims, count - 1)) || (k + 1 < size && meet(stride - rest, dims, count - 1));
}

// False only where no byte is in both: of tensors whose ranges of addresses cross, this knows it if they have
// the same strides, as slices of one tensor have.
inline bool may_overlap(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || end_of(a) <= begin_of(b) || end_of(b) <= begin_of(a)) return false;
  const auto size = static_cast<int64_t>(a.element_size());
  const int64_t bytes = begin_of(a) - begin_of(b);
  const bool comparable = a.element_size() == b.element_size() && a.sizes() == b.sizes() &&
                          a.strides() == b.strides() && bytes % size == 0 && is_nested(a);
  if (!comparable) return true;
  const Dims dims = dims_of(a);
  return meet(bytes / size, dims.data(), dims.size());
}

}  // namespace blokern::memory
