// Which memory strided tensors take. Torch's own at::get_overlap_status leaves it open ("too hard") for
// all that is not dense, as every slice of columns is, and looks at storages, of which one numpy array
// may have several.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstdint>

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

// k · stride, k in [low, high].
struct Term {
  int64_t stride, low, high;
};

inline void add_term(c10::SmallVectorImpl<Term>& terms, const Dim& dim, bool is_first) {
  if (dim.size == 1 || dim.stride == 0) return;
  const auto known =
      std::find_if(terms.begin(), terms.end(), [&](const Term& t) { return t.stride == dim.stride; });
  Term& term = known != terms.end() ? *known : terms.emplace_back(Term{dim.stride, 0, 0});
  (is_first ? term.high : term.low) += is_first ? dim.size - 1 : 1 - dim.size;
}

// Whether the terms, the smallest stride first, add up to the distance for some k. Of tensors that people
// make, few k are possible for each term: after `budget` of them the answer is yes.
inline bool add_up(int64_t distance, const Term* terms, size_t count, int& budget) {
  if (count == 0) return distance == 0;
  int64_t least = 0, most = 0;  // of the smaller ones
  for (size_t i = 0; i + 1 < count; ++i) {
    least += terms[i].low * terms[i].stride;
    most += terms[i].high * terms[i].stride;
  }
  const auto& [stride, low, high] = terms[count - 1];
  for (int64_t k = std::max(low, (distance - most) / stride - 1);
       k <= std::min(high, (distance - least) / stride + 1); ++k) {
    if (--budget < 0) return true;
    const int64_t rest = distance - k * stride;
    if (rest >= least && rest <= most && add_up(rest, terms, count - 1, budget)) return true;
  }
  return false;
}

// Whether some byte is in both; may be said of tensors whose strides are such a riddle that it takes too long
// to find out.
inline bool may_overlap(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || end_of(a) <= begin_of(b) || end_of(b) <= begin_of(a)) return false;
  c10::SmallVector<Term, 8> terms;
  for (const at::Tensor* t : {&a, &b}) {
    const auto bytes = static_cast<int64_t>(t->element_size());
    add_term(terms, {bytes, 1}, t == &a);
    for (int64_t d = 0; d < t->dim(); ++d) add_term(terms, {t->size(d), t->stride(d) * bytes}, t == &a);
  }
  std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.stride < b.stride; });
  int budget = 10'000;
  return add_up(begin_of(b) - begin_of(a), terms.data(), terms.size(), budget);
}

}  // namespace blokern::memory
