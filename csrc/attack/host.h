// What the attack ops' host files share: checks, sizes, the box. <op>_host.h is an op on tensors of any
// device: it checks its arguments, lays them out (arrange.h), and runs the kernels by a Device, of
// register_<device>.cpp:
//   elements(like, p, kernel), samples(like, p, kernel)  call kernel(p, …) where the tensor `like` is, over
//                                                        the batch's elements or over whole samples;
//   readable                                             whether the host may look into a tensor;
//   draw_seed(generator, like)                           draws 64 bits.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "attack/arrange.h"
#include "attack/ball.h"
#include "attack/batch.h"
#include "checks.h"
#include "support/dispatch.h"

namespace blokern::attack_ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The norm of ball and step; as the ops' argument its p, or 0 for infinity.
enum class Norm : int64_t { linf = 0, l1 = 1, l2 = 2 };

inline Norm norm_of(int64_t norm) {
  TORCH_CHECK_VALUE(norm >= 0 && norm <= 2, "norm must be 0 (linf), 1 (l1) or 2 (l2), got ", norm);
  return static_cast<Norm>(norm);
}

// A step size or a radius as the kernels take it, and the memory it may point to.
struct Size {
  PerSample value;
  Tensor storage;
  bool uniform() const { return value.values == nullptr; }
};

// values: float64 [N] beside the images; none: all samples have the uniform one.
template <class Device, void (*check)(double, const char*)>
Size size_of(double uniform, const OptionalTensor& values, const char* name, const Tensor& like) {
  if (!values.has_value()) {
    check(uniform, name);
    return {{uniform, nullptr}, {}};
  }
  checks::row_vector(*values, name, at::kDouble, like);
  Tensor storage = values->contiguous();
  const double* const data = storage.const_data_ptr<double>();
  if constexpr (Device::readable) {
    for (int64_t n = 0; n < storage.numel(); ++n) check(data[n], name);
  }
  return {{0, data}, std::move(storage)};
}

inline Tensor checked_active(const OptionalTensor& active, const Tensor& like) {
  if (!active.has_value()) return {};
  checks::row_vector(*active, "active", at::kBool, like);
  return active->contiguous();
}

inline const bool* data_or_null(const Tensor& active) {
  return active.defined() ? active.const_data_ptr<bool>() : nullptr;
}

// The box, of numbers that T has.
template <class T>
Box box_of(double clip_min, double clip_max) {
  const Box box = box_in<T>({clip_min, clip_max});
  TORCH_CHECK_VALUE(box.min <= box.max, "no ", c10::CppTypeToScalarType<T>::value,
                    " lies between clip_min and clip_max, got clip_min=", checks::digits(clip_min),
                    " and clip_max=", checks::digits(clip_max), ": take float32 images");
  return box;
}

// The norm's kernel: L∞ is elementwise, the others take whole samples.
template <class Device, class P, class Linf, class L2, class L1>
void run(Norm ball, const Tensor& like, const P& p, Linf linf, L2 l2, L1 l1) {
  switch (ball) {
    case Norm::linf:
      return Device::elements(like, p, linf);
    case Norm::l2:
      return Device::samples(like, p, l2);
    case Norm::l1:
      return Device::samples(like, p, l1);
  }
}

inline void bump_version(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

inline void check_pair(const Tensor& x_adv, const char* name, const Tensor& x) {
  checks::images(x_adv, name);
  checks::same_images(x, "x", x_adv, name);
}

inline void check_gradient(const Tensor& grad, const Tensor& like, const char* like_name) {
  checks::gradient(grad, like, like_name);
}

inline void check_in_place(const Tensor& t, const char* name,
                           std::initializer_list<std::pair<const Tensor&, const char*>> inputs) {
  checks::writable(t, name);
  for (const auto& [input, input_name] : inputs) checks::apart_or_same(t, name, input, input_name);
}

}  // namespace blokern::attack_ops
