// The sparse family's steps over a list of layers on CPU tensors: checks, layout, threads. Arithmetic:
// bip_score_step_cpu.cpp, bip_released_step_cpu.cpp, masked_sgd_step_cpu.cpp.
#include <torch/library.h>

#include <string>

#include "sparse/bip_released_step.h"
#include "sparse/bip_score_step.h"
#include "sparse/masked_sgd_step.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

std::string element(const char* list, size_t i) { return list + ("[" + std::to_string(i) + "]"); }

void check_count(at::TensorList list, const char* name, at::TensorList like, const char* like_name) {
  TORCH_CHECK_VALUE(list.size() == like.size(), name, " must have as many tensors as ", like_name, ", ",
                    like.size(), ", got ", list.size());
}

void check_rate(double value, const char* name) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, name, " must be finite and at least 0, got ", value);
}

void check_like(const Tensor& t, const std::string& name, const Tensor& like, const std::string& like_name) {
  checks::same_images(t, name.c_str(), like, like_name.c_str());
  checks::constant(t, name.c_str());
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

const uint64_t* checked_words(const Tensor& words, const std::string& name, int64_t rows, int64_t cols) {
  TORCH_CHECK_TYPE(words.scalar_type() == at::kLong, name, " must be int64, got ", words.scalar_type());
  TORCH_CHECK_VALUE(
      words.dim() == 2 && words.size(0) == rows && words.size(1) == row_words(cols) && words.is_contiguous(),
      name, " must be contiguous [", rows, ", ", row_words(cols), "], got ", words.sizes());
  return static_cast<const uint64_t*>(words.const_data_ptr());
}

// What every step takes. `words` may be empty: of a step that asks for no mask.
struct Call {
  at::TensorList values, grads, words, buffers;
  SgdRates rates;
};

// step(layer, i, begin, end) for rows [begin, end) of each layer i, its threads beside one another. All is
// checked before anything is written.
template <class Step>
void over_layers(const Call& call, const char* values_name, Step&& step) {
  const auto& [values, grads, words, buffers, rates] = call;
  check_rate(rates.lr, "lr");
  check_rate(rates.momentum, "momentum");
  check_rate(rates.weight_decay, "weight_decay");
  check_count(grads, "grads", values, values_name);
  if (!words.empty()) check_count(words, "masks", values, values_name);
  if (rates.momentum != 0 || !buffers.empty()) check_count(buffers, "momentum_buffers", values, values_name);
  for (size_t i = 0; i < values.size(); ++i) {
    const std::string name = element(values_name, i);
    const Tensor& value = values[i];
    TORCH_CHECK_TYPE(value.scalar_type() == at::kFloat || value.scalar_type() == at::kDouble, name,
                     " must be float64 or float32, got ", value.scalar_type());
    TORCH_CHECK_VALUE(value.dim() >= 2, name, " must have at least two dimensions, [out, ...], got shape ",
                      value.sizes());
    checks::constant(value, name.c_str());
    checks::writable(value, name.c_str());
    check_like(grads[i], element("grads", i), value, name);
    checks::apart(value, name.c_str(), grads[i], element("grads", i).c_str());
    if (!buffers.empty()) {
      const std::string buffer_name = element("momentum_buffers", i);
      check_like(buffers[i], buffer_name, value, name);
      checks::writable(buffers[i], buffer_name.c_str());
      checks::apart(buffers[i], buffer_name.c_str(), value, name.c_str());
      checks::apart(buffers[i], buffer_name.c_str(), grads[i], element("grads", i).c_str());
    }
    if (!words.empty() && value.numel() > 0)
      checked_words(words[i], element("masks", i), value.size(0), value.numel() / value.size(0));
  }
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].numel() == 0) continue;
    const int64_t rows = values[i].size(0), cols = values[i].numel() / rows;
    const InPlace value(values[i]);
    const Tensor grad = grads[i].contiguous();
    std::optional<InPlace> buffer;
    if (!buffers.empty()) buffer.emplace(buffers[i]);
    dispatch(values[i].scalar_type(), [&]<class T>() {
      if constexpr (!std::is_same_v<T, at::BFloat16>) {
        const SgdLayer<T> layer{
            rows,
            cols,
            value.data<T>(),
            grad.const_data_ptr<T>(),
            buffer ? buffer->data<T>() : nullptr,
            words.empty() ? nullptr : static_cast<const uint64_t*>(words[i].const_data_ptr()),
            rates};
        at::parallel_for(0, rows, grain(cols), [&](int64_t b, int64_t e) { step(layer, i, b, e); });
      }
    });
    value.finish();
    if (buffer) buffer->finish();
  }
}

double checked_inverse(double gamma) {
  TORCH_CHECK_VALUE(gamma > 0, "gamma must be positive, or inf for no implicit term, got ", gamma);
  return 1 / gamma;
}

void bip_score_step_op(at::TensorList scores, at::TensorList weights, at::TensorList grads,
                       at::TensorList words, at::TensorList buffers, double lr, double gamma, double momentum,
                       double weight_decay) {
  const double implicit = checked_inverse(gamma);
  check_count(weights, "weights", scores, "scores");
  check_count(words, "masks", scores, "scores");
  std::vector<Tensor> dense;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_like(weights[i], element("weights", i), scores[i], element("scores", i));
    checks::apart(scores[i], element("scores", i).c_str(), weights[i], element("weights", i).c_str());
    if (i < buffers.size())
      checks::apart(buffers[i], element("momentum_buffers", i).c_str(), weights[i],
                    element("weights", i).c_str());
    dense.push_back(weights[i].contiguous());
  }
  over_layers({scores, grads, words, buffers, {lr, momentum, weight_decay}}, "scores",
              [&]<class T>(const SgdLayer<T>& layer, size_t i, int64_t b, int64_t e) {
                bip_score_step(layer, dense[i].const_data_ptr<T>(), implicit, b, e);
              });
}

void bip_released_step_op(at::TensorList weights, at::TensorList grads, at::TensorList buffers, double lr,
                          double gamma, double momentum, double weight_decay) {
  const double implicit = checked_inverse(gamma);
  over_layers({weights, grads, {}, buffers, {lr, momentum, weight_decay}}, "weights",
              [&]<class T>(const SgdLayer<T>& layer, size_t, int64_t b, int64_t e) {
                bip_released_step(layer, implicit, b, e);
              });
}

void masked_sgd_step_op(at::TensorList weights, at::TensorList grads, at::TensorList words,
                        at::TensorList buffers, double lr, double momentum, double weight_decay) {
  check_count(words, "masks", weights, "weights");
  over_layers(
      {weights, grads, words, buffers, {lr, momentum, weight_decay}}, "weights",
      [&]<class T>(const SgdLayer<T>& layer, size_t, int64_t b, int64_t e) { masked_sgd_step(layer, b, e); });
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("bip_score_step_", bip_score_step_op);
  m.impl("bip_released_step_", bip_released_step_op);
  m.impl("masked_sgd_step_", masked_sgd_step_op);
}

}  // namespace blokern
