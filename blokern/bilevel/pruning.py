"""Pruning methods that BiP is measured against: a model and some batches in, masks out.

Every method works on a copy: the model keeps its weights, buffers, gradients and modes. Weights that a model has pruned
already count as zeros. Batches are pairs (x, y), x [N, ...] on the model's device and y [N] int64.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from blokern.bilevel import schedule
from blokern.bilevel.masking import PruningSettings, masks_from_scores, prunable, select
from blokern.bilevel.step import check_types
from blokern.distributed import Processes
from blokern.sparse import SparseMask, to_dense

__all__ = [
    "IMP",
    "OMP",
    "SNIP",
    "GraSP",
    "GraSPSettings",
    "Hydra",
    "HydraSettings",
    "IMPSettings",
    "OMPSettings",
    "Pruner",
    "RandomPruning",
    "RandomPruningSettings",
    "SNIPSettings",
    "SynFlow",
    "SynFlowSettings",
]

Pairs: TypeAlias = Iterable[tuple[Tensor, Tensor]]
Scores: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OMPSettings(PruningSettings):
    """`PruningSettings` of `OMP`."""


@dataclass(frozen=True, kw_only=True)
class IMPSettings(PruningSettings):
    """`PruningSettings` of `IMP`.

    Args:
        rate: part of the remaining weights that a round prunes.
        rewind_epoch: epoch of the dense training whose weights each round starts from again; 0 is the initialisation.
    """

    rate: float = 0.2
    rewind_epoch: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.rate < 1.0:
            raise ValueError(f"rate must be in (0, 1), got {self.rate}")
        _check_count(self, "rewind_epoch", 0)


@dataclass(frozen=True, kw_only=True)
class SNIPSettings(PruningSettings):
    """`PruningSettings` of `SNIP`."""


@dataclass(frozen=True, kw_only=True)
class GraSPSettings(PruningSettings):
    """`PruningSettings` of `GraSP`.

    Args:
        temperature: what the logits are divided by.
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "temperature")


@dataclass(frozen=True, kw_only=True)
class SynFlowSettings(PruningSettings):
    """`PruningSettings` of `SynFlow`.

    Args:
        rounds: how often weights are scored and pruned, to densities density^(i / rounds).
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "rounds", 1)


@dataclass(frozen=True, kw_only=True)
class HydraSettings(PruningSettings):
    """`PruningSettings` of `Hydra`.

    Args:
        score_epochs: passes over the batches that train the scores.
        score_lr: peak learning rate of the scores; it falls to 0 along a cosine.
        score_momentum: of the scores' SGD.
    """

    score_epochs: int = 20
    score_lr: float = 0.1
    score_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "score_epochs", 1)
        _check_positive(self, "score_lr")
        if not 0.0 <= self.score_momentum < 1.0:
            raise ValueError(f"score_momentum must be in [0, 1), got {self.score_momentum}")


@dataclass(frozen=True, kw_only=True)
class RandomPruningSettings(PruningSettings):
    """`PruningSettings` of `RandomPruning`.

    Args:
        seed: of the scores.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "seed", 0)


SettingsT = TypeVar("SettingsT", bound=PruningSettings)


class Pruner(ABC, Generic[SettingsT]):
    """A method that scores a model's weights, of which the highest are kept.

    Of several `processes` that have the same model, each gives its own batches, as many as the others, and all get the
    masks of the batches together.
    """

    settings_type: ClassVar[type[PruningSettings]]

    def __init__(self, settings: SettingsT, processes: Processes = Processes()) -> None:  # noqa: B008  # frozen
        check_types(settings=(settings, self.settings_type), processes=(processes, Processes))
        self.settings = settings
        self.processes = processes

    def masks(self, model: nn.Module, batches: Pairs = ()) -> dict[str, SparseMask]:
        """A mask for each weight of :func:`blokern.bilevel.masking.prunable`, by parameter name.

        Raises ValueError for a model without such weights or with tied ones, for scores that are not finite, and if
        the method needs batches and iterating over them gives none.
        """
        twin = to_dense(copy.deepcopy(model))
        for weight in (weights := prunable(twin)).values():
            weight.requires_grad_()
        with torch.enable_grad():
            scores = self._scores(twin, weights, batches)
        return masks_from_scores(scores, self.settings)

    @abstractmethod
    def _scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Pairs) -> Scores:
        """The weights' scores; `model`, whose weights these are, is the method's to spoil."""

    def _gradients(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        batches: Pairs,
        temperature: float = 1.0,
        along: Mapping[str, Tensor] | None = None,
    ) -> Scores:
        """∂/∂weights of the mean cross-entropy over all batches; of its gradient's product with `along`, where
        given."""
        leaves = list(weights.values())
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        samples = leaves[0].new_zeros((), dtype=torch.int64)
        for x, y in _checked(batches):
            loss = F.cross_entropy(model(x) / temperature, y, reduction="sum")
            if along is not None:
                first = torch.autograd.grad(loss, leaves, create_graph=True)
                loss = torch.stack([(g * v).sum() for g, v in zip(first, along.values(), strict=True)]).sum()
            for total, gradient in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                total += gradient
            samples += len(y)
        self.processes.sum_([*sums, samples])
        return {name: total / samples for name, total in zip(weights, sums, strict=True)}


class OMP(Pruner[OMPSettings]):
    """One-shot magnitude pruning: |θ|.

    Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015.

    >>> masks = OMP(OMPSettings(density=0.1)).masks(model)
    """

    settings_type = OMPSettings

    def _scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Pairs) -> Scores:
        return {name: weight.detach().abs() for name, weight in weights.items()}


class RandomPruning(Pruner[RandomPruningSettings]):
    """Uniformly random scores, the same for every model of these shapes.

    >>> masks = RandomPruning(RandomPruningSettings(density=0.1, seed=1)).masks(model)
    """

    settings_type = RandomPruningSettings

    def _scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Pairs) -> Scores:
        generator = torch.Generator().manual_seed(self.settings.seed)
        # float64: among millions of float32 draws many are equal, and the lower index would win.
        return {
            name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
            for name, weight in weights.items()
        }


class SNIP(Pruner[SNIPSettings]):
    """Connection sensitivity |θ ⊙ g|, g the gradient of the mean cross-entropy over all batches, in train mode.

    Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019; here at the
    weights as given, which the paper draws anew.

    >>> masks = SNIP(SNIPSettings(density=0.1)).masks(model, [(x, y)])
    """

    settings_type = SNIPSettings

    def _scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Pairs) -> Scores:
        model.train()
        gradients = self._gradients(model, weights, batches)
        return {name: (weight * gradients[name]).detach().abs() for name, weight in weights.items()}


class GraSP(Pruner[GraSPSettings]):
    """Gradient signal preservation: prunes the weights of the highest −θ ⊙ Hg, in train mode.

    g and H are gradient and Hessian of the mean cross-entropy over all batches, logits divided by the temperature;
    −θ ⊙ Hg is to first order what pruning a weight changes ‖g‖² by, halved. Filters and channels rank by their sums.
    Batches are iterated over twice.

    Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020; the
    temperature is the released code's.

    >>> masks = GraSP(GraSPSettings(density=0.1)).masks(model, [(x, y)])
    """

    settings_type = GraSPSettings

    def _scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Pairs) -> Scores:
        model.train()
        temperature = self.settings.temperature
        gradients = self._gradients(model, weights, batches, temperature)
        products = self._gradients(model, weights, batches, temperature, along=gradients)
        scores = {name: (weight * products[name]).detach() for name, weight in weights.items()}
        if self.settings.granularity in ("filter", "channel"):
            dim = 0 if self.settings.granularity == "filter" else 1
            return {name: _ranked_by_sum(score, dim) for name, score in scores.items()}
        return scores


class SynFlow(Pruner[SynFlowSettings]):
    """Synaptic flow |θ ⊙ ∂R/∂θ|, R the summed output of the network of absolute values for an image of ones.

    Pruned little by little, which keeps every layer alive; of the batches only the images' shape is used. In float64
    and eval mode. As in the released code all parameters and buffers are replaced by absolute values; BatchNorm's
    running means by zeros, their value at the initialisation where that code prunes: the flow must not become negative.
    n:m patterns, which keep every layer alive anyway, are chosen in one round.

    Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic flow",
    NeurIPS 2020, algorithm 1.

    >>> masks = SynFlow(SynFlowSettings(density=0.1)).masks(model, [(x, y)])
    """

    settings_type = SynFlowSettings

    def _scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Pairs) -> Scores:
        x, _ = next(_checked(batches))
        ones = torch.ones(1, *x.shape[1:], dtype=torch.float64, device=x.device)
        model.double().eval()
        for tensor in model.state_dict().values():
            tensor.abs_()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()

        settings = self.settings
        rounds = settings.rounds if settings.pattern is None else 1
        for i in range(1, rounds + 1):
            flow = torch.autograd.grad(model(ones).sum(), list(weights.values()))
            scores = {
                name: (weight * g).detach().abs()
                for (name, weight), g in zip(weights.items(), flow, strict=True)
            }
            if i < rounds:
                kept = select(scores, replace(settings, density=settings.density ** (i / rounds)))
                with torch.no_grad():
                    for name, weight in weights.items():
                        weight.mul_(kept[name])
        return scores


class Hydra(Pruner[HydraSettings]):
    """Scores trained by SGD at fixed weights, through the mask that they select, straight-through.

    Scores start at √(6 / fan_in) |θ| / max |θ|; their absolute values rank. Batches are iterated over once an epoch,
    in train mode.

    Sehwag, Wang, Mittal, Jana, "HYDRA: Pruning Adversarially Robust Neural Networks", NeurIPS 2020; released code
    with the plain loss, where each layer is pruned alone (scope="layer").

    >>> masks = Hydra(HydraSettings(density=0.1, score_epochs=1)).masks(model, loader)
    """

    settings_type = HydraSettings

    def _scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Pairs) -> Scores:
        settings = self.settings
        model.train().requires_grad_(False)
        scores = {name: scaled_magnitudes(weight).requires_grad_() for name, weight in weights.items()}
        optimizer = torch.optim.SGD(scores.values(), settings.score_lr, momentum=settings.score_momentum)
        for epoch in range(settings.score_epochs):
            # Within an epoch the rate stays, as in the released code: batches need not have a length.
            optimizer.param_groups[0]["lr"] = schedule.learning_rate(
                epoch, settings.score_epochs, peak=settings.score_lr, schedule="cosine"
            )
            for x, y in _checked(batches):
                sizes = {name: score.abs() for name, score in scores.items()}
                kept = select(sizes, settings)
                # In value the mask, in gradient the score.
                masked = {
                    name: weight * (kept[name] + (sizes[name] - sizes[name].detach()))
                    for name, weight in weights.items()
                }
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(functional_call(model, masked, (x,)), y))
                self.processes.average_(score.grad for score in scores.values() if score.grad is not None)
                optimizer.step()
        return {name: score.detach().abs() for name, score in scores.items()}


class IMP:
    """Iterative magnitude pruning with rewinding: prune a fifth, go back to early weights, train, again and again.

    Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020.
    It owns no training; anyone's loop does::

        early = copy.deepcopy(model.state_dict())  # at settings.rewind_epoch
        train(model)
        for density in imp.densities():
            masks = imp.masks(model, density)
            to_dense(model).load_state_dict(early)
            train(sparsify(model, masks))

    >>> IMP(IMPSettings(density=0.6)).densities()
    [0.8, 0.64, 0.6]
    """

    settings_type = IMPSettings

    def __init__(self, settings: IMPSettings) -> None:
        if not isinstance(settings, IMPSettings):
            raise TypeError(f"settings must be IMPSettings, got {type(settings).__name__}")
        self.settings = settings

    def densities(self) -> list[float]:
        """The density after each round: (1 − rate)ⁿ, and last the settings' own; for n:m there is one round."""
        settings = self.settings
        if settings.pattern is not None:
            return [settings.density]
        # Rounded, for 0.8³ to be 0.512: the density asked for is then no round of its own.
        powers = (round((1.0 - settings.rate) ** n, 12) for n in count(1))
        return [*takewhile(lambda density: density > settings.density, powers), settings.density]

    def masks(self, model: nn.Module, density: float) -> dict[str, SparseMask]:
        """The largest of the weights that the trained model has left. Raises as :meth:`Pruner.masks`."""
        words = {"scope": self.settings.scope, "granularity": self.settings.granularity}
        return OMP(OMPSettings(density=density, **words)).masks(model)  # type: ignore[arg-type]


def scaled_magnitudes(weight: Tensor) -> Tensor:
    """√(6 / fan_in) |θ| / max |θ| as a new tensor: where scores that are trained start from.

    >>> scaled_magnitudes(torch.tensor([[1.0, -2.0, 0.0]]))
    tensor([[0.7071, 1.4142, 0.0000]])
    """
    size = weight.detach().abs()
    fan_in = math.prod(weight.shape[1:])
    return size * (math.sqrt(6.0 / fan_in) / size.max().clamp(min=torch.finfo(size.dtype).tiny))


def _ranked_by_sum(score: Tensor, dim: int) -> Tensor:
    """Scores whose groups' L2 norms rank as the sums of the given ones, which have signs, do."""
    sums = score.sum([d for d in range(score.dim()) if d != dim], keepdim=True)
    return (sums - sums.min()).expand_as(score)


def _checked(batches: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, of which there must be one at least."""
    empty = True
    for x, y in batches:
        if x.shape[:1] != y.shape:
            raise ValueError(
                f"batches: y must have shape {tuple(x.shape[:1])} to fit x, got {tuple(y.shape)}"
            )
        empty = False
        yield x, y
    if empty:
        raise ValueError("batches must give at least one (x, y) whenever iterated over, got none")


def _check_count(settings: PruningSettings, name: str, least: int) -> None:
    value = getattr(settings, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_positive(settings: PruningSettings, name: str) -> None:
    value = getattr(settings, name)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
