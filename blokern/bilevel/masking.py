"""From scores to masks: what every pruning method shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from blokern import ops
from blokern._names import unknown_name
from blokern.ops import Scope
from blokern.sparse import MaskedConv2d, MaskedLinear, SparseMask
from blokern.sparse.modules import parameter_owners

__all__ = ["PruningSettings", "masks_from_scores", "prunable", "select"]

_GRANULARITIES = ("weight", "filter", "channel", "n:m")


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """What every pruning method takes.

    Args:
        density: part of the weights that is kept, in (0, 1].
        scope: global ranks the weights of all layers together, layer each layer's alone; whole filters, channels and
            n:m are chosen layer by layer in any case.
        granularity: weight, filter, channel, or n:m, such as 2:4, whose density is n / m.

    Raises:
        TypeError, ValueError: a setting of another type or out of range.

    >>> PruningSettings(density=0.5, granularity="2:4").pattern
    (2, 4)
    """

    density: float = 0.1
    scope: Scope = "global"
    granularity: str = "weight"

    def __post_init__(self) -> None:
        if not isinstance(self.density, float | int) or isinstance(self.density, bool):
            raise TypeError(f"density must be a float, got {self.density!r}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.scope not in get_args(Scope):
            raise unknown_name("scope", self.scope, get_args(Scope))
        if self.pattern is None:
            if self.granularity not in _GRANULARITIES[:-1]:
                raise unknown_name("granularity", self.granularity, _GRANULARITIES)
            return
        n, m = self.pattern
        if not 1 <= n <= m:
            raise ValueError(f"granularity must be n:m with 1 <= n <= m, got {self.granularity}")
        if self.density != n / m:
            raise ValueError(
                f"density must be {n / m:g} for granularity {self.granularity}, got {self.density}"
            )

    @property
    def pattern(self) -> tuple[int, int] | None:
        """n and m of granularity n:m, None for the others."""
        found = re.fullmatch(r"(\d+):(\d+)", str(self.granularity))
        return None if found is None else (int(found[1]), int(found[2]))


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all nn.Linear and nn.Conv2d, masked or not, by parameter name, first and last layer included.

    Raises ValueError if there is none, or if one is shared between modules.

    >>> list(prunable(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 2))))
    ['0.weight', '2.weight']
    """
    owners = parameter_owners(model)
    found = {}
    for path, module in model.named_modules():
        # Exact types, as sparsify takes: a subclass may use its weight in another way.
        if type(module) in (nn.Linear, nn.Conv2d, MaskedLinear, MaskedConv2d):
            name = f"{path}.weight".lstrip(".")
            if len(shared := owners[id(module.weight)]) > 1:
                raise ValueError(
                    f"model: {name!r} is shared between {' and '.join(map(repr, shared))}; untie it first"
                )
            found[name] = module.weight
    if not found:
        raise ValueError(f"model must have an nn.Linear or nn.Conv2d to prune, got {type(model).__name__}")
    return found


def masks_from_scores(scores: Mapping[str, Tensor], settings: PruningSettings) -> dict[str, SparseMask]:
    """:func:`select`, packed: what :func:`blokern.sparse.sparsify` takes.

    >>> masks = masks_from_scores({"fc.weight": torch.rand(4, 8)}, PruningSettings(density=0.25))
    >>> masks["fc.weight"].kept
    8
    """
    return {name: SparseMask(mask) for name, mask in select(scores, settings).items()}


def select(scores: Mapping[str, Tensor], settings: PruningSettings) -> dict[str, Tensor]:
    """Keep the highest scores: a bool mask for each layer, in the order that :func:`prunable` gives them.

    scores: by parameter name, [out, in, ...], of the weight's shape. Filters and channels rank by the L2 norm of their
    scores; the last layer keeps all its filters, for they are the classes, and the first all its channels, the
    images'. n:m chooses among input channels, and a layer whose number of them is no multiple of m stays dense, as in
    NVIDIA's ASP. Raises ValueError for a NaN or infinite score, or if n:m fits no layer.

    >>> scores = {"fc.weight": torch.tensor([[3.0, 1.0], [0.0, 2.0]])}
    >>> select(scores, PruningSettings(density=0.5))["fc.weight"]
    tensor([[ True, False],
            [False,  True]])
    """
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise ValueError(f"scores of {name!r} must be finite, got NaN or infinity")
    names, density = list(scores), settings.density
    if settings.granularity == "weight":
        kept = ops.topk_mask(list(scores.values()), density, scope=settings.scope)
        return dict(zip(names, kept, strict=True))
    if settings.pattern is not None:
        n, m = settings.pattern
        if all(score.shape[1] % m for score in scores.values()):
            raise ValueError(
                f"granularity {n}:{m} needs a layer with a multiple of {m} input channels, got none"
            )
        return {
            name: _all(score) if score.shape[1] % m else ops.nm_mask(score, n, m, dim=1)
            for name, score in scores.items()
        }
    filters = settings.granularity == "filter"
    group_mask, whole = (ops.filter_mask, names[-1]) if filters else (ops.channel_mask, names[0])
    return {
        name: _all(score) if name == whole else group_mask(score, density) for name, score in scores.items()
    }


def _all(score: Tensor) -> Tensor:
    return torch.ones_like(score, dtype=torch.bool)
