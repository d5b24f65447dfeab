"""The fused ops. :mod:`blokern.ops.reference` defines each in plain torch."""

from blokern.ops.attack import (
    apgd_step_,
    fast_bat_step,
    pgd_step,
    pgd_step_,
    project,
    project_,
    random_start,
)
from blokern.ops.mask import SparseMask
from blokern.ops.products import masked_linear, sddmm, spmm
from blokern.ops.types import Norm, PerSample

__all__ = [
    "Norm",
    "PerSample",
    "SparseMask",
    "apgd_step_",
    "fast_bat_step",
    "masked_linear",
    "pgd_step",
    "pgd_step_",
    "project",
    "project_",
    "random_start",
    "sddmm",
    "spmm",
]
