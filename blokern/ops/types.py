"""The words the ops share."""

from typing import Literal, TypeAlias

from torch import Tensor

#: The perturbation's norm.
Norm: TypeAlias = Literal["linf", "l2", "l1"]
#: One value for the batch, or a tensor of shape [N] with one a sample.
PerSample: TypeAlias = float | Tensor
#: Where a density holds: over all layers together, or in each.
Scope: TypeAlias = Literal["global", "layer"]
