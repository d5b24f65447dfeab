// The curvature ops' registrations, for a Device of register_<device>.cpp.
#pragma once

#include <torch/library.h>

#include "curvature/activation_host.h"
#include "curvature/batch_norm_host.h"
#include "curvature/layer_norm_host.h"
#include "curvature/softmax_cross_entropy_hvp_host.h"

namespace blokern {

template <class Device>
void implement(torch::Library& m) {
  m.impl("tanh_adjoint_tangent", activation_ops::plain<Device, Tanh>);
  m.impl("sigmoid_adjoint_tangent", activation_ops::plain<Device, Sigmoid>);
  m.impl("silu_adjoint_tangent", activation_ops::plain<Device, Silu>);
  m.impl("gelu_adjoint_tangent", activation_ops::plain<Device, Gelu>);
  m.impl("gelu_tanh_adjoint_tangent", activation_ops::plain<Device, GeluTanh>);
  m.impl("softplus_adjoint_tangent", activation_ops::softplus<Device>);
  m.impl("elu_adjoint_tangent", activation_ops::elu<Device>);
  m.impl("softmax_cross_entropy_hvp", losses_ops::softmax_cross_entropy_hvp<Device>);
  m.impl("batch_norm_tangent", batch_norm_ops::batch_norm_tangent<Device>);
  m.impl("batch_norm_adjoint", batch_norm_ops::batch_norm_adjoint<Device>);
  m.impl("batch_norm_adjoint_tangent", batch_norm_ops::batch_norm_adjoint_tangent<Device>);
  m.impl("layer_norm_tangent", layer_norm_ops::layer_norm_tangent<Device>);
  m.impl("layer_norm_adjoint_tangent", layer_norm_ops::layer_norm_adjoint_tangent<Device>);
}

}  // namespace blokern
