// The sparse family's steps over a list of layers on tensors of any device: checks, layout. A Device has
// layers(like, list, step), which runs step(list..., where...) on the SgdLayers of one dtype: on the CPU one
// layer's rows after the other's, on CUDA all layers at once.
#pragma once

#include <torch/library.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "sparse/bip_released_step.h"
#include "sparse/bip_score_step.h"
#include "sparse/masked_sgd_step.h"
#include "sparse/torch_ops.h"

namespace blokern::pruning_ops {

using checks::element;

inline void check_count(at::TensorList list, const char* name, at::TensorList like, const char* like_name) {
  TORCH_CHECK_VALUE(list.size() == like.size(), name, " must have as many tensors as ", like_name, ", ",
                    like.size(), ", got ", list.size());
}

inline void check_rate(double value, const char* name) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, name, " must be finite and at least 0, got ", value);
}

inline void check_like(const Tensor& t, const std::string& name, const Tensor& like,
                       const std::string& like_name) {
  checks::same_images(t, name.c_str(), like, like_name.c_str());
}

// A tensor that a step writes: worked on where it lies, or in a row-major copy that `finish` brings back.
class InPlace {
 public:
  explicit InPlace(const Tensor& t) : t_(t), dense_(t.contiguous()) {}

  template <class T>
  T* data() const {
    return dense_.mutable_data_ptr<T>();
  }
  void finish() const {
    if (!dense_.is_same(t_)) t_.copy_(dense_);
    if (!t_.is_inference()) t_.unsafeGetTensorImpl()->bump_version();
  }

 private:
  Tensor t_, dense_;
};

inline void check_words(const Tensor& words, const std::string& name, const Tensor& like,
                        const std::string& like_name) {
  const int64_t rows = like.size(0), cols = like.numel() / rows;
  checks::same_device(words, name.c_str(), like, like_name.c_str());
  TORCH_CHECK_TYPE(words.scalar_type() == at::kLong, name, " must be int64, got ", words.scalar_type());
  TORCH_CHECK_VALUE(
      words.dim() == 2 && words.size(0) == rows && words.size(1) == row_words(cols) && words.is_contiguous(),
      name, " must be contiguous [", rows, ", ", row_words(cols), "], got ", words.sizes());
}

// What every step takes. `words` may be empty, of a step that asks for no mask, and `weights`, of one that
// asks for no other tensor.
struct Call {
  at::TensorList values, weights, grads, words, buffers;
  SgdRates rates;
};

inline void check_call(const Call& call, const char* values_name) {
  const auto& [values, weights, grads, words, buffers, rates] = call;
  check_rate(rates.lr, "lr");
  check_rate(rates.momentum, "momentum");
  check_rate(rates.weight_decay, "weight_decay");
  check_count(grads, "grads", values, values_name);
  if (!weights.empty()) check_count(weights, "weights", values, values_name);
  if (!words.empty()) check_count(words, "masks", values, values_name);
  if (rates.momentum != 0 || !buffers.empty()) check_count(buffers, "momentum_buffers", values, values_name);
  for (size_t i = 0; i < values.size(); ++i) {
    const std::string name = element(values_name, i);
    const Tensor& value = values[i];
    TORCH_CHECK_TYPE(value.scalar_type() == at::kFloat || value.scalar_type() == at::kDouble, name,
                     " must be float64 or float32, got ", value.scalar_type());
    TORCH_CHECK_VALUE(value.dim() >= 2, name, " must have at least two dimensions, [out, ...], got shape ",
                      value.sizes());
    checks::same_device(value, name.c_str(), values[0], element(values_name, 0).c_str());
    check_like(grads[i], element("grads", i), value, name);
    if (!weights.empty()) check_like(weights[i], element("weights", i), value, name);
    if (!buffers.empty()) check_like(buffers[i], element("momentum_buffers", i), value, name);
    if (!words.empty() && value.numel() > 0) check_words(words[i], element("masks", i), value, name);
  }
  checks::writable_and_apart({{values, values_name, true},
                              {weights, "weights", false},
                              {grads, "grads", false},
                              {buffers, "momentum_buffers", true}},
                             /*or_same=*/false);
}

// All is checked before anything is written.
template <class Device, class Step>
void over_layers(const Call& call, const char* values_name, Step step) {
  check_call(call, values_name);
  const auto& [values, weights, grads, words, buffers, rates] = call;
  std::vector<InPlace> written;
  std::vector<Tensor> read;
  written.reserve(values.size() + buffers.size());
  std::tuple<std::vector<SgdLayer<float>>, std::vector<SgdLayer<double>>> layers;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].numel() == 0) continue;
    dispatch(values[i].scalar_type(), [&]<class T>() {
      if constexpr (std::is_same_v<T, Accum<T>>) {
        const auto reads = [&](const Tensor& t) {
          read.push_back(t.contiguous());
          return read.back().const_data_ptr<T>();
        };
        const auto writes = [&](const Tensor& t) {
          written.emplace_back(t);
          return written.back().data<T>();
        };
        const int64_t rows = values[i].size(0);
        std::get<std::vector<SgdLayer<T>>>(layers).push_back(
            {rows, values[i].numel() / rows, writes(values[i]), weights.empty() ? nullptr : reads(weights[i]),
             reads(grads[i]), buffers.empty() ? nullptr : writes(buffers[i]),
             words.empty() ? nullptr : static_cast<const uint64_t*>(words[i].const_data_ptr()), rates});
      }
    });
  }
  const auto run = [&](const auto& list) {
    if (!list.empty()) Device::layers(values[0], list, step);
  };
  std::apply([&](const auto&... lists) { (run(lists), ...); }, layers);
  for (const InPlace& t : written) t.finish();
}

inline double checked_inverse(double gamma) {
  TORCH_CHECK_VALUE(gamma > 0, "gamma must be positive, or inf for no implicit term, got ", gamma);
  return 1 / gamma;
}

template <class Device>
void bip_score_step_(at::TensorList scores, at::TensorList weights, at::TensorList grads,
                     at::TensorList words, at::TensorList buffers, double lr, double gamma, double momentum,
                     double weight_decay) {
  const double implicit = checked_inverse(gamma);
  check_count(weights, "weights", scores, "scores");
  check_count(words, "masks", scores, "scores");
  over_layers<Device>(
      {scores, weights, grads, words, buffers, {lr, momentum, weight_decay}}, "scores",
      [=](const auto& layers, const auto&... where) { bip_score_step(layers, implicit, where...); });
}

template <class Device>
void bip_released_step_(at::TensorList weights, at::TensorList grads, at::TensorList buffers, double lr,
                        double gamma, double momentum, double weight_decay) {
  const double implicit = checked_inverse(gamma);
  over_layers<Device>(
      {weights, {}, grads, {}, buffers, {lr, momentum, weight_decay}}, "weights",
      [=](const auto& layers, const auto&... where) { bip_released_step(layers, implicit, where...); });
}

template <class Device>
void masked_sgd_step_(at::TensorList weights, at::TensorList grads, at::TensorList words,
                      at::TensorList buffers, double lr, double momentum, double weight_decay) {
  check_count(words, "masks", weights, "weights");
  over_layers<Device>({weights, {}, grads, words, buffers, {lr, momentum, weight_decay}}, "weights",
                      [](const auto& layers, const auto&... where) { masked_sgd_step(layers, where...); });
}

template <class Device>
void implement(torch::Library& m) {
  m.impl("bip_score_step_", &bip_score_step_<Device>);
  m.impl("bip_released_step_", &bip_released_step_<Device>);
  m.impl("masked_sgd_step_", &masked_sgd_step_<Device>);
}

}  // namespace blokern::pruning_ops
