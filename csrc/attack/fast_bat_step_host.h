// fast_bat_step on tensors.
#pragma once

#include "attack/fast_bat_step.h"
#include "attack/host.h"

namespace blokern::attack_ops {

template <class Device>
std::tuple<Tensor, Tensor> fast_bat_step(const Tensor& z, const Tensor& x, const Tensor& grad,
                                         double uniform_step_size, double uniform_eps,
                                         const OptionalTensor& step_size, const OptionalTensor& eps,
                                         double clip_min, double clip_max) {
  check_pair(z, "z", x);
  check_gradient(grad, z, "z");
  checks::box(clip_min, clip_max);
  const Size step = size_of<Device, checks::finite>(uniform_step_size, step_size, "step_size", z);
  const Size radius = size_of<Device, checks::radius>(uniform_eps, eps, "eps", z);
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

}  // namespace blokern::attack_ops
