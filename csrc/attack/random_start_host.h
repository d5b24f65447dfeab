// random_start on tensors.
#pragma once

#include "attack/host.h"
#include "attack/random_start.h"

namespace blokern::attack_ops {

template <class Device>
Tensor random_start(const Tensor& x, double uniform_eps, const OptionalTensor& eps, int64_t norm,
                    double clip_min, double clip_max, int64_t first, std::optional<at::Generator> generator) {
  const Norm ball = norm_of(norm);
  checks::images(x, "x");
  checks::box(clip_min, clip_max);
  TORCH_CHECK_VALUE(first >= 0, "first must be at least 0, got ", first);
  const Size radius = size_of<Device, checks::radius>(uniform_eps, eps, "eps", x);
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
    switch (ball) {
      case Norm::linf:
        return Device::samples(x, p, BLOKERN_KERNEL(random_start_linf));
      case Norm::l2:
        return Device::samples(x, p, BLOKERN_KERNEL(random_start_l2));
      case Norm::l1:
        return Device::samples(x, p, BLOKERN_KERNEL(random_start_l1));
    }
  });
  rows.finish(rows_out, out);
  return out;
}

}  // namespace blokern::attack_ops
