// pgd_step and pgd_step_ on tensors.
#pragma once

#include "attack/host.h"
#include "attack/pgd_step.h"

namespace blokern::attack_ops {

template <class Device>
void pgd_step_into(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double uniform_step_size,
                   double uniform_eps, const OptionalTensor& step_size, const OptionalTensor& eps,
                   int64_t norm, double clip_min, double clip_max, const OptionalTensor& active,
                   const Tensor& out) {
  const Norm ball = norm_of(norm);
  const Size step = size_of<Device, checks::finite>(uniform_step_size, step_size, "step_size", x_adv);
  const Size radius = size_of<Device, checks::radius>(uniform_eps, eps, "eps", x_adv);
  const Tensor mask = checked_active(active, x_adv);
  const bool flat = ball == Norm::linf && step.uniform() && radius.uniform() && !mask.defined();
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
    run<Device>(ball, x_adv, p, BLOKERN_KERNEL(pgd_step_linf), BLOKERN_KERNEL(pgd_step_l2),
                BLOKERN_KERNEL(pgd_step_l1));
  });
  rows.finish(rows_out, out);
}

inline void check_pgd_step(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double clip_min,
                           double clip_max) {
  check_pair(x_adv, "x_adv", x);
  check_gradient(grad, x_adv, "x_adv");
  checks::box(clip_min, clip_max);
}

template <class Device>
Tensor pgd_step(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double uniform_step_size,
                double uniform_eps, const OptionalTensor& step_size, const OptionalTensor& eps, int64_t norm,
                double clip_min, double clip_max, const OptionalTensor& active) {
  check_pgd_step(x_adv, x, grad, clip_min, clip_max);
  Tensor out = at::empty_like(x_adv);
  pgd_step_into<Device>(x_adv, x, grad, uniform_step_size, uniform_eps, step_size, eps, norm, clip_min,
                        clip_max, active, out);
  return out;
}

template <class Device>
void pgd_step_(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double uniform_step_size,
               double uniform_eps, const OptionalTensor& step_size, const OptionalTensor& eps, int64_t norm,
               double clip_min, double clip_max, const OptionalTensor& active) {
  check_pgd_step(x_adv, x, grad, clip_min, clip_max);
  check_in_place(x_adv, "x_adv", {{x, "x"}, {grad, "grad"}});
  checks::apart(x_adv, "x_adv", step_size, "step_size");
  checks::apart(x_adv, "x_adv", eps, "eps");
  pgd_step_into<Device>(x_adv, x, grad, uniform_step_size, uniform_eps, step_size, eps, norm, clip_min,
                        clip_max, active, x_adv);
  bump_version(x_adv);
}

}  // namespace blokern::attack_ops
