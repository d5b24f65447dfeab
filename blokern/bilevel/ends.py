"""Where a network begins and ends: which layers read the model's input channels, and which give its outputs.

The model runs once, and a dispatch mode below autograd follows for every block of memory which layers' outputs it was
computed from since the last layer: control flow, hooks, views, writes in place, skips, several heads and whatever an
output is packed in need no rules. What is followed are weights, not modules, so that a parent that reads a layer's
weight itself is seen, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blokern.bilevel.loss import call, tensors_in

__all__ = ["Ends", "ends_of", "find_ends"]

#: Ops whose outputs sum over weights: past these a value is the layer's, and no longer that of what the layer read.
_MIXING = {
    *("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv_tbc", "_trilinear"),
    *(
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "addbmm",
        "mv",
        "addmv",
        "dot",
        "linear",
        "matmul",
        "_addmm_activation",
    ),
    *("embedding", "embedding_bag", "_embedding_bag", "mkldnn_rnn_layer", "_cudnn_rnn"),
    *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
}
#: Ops that take of their operand no more than its shape.
_FACTORIES = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
}
#: What an input is an origin by, as weights are by their names: of data, and of the input's channels.
_DATA, _CHANNELS = "data of the input", "channels of the input"
#: Of the images and the sequences that are tried.
_SIZES = (32, 28, 64, 224, 16, 8, 96, 128, 256, 299)
_LENGTHS = (16, 4)


@dataclass(frozen=True)
class Ends:
    """Names of weights.

    first: of layers that an input reaches through no other layer. last: of those whose output reaches one of the model
    through no other layer. called: of all that took part.
    """

    first: frozenset[str]
    last: frozenset[str]
    called: frozenset[str]


def ends_of(model: nn.Module, x: Any = None) -> Ends:
    """The ends of a model, which is the caller's to spoil, on x; None: on inputs made up to fit its layers.

    Raises ValueError if the model takes none of those.

    >>> sorted(ends_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))).last)
    ['1.weight']
    """
    if x is not None:
        return find_ends(model, x)
    reason = "no layer says what they are"
    for inputs in _made_up(model):
        try:
            return find_ends(model, inputs)
        except Exception as error:  # whatever a model says to inputs of another shape
            reason = f"of those tried it said last: {error}"
    raise ValueError(
        f"model: the inputs that it takes are not known ({reason}); give batches with one (x, y) at least, or BiP an "
        "example, for the network to be run: it shows which filters are its outputs and which channels its inputs"
    )


def find_ends(model: nn.Module, x: Any) -> Ends:
    """The ends of a model, found by running it on x in eval mode, in which it is left.

    x: as :func:`blokern.bilevel.loss.call` takes it. Every parameter of two dimensions or more counts as a layer's: an
    embedding, or a layer that cannot be pruned, ends a way just as well.

    >>> ends = find_ends(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)), torch.rand(1, 3, 8, 8))
    >>> sorted(ends.first), sorted(ends.last)
    (['0.weight'], ['1.weight'])
    """
    follower = _Follower()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            follower.add(parameter, _Origin(frozenset([name]), is_weight=True))
    for tensor in tensors_in(x):
        # Tokens and masks have no channels, images do.
        is_image = tensor.is_floating_point() or tensor.dtype == torch.uint8
        follower.add(tensor, _Origin(frozenset([_DATA, _CHANNELS] if is_image else [_DATA])))
    # With gradients, as torch's fused paths for inference read whole blocks of layers in one op.
    with torch.enable_grad(), follower:
        output = call(model.eval(), x)
    last = _union(follower.origin(tensor) for tensor in tensors_in(output)).names - {_DATA, _CHANNELS}
    if not last:
        raise ValueError(
            f"model: its output, {type(output).__name__}, does not show which layers it comes from"
        )
    first = {name for name, read in follower.read.items() if _CHANNELS in read}
    return Ends(frozenset(first), last, frozenset(follower.read))


@dataclass(frozen=True)
class _Origin:
    """Which layers' outputs a block of memory was computed from; is_weight: which weights, and nothing else."""

    names: frozenset[str] = frozenset()
    is_weight: bool = False


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the origin of every block of memory, and in `read` that of all that each weight was multiplied with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: dict[str, frozenset[str]] = {}
        # With the memory itself: freed, its address would be another's.
        self._origins: dict[int, tuple[torch.UntypedStorage, _Origin]] = {}

    def origin(self, tensor: Tensor) -> _Origin:
        if tensor.layout != torch.strided:
            return _Origin()
        return self._origins.get(tensor.untyped_storage()._cdata, (None, _Origin()))[1]

    def add(self, tensor: Tensor, origin: _Origin) -> None:
        """To the origin that a memory has already: a view is a part, and a write may leave the rest."""
        if tensor.layout != torch.strided:
            return
        memory = tensor.untyped_storage()
        self._origins[memory._cdata] = (memory, _union([self.origin(tensor), origin]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        origins = [] if name in _FACTORIES else [self.origin(t) for t in _tensors((args, kwargs))]
        origin = self._mixed(origins, args) if name in _MIXING else _union(origins)
        result = func(*args, **kwargs)
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        written = [
            given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write
        ]
        for tensor in _tensors((result, written)):
            # A comparison's outcome has no channels of the input's.
            names = origin.names - {_CHANNELS} if tensor.dtype == torch.bool else origin.names
            if names:
                self.add(tensor, _Origin(names, origin.is_weight))
        return result

    def _mixed(self, origins: Iterable[_Origin], args: tuple[Any, ...]) -> _Origin:
        """The origin of a layer's output, if this is one: of weights with something else."""
        origins = [*origins]
        weights, data = (_union(o for o in origins if o.is_weight is side) for side in (True, False))
        for name in weights.names:
            self.read[name] = self.read.get(name, frozenset()) | data.names
        if not weights.names or _is_depthwise(args):
            return _union([weights, data])
        return _Origin(weights.names, is_weight=not data.names)


def _union(origins: Iterable[_Origin]) -> _Origin:
    known = [origin for origin in origins if origin.names]
    names = frozenset[str]().union(*(origin.names for origin in known))
    return _Origin(names, is_weight=bool(known) and all(origin.is_weight for origin in known))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _is_depthwise(args: tuple[Any, ...]) -> bool:
    """Whether these are a convolution's with as many groups as channels: such a layer keeps channels apart."""
    groups = (
        args[8] if len(args) > 8 else 1
    )  # (input, weight, bias, stride, padding, dilation, transposed, _, groups)
    return bool(isinstance(groups, int) and groups > 1 and groups == args[0].shape[1])


def _made_up(model: nn.Module) -> Iterator[Tensor]:
    """Inputs such as its layers take: tokens [2, L], images [2, C, S, S] of few channels first, features [2, F] and
    [2, L, F]. All but one kind make a network raise in its first layers."""
    modules = [*model.modules()]
    device = next(model.parameters()).device
    if any(isinstance(module, nn.Embedding) for module in modules):
        for length in _LENGTHS:
            yield torch.zeros(2, length, dtype=torch.int64, device=device)
    convolutions = [module for module in modules if isinstance(module, nn.modules.conv._ConvNd)]
    if convolutions:
        dims = min(module.weight.dim() for module in convolutions) - 2
        for size in _SIZES:
            for channels in sorted({module.in_channels for module in convolutions}):
                yield convolutions[0].weight.new_zeros(2, channels, *dims * [size])
    for module in modules:
        if isinstance(module, nn.Linear | nn.RNNBase):
            features = module.in_features if isinstance(module, nn.Linear) else module.input_size
            parameter = next(module.parameters())
            yield parameter.new_zeros(2, features)
            for length in _LENGTHS:
                yield parameter.new_zeros(2, length, features)
