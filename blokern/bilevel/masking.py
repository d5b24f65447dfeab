"""From scores to masks: what every pruning method shares."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from blokern import ops
from blokern._names import unknown_name
from blokern.bilevel.ends import ends_of
from blokern.ops import Scope
from blokern.sparse import SparseMask, masks_of, to_dense
from blokern.sparse.maskable import maskable

__all__ = [
    "Kept",
    "PruningSettings",
    "dense_twin",
    "excluded",
    "kept_of",
    "masks_from_scores",
    "prunable",
    "select",
    "whole_layers",
]

ModelT = TypeVar("ModelT", bound=nn.Module)

_GRANULARITIES = ("weight", "filter", "channel", "n:m")
#: Share of the kept weights from which on those chosen by their place are worth a word.
_TIED = 0.1


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """What every pruning method takes.

    Args:
        density: part of the weights that is kept, in (0, 1].
        scope: global ranks the weights of all layers together, layer each layer's alone; whole filters, channels and
            n:m are chosen layer by layer in any case.
        granularity: weight, filter, channel, or n:m, such as 2:4, whose density is n / m.
        exclude: what stays dense: names of weights or of modules, with all below them, or modules; density is of the
            rest.

    Raises:
        TypeError, ValueError: a setting of another type or out of range.

    >>> PruningSettings(density=0.5, granularity="2:4").pattern
    (2, 4)
    """

    density: float = 0.1
    scope: Scope = "global"
    granularity: str = "weight"
    exclude: Sequence[str | nn.Module] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.density, float | int) or isinstance(self.density, bool):
            raise TypeError(f"density must be a float, got {self.density!r}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.scope not in get_args(Scope):
            raise unknown_name("scope", self.scope, get_args(Scope))
        if not isinstance(self.exclude, list | tuple) or not all(
            isinstance(what, str | nn.Module) for what in self.exclude
        ):
            raise TypeError(f"exclude must be a tuple of names or modules, got {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))
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


# --- What is pruned -----------------------------------------------------------------------------------------


def prunable(model: nn.Module, exclude: Sequence[str | nn.Module] = ()) -> dict[str, nn.Parameter]:
    """The weights that can be masked, by parameter name: those of nn.Linear and nn.Conv2d, masked or not, but for what
    :class:`PruningSettings` excludes.

    Warns of the weights that cannot be masked, naming them and why: they stay as they are, and no density is of them.
    Raises ValueError if there is nothing to prune, or if `exclude` names something that the model has not.

    >>> list(prunable(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 2))))
    ['0.weight', '2.weight']
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"model: {name!r} has no shape yet; run the model once before it is pruned")
    left_out = excluded(model, exclude)
    able = maskable(model)
    # By the model, not from the list: a masked layer has zeros for what it has pruned.
    found = {n: model.get_parameter(n) for n, w in able.weights.items() if n not in left_out and w.numel()}
    skipped: dict[str, list[str]] = {}
    for name, why in able.skipped.items():
        if name not in left_out:
            skipped.setdefault(why, []).append(name)
    if not found:
        raise ValueError(
            f"model must have an nn.Linear or nn.Conv2d to prune, got {type(model).__name__}"
            f"{', in which ' if skipped else ''}{_listed(skipped)}{', and all others are excluded' if left_out else ''}"
        )
    if skipped:
        every = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
        rest = every - sum(weight.numel() for weight in able.weights.values())
        warnings.warn(
            f"{100 * rest / every:.3g} % of the model's weights cannot be masked, and stay dense: {_listed(skipped)}",
            stacklevel=3,
        )
    return found


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    """Names, and what is to be said of each, said once of all: "'a.weight' and 3 more must be …; 'b.weight' is …"."""
    return "; ".join(
        f"{some[0]!r}{f' and {len(some) - 1} more' if len(some) > 1 else ''} {said}"
        for said, some in names.items()
    )


def excluded(model: nn.Module, exclude: Sequence[str | nn.Module]) -> set[str]:
    """The names of the parameters that `exclude` means. Raises ValueError for what the model has not.

    >>> sorted(excluded(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), ["1"]))
    ['1.bias', '1.weight']
    """
    paths = {id(module): path for path, module in model.named_modules()}
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: set[str] = set()
    for what in exclude:
        if isinstance(what, nn.Module) and id(what) not in paths:
            raise ValueError(f"exclude: the model has no such module, {type(what).__name__}")
        path = paths[id(what)] if isinstance(what, nn.Module) else what
        if path not in parameters and path not in paths.values():
            near = difflib.get_close_matches(path, [*parameters, *paths.values()], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"exclude: the model has no module or parameter {path!r}{hint}")
        found |= {
            name for name in parameters if name == path or f"{name}.".startswith(f"{path}." if path else "")
        }
    return found


def dense_twin(model: ModelT) -> ModelT:
    """A dense copy of the model, whose pruned weights are zeros; also where a module holds a tensor with a history,
    such as a weight that a hook has made.

    >>> type(dense_twin(nn.Sequential(MaskedLinear(2, 2)))[0]).__name__
    'Linear'
    """
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return to_dense(copy.deepcopy(model, {id(t): t.detach().clone() for t in held if not t.is_leaf}))


def whole_layers(
    model: nn.Module, weights: Mapping[str, Tensor], settings: PruningSettings, example: Any = None
) -> frozenset[str]:
    """Those of the weights that stay whole at the settings' granularity; the model is the caller's to spoil.

    Of filters those that are the model's outputs, of channels those that are its inputs': every layer whose output
    reaches one of the model through no other layer, or that an input reaches so. The model is run on the example's
    inputs for that; without any (None), on some that are made up to fit. A layer that takes no part in that run stays
    whole, too, with a warning.

    Raises ValueError if no inputs are given and none are found, or if all layers would stay whole.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> whole_layers(net, prunable(net), PruningSettings(granularity="filter"))
    frozenset({'1.weight'})
    """
    if settings.granularity not in ("filter", "channel"):
        return frozenset()
    ends = ends_of(model, example)
    own = ends.last if settings.granularity == "filter" else ends.first
    unknown = weights.keys() - ends.called
    if unknown:
        warnings.warn(
            f"granularity {settings.granularity}: {_listed({'stay whole': sorted(unknown)})}, as they take no part "
            "when the model runs in eval mode: whether their filters and channels are the model's own is not known",
            stacklevel=3,
        )
    whole = unknown | (own & weights.keys())
    if len(whole) == len(weights):
        raise ValueError(
            f"granularity {settings.granularity} needs a layer whose {settings.granularity}s are not the model's own "
            f"{'outputs' if settings.granularity == 'filter' else 'inputs'}, got none"
        )
    return frozenset(whole)


# --- Which of it is kept ------------------------------------------------------------------------------------


def masks_from_scores(
    scores: Mapping[str, Tensor], settings: PruningSettings, whole: Collection[str] = ()
) -> dict[str, SparseMask]:
    """:func:`select`, packed: what :func:`blokern.sparse.sparsify` takes.

    Warns where many are kept for their place alone, because their scores equal those of others that are not.

    >>> masks = masks_from_scores({"fc.weight": torch.rand(4, 8)}, PruningSettings(density=0.25))
    >>> masks["fc.weight"].kept
    8
    """
    kept = select(scores, settings, whole)
    if settings.granularity == "weight":
        _warn_of_ties(scores, kept, settings.scope)
    return {name: SparseMask(mask) for name, mask in kept.items()}


def select(
    scores: Mapping[str, Tensor], settings: PruningSettings, whole: Collection[str] = ()
) -> dict[str, Tensor]:
    """Keep the highest scores: a bool mask for each layer, in the order that :func:`prunable` gives them.

    scores: by parameter name, [out, in, ...], of the weight's shape. whole: layers that keep all filters or channels,
    see :func:`whole_layers`. These rank by the L2 norm of their scores; n:m chooses among input channels. All is kept
    of n:m in a layer whose number of input channels is no multiple of m, as in NVIDIA's ASP, and of channels in one
    that has one of them, as a depthwise one. Raises ValueError for a NaN or infinite score, or if n:m fits no layer.

    >>> scores = {"fc.weight": torch.tensor([[3.0, 1.0], [0.0, 2.0]])}
    >>> select(scores, PruningSettings(density=0.5))["fc.weight"]
    tensor([[ True, False],
            [False,  True]])
    """
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise ValueError(f"scores of {name!r} must be finite, got NaN or infinity")
    if settings.granularity == "weight":
        kept = ops.topk_mask([*scores.values()], settings.density, scope=settings.scope)
        return dict(zip(scores, kept, strict=True))
    choose, fits = _choice(settings)
    if settings.pattern is not None and not any(map(fits, scores.values())):
        n, m = settings.pattern
        raise ValueError(f"granularity {n}:{m} needs a layer with a multiple of {m} input channels, got none")
    return {
        name: choose(score) if fits(score) and name not in whole else torch.ones_like(score, dtype=torch.bool)
        for name, score in scores.items()
    }


def _choice(settings: PruningSettings) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], bool]]:
    """A layer's mask of its scores, and whether it can have one; not of single weights."""
    density = settings.density
    if settings.pattern is not None:
        n, m = settings.pattern
        return lambda score: ops.nm_mask(score, n, m, dim=1), lambda score: score.shape[1] % m == 0
    if settings.granularity == "filter":
        return lambda score: ops.filter_mask(score, density), lambda score: True
    return lambda score: ops.channel_mask(score, density), lambda score: score.shape[1] > 1


def _warn_of_ties(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], scope: Scope) -> None:
    """Warn where the place of a weight, and not its score, has decided of many."""
    groups = [[*scores]] if scope == "global" else [[name] for name in scores]
    for names in groups:
        chosen = [scores[name][kept[name]] for name in names if bool(kept[name].any())]
        if not chosen:
            continue
        least = min(part.min().item() for part in chosen)
        tied = sum(int((part == least).sum()) for part in chosen)
        pruned = sum(int((~kept[name] & (scores[name] == least)).sum()) for name in names)
        if pruned and tied > _TIED * sum(len(part) for part in chosen):
            whose = "all layers" if scope == "global" else repr(names[0])
            warnings.warn(
                f"scores of {whose}: {tied} weights are kept for their place alone, as the score {least:g} is theirs "
                f"and that of {pruned} pruned ones",
                stacklevel=4,
            )


# --- What is left -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """How many are kept, and of how many.

    masked: of the weights that have a mask. parameters: of all of the model's, biases and what cannot be masked too.
    """

    masked: tuple[int, int]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        (left, masked), (all_left, parameters) = self.masked, self.parameters
        shares = f"{100 * left / max(masked, 1):.4g} %", f"{100 * all_left / max(parameters, 1):.4g} %"
        return (
            f"{shares[0]} of the {masked:,} masked weights kept, {shares[1]} of all {parameters:,} parameters"
        )


def kept_of(model: nn.Module) -> Kept:
    """What is left of a pruned model, counted.

    >>> print(kept_of(sparsify(nn.Sequential(nn.Linear(8, 4)), {"0.weight": torch.eye(4, 8) > 0})))
    12.5 % of the 32 masked weights kept, 22.22 % of all 36 parameters
    """
    masks = masks_of(model).values()
    left, masked = sum(mask.kept for mask in masks), sum(mask.rows * mask.cols for mask in masks)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Kept((left, masked), (parameters - masked + left, parameters))
