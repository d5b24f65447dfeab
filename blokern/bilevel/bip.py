"""BiP: pruning as bi-level optimisation, of which no second derivative is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from blokern import ops
from blokern._names import unknown_name
from blokern.bilevel.masking import PruningSettings, prunable, select
from blokern.bilevel.settings import check_numbers
from blokern.bilevel.step import Batch, StepResult, check_batch, check_types
from blokern.sparse import MaskedConv2d, MaskedLinear, SparseMask, sparsify

__all__ = ["BiP", "BiPSettings", "ModelLoss", "cross_entropy"]

#: (model, x, y) → the loss, a scalar, and the logits [N, K] that it is of.
ModelLoss: TypeAlias = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
Mode: TypeAlias = Literal["paper", "released"]
MaskedLayer: TypeAlias = MaskedConv2d | MaskedLinear


@dataclass(frozen=True, kw_only=True)
class BiPSettings(PruningSettings):
    """`PruningSettings` of `BiP`.

    Args:
        mode: "paper", or "released" for what the authors' code does, to reproduce it.
        gamma: γ of the lower level's regulariser, which the implicit term is divided by; inf: no such term. None is
            1, or 10⁴ in mode "released", whose code calls 1/γ lr2.
        score_lr: learning rate of the scores at first; the paper's is a tenth of it from 50 % of the run on, a
            hundredth from 75 % on.
        score_momentum, score_weight_decay: of SGD on the scores.
    """

    mode: Mode = "paper"
    gamma: float | None = None
    score_lr: float = 0.1
    score_momentum: float = 0.9
    score_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self)
        if self.mode not in get_args(Mode):
            raise unknown_name("mode", self.mode, get_args(Mode))

    @property
    def implicit_gamma(self) -> float:
        """The γ in use."""
        if self.gamma is None:
            return 1.0 if self.mode == "paper" else 1e4
        return self.gamma


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy, and the logits.

    >>> loss, logits = cross_entropy(model, x, y)
    """
    logits = model(x)
    return F.cross_entropy(logits, y), logits


class BiP:
    """Bi-level pruning: weights θ (lower level) and scores s (upper level) learn in turn, each step on its own batch.

    With m the mask, w = m ⊙ θ and g = ∇_w ℓ:

    1. θ takes the optimizer's step for the gradient m ⊙ g of the lower batch.
    2. g anew, dense, at the new θ on the upper batch; s ← s − score_lr · (θ − m ⊙ g / γ) ⊙ g, with momentum.
    3. m keeps the highest scores, or the filters or channels of the largest norms of s.

    In sweeps over the network, of which a dense training step has three, that is 1 + 5d at density d: only the dense g
    of step 2 works for pruned weights. BatchNorm's running statistics move twice a step; its parameters and the biases
    learn at the lower level alone. Scores start as √(6 / fan_in) · |θ| / max|θ|, so give a trained model.

    mode "released": the scores are θ itself, with the score gradient |θ| ⊙ g − (θ ⊙ g)² / γ and magnitudes ranked;
    that code also decays parameters whose gradient is zero once more, which is left out here.

    Pruned are the layers that :func:`blokern.bilevel.masking.prunable` finds and whose weights require grad.

    loss_fn: the loss of both levels; attack x in it to prune a robust network. metrics: "upper_loss", and "changed",
    the share of the masks' bits that changed. Raises TypeError for an argument of another type, ValueError where no
    layer can be pruned, weights are shared between layers, or, in a step, scores are no longer finite.

    Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu, "Advancing Model Pruning via Bi-level Optimization", NeurIPS 2022.

    >>> rule = BiP(model, torch.optim.SGD(model.parameters(), lr=0.1), BiPSettings(density=0.1))
    >>> loss = rule.step((x, y), (x2, y2)).loss
    """

    takes_two: ClassVar[Literal[True]] = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: BiPSettings,
        loss_fn: ModelLoss = cross_entropy,
    ) -> None:
        check_types(
            model=(model, nn.Module), optimizer=(optimizer, Optimizer), settings=(settings, BiPSettings)
        )
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.loss_fn = loss_fn
        #: The scores' learning rate, to be set by whoever has a schedule.
        self.score_lr = settings.score_lr
        weights = {name: w.detach() for name, w in prunable(model).items() if w.requires_grad}
        if not weights:
            raise ValueError("model must have a layer to prune whose weight requires grad, got none")
        self._names = list(weights)
        self._scores = (
            {} if settings.mode == "released" else {k: _initial_scores(w) for k, w in weights.items()}
        )
        buffered = settings.score_momentum > 0
        self._momentum = {name: torch.zeros_like(w) for name, w in weights.items() if buffered}
        sparsify(model, dict(zip(weights, self._select(), strict=True)))

    @property
    def scores(self) -> dict[str, Tensor]:
        """The scores by parameter name; in mode "released" the weights."""
        if self.settings.mode == "paper":
            return self._scores
        return {name: layer.weight.detach() for name, layer in zip(self._names, self._layers(), strict=True)}

    def step(self, lower: Batch, upper: Batch) -> StepResult:
        """Updates weights on the one batch, scores and masks on the other.

        Each batch is (x, y), x [N, ...] float32 or float64, y [N] int64. Raises TypeError or ValueError for others.
        """
        for name, batch in (("lower", lower), ("upper", upper)):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(f"{name} must be a batch (x, y), got {type(batch).__name__}")
            check_types(**{f"{name} {part}": (t, Tensor) for part, t in zip("xy", batch, strict=True)})
            check_batch(*batch, of=f"{name} ")
        with torch.autocast(lower[0].device.type, enabled=False):
            self.optimizer.zero_grad(set_to_none=True)
            loss, logits = self.loss_fn(self.model, lower[0].detach(), lower[1])
            torch.autograd.backward(loss)
            self.optimizer.step()
            upper_loss, grads = self._dense_gradients(upper[0].detach(), upper[1])
        self._score_step(grads)
        metrics = {"upper_loss": upper_loss, "changed": self._refresh_masks()}
        return StepResult(loss.detach(), logits.detach(), metrics)

    def state_dict(self) -> dict[str, Any]:
        """The scores and their momentum, by parameter name; masks and weights are in the model's."""
        return {"scores": dict(self._scores), "momentum": dict(self._momentum)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave. Raises ValueError, and changes nothing, where layers or shapes differ."""
        ours = self.state_dict()
        for part, tensors in ours.items():
            there = {name: tuple(t.shape) for name, t in state[part].items()}
            here = {name: tuple(t.shape) for name, t in tensors.items()}
            if there != here:
                raise ValueError(f"state is of other layers: {part} of {there}, but the model has {here}")
        for part, tensors in ours.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[part][name])

    def _layers(self) -> list[MaskedLayer]:
        return [self.model.get_submodule(name.rpartition(".")[0]) for name in self._names]  # type: ignore[misc]

    def _dense_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss and g = ∇_w ℓ of each layer."""
        layers = self._layers()
        with _dense_grad(layers):
            loss, _ = self.loss_fn(self.model, x, y)
            weights = [layer.weight for layer in layers]
            grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return loss.detach(), list(grads)

    def _score_step(self, grads: list[Tensor]) -> None:
        layers, settings = self._layers(), self.settings
        scores = list(self.scores.values())
        rates: dict[str, Any] = {
            "lr": self.score_lr,
            "gamma": settings.implicit_gamma,
            "momentum": settings.score_momentum,
            "weight_decay": settings.score_weight_decay,
            "momentum_buffers": list(self._momentum.values()) or None,
        }
        if settings.mode == "released":
            ops.bip_released_step_(scores, grads, **rates)
        else:
            weights, masks = [layer.weight.detach() for layer in layers], [layer.mask for layer in layers]
            ops.bip_score_step_(scores, weights, grads, masks, **rates)

    def _refresh_masks(self) -> Tensor:
        """Masks of the new scores; returns the share of the bits that changed."""
        changed, total = torch.zeros((), dtype=torch.int64), 0
        for layer, bits in zip(self._layers(), self._select(), strict=True):
            new = SparseMask(bits)
            changed, total = changed + layer.mask.differing(new), total + bits.numel()
            layer.mask.update_(new)
        return changed / total

    def _select(self) -> list[Tensor]:
        """The masks of the scores."""
        scores = self.scores
        if self.settings.mode == "released":
            scores = {name: score.abs() for name, score in scores.items()}
        return [*select(scores, self.settings).values()]


def _initial_scores(weight: Tensor) -> Tensor:
    """√(6 / fan_in) · |θ| / max|θ|; zeros where θ is zero."""
    scale = math.sqrt(6 / weight[0].numel())
    size = weight.abs()
    largest = size.max()
    return size.mul_(scale / torch.where(largest > 0, largest, 1.0))


@contextmanager
def _dense_grad(layers: Sequence[MaskedLayer]) -> Iterator[None]:
    try:
        for layer in layers:
            layer.dense_grad = True
        yield
    finally:
        for layer in layers:
            layer.dense_grad = False
