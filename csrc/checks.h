// The one place for checks of shape, dtype, device and value, and for what they say. A wrong value is a
// ValueError, a wrong type a TypeError; each names the argument, what came and what was expected.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "memory_overlap.h"

namespace blokern::checks {

inline bool is_half(at::ScalarType t) { return t == at::kBFloat16 || t == at::kHalf; }

// Of a floating type that kernels exist for.
inline void floating(const at::Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble || is_half(t.scalar_type()), name,
      " must be float64, float32, bfloat16 or float16, got ", t.scalar_type());
}

// A batch of images, [N, ...].
inline void images(const at::Tensor& t, const char* name) {
  floating(t, name);
  TORCH_CHECK_VALUE(t.dim() >= 1, name, " must have a batch dimension, [N, ...], got a scalar tensor");
}

inline void same_shape(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, " must have the shape of ", like_name, ", ",
                    like.sizes(), ", got ", t.sizes());
}

inline void same_device(const at::Tensor& t, const char* name, const at::Tensor& like,
                        const char* like_name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on the device of ", like_name, ", ",
                    like.device(), ", got ", t.device());
}

inline void same_images(const at::Tensor& t, const char* name, const at::Tensor& like,
                        const char* like_name) {
  same_shape(t, name, like, like_name);
  same_device(t, name, like, like_name);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name, ", ",
                   like.scalar_type(), ", got ", t.scalar_type());
}

// A gradient has its images' dtype, or is what autocast leaves of float32 images.
inline void gradient(const at::Tensor& grad, const at::Tensor& like, const char* like_name) {
  same_shape(grad, "grad", like, like_name);
  same_device(grad, "grad", like, like_name);
  TORCH_CHECK_TYPE(grad.scalar_type() == like.scalar_type() ||
                       (like.scalar_type() == at::kFloat && is_half(grad.scalar_type())),
                   "grad must have the dtype of ", like_name, ", ", like.scalar_type(),
                   like.scalar_type() == at::kFloat ? ", or be bfloat16 or float16" : "", ", got ",
                   grad.scalar_type());
}

// One value a sample, of the given dtype.
inline void row_vector(const at::Tensor& t, const char* name, at::ScalarType dtype, const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == like.size(0), name, " must have shape [", like.size(0),
                    "], one value a sample, got ", t.sizes());
  same_device(t, name, like, "the images");
}

inline void finite(double value, const char* name) {
  TORCH_CHECK_VALUE(std::isfinite(value), name, " must be finite, got ", value);
}

inline void radius(double value, const char* name) {
  TORCH_CHECK_VALUE(value >= 0, name, " must be at least 0, got ", value);
}

// A number with as many digits as tell it from its neighbours.
inline std::string digits(double value) {
  std::array<char, 32> text;
  return {text.data(), std::to_chars(text.data(), text.data() + text.size(), value).ptr};
}

inline void box(double min, double max) {
  TORCH_CHECK_VALUE(min <= max, "clip_min must be at most clip_max, got clip_min=", digits(min),
                    " and clip_max=", digits(max));
}

// A tensor that is written in place must have one place for each element: views of dense tensors have, and
// what else could is not taken.
inline void writable(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(memory::is_nested(t), name,
                    " is written in place, and some of its elements may share memory (an expanded tensor?): "
                    "clone it first");
}

// Reading an input while writing `t` is sound where they are apart, or exactly the same.
inline void apart_or_same(const at::Tensor& t, const char* name, const at::Tensor& input,
                          const char* input_name) {
  TORCH_CHECK_VALUE(memory::are_same(t, input) || !memory::may_overlap(t, input), name,
                    " is written in place and shares part of its memory with ", input_name,
                    ": clone one of them first");
}

inline void apart(const at::Tensor& t, const char* name, const at::Tensor& other, const char* other_name) {
  TORCH_CHECK_VALUE(!memory::may_overlap(t, other), name, " is written in place and shares memory with ",
                    other_name, ": clone one of them first");
}

inline void apart(const at::Tensor& t, const char* name, const std::optional<at::Tensor>& other,
                  const char* other_name) {
  if (other.has_value()) apart(t, name, *other, other_name);
}

inline std::string element(const char* list, size_t i) { return list + ("[" + std::to_string(i) + "]"); }

// A list that a call takes, and whether it is written in place.
struct List {
  at::TensorList tensors;
  const char* name;
  bool is_written;
};

// Tensors of lists that are written must be so that they can be, and apart from all else that the call takes;
// or, where an op has each element read before it is written, an input may be exactly what stands at its
// place in the list. A sweep over addresses, as pairs would be too many.
inline void writable_and_apart(std::initializer_list<List> lists, bool or_same) {
  struct Item {
    const at::Tensor* t;
    const List* list;
    size_t index;
    const char* begin;
  };
  std::vector<Item> items;
  for (const List& list : lists) {
    for (size_t i = 0; i < list.tensors.size(); ++i) {
      const at::Tensor& t = list.tensors[i];
      if (list.is_written) writable(t, element(list.name, i).c_str());
      if (t.numel() > 0) items.push_back({&t, &list, i, memory::begin_of(t)});
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.begin < b.begin; });
  for (auto a = items.begin(); a != items.end(); ++a) {
    const char* const end = memory::end_of(*a->t);
    for (auto b = a + 1; b != items.end() && b->begin < end; ++b) {
      const Item &written = a->list->is_written ? *a : *b, &other = a->list->is_written ? *b : *a;
      const bool is_itself = or_same && written.index == other.index && !other.list->is_written &&
                             memory::are_same(*written.t, *other.t);
      if (written.list->is_written && !is_itself)
        apart(*written.t, element(written.list->name, written.index).c_str(), *other.t,
              element(other.list->name, other.index).c_str());
    }
  }
}

}  // namespace blokern::checks
