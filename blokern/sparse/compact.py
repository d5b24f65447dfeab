"""Physically smaller layers in the place of masked ones.

The model runs once on an example input, and what its ops do to channels is read off (:mod:`blokern.sparse.compaction`):
a BatchNorm's channels are those of the convolution before it, and the operands of an add share theirs. Forward along
the ops goes what is constant, because a filter keeps nothing; backward which channels are needed, from the layers that
read them. The rest goes, in a copy whose ops are then read too, and whose outputs are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from blokern.ops.mask import SparseMask
from blokern.sparse.compaction.comparison import check_outputs, coarsest_eps, doubled
from blokern.sparse.compaction.cut import add_biases, copied, drop_biases, part_of
from blokern.sparse.compaction.example import checked_example, find_example
from blokern.sparse.compaction.plan import ForwardFails, Plan, find_plan
from blokern.sparse.compaction.record import Refusal
from blokern.sparse.modules import MaskedConv2d, MaskedLinear, checked_masks, drop_mask, give_mask, masks_of

__all__ = ["compact"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def compact(
    model: ModelT,
    masks: Mapping[str, Tensor | SparseMask] | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
) -> ModelT:
    """A copy of the model without the channels that its masks make superfluous, and with the same outputs.

    masks: by parameter name, bool or SparseMask of the weight's shape, as :func:`sparsify` takes them: the layers count
    as if they had these, instead of their own if any; None: their own. example: an input, or a tuple of the forward's
    arguments, of the sizes that the copy is to work with; None: one is made by the first layer. The model itself stays
    as it is.

    Channels go that no kept weight reads, and those whose filter keeps nothing, which are constant: the constant moves
    into the biases of the layers that read it. Where that is not exact (zeros padded around a constant that is not
    zero) they stay. Constants are those of the mode, train or eval, that the model is in: a BatchNorm's differ, and a
    warning says so of a model in train mode whose copy would be wrong in eval mode. A layer all of whose weights are
    kept becomes a dense one. Names in the state_dict stay, but for masks that are gone and biases that constants need.

    The model runs on the example, in both modes, and each op says which channels are the same: convolutions of any
    kind, products, normalisations, pooling, arithmetic, views, joins and parts, in place or not. What other ops touch
    stays, and so does what the forward gives the size of as a number. The copy is compared with the masked network
    before it is returned. Raises ValueError for a model whose forward fails on the example or looks at values that
    depend on it, and where no example is found; ValueError or TypeError, as sparsify, for masks that do not fit.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    >>> compact(net, {"0.weight": filter_mask(net[0].weight, 0.5)})[1].in_channels
    4
    """
    given = [] if masks is None else checked_masks(model, masks)
    paths = {id(module): path for path, module in model.named_modules()}
    masked = copied(model)
    for module, mask in given:
        give_mask(masked.get_submodule(paths[id(module)]), mask)
    network = _Masked(masked)
    inputs = find_example(network.dense) if example is None else checked_example(example)
    try:
        return _compacted(network, inputs)
    except Refusal as error:
        raise ValueError(f"model: it cannot be compacted: {error}") from error


def _compacted(network: _Masked[ModelT], inputs: tuple[Any, ...]) -> ModelT:
    """Planned and compared in float64 where the model computes in it, so that rounding hides nothing."""
    try:
        plan = find_plan(copied(network.dense).double(), network.kept, doubled(inputs))
    except ForwardFails:
        plan = find_plan(network.dense, network.kept, inputs)
    small = network.without(plan)
    if any(module.training for module in small.modules()):
        _warn_of_eval_mode(network.dense, small, inputs, coarsest_eps(small, plan.eps))
    if plan.compared:  # in its own numbers, with its own layers
        check_outputs(network.dense, copied(small), inputs, coarsest_eps(small, plan.eps), rough=True)
    return small


def _warn_of_eval_mode(dense: nn.Module, small: nn.Module, inputs: tuple[Any, ...], eps: float) -> None:
    """In train mode a BatchNorm's constant is its bias alone; in eval mode it has the running mean in it."""
    want, got = (copied(network).double().eval() for network in (dense, small))
    try:
        check_outputs(want, got, doubled(inputs), eps)
    except Refusal as error:
        warnings.warn(
            f"compact: the model is in train mode, for which the smaller one is right; in eval mode {error}: call "
            "model.eval() before compact, for inference",
            stacklevel=4,
        )


class _Masked(Generic[ModelT]):
    """What is known of a masked network. dense: it with plain layers, zeros for masked weights and for biases that
    layers lacked. kept: its masks, by parameter name."""

    def __init__(self, masked: ModelT) -> None:
        self.dense = masked
        self.kept = {name: mask.to_dense() for name, mask in masks_of(masked).items()}
        self._dense_grad: dict[str, dict[str, Any]] = {}
        for path, module in self.dense.named_modules():
            if type(module) in (MaskedConv2d, MaskedLinear):
                own = {key: value for key, value in vars(module).items() if key == "dense_grad"}
                self._dense_grad[f"{path}.weight".lstrip(".")] = own
                drop_mask(module)
        self._biases = add_biases(self.dense)

    def without(self, plan: Plan) -> ModelT:
        """A copy without what goes; layers that keep some weights only are masked again."""
        small = plan.carried_out(self.dense)
        drop_biases(small, self._biases)
        for name, mask in self.kept.items():
            part = part_of(mask, plan.axes[name], plan.live)
            if not part.all():
                module = small.get_submodule(name.rpartition(".")[0])
                give_mask(module, SparseMask(part))
                vars(module).update(self._dense_grad[name])
        return small
