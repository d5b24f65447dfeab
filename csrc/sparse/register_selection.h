// The sparse family's selections on tensors of any device: checks and memory. A Device has
// topk_mask(layers, wanted, any_double), which writes the masks, selection s keeping wanted[s] entries, with
// keys of 64 bits for any_double and of 32 else; and nm_mask(p, scores). Both refuse NaN.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "sparse/nm_mask.h"
#include "sparse/topk_mask.h"
#include "support/dispatch.h"

namespace blokern::selection_ops {

using at::Tensor;

inline Tensor empty_mask(const Tensor& scores) {
  return at::empty(scores.sizes(), scores.options().dtype(at::kBool));
}

// One tensor of topk_mask's list, row-major; its entries are [begin, end) of the whole list's.
struct Layer {
  std::string name;
  Tensor scores, mask;
  int64_t begin, end;
  int64_t selection;  // the one that it takes part in
};

// Python's round: to the nearest, halves to even.
inline int64_t round_product(double density, int64_t entries) {
  return std::llrint(density * static_cast<double>(entries));
}

template <class Device>
std::vector<Tensor> topk_mask(at::TensorList scores, double density, bool per_layer) {
  TORCH_CHECK_VALUE(density > 0 && density <= 1, "density must be in (0, 1], got ", density);
  std::vector<Layer> layers;
  std::vector<Tensor> masks;
  std::vector<int64_t> kept;
  bool any_double = false;
  int64_t end = 0;
  for (const Tensor& t : scores) {
    const auto index = static_cast<int64_t>(layers.size());
    const std::string name = scores.size() == 1 ? "scores" : "scores[" + std::to_string(index) + "]";
    checks::floating(t, name.c_str());
    checks::same_device(t, name.c_str(), scores[0], "scores[0]");
    any_double |= t.scalar_type() == at::kDouble;
    masks.push_back(empty_mask(t));
    layers.push_back({name, t.contiguous(), masks.back(), end, end + t.numel(), per_layer ? index : 0});
    end += t.numel();
    if (per_layer) kept.push_back(round_product(density, t.numel()));
  }
  if (!per_layer) kept.push_back(round_product(density, end));
  Device::topk_mask(layers, kept, any_double);
  return masks;
}

template <class Device>
Tensor nm_mask(const Tensor& scores, int64_t n, int64_t m, int64_t dim) {
  checks::floating(scores, "scores");
  TORCH_CHECK_VALUE(m >= 1, "m must be at least 1, got ", m);
  TORCH_CHECK_VALUE(n >= 1 && n <= m, "n must be in [1, m], got n=", n, " and m=", m);
  const int64_t dims = scores.dim();
  TORCH_CHECK_VALUE(-dims <= dim && dim < dims, "dim must be a dimension of scores, which has ", dims,
                    ", got ", dim);
  if (dim < 0) dim += dims;
  TORCH_CHECK_VALUE(scores.size(dim) % m == 0, "scores must have a multiple of m, ", m,
                    ", entries along dim ", dim, ", got shape ", scores.sizes());
  Tensor mask = empty_mask(scores);
  const Tensor dense = scores.contiguous();
  dispatch_image(scores.scalar_type(), [&]<class T>() {
    Device::nm_mask(NmMask<T>{dense.const_data_ptr<T>(), mask.mutable_data_ptr<bool>(), n, m,
                              c10::multiply_integers(scores.sizes().slice(dim + 1)), scores.numel() / m},
                    scores);
  });
  return mask;
}

template <class Device>
void implement(torch::Library& m) {
  m.impl("topk_mask", &topk_mask<Device>);
  m.impl("nm_mask", &nm_mask<Device>);
}

}  // namespace blokern::selection_ops
