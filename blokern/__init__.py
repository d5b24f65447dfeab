"""C++/CUDA kernels and bi-level trainers for robust and sparse PyTorch networks.

:mod:`blokern.ops` has the fused ops, :mod:`blokern.attack` attacks and evaluation, :mod:`blokern.bilevel` training
methods and their trainer, :mod:`blokern.curvature` second-order products, :mod:`blokern.data` and
:mod:`blokern.models` what to train on.
"""

from blokern._version import __version__

__all__ = ["__version__"]
