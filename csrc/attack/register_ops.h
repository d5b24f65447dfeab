// The attack ops on tensors of any device: checks, layout, parameters. A Device, of register_<device>.cpp,
// runs the kernels on them: elements(like, p, kernel) and samples(like, p, kernel) call kernel(p, …) where
// the tensor `like` is, over the batch's elements or over whole samples; readable says whether the host may
// look into a tensor; draw_seed draws from a generator.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "attack/apgd_step.h"
#include "attack/arrange.h"
#include "attack/fast_bat_step.h"
#include "attack/pgd_step.h"
#include "attack/project.h"
#include "attack/random_start.h"
#include "checks.h"
#include "support/dispatch.h"

namespace blokern::attack_ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum class Norm { linf, l2, l1 };

// A size as the kernels take it, and the memory it may point to.
struct Size {
  PerSample value;
  Tensor storage;
  bool uniform() const { return value.values == nullptr; }
};

template <class Device, void (*check)(double, const char*)>
Size size_of(double value, const char* name, const Tensor& /*like*/) {
  check(value, name);
  return {{value, nullptr}, {}};
}

template <class Device, void (*check)(double, const char*)>
Size size_of(const Tensor& values, const char* name, const Tensor& like) {
  checks::row_vector(values, name, at::kDouble, like);
  Tensor storage = values.contiguous();
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

// ---- pgd_step

template <class Device, Norm norm, class Number>
void pgd_step_into(const Tensor& x_adv, const Tensor& x, const Tensor& grad, Number step_size, Number eps,
                   double clip_min, double clip_max, const OptionalTensor& active, const Tensor& out) {
  const Size step = size_of<Device, checks::finite>(step_size, "step_size", x_adv);
  const Size radius = size_of<Device, checks::radius>(eps, "eps", x_adv);
  const Tensor mask = checked_active(active, x_adv);
  const bool flat = norm == Norm::linf && step.uniform() && radius.uniform() && !mask.defined();
  Arrangement rows(out, flat);
  const Tensor rows_x_adv = rows.input(x_adv), rows_x = rows.input(x), rows_grad = rows.input(grad);
  const Tensor rows_out = rows.output(out);
  dispatch_image_and_grad(x_adv.scalar_type(), grad.scalar_type(), [&]<class T, class G>() {
    const PgdStep<T, G> p{rows.batch(data_or_null(mask)),
                          rows.read<T>(rows_x_adv),
                          rows.read<T>(rows_x),
                          rows.read<G>(rows_grad),
                          rows.write<T>(rows_out),
                          step.value,
                          radius.value,
                          box_of<T>(clip_min, clip_max)};
    if constexpr (norm == Norm::linf) Device::elements(x_adv, p, BLOKERN_KERNEL(pgd_step_linf));
    if constexpr (norm == Norm::l2) Device::samples(x_adv, p, BLOKERN_KERNEL(pgd_step_l2));
    if constexpr (norm == Norm::l1) Device::samples(x_adv, p, BLOKERN_KERNEL(pgd_step_l1));
  });
  rows.finish(rows_out, out);
}

inline void check_pgd_step(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double clip_min,
                           double clip_max) {
  check_pair(x_adv, "x_adv", x);
  check_gradient(grad, x_adv, "x_adv");
  checks::box(clip_min, clip_max);
}

template <class Device, Norm norm, class Number>
Tensor pgd_step(const Tensor& x_adv, const Tensor& x, const Tensor& grad, Number step_size, Number eps,
                double clip_min, double clip_max, const OptionalTensor& active) {
  check_pgd_step(x_adv, x, grad, clip_min, clip_max);
  Tensor out = at::empty_like(x_adv);
  pgd_step_into<Device, norm, Number>(x_adv, x, grad, step_size, eps, clip_min, clip_max, active, out);
  return out;
}

template <class Device, Norm norm, class Number>
void pgd_step_(const Tensor& x_adv, const Tensor& x, const Tensor& grad, Number step_size, Number eps,
               double clip_min, double clip_max, const OptionalTensor& active) {
  check_pgd_step(x_adv, x, grad, clip_min, clip_max);
  check_in_place(x_adv, "x_adv", {{x, "x"}, {grad, "grad"}});
  checks::apart(x_adv, "x_adv", step_size, "step_size");
  checks::apart(x_adv, "x_adv", eps, "eps");
  pgd_step_into<Device, norm, Number>(x_adv, x, grad, step_size, eps, clip_min, clip_max, active, x_adv);
  bump_version(x_adv);
}

// ---- project

template <class Device, Norm norm, class Number>
void project_into(const Tensor& x_adv, const Tensor& x, Number eps, double clip_min, double clip_max,
                  const OptionalTensor& active, const Tensor& out) {
  check_pair(x_adv, "x_adv", x);
  checks::box(clip_min, clip_max);
  const Size radius = size_of<Device, checks::radius>(eps, "eps", x_adv);
  const Tensor mask = checked_active(active, x_adv);
  Arrangement rows(out, norm == Norm::linf && radius.uniform() && !mask.defined());
  const Tensor rows_x_adv = rows.input(x_adv), rows_x = rows.input(x), rows_out = rows.output(out);
  dispatch_image(x_adv.scalar_type(), [&]<class T>() {
    const Project<T> p{rows.batch(data_or_null(mask)),
                       rows.read<T>(rows_x_adv),
                       rows.read<T>(rows_x),
                       rows.write<T>(rows_out),
                       radius.value,
                       box_of<T>(clip_min, clip_max)};
    if constexpr (norm == Norm::linf) Device::elements(x_adv, p, BLOKERN_KERNEL(project_linf));
    if constexpr (norm == Norm::l2) Device::samples(x_adv, p, BLOKERN_KERNEL(project_l2));
    if constexpr (norm == Norm::l1) Device::samples(x_adv, p, BLOKERN_KERNEL(project_l1));
  });
  rows.finish(rows_out, out);
}

template <class Device, Norm norm, class Number>
Tensor project(const Tensor& x_adv, const Tensor& x, Number eps, double clip_min, double clip_max,
               const OptionalTensor& active) {
  Tensor out = at::empty_like(x_adv);
  project_into<Device, norm, Number>(x_adv, x, eps, clip_min, clip_max, active, out);
  return out;
}

template <class Device, Norm norm, class Number>
void project_(const Tensor& x_adv, const Tensor& x, Number eps, double clip_min, double clip_max,
              const OptionalTensor& active) {
  check_in_place(x_adv, "x_adv", {{x, "x"}});
  checks::apart(x_adv, "x_adv", eps, "eps");
  project_into<Device, norm, Number>(x_adv, x, eps, clip_min, clip_max, active, x_adv);
  bump_version(x_adv);
}

// ---- apgd_step

template <class Device, Norm norm, class Number>
void apgd_step_(const Tensor& x_adv, const Tensor& x_prev, const Tensor& x, const Tensor& grad,
                Number step_size, Number eps, double momentum, double clip_min, double clip_max,
                const OptionalTensor& keep, const OptionalTensor& active) {
  check_pair(x_adv, "x_adv", x);
  check_gradient(grad, x_adv, "x_adv");
  checks::same_images(x_prev, "x_prev", x_adv, "x_adv");
  check_in_place(x_adv, "x_adv", {{x, "x"}, {grad, "grad"}});
  checks::writable(x_prev, "x_prev");
  for (const auto& [other, name] : {std::pair{x_adv, "x_adv"}, {x, "x"}, {grad, "grad"}}) {
    checks::apart(x_prev, "x_prev", other, name);
  }
  for (const auto& [written, name] : {std::pair{x_adv, "x_adv"}, {x_prev, "x_prev"}}) {
    checks::apart(written, name, step_size, "step_size");
    checks::apart(written, name, eps, "eps");
  }
  checks::box(clip_min, clip_max);
  TORCH_CHECK_VALUE(momentum >= 0 && momentum <= 1, "momentum must be in [0, 1], got ", momentum);
  const Size step = size_of<Device, checks::finite>(step_size, "step_size", x_adv);
  const Size radius = size_of<Device, checks::radius>(eps, "eps", x_adv);
  const Tensor mask = checked_active(active, x_adv);
  Tensor counts;
  if (keep.has_value()) {
    TORCH_CHECK_VALUE(norm == Norm::l1, "keep is for norm \"l1\" alone");
    checks::row_vector(*keep, "keep", at::kLong, x_adv);
    counts = keep->contiguous();
    const int64_t* const data = counts.const_data_ptr<int64_t>();
    for (int64_t n = 0; Device::readable && n < counts.numel(); ++n) {
      TORCH_CHECK_VALUE(data[n] >= 1, "keep must be at least 1, got ", data[n], " for sample ", n);
    }
  }
  Arrangement rows(x_adv, norm == Norm::linf && step.uniform() && radius.uniform() && !mask.defined());
  const Tensor rows_x_adv = rows.in_place(x_adv), rows_x_prev = rows.in_place(x_prev);
  const Tensor rows_x = rows.input(x), rows_grad = rows.input(grad);
  dispatch_image_and_grad(x_adv.scalar_type(), grad.scalar_type(), [&]<class T, class G>() {
    const ApgdStep<T, G> p{rows.batch(data_or_null(mask)),
                           rows.write<T>(rows_x_adv),
                           rows.write<T>(rows_x_prev),
                           rows.read<T>(rows_x),
                           rows.read<G>(rows_grad),
                           step.value,
                           radius.value,
                           momentum,
                           counts.defined() ? counts.const_data_ptr<int64_t>() : nullptr,
                           box_of<T>(clip_min, clip_max)};
    if constexpr (norm == Norm::linf) Device::elements(x_adv, p, BLOKERN_KERNEL(apgd_step_linf));
    if constexpr (norm == Norm::l2) Device::samples(x_adv, p, BLOKERN_KERNEL(apgd_step_l2));
    if constexpr (norm == Norm::l1) Device::samples(x_adv, p, BLOKERN_KERNEL(apgd_step_l1));
  });
  rows.finish(rows_x_adv, x_adv);
  rows.finish(rows_x_prev, x_prev);
  bump_version(x_adv);
  bump_version(x_prev);
}

// ---- random_start

template <class Device, Norm norm, class Number>
Tensor random_start(const Tensor& x, Number eps, double clip_min, double clip_max, int64_t first,
                    std::optional<at::Generator> generator) {
  checks::images(x, "x");
  checks::box(clip_min, clip_max);
  TORCH_CHECK_VALUE(first >= 0, "first must be at least 0, got ", first);
  const Size radius = size_of<Device, checks::radius>(eps, "eps", x);
  Tensor out = at::empty_like(x);
  Arrangement rows(out, /*flat=*/false);
  const Tensor rows_x = rows.input(x), rows_out = rows.output(out);
  const uint64_t seed = Device::draw_seed(std::move(generator), x);
  dispatch_image(x.scalar_type(), [&]<class T>() {
    const RandomStart<T> p{rows.batch(nullptr),
                           rows.read<T>(rows_x),
                           rows.write<T>(rows_out),
                           radius.value,
                           box_of<T>(clip_min, clip_max),
                           seed,
                           first};
    if constexpr (norm == Norm::linf) Device::samples(x, p, BLOKERN_KERNEL(random_start_linf));
    if constexpr (norm == Norm::l2) Device::samples(x, p, BLOKERN_KERNEL(random_start_l2));
    if constexpr (norm == Norm::l1) Device::samples(x, p, BLOKERN_KERNEL(random_start_l1));
  });
  rows.finish(rows_out, out);
  return out;
}

// ---- fast_bat_step

template <class Device, class Number>
std::tuple<Tensor, Tensor> fast_bat_step(const Tensor& z, const Tensor& x, const Tensor& grad,
                                         Number step_size, Number eps, double clip_min, double clip_max) {
  check_pair(z, "z", x);
  check_gradient(grad, z, "z");
  checks::box(clip_min, clip_max);
  const Size step = size_of<Device, checks::finite>(step_size, "step_size", z);
  const Size radius = size_of<Device, checks::radius>(eps, "eps", z);
  Tensor delta = at::empty_like(z), free = at::empty_like(z, z.options().dtype(at::kBool));
  Arrangement rows(delta, step.uniform() && radius.uniform());
  const Tensor rows_z = rows.input(z), rows_x = rows.input(x), rows_grad = rows.input(grad);
  const Tensor rows_delta = rows.output(delta), rows_free = rows.output(free);
  dispatch_image_and_grad(z.scalar_type(), grad.scalar_type(), [&]<class T, class G>() {
    const FastBatStep<T, G> p{rows.batch(nullptr),
                              rows.read<T>(rows_z),
                              rows.read<T>(rows_x),
                              rows.read<G>(rows_grad),
                              rows.write<T>(rows_delta),
                              rows.write<bool>(rows_free),
                              step.value,
                              radius.value,
                              box_of<T>(clip_min, clip_max)};
    Device::elements(z, p, BLOKERN_KERNEL(blokern::fast_bat_step));
  });
  rows.finish(rows_delta, delta);
  rows.finish(rows_free, free);
  return {delta, free};
}

template <class Device, Norm norm>
void implement(torch::Library& m, const std::string& suffix) {
  const auto impl = [&](const std::string& name, const std::string& tail, auto uniform, auto per_sample) {
    m.impl((name + suffix + tail).c_str(), uniform);
    m.impl((name + suffix + tail + ".per_sample").c_str(), per_sample);
  };
  using T = const Tensor&;
  impl("pgd_step_", "", &pgd_step<Device, norm, double>, &pgd_step<Device, norm, T>);
  impl("pgd_step_", "_", &pgd_step_<Device, norm, double>, &pgd_step_<Device, norm, T>);
  impl("project_", "", &project<Device, norm, double>, &project<Device, norm, T>);
  impl("project_", "_", &project_<Device, norm, double>, &project_<Device, norm, T>);
  impl("apgd_step_", "_", &apgd_step_<Device, norm, double>, &apgd_step_<Device, norm, T>);
  impl("random_start_", "", &random_start<Device, norm, double>, &random_start<Device, norm, T>);
}

template <class Device>
void implement_all(torch::Library& m) {
  implement<Device, Norm::linf>(m, "linf");
  implement<Device, Norm::l2>(m, "l2");
  implement<Device, Norm::l1>(m, "l1");
  m.impl("fast_bat_step", &fast_bat_step<Device, double>);
  m.impl("fast_bat_step.per_sample", &fast_bat_step<Device, const Tensor&>);
}

}  // namespace blokern::attack_ops
