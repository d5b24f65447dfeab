"""Pruning methods that BiP is measured against: a model and some batches in, masks out.

Every method works on a copy: the model keeps its weights, buffers, gradients and modes. What a model has pruned already
comes last in any ranking. Batches are those of :mod:`blokern.bilevel.loss`, on the model's device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import count, takewhile
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from blokern.bilevel import schedule
from blokern.bilevel.loss import (
    HALVES,
    Criterion,
    LossModule,
    ModelLoss,
    Widened,
    call,
    checked_batches,
    cross_entropy,
    first_of,
    loss_of,
    map_tensors,
    samples,
    tensors_in,
    widened,
)
from blokern.bilevel.masking import (
    PruningSettings,
    dense_twin,
    excluded,
    masks_from_scores,
    prunable,
    select,
    whole_layers,
)
from blokern.bilevel.pruning_settings import (
    GraSPSettings,
    HydraSettings,
    IMPSettings,
    OMPSettings,
    RandomPruningSettings,
    SNIPSettings,
    SynFlowSettings,
)
from blokern.bilevel.step import check_types
from blokern.distributed import Processes
from blokern.sparse import SparseMask, masks_of

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

Batches: TypeAlias = Iterable[Any]
Weights: TypeAlias = Mapping[str, nn.Parameter]
Whole: TypeAlias = Collection[str]
Scores: TypeAlias = dict[str, Tensor]


SettingsT = TypeVar("SettingsT", bound=PruningSettings)


class Pruner(ABC, Generic[SettingsT]):
    """A method that scores a model's weights, of which the highest are kept.

    Of several `processes` that have the same model, each gives its own batches, as many as the others, and all get the
    masks of the batches together. loss_fn: (model, x, y) → the mean loss and the logits, such as
    :func:`blokern.bilevel.loss.model_loss` makes of a loss of logits; the cross-entropy takes labels of samples, pixels
    and tokens, and probabilities. Raises TypeError for settings of another method.
    """

    settings_type: ClassVar[type[PruningSettings]]

    def __init__(
        self,
        settings: SettingsT,
        processes: Processes = Processes(),  # noqa: B008  # frozen
        loss_fn: ModelLoss = cross_entropy,
    ) -> None:
        check_types(settings=(settings, self.settings_type), processes=(processes, Processes))
        self.settings = settings
        self.processes = processes
        self.loss_fn = loss_fn

    def masks(self, model: nn.Module, batches: Batches = ()) -> dict[str, SparseMask]:
        """A mask for each weight of :func:`blokern.bilevel.masking.prunable`, by parameter name.

        Whole filters and channels ask for the network's outputs and inputs: it is run on the first batch, or, without
        batches, on inputs made up to fit. Weights of half precision count in float32. Warns of weights that cannot be
        masked. Raises ValueError for a model without others, for scores that are not finite, and if the method needs
        batches and iterating over them gives none; TypeError or ValueError for a batch that is none.
        """
        check_types(model=(model, nn.Module))
        settings, before = self.settings, masks_of(model)
        left_out = sorted(excluded(model, settings.exclude))
        example = None
        if settings.granularity in ("filter", "channel"):
            example, batches = first_of(batches)
        # Outside of whatever surrounds the call, as scores must not depend on it.
        with torch.inference_mode(False), torch.enable_grad():
            twin = dense_twin(model)
            if any(p.dtype in HALVES for p in twin.parameters()):
                twin.float()
                example, batches = map_tensors(example, widened), Widened(batches)
            weights = prunable(twin, left_out)
            for name, weight in weights.items():
                if weight.is_meta:
                    raise ValueError(
                        f"model: {name!r} is on the meta device, without values; load them first"
                    )
                weight.requires_grad_()
            with torch.autocast(next(iter(weights.values())).device.type, enabled=False):
                whole = whole_layers(twin, weights, settings, example)
                scores = self._scores(twin, weights, batches, whole)
        for name in scores.keys() & before.keys():
            scores[name] = _pruned_last(scores[name], before[name].to_dense(), settings)
        return masks_from_scores(scores, settings, whole)

    @abstractmethod
    def _scores(self, model: nn.Module, weights: Weights, batches: Batches, whole: Whole = ()) -> Scores:
        """The weights' scores; `model`, whose weights these are, is the method's to spoil. whole: layers that keep all
        filters, or channels."""

    def _gradients(
        self,
        model: nn.Module,
        weights: Weights,
        batches: Batches,
        loss_fn: ModelLoss,
        along: Mapping[str, Tensor] | None = None,
    ) -> Scores:
        """∂/∂weights of the mean loss over all batches; of its gradient's product with `along`, where given."""
        leaves = list(weights.values())
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        total = leaves[0].new_zeros((), dtype=torch.int64)
        for x, y in checked_batches(batches):
            size = samples(x)
            loss, _ = loss_of(loss_fn, model, x, y)
            if not loss.requires_grad:
                raise ValueError(
                    "loss_fn must give a loss that depends on the model's weights, got a constant"
                )
            if along is not None:
                first = _gradient(loss, leaves, create_graph=True)
                loss = torch.stack([(g * v).sum() for g, v in zip(first, along.values(), strict=True)]).sum()
            if loss.requires_grad:  # a gradient may be constant
                for sum_, gradient in zip(sums, _gradient(loss, leaves), strict=True):
                    sum_ += gradient * size
            total += size
        self.processes.sum_([*sums, total])
        return {name: sum_ / total for name, sum_ in zip(weights, sums, strict=True)}


class OMP(Pruner[OMPSettings]):
    """One-shot magnitude pruning: |θ|.

    Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015.

    >>> masks = OMP(OMPSettings(density=0.1)).masks(model)
    """

    settings_type = OMPSettings

    def _scores(self, model: nn.Module, weights: Weights, batches: Batches, whole: Whole = ()) -> Scores:
        return {name: weight.detach().abs() for name, weight in weights.items()}


class RandomPruning(Pruner[RandomPruningSettings]):
    """Uniformly random scores, the same for every model of these shapes.

    >>> masks = RandomPruning(RandomPruningSettings(density=0.1, seed=1)).masks(model)
    """

    settings_type = RandomPruningSettings

    def _scores(self, model: nn.Module, weights: Weights, batches: Batches, whole: Whole = ()) -> Scores:
        generator = torch.Generator().manual_seed(self.settings.seed)
        # float64: among millions of float32 draws many are equal, and the lower index would win.
        return {
            name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
            for name, weight in weights.items()
        }


class SNIP(Pruner[SNIPSettings]):
    """Connection sensitivity |θ ⊙ g|, g the gradient of the mean loss over all batches, in train mode.

    Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019; here at the
    weights as given, which the paper draws anew.

    >>> masks = SNIP(SNIPSettings(density=0.1)).masks(model, [(x, y)])
    """

    settings_type = SNIPSettings

    def _scores(self, model: nn.Module, weights: Weights, batches: Batches, whole: Whole = ()) -> Scores:
        model.train()
        gradients = self._gradients(model, weights, batches, self.loss_fn)
        return {name: (weight * gradients[name]).detach().abs() for name, weight in weights.items()}


class GraSP(Pruner[GraSPSettings]):
    """Gradient signal preservation: prunes the weights of the highest −θ ⊙ Hg, in train mode.

    g and H are gradient and Hessian of the mean loss over all batches, logits divided by the temperature; −θ ⊙ Hg is to
    first order what pruning a weight changes ‖g‖² by, halved. Filters and channels rank by their sums. Batches are
    iterated over twice. A `loss_fn` that is not of :func:`blokern.bilevel.loss.model_loss`, or a loss that the model
    computes itself, needs temperature 1: ValueError.

    Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020; the
    temperature is the released code's.

    >>> masks = GraSP(GraSPSettings(density=0.1)).masks(model, [(x, y)])
    """

    settings_type = GraSPSettings

    def _scores(self, model: nn.Module, weights: Weights, batches: Batches, whole: Whole = ()) -> Scores:
        model.train()
        loss_fn = self._tempered()
        gradients = self._gradients(model, weights, batches, loss_fn)
        products = self._gradients(model, weights, batches, loss_fn, along=gradients)
        scores = {name: (weight * products[name]).detach() for name, weight in weights.items()}
        if self.settings.granularity in ("filter", "channel"):
            dim = 0 if self.settings.granularity == "filter" else 1
            return {name: _ranked_by_sum(score, dim) for name, score in scores.items()}
        return scores

    def _tempered(self) -> ModelLoss:
        temperature, loss_fn = self.settings.temperature, self.loss_fn
        if isinstance(loss_fn, Criterion):
            return replace(loss_fn, temperature=temperature)
        if temperature != 1.0:
            raise ValueError(
                f"temperature must be 1 for a loss_fn that takes its own logits, got {temperature:g}: they cannot be "
                "divided; give loss_fn=model_loss(criterion), or temperature=1"
            )
        return loss_fn


class SynFlow(Pruner[SynFlowSettings]):
    """Synaptic flow |θ ⊙ ∂R/∂θ|, R the summed output of the network of absolute values for an image of ones.

    Pruned little by little, which keeps every layer alive; of the batches only the images' shape is used. In float64
    and eval mode. As in the released code all parameters and buffers are replaced by absolute values; BatchNorm's
    running means by zeros, their value at the initialisation where that code prunes: the flow must not become negative.
    n:m patterns, which keep every layer alive anyway, are chosen in one round. Of tokens, nn.Embedding gives ones.

    Raises ValueError where there is no such flow, as it is negative or not finite: what subtracts (LayerNorm,
    GroupNorm) or exponentiates (attention) is not monotone in absolute values.

    Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic flow",
    NeurIPS 2020, algorithm 1.

    >>> masks = SynFlow(SynFlowSettings(density=0.1)).masks(model, [(x, y)])
    """

    settings_type = SynFlowSettings

    def _scores(self, model: nn.Module, weights: Weights, batches: Batches, whole: Whole = ()) -> Scores:
        x = map_tensors(next(checked_batches(batches))[0], _ones)
        model.double().eval()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, args, output: torch.ones_like(output))

        settings = self.settings
        rounds = settings.rounds if settings.pattern is None else 1
        for i in range(1, rounds + 1):
            outputs = [t for t in tensors_in(call(model, x)) if t.requires_grad]
            if not outputs:
                raise ValueError("model must have an output that depends on its weights, got none")
            flow = _gradient(torch.stack([t.sum() for t in outputs]).sum(), [*weights.values()])
            scores = {n: (w * g).detach() for (n, w), g in zip(weights.items(), flow, strict=True)}
            for name, score in scores.items():
                _check_flow(name, score)
                score.abs_()
            if i < rounds:
                kept = select(scores, replace(settings, density=settings.density ** (i / rounds)), whole)
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

    def _scores(self, model: nn.Module, weights: Weights, batches: Batches, whole: Whole = ()) -> Scores:
        settings = self.settings
        loss = LossModule(model.train().requires_grad_(False), self.loss_fn)
        scores = {name: scaled_magnitudes(weight).requires_grad_() for name, weight in weights.items()}
        optimizer = torch.optim.SGD(scores.values(), settings.score_lr, momentum=settings.score_momentum)
        for epoch in range(settings.score_epochs):
            # Within an epoch the rate stays, as in the released code: batches need not have a length.
            optimizer.param_groups[0]["lr"] = schedule.learning_rate(
                epoch, settings.score_epochs, peak=settings.score_lr, schedule="cosine"
            )
            for batch in checked_batches(batches):
                sizes = {name: score.abs() for name, score in scores.items()}
                kept = select(sizes, settings, whole)
                # In value the mask, in gradient the score.
                masked = {
                    f"model.{name}": weight * (kept[name] + (sizes[name] - sizes[name].detach()))
                    for name, weight in weights.items()
                }
                optimizer.zero_grad()
                torch.autograd.backward(functional_call(loss, masked, batch))
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

    def masks(self, model: nn.Module, density: float, batches: Batches = ()) -> dict[str, SparseMask]:
        """The largest of the weights that the trained model has left. batches, raises: as :meth:`Pruner.masks`."""
        words = {field.name: getattr(self.settings, field.name) for field in fields(PruningSettings)}
        return OMP(OMPSettings(**{**words, "density": density})).masks(model, batches)


def scaled_magnitudes(weight: Tensor) -> Tensor:
    """√(6 / fan_in) |θ| / max |θ| as a new tensor: where scores that are trained start from.

    >>> scaled_magnitudes(torch.tensor([[1.0, -2.0, 0.0]]))
    tensor([[0.7071, 1.4142, 0.0000]])
    """
    size = weight.detach().abs()
    fan_in = math.prod(weight.shape[1:])
    return size * (math.sqrt(6.0 / fan_in) / size.max().clamp(min=torch.finfo(size.dtype).tiny))


def _ranked_by_sum(score: Tensor, dim: int) -> Tensor:
    """Scores whose groups' L2 norms rank as the sums of the given ones, which have signs, do; all above 0."""
    sums = score.double().sum([d for d in range(score.dim()) if d != dim], keepdim=True)
    least, most = sums.min(), sums.max()
    return (sums - least + (most - least)).expand_as(score)


def _pruned_last(score: Tensor, mask: Tensor, settings: PruningSettings) -> Tensor:
    """The score, in which what the mask has pruned ranks last: single weights, or groups that it keeps nothing of."""
    if settings.granularity not in ("filter", "channel"):
        return score.where(mask, torch.finfo(score.dtype).min)
    others = [d for d in range(score.dim()) if d != (0 if settings.granularity == "filter" else 1)]
    least = torch.finfo(score.dtype).tiny ** 0.5  # whose square is not 0: norms rank
    return score.where(score != 0, least).where(mask.sum(others, keepdim=True) > 0, 0.0)


def _check_flow(name: str, flow: Tensor) -> None:
    """Raises ValueError unless this may be a flow through a network of absolute values."""
    if not bool(flow.isfinite().all()):
        raise ValueError(
            f"scores of {name!r} must be finite, got NaN or infinity: the flow through a network of absolute values, "
            "in which exp and softmax overflow; try another method"
        )
    if flow.numel() and flow.min() < -1e-9 * flow.abs().max():
        raise ValueError(
            f"scores of {name!r} must be a synaptic flow, which is not negative, got {flow.min().item():.3g}: the "
            "network is not monotone in absolute values, as LayerNorm, GroupNorm and attention are not; try another "
            "method"
        )


def _gradient(loss: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """∂loss/∂leaves, zeros where there is none."""
    return [
        *torch.autograd.grad(
            loss, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
    ]


def _ones(x: Tensor) -> Tensor:
    """Of one sample, ones where it is an image, in float64; tokens and masks as they are."""
    if not x.is_floating_point() and x.dtype != torch.uint8:
        return x[:1]
    return torch.ones(1, *x.shape[1:], dtype=torch.float64, device=x.device)
