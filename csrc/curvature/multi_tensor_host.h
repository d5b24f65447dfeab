// Products and updates of lists of tensors on any device: checks, layout. Arithmetic:
// multi_tensor_<device>. Devices: register_multi_tensor_cpu.cpp, register_cuda.cpp. A Device has
// run(list, make, kernel), which gives the kernel make<T>(i), the parameters of the list's i-th tensor of
// type T, and sums(list, make, kernel), the same for a kernel that sums: float64, one a column.
#pragma once

#include <ATen/ops/empty_strided.h>
#include <c10/util/strides.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

#include "curvature/multi_tensor.h"
#include "curvature/stacks.h"
#include "support/dispatch.h"

namespace blokern::multi_tensor_ops {

using checks::element;

// The tensors of a list are stacks [K, ...] of K columns, on one device.
inline void check_list(at::TensorList list, const char* name) {
  TORCH_CHECK_VALUE(!list.empty(), name, " must have at least one tensor, got an empty list");
  const std::string first = element(name, 0);
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string own = element(name, i);
    checks::floating(list[i], own.c_str());
    TORCH_CHECK_VALUE(list[i].dim() >= 1 && list[i].size(0) == list[0].size(0), own,
                      " must be a stack of as many as the others, [K, ...], got shape ", list[i].sizes());
    checks::same_device(list[i], own.c_str(), list[0], first.c_str());
  }
}

inline void check_like(at::TensorList list, const char* name, at::TensorList like, const char* like_name) {
  TORCH_CHECK_VALUE(list.size() == like.size(), name, " must have as many tensors as ", like_name, ", ",
                    like.size(), ", got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    checks::same_images(list[i], element(name, i).c_str(), like[i], element(like_name, i).c_str());
  }
}

inline Tensor coefficients(const Tensor& t, const char* name, at::TensorList like) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kDouble, name, " must be float64, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == like[0].size(0), name, " must have shape [", like[0].size(0),
                    "], one value a column, got ", t.sizes());
  checks::same_device(t, name, like[0], "the tensors");
  return t.clone(at::MemoryFormat::Contiguous);  // it may lie in what is written
}

// Elements of a column.
inline int64_t column_size(const Tensor& t) { return t.size(0) == 0 ? 0 : t.numel() / t.size(0); }

// Where a list's elements lie: the strides of each tensor, its columns dense and one behind another.
using Strides = std::vector<c10::DimVector>;

inline Strides strides_of(at::TensorList list) {
  Strides all;
  for (const Tensor& t : list) {
    const bool dense = t.is_non_overlapping_and_dense() && (t.size(0) < 2 || t.stride(0) == column_size(t));
    all.push_back(dense ? c10::DimVector(t.strides()) : c10::contiguous_strides(t.sizes()));
  }
  return all;
}

// A list's tensors, in copies where they do not lie so.
class Arranged {
 public:
  Arranged(at::TensorList list, const Strides& strides) : list_(list) {
    for (size_t i = 0; i < list.size(); ++i) {
      const Tensor& t = list[i];
      dense_.push_back(t.strides() == at::IntArrayRef(strides[i])
                           ? t
                           : at::empty_strided(t.sizes(), strides[i], t.options()).copy_(t));
    }
  }

  template <class T>
  const T* data(size_t i) const {
    return dense_[i].template const_data_ptr<T>();
  }

 protected:
  at::TensorList list_;
  std::vector<Tensor> dense_;
};

// The same of a list that is written, and what of it is in copies brought back at the end.
class ArrangedInPlace : public Arranged {
 public:
  ArrangedInPlace(at::TensorList list, const Strides& strides) : Arranged(list, strides) {
    for (const Tensor& t : dense_) data_.push_back(t.mutable_data_ptr());
  }

  template <class T>
  T* data(size_t i) const {
    return static_cast<T*>(data_[i]);
  }
  void finish() const {
    for (size_t i = 0; i < list_.size(); ++i) {
      if (!dense_[i].is_same(list_[i])) list_[i].copy_(dense_[i]);
      if (!list_[i].is_inference()) list_[i].unsafeGetTensorImpl()->bump_version();
    }
  }

 private:
  std::vector<void*> data_;
};

template <class Device>
Tensor multi_tensor_dot(at::TensorList a, at::TensorList b) {
  check_list(a, "a");
  check_like(b, "b", a, "a");
  const Strides strides = strides_of(a);
  const Arranged first(a, strides), second(b, strides);
  return Device::sums(
      a, [&]<class T>(size_t i) { return Dot<T>{first.data<T>(i), second.data<T>(i)}; }, BLOKERN_KERNEL(dot));
}

template <class Device>
void multi_tensor_axpby(at::TensorList y, at::TensorList x, const Tensor& a, const Tensor& b) {
  check_list(y, "y");
  check_like(x, "x", y, "y");
  checks::writable_and_apart({{y, "y", true}, {x, "x", false}}, /*or_same=*/true);
  const Tensor of_x = coefficients(a, "a", y), of_y = coefficients(b, "b", y);
  const auto *const first = of_x.const_data_ptr<double>(), *const second = of_y.const_data_ptr<double>();
  const Strides strides = strides_of(y);
  const Arranged from(x, strides);
  const ArrangedInPlace to(y, strides);
  Device::run(
      y, [&]<class T>(size_t i) { return Axpby<T>{to.data<T>(i), from.data<T>(i), first, second}; },
      BLOKERN_KERNEL(axpby));
  to.finish();
}

template <class Device>
Tensor cg_update(at::TensorList x, at::TensorList r, at::TensorList p, at::TensorList ap,
                 const Tensor& alpha) {
  check_list(x, "x");
  check_like(r, "r", x, "x");
  check_like(p, "p", x, "x");
  check_like(ap, "ap", x, "x");
  checks::writable_and_apart({{x, "x", true}, {r, "r", true}, {p, "p", false}, {ap, "ap", false}},
                             /*or_same=*/true);
  const Tensor steps = coefficients(alpha, "alpha", x);
  const auto* const step = steps.const_data_ptr<double>();
  const Strides strides = strides_of(x);
  const Arranged along(p, strides), image(ap, strides);
  const ArrangedInPlace solution(x, strides), residual(r, strides);
  const auto make = [&]<class T>(size_t i) {
    return CgUpdate<T>{solution.data<T>(i), residual.data<T>(i), along.data<T>(i), image.data<T>(i), step};
  };
  Tensor squares = Device::sums(x, make, BLOKERN_KERNEL(blokern::cg_update));
  solution.finish();
  residual.finish();
  return squares;
}

template <class Device>
void implement(torch::Library& m) {
  m.impl("multi_tensor_dot", multi_tensor_dot<Device>);
  m.impl("multi_tensor_axpby_", multi_tensor_axpby<Device>);
  m.impl("cg_update_", cg_update<Device>);
}

}  // namespace blokern::multi_tensor_ops
