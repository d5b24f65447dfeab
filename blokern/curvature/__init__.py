"""Second-order products of a loss, without ever forming a matrix."""

from blokern.curvature.linearization import Linearization, LossFn, ggnvp, hvp, linearize, mixed_hvp

__all__ = ["Linearization", "LossFn", "ggnvp", "hvp", "linearize", "mixed_hvp"]
