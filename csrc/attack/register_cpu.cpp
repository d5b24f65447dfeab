// The attack ops on CPU tensors: checks, layout, parameters, threads. Arithmetic: <op>_cpu.cpp.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
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

namespace blokern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum class Norm { linf, l2, l1 };

constexpr int64_t kGrain = 16384;  // elements that are worth a thread's wake-up

// run(begin, end) over a batch, on torch's threads: over its elements, or over whole samples.
template <class Run>
void over_elements(const Batch& batch, Run&& run) {
  at::parallel_for(0, batch.samples * batch.size, kGrain, run);
}

template <class Run>
void over_samples(const Batch& batch, Run&& run) {
  if (batch.size == 0) return;
  at::parallel_for(0, batch.samples, std::max<int64_t>(1, kGrain / batch.size), run);
}

// A size as the kernels take it, and the memory it may point to.
struct Size {
  PerSample value;
  Tensor storage;
  bool uniform() const { return value.values == nullptr; }
};

template <void (*check)(double, const char*)>
Size size_of(double value, const char* name, const Tensor& /*like*/) {
  check(value, name);
  return {{value, nullptr}, {}};
}

template <void (*check)(double, const char*)>
Size size_of(const Tensor& values, const char* name, const Tensor& like) {
  checks::row_vector(values, name, at::kDouble, like);
  Tensor storage = values.contiguous();
  const double* const data = storage.const_data_ptr<double>();
  for (int64_t n = 0; n < storage.numel(); ++n) check(data[n], name);
  return {{0, data}, std::move(storage)};
}

Tensor checked_active(const OptionalTensor& active, const Tensor& like) {
  if (!active.has_value()) return {};
  checks::row_vector(*active, "active", at::kBool, like);
  return active->contiguous();
}

const bool* data_or_null(const Tensor& active) {
  return active.defined() ? active.const_data_ptr<bool>() : nullptr;
}

void bump_version(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

void check_pair(const Tensor& x_adv, const char* name, const Tensor& x) {
  checks::images(x_adv, name);
  checks::same_images(x, "x", x_adv, name);
  checks::constant(x_adv, name);
  checks::constant(x, "x");
}

void check_gradient(const Tensor& grad, const Tensor& like, const char* like_name) {
  checks::gradient(grad, like, like_name);
  checks::constant(grad, "grad");
}

void check_in_place(const Tensor& t, const char* name,
                    std::initializer_list<std::pair<const Tensor&, const char*>> inputs) {
  checks::writable(t, name);
  for (const auto& [input, input_name] : inputs) checks::apart_or_same(t, name, input, input_name);
}

// ---- pgd_step

template <Norm norm, class Number>
void pgd_step_into(const Tensor& x_adv, const Tensor& x, const Tensor& grad, Number step_size, Number eps,
                   double clip_min, double clip_max, const OptionalTensor& active, const Tensor& out) {
  const Size step = size_of<checks::finite>(step_size, "step_size", x_adv);
  const Size radius = size_of<checks::radius>(eps, "eps", x_adv);
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
                          {clip_min, clip_max}};
    if constexpr (norm == Norm::linf)
      over_elements(p.batch, [&](int64_t b, int64_t e) { pgd_step_linf(p, b, e); });
    if constexpr (norm == Norm::l2)
      over_samples(p.batch, [&](int64_t b, int64_t e) { pgd_step_l2(p, b, e); });
    if constexpr (norm == Norm::l1)
      over_samples(p.batch, [&](int64_t b, int64_t e) { pgd_step_l1(p, b, e); });
  });
  rows.finish(rows_out, out);
}

void check_pgd_step(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double clip_min,
                    double clip_max) {
  check_pair(x_adv, "x_adv", x);
  check_gradient(grad, x_adv, "x_adv");
  checks::box(clip_min, clip_max);
}

template <Norm norm, class Number>
Tensor pgd_step(const Tensor& x_adv, const Tensor& x, const Tensor& grad, Number step_size, Number eps,
                double clip_min, double clip_max, const OptionalTensor& active) {
  check_pgd_step(x_adv, x, grad, clip_min, clip_max);
  Tensor out = at::empty_like(x_adv);
  pgd_step_into<norm, Number>(x_adv, x, grad, step_size, eps, clip_min, clip_max, active, out);
  return out;
}

template <Norm norm, class Number>
void pgd_step_(const Tensor& x_adv, const Tensor& x, const Tensor& grad, Number step_size, Number eps,
               double clip_min, double clip_max, const OptionalTensor& active) {
  check_pgd_step(x_adv, x, grad, clip_min, clip_max);
  check_in_place(x_adv, "x_adv", {{x, "x"}, {grad, "grad"}});
  pgd_step_into<norm, Number>(x_adv, x, grad, step_size, eps, clip_min, clip_max, active, x_adv);
  bump_version(x_adv);
}

// ---- project

template <Norm norm, class Number>
void project_into(const Tensor& x_adv, const Tensor& x, Number eps, double clip_min, double clip_max,
                  const OptionalTensor& active, const Tensor& out) {
  check_pair(x_adv, "x_adv", x);
  checks::box(clip_min, clip_max);
  const Size radius = size_of<checks::radius>(eps, "eps", x_adv);
  const Tensor mask = checked_active(active, x_adv);
  Arrangement rows(out, norm == Norm::linf && radius.uniform() && !mask.defined());
  const Tensor rows_x_adv = rows.input(x_adv), rows_x = rows.input(x), rows_out = rows.output(out);
  dispatch_image(x_adv.scalar_type(), [&]<class T>() {
    const Project<T> p{rows.batch(data_or_null(mask)),
                       rows.read<T>(rows_x_adv),
                       rows.read<T>(rows_x),
                       rows.write<T>(rows_out),
                       radius.value,
                       {clip_min, clip_max}};
    if constexpr (norm == Norm::linf)
      over_elements(p.batch, [&](int64_t b, int64_t e) { project_linf(p, b, e); });
    if constexpr (norm == Norm::l2) over_samples(p.batch, [&](int64_t b, int64_t e) { project_l2(p, b, e); });
    if constexpr (norm == Norm::l1) over_samples(p.batch, [&](int64_t b, int64_t e) { project_l1(p, b, e); });
  });
  rows.finish(rows_out, out);
}

template <Norm norm, class Number>
Tensor project(const Tensor& x_adv, const Tensor& x, Number eps, double clip_min, double clip_max,
               const OptionalTensor& active) {
  Tensor out = at::empty_like(x_adv);
  project_into<norm, Number>(x_adv, x, eps, clip_min, clip_max, active, out);
  return out;
}

template <Norm norm, class Number>
void project_(const Tensor& x_adv, const Tensor& x, Number eps, double clip_min, double clip_max,
              const OptionalTensor& active) {
  check_in_place(x_adv, "x_adv", {{x, "x"}});
  project_into<norm, Number>(x_adv, x, eps, clip_min, clip_max, active, x_adv);
  bump_version(x_adv);
}

// ---- apgd_step

template <Norm norm, class Number>
void apgd_step_(const Tensor& x_adv, const Tensor& x_prev, const Tensor& x, const Tensor& grad,
                Number step_size, Number eps, double momentum, double clip_min, double clip_max,
                const OptionalTensor& keep, const OptionalTensor& active) {
  check_pair(x_adv, "x_adv", x);
  check_gradient(grad, x_adv, "x_adv");
  checks::same_images(x_prev, "x_prev", x_adv, "x_adv");
  checks::constant(x_prev, "x_prev");
  check_in_place(x_adv, "x_adv", {{x, "x"}, {grad, "grad"}});
  checks::writable(x_prev, "x_prev");
  for (const auto& [other, name] : {std::pair{x_adv, "x_adv"}, {x, "x"}, {grad, "grad"}}) {
    checks::apart(x_prev, "x_prev", other, name);
  }
  checks::box(clip_min, clip_max);
  TORCH_CHECK_VALUE(momentum >= 0 && momentum <= 1, "momentum must be in [0, 1], got ", momentum);
  const Size step = size_of<checks::finite>(step_size, "step_size", x_adv);
  const Size radius = size_of<checks::radius>(eps, "eps", x_adv);
  const Tensor mask = checked_active(active, x_adv);
  Tensor counts;
  if (keep.has_value()) {
    TORCH_CHECK_VALUE(norm == Norm::l1, "keep is for norm \"l1\" alone");
    checks::row_vector(*keep, "keep", at::kLong, x_adv);
    counts = keep->contiguous();
    const int64_t* const data = counts.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < counts.numel(); ++n) {
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
                           {clip_min, clip_max}};
    if constexpr (norm == Norm::linf)
      over_elements(p.batch, [&](int64_t b, int64_t e) { apgd_step_linf(p, b, e); });
    if constexpr (norm == Norm::l2)
      over_samples(p.batch, [&](int64_t b, int64_t e) { apgd_step_l2(p, b, e); });
    if constexpr (norm == Norm::l1)
      over_samples(p.batch, [&](int64_t b, int64_t e) { apgd_step_l1(p, b, e); });
  });
  rows.finish(rows_x_adv, x_adv);
  rows.finish(rows_x_prev, x_prev);
  bump_version(x_adv);
  bump_version(x_prev);
}

// ---- random_start

uint64_t draw_seed(std::optional<at::Generator> generator) {
  auto* const gen =
      at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(gen->mutex_);
  return gen->random64();
}

template <Norm norm, class Number>
Tensor random_start(const Tensor& x, Number eps, double clip_min, double clip_max,
                    std::optional<at::Generator> generator) {
  checks::images(x, "x");
  checks::constant(x, "x");
  checks::box(clip_min, clip_max);
  const Size radius = size_of<checks::radius>(eps, "eps", x);
  Tensor out = at::empty_like(x);
  Arrangement rows(out, /*flat=*/false);
  const Tensor rows_x = rows.input(x), rows_out = rows.output(out);
  const uint64_t seed = draw_seed(std::move(generator));
  dispatch_image(x.scalar_type(), [&]<class T>() {
    const RandomStart<T> p{rows.batch(nullptr), rows.read<T>(rows_x), rows.write<T>(rows_out),
                           radius.value,        {clip_min, clip_max}, seed};
    over_samples(p.batch, [&](int64_t b, int64_t e) {
      if constexpr (norm == Norm::linf) random_start_linf(p, b, e);
      if constexpr (norm == Norm::l2) random_start_l2(p, b, e);
      if constexpr (norm == Norm::l1) random_start_l1(p, b, e);
    });
  });
  rows.finish(rows_out, out);
  return out;
}

// ---- fast_bat_step

template <class Number>
std::tuple<Tensor, Tensor> fast_bat_step_cpu(const Tensor& z, const Tensor& x, const Tensor& grad,
                                             Number step_size, Number eps, double clip_min, double clip_max) {
  check_pair(z, "z", x);
  check_gradient(grad, z, "z");
  checks::box(clip_min, clip_max);
  const Size step = size_of<checks::finite>(step_size, "step_size", z);
  const Size radius = size_of<checks::radius>(eps, "eps", z);
  Tensor delta = at::empty_like(z), free = at::empty_like(z, z.options().dtype(at::kBool));
  Arrangement rows(delta, step.uniform() && radius.uniform());
  const Tensor rows_z = rows.input(z), rows_x = rows.input(x), rows_grad = rows.input(grad);
  const Tensor rows_delta = rows.output(delta), rows_free = rows.output(free);
  dispatch_image_and_grad(z.scalar_type(), grad.scalar_type(), [&]<class T, class G>() {
    const FastBatStep<T, G> p{
        rows.batch(nullptr),       rows.read<T>(rows_z),        rows.read<T>(rows_x), rows.read<G>(rows_grad),
        rows.write<T>(rows_delta), rows.write<bool>(rows_free), step.value,           radius.value,
        {clip_min, clip_max}};
    over_elements(p.batch, [&](int64_t b, int64_t e) { fast_bat_step(p, b, e); });
  });
  rows.finish(rows_delta, delta);
  rows.finish(rows_free, free);
  return {delta, free};
}

template <Norm norm>
void implement(torch::Library& m, const std::string& suffix) {
  const auto impl = [&](const std::string& name, const std::string& tail, auto uniform, auto per_sample) {
    m.impl((name + suffix + tail).c_str(), uniform);
    m.impl((name + suffix + tail + ".per_sample").c_str(), per_sample);
  };
  impl("pgd_step_", "", &pgd_step<norm, double>, &pgd_step<norm, const Tensor&>);
  impl("pgd_step_", "_", &pgd_step_<norm, double>, &pgd_step_<norm, const Tensor&>);
  impl("project_", "", &project<norm, double>, &project<norm, const Tensor&>);
  impl("project_", "_", &project_<norm, double>, &project_<norm, const Tensor&>);
  impl("apgd_step_", "_", &apgd_step_<norm, double>, &apgd_step_<norm, const Tensor&>);
  impl("random_start_", "", &random_start<norm, double>, &random_start<norm, const Tensor&>);
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  implement<Norm::linf>(m, "linf");
  implement<Norm::l2>(m, "l2");
  implement<Norm::l1>(m, "l1");
  m.impl("fast_bat_step", &fast_bat_step_cpu<double>);
  m.impl("fast_bat_step.per_sample", &fast_bat_step_cpu<const Tensor&>);
}

}  // namespace blokern
