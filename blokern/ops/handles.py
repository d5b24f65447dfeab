"""Ops as the dispatcher names them, for tables with an entry an op."""

import torch

import blokern.ops.convolution
import blokern.ops.products  # noqa: F401  (they register what is named here)

__all__ = ["CONV2D_WEIGHT", "MASKED_CONV2D", "MASKED_CONV2D_INPUT", "MASKED_CONV2D_WEIGHT", "SDDMM", "SPMM"]

SPMM = torch.ops.blokern.spmm.default
SDDMM = torch.ops.blokern.sddmm.default
MASKED_CONV2D = torch.ops.blokern.masked_conv2d.default
MASKED_CONV2D_INPUT = torch.ops.blokern.masked_conv2d_input.default
MASKED_CONV2D_WEIGHT = torch.ops.blokern.masked_conv2d_weight.default
CONV2D_WEIGHT = torch.ops.blokern.conv2d_weight.default
