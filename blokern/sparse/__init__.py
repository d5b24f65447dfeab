"""Pruned networks that are really faster: masked layers in the place of dense ones."""

from blokern.ops.mask import SparseMask
from blokern.sparse.compact import compact
from blokern.sparse.convert import from_csr, from_torch_prune, to_csr, to_torch_prune
from blokern.sparse.layout import (
    SamplesInnermostAdaptiveAvgPool2d,
    SamplesInnermostAvgPool2d,
    SamplesInnermostBatchNorm2d,
    SamplesInnermostMaxPool2d,
    is_samples_innermost,
    samples_innermost,
    to_samples_innermost,
)
from blokern.sparse.modules import MaskedConv2d, MaskedLinear, masks_of, sparsify, to_dense
from blokern.sparse.packed import PackedLinear, pack

__all__ = [
    "MaskedConv2d",
    "MaskedLinear",
    "PackedLinear",
    "SamplesInnermostAdaptiveAvgPool2d",
    "SamplesInnermostAvgPool2d",
    "SamplesInnermostBatchNorm2d",
    "SamplesInnermostMaxPool2d",
    "SparseMask",
    "compact",
    "from_csr",
    "from_torch_prune",
    "is_samples_innermost",
    "masks_of",
    "pack",
    "samples_innermost",
    "sparsify",
    "to_csr",
    "to_dense",
    "to_samples_innermost",
    "to_torch_prune",
]
