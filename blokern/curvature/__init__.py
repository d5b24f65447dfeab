"""Second-order products of a loss, and what is built on them, without ever forming a matrix."""

from blokern.curvature.linearization import Linearization, LossFn, ggnvp, hvp, linearize, mixed_hvp
from blokern.curvature.operators import CurvatureOperator, GGNOperator, HessianOperator
from blokern.curvature.solvers import Operator, Solution, cg_solve, inverse_hvp, neumann_solve
from blokern.curvature.spectrum import (
    RitzValues,
    SpectralDensity,
    TraceEstimate,
    hutchinson_trace,
    lanczos,
    spectral_density,
)

__all__ = [
    "CurvatureOperator",
    "GGNOperator",
    "HessianOperator",
    "Linearization",
    "LossFn",
    "Operator",
    "RitzValues",
    "Solution",
    "SpectralDensity",
    "TraceEstimate",
    "cg_solve",
    "ggnvp",
    "hutchinson_trace",
    "hvp",
    "inverse_hvp",
    "lanczos",
    "linearize",
    "mixed_hvp",
    "neumann_solve",
    "spectral_density",
]
