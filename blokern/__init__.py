"""C++/CUDA kernels and bi-level trainers for robust and sparse PyTorch networks.

:mod:`blokern.ops` has the fused ops, :mod:`blokern.attack` attacks and evaluation, :mod:`blokern.bilevel` training
methods and their trainer, :mod:`blokern.sparse` pruned networks, :mod:`blokern.curvature` second-order products,
:mod:`blokern.data` and :mod:`blokern.models` what to train on. A program that trains calls :func:`keep_freed_memory`.
"""

from blokern._memory import keep_freed_memory
from blokern._version import __version__

__all__ = ["__version__", "keep_freed_memory"]
