"""Pruned networks that are really faster: masked layers in the place of dense ones."""

from blokern.ops.mask import SparseMask
from blokern.sparse.modules import MaskedConv2d, MaskedLinear, masks_of, sparsify, to_dense

__all__ = ["MaskedConv2d", "MaskedLinear", "SparseMask", "masks_of", "sparsify", "to_dense"]
