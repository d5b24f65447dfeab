// apgd_step_ on tensors.
#pragma once

#include "attack/apgd_step.h"
#include "attack/host.h"

namespace blokern::attack_ops {

template <class Device>
void apgd_step_(const Tensor& x_adv, const Tensor& x_prev, const Tensor& x, const Tensor& grad,
                double uniform_step_size, double uniform_eps, const OptionalTensor& step_size,
                const OptionalTensor& eps, double momentum, int64_t norm, double clip_min, double clip_max,
                const OptionalTensor& keep, const OptionalTensor& active) {
  const Norm ball = norm_of(norm);
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
  const Size step = size_of<Device, checks::finite>(uniform_step_size, step_size, "step_size", x_adv);
  const Size radius = size_of<Device, checks::radius>(uniform_eps, eps, "eps", x_adv);
  const Tensor mask = checked_active(active, x_adv);
  Tensor counts;
  if (keep.has_value()) {
    TORCH_CHECK_VALUE(ball == Norm::l1, "keep is for norm \"l1\" alone");
    checks::row_vector(*keep, "keep", at::kLong, x_adv);
    counts = keep->contiguous();
    const int64_t* const data = counts.const_data_ptr<int64_t>();
    for (int64_t n = 0; Device::readable && n < counts.numel(); ++n) {
      TORCH_CHECK_VALUE(data[n] >= 1, "keep must be at least 1, got ", data[n], " for sample ", n);
    }
  }
  Arrangement rows(x_adv, ball == Norm::linf && step.uniform() && radius.uniform() && !mask.defined());
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
    run<Device>(ball, x_adv, p, BLOKERN_KERNEL(apgd_step_linf), BLOKERN_KERNEL(apgd_step_l2),
                BLOKERN_KERNEL(apgd_step_l1));
  });
  rows.finish(rows_x_adv, x_adv);
  rows.finish(rows_x_prev, x_prev);
  bump_version(x_adv);
  bump_version(x_prev);
}

}  // namespace blokern::attack_ops
