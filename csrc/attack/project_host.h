// project and project_ on tensors.
#pragma once

#include "attack/host.h"
#include "attack/project.h"

namespace blokern::attack_ops {

template <class Device>
void project_into(const Tensor& x_adv, const Tensor& x, double uniform_eps, const OptionalTensor& eps,
                  int64_t norm, double clip_min, double clip_max, const OptionalTensor& active,
                  const Tensor& out) {
  const Norm ball = norm_of(norm);
  check_pair(x_adv, "x_adv", x);
  checks::box(clip_min, clip_max);
  const Size radius = size_of<Device, checks::radius>(uniform_eps, eps, "eps", x_adv);
  const Tensor mask = checked_active(active, x_adv);
  Arrangement rows(out, ball == Norm::linf && radius.uniform() && !mask.defined());
  const Tensor rows_x_adv = rows.input(x_adv), rows_x = rows.input(x), rows_out = rows.output(out);
  dispatch_image(x_adv.scalar_type(), [&]<class T>() {
    const Project<T> p{rows.batch(data_or_null(mask)),
                       rows.read<T>(rows_x_adv),
                       rows.read<T>(rows_x),
                       rows.write<T>(rows_out),
                       radius.value,
                       box_of<T>(clip_min, clip_max)};
    run<Device>(ball, x_adv, p, BLOKERN_KERNEL(project_linf), BLOKERN_KERNEL(project_l2),
                BLOKERN_KERNEL(project_l1));
  });
  rows.finish(rows_out, out);
}

template <class Device>
Tensor project(const Tensor& x_adv, const Tensor& x, double uniform_eps, const OptionalTensor& eps,
               int64_t norm, double clip_min, double clip_max, const OptionalTensor& active) {
  Tensor out = at::empty_like(x_adv);
  project_into<Device>(x_adv, x, uniform_eps, eps, norm, clip_min, clip_max, active, out);
  return out;
}

template <class Device>
void project_(const Tensor& x_adv, const Tensor& x, double uniform_eps, const OptionalTensor& eps,
              int64_t norm, double clip_min, double clip_max, const OptionalTensor& active) {
  check_in_place(x_adv, "x_adv", {{x, "x"}});
  checks::apart(x_adv, "x_adv", eps, "eps");
  project_into<Device>(x_adv, x, uniform_eps, eps, norm, clip_min, clip_max, active, x_adv);
  bump_version(x_adv);
}

}  // namespace blokern::attack_ops
