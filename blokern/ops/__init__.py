"""The fused ops. :mod:`blokern.ops.reference` defines each in plain torch."""

import blokern._backend  # the native ops
import blokern.ops.functorch
import blokern.ops.traced  # noqa: F401  (those of traced graphs)
from blokern.ops.attack import (
    apgd_step_,
    fast_bat_step,
    pgd_step,
    pgd_step_,
    project,
    project_,
    random_start,
)
from blokern.ops.convolution import masked_conv2d
from blokern.ops.curvature import (
    activation_adjoint_tangent,
    batch_norm_adjoint,
    batch_norm_adjoint_tangent,
    batch_norm_tangent,
    layer_norm_adjoint_tangent,
    layer_norm_tangent,
    softmax_cross_entropy_hvp,
)
from blokern.ops.mask import SparseMask
from blokern.ops.multi_tensor import cg_update_, multi_tensor_axpby_, multi_tensor_dot
from blokern.ops.packed import PackedWeight, pack_weight, packed_linear
from blokern.ops.products import masked_linear, sddmm, spmm
from blokern.ops.pruning import bip_released_step_, bip_score_step_, masked_sgd_step_
from blokern.ops.selection import channel_mask, filter_mask, nm_mask, topk_mask
from blokern.ops.types import Norm, PerSample, Scope

__all__ = [
    "Norm",
    "PackedWeight",
    "PerSample",
    "Scope",
    "SparseMask",
    "activation_adjoint_tangent",
    "apgd_step_",
    "batch_norm_adjoint",
    "batch_norm_adjoint_tangent",
    "batch_norm_tangent",
    "bip_released_step_",
    "bip_score_step_",
    "cg_update_",
    "channel_mask",
    "fast_bat_step",
    "filter_mask",
    "layer_norm_adjoint_tangent",
    "layer_norm_tangent",
    "masked_conv2d",
    "masked_linear",
    "masked_sgd_step_",
    "multi_tensor_axpby_",
    "multi_tensor_dot",
    "nm_mask",
    "pack_weight",
    "packed_linear",
    "pgd_step",
    "pgd_step_",
    "project",
    "project_",
    "random_start",
    "sddmm",
    "softmax_cross_entropy_hvp",
    "spmm",
    "topk_mask",
]
