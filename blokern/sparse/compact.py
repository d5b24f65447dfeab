"""Physically smaller layers in the place of masked ones.

The model's graph (torch.fx) tells which channels are the same ones: a BatchNorm's are those of the convolution before
it, and the operands of an add share theirs. Forward along it goes what is constant, because a filter keeps nothing;
backward which channels are needed, from the layers that read them. The rest goes.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from blokern.ops.mask import SparseMask
from blokern.sparse import layout
from blokern.sparse.modules import (
    MaskedConv2d,
    MaskedLinear,
    checked_masks,
    drop_mask,
    give_mask,
    parameter_owners,
)

__all__ = ["compact"]

ModelT = TypeVar("ModelT", bound=nn.Module)

_CONVS = {nn.Conv2d, MaskedConv2d}
_LINEARS = {nn.Linear, MaskedLinear}
_MASKED = {MaskedConv2d, MaskedLinear}
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, layout.SamplesInnermostBatchNorm2d}
_AVERAGES = {nn.AvgPool2d, layout.SamplesInnermostAvgPool2d}
_POOLS = {  # that leave a constant plane constant
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    layout.SamplesInnermostMaxPool2d,
    layout.SamplesInnermostAdaptiveAvgPool2d,
}
_DROPOUTS = {nn.Dropout, nn.Dropout2d}
_ELEMENTWISE = {
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
}
_ELEMENTWISE_FUNCTIONS = {
    *(F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardtanh, F.hardswish, F.softplus),
    *(torch.sigmoid, F.sigmoid, torch.tanh, F.tanh),
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv),
    *(torch.add, torch.sub, torch.mul, torch.div),
}
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "add", "add_", "sub", "mul", "div", "contiguous"}
_POOL_FUNCTIONS = {F.max_pool2d, torch.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}


#: Sizes that a forward may ask for: not the number of channels.
_SIZES = ((0,), (2,), (3,))


def compact(model: ModelT, masks: Mapping[str, Tensor | SparseMask] | None = None) -> ModelT:
    """A copy of the model without the channels that its masks make superfluous, and with the same outputs.

    masks: by parameter name, bool or SparseMask of the weight's shape, as :func:`sparsify` takes them: the layers count
    as if they had these, instead of their own if any; None: their own. The model itself stays as it is.

    Channels go that no kept weight reads, and those whose filter keeps nothing, which are constant: the constant moves
    into the biases of the layers that read it. Where that is not exact (zeros padded around a constant that is not
    zero) they stay. Constants are those of the mode, train or eval, that the model is in: a BatchNorm's differ. A layer
    all of whose weights are kept becomes a dense one. Names in the state_dict stay, but for masks that are gone and
    biases that constants need.

    Known are Conv2d (plain, depthwise), Linear, BatchNorm, elementwise activations, dropout, pooling, flattening, means
    over the image, arithmetic between equally many channels, concatenation. Raises ValueError, naming the module, for
    anything else that channels pass through, for layers that are called twice or share parameters, and for a forward
    that torch.fx cannot trace; ValueError or TypeError, as sparsify, for masks that do not fit.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    >>> compact(net, {"0.weight": filter_mask(net[0].weight, 0.5)})[1].in_channels
    4
    """
    given = {} if masks is None else dict(checked_masks(model, masks))
    graph = _Graph(model, given)
    live = graph.live()
    copies: dict[int, Any] = {}  # of the model's objects, by id
    with torch.no_grad():
        for layer in graph.layers:
            layer.shrink(live, copies)
        compacted = copy.deepcopy(model, copies)
        for layer in graph.layers:
            layer.finish(copies[id(layer.module)])
    for module in given.keys() - {layer.module for layer in graph.layers}:  # which the forward does not call
        give_mask(copies[id(module)], given[module])
    return compacted


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module).__module__.startswith("blokern.sparse.") or super().is_leaf_module(module, name)


@dataclass
class _Value:
    """A tensor of the graph with channels in its second dimension.

    ids: a number for each channel. constant: float64, the channel's value, NaN where it varies. form: "maps",
    [N, C, H, W]; "features", [N, C]; or "flat", maps flattened to [N, C·k] where k shows only in the next layer's size.
    """

    ids: Tensor
    constant: Tensor
    form: str

    def of_size(self, size: int) -> _Value:
        k = size // len(self.ids) if self.form == "flat" else 1
        if k * len(self.ids) != size:
            raise ValueError(f"it takes {size} channels and meets {len(self.ids)}")
        form = "features" if self.form == "flat" else self.form
        return _Value(self.ids.repeat_interleave(k), self.constant.repeat_interleave(k), form)

    def become(self, constant: Tensor) -> _Value:
        """After an op that keeps channels apart."""
        return replace(self, constant=constant.where(~self.constant.isnan(), torch.nan))


class _Layer:
    """A module with weights; the ids of its channels, its input if it mixes those, and its mask if it has one."""

    def __init__(
        self, module: Any, ids: Tensor, source: _Value | None = None, mask: SparseMask | None = None
    ) -> None:
        self.module, self.ids, self.source = module, ids, source
        self.new_mask: SparseMask | None = None
        self.new_bias: nn.Parameter | None = None  # for constants that come, where there was none
        self._sparse = mask

    @cached_property
    def mask(self) -> Tensor | None:
        """bool, of the weight's shape; None: all are kept."""
        return None if self._sparse is None else self._sparse.to_dense().cpu()

    @cached_property
    def _reads(self) -> Tensor:
        """bool [out, in]: whether a weight is kept."""
        assert self._sparse is not None
        assert self.mask is not None
        # Whole filters show in the words: no need to look at each weight.
        some = (self._sparse.words != 0).any(1).cpu()
        if self._sparse.kept == int(some.sum()) * self._sparse.cols:
            return some.unsqueeze(1).expand(self.mask.shape[:2])
        return self.mask.unsqueeze(-1).flatten(2).any(2)

    def reading(self, inputs: Tensor) -> Tensor:
        """bool [out]: which outputs read some of the inputs; inputs: bool [in], or [out, 1] if each has its own."""
        if self.mask is None:
            return inputs.any(-1).expand(len(self.module.weight))
        return (self._reads & inputs).any(1)

    def read_by(self, outputs: Tensor) -> Tensor:
        """bool [in]: which inputs some of the outputs read; outputs: bool [out]."""
        if self.mask is None:
            return outputs.any().expand(self.module.weight.shape[1])
        return self._reads[outputs].any(0)

    def sums(self, inputs: Tensor) -> Tensor:
        """The kept weights' sums with inputs that are the same at all taps, float64 [out]; inputs: [in] or [out, 1]."""
        weight = self.module.weight
        columns = inputs.view(-1, weight.shape[1]).any(0).nonzero().flatten()  # few are not 0
        if len(columns) == 0:
            return inputs.new_zeros(len(weight))
        part = _double(weight[:, columns])
        if self.mask is not None:
            part = part.where(self.mask[:, columns], 0.0)
        return (part.unsqueeze(-1).flatten(2).sum(2) * inputs[..., columns]).sum(1)

    def folds(self, constant: Tensor) -> Tensor:
        """Which constant inputs are, to the outputs, a number: all, unless zeros lie around them."""
        module = self.module
        pads = getattr(module, "padding_mode", "") == "zeros" and module.padding not in ("valid", 0, (0, 0))
        return (constant == 0) | (~constant.isnan() & (not pads))

    def constant(self, source: Tensor) -> Tensor:
        """The outputs' constants, of the inputs' constants; source: [in], or [out, 1] if each has one of its own."""
        folds = self.folds(source)
        total = self.sums(source.where(folds, 0.0)).where(~self.reading(~folds), torch.nan)
        bias = self.module.bias
        return total if bias is None else total + _double(bias)

    @cached_property
    def _irreplaceable(self) -> Tensor:
        """bool [in]: the inputs that no bias can replace."""
        assert self.source is not None
        return ~self.folds(self.source.constant)

    def needs(self, live: Tensor) -> Tensor:
        """The ids of the inputs that live outputs read and no bias can replace."""
        if self.source is None:
            return self.ids[:0]
        return self.source.ids[self.read_by(live[self.ids]) & self._irreplaceable]

    def shrink(self, live: Tensor, copies: dict[int, Any]) -> None:
        """Put what stays of each of the module's tensors into `copies`."""
        module, rows = self.module, live[self.ids]
        columns = live[self.source.ids] if self.source is not None else live.new_ones(1)
        places = [_places(which, module.weight.device) for which in (rows, columns)]
        parts = {
            name: _part(tensor, places)
            for name in ("weight", "bias", "running_mean", "running_var")
            if (tensor := getattr(module, name, None)) is not None
        }
        if self.source is not None and places[1] is not None:
            moved = self.sums(self.source.constant.nan_to_num(0.0).masked_fill(columns, 0.0))[rows]
            if moved.any() and "bias" in parts:
                parts["bias"] += moved.to(parts["bias"])
            elif moved.any():
                self.new_bias = nn.Parameter(moved.to(parts["weight"]), module.weight.requires_grad)
        for name, smaller in parts.items():
            tensor = getattr(module, name)
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(smaller, tensor.requires_grad) if is_parameter else smaller
        if self.mask is not None:
            self.new_mask = SparseMask(_part(self.mask.to(module.weight.device), places))
        self.count = int(rows.sum())

    def finish(self, module: Any) -> None:
        """Let the module's copy know the sizes of its tensors."""
        if self.new_mask is not None:
            give_mask(module, self.new_mask)
        if self.new_bias is not None:
            module.bias = self.new_bias
        if type(module) in _NORMS:
            module.num_features = self.count
        elif type(module) in _LINEARS:
            module.out_features, module.in_features = module.weight.shape
        else:
            module.groups = 1 if module.groups == 1 else self.count
            module.out_channels, module.in_channels = self.count, module.weight.shape[1] * module.groups
        if self.new_mask is not None and self.new_mask.kept == module.weight.numel():
            drop_mask(module)


def _places(live: Tensor, device: torch.device) -> Tensor | None:
    """Where they are, None for all."""
    return None if live.all() else live.nonzero().flatten().to(device)


def _part(tensor: Tensor, places: Sequence[Tensor | None]) -> Tensor:
    """A copy of these places of the first dimension, and of the second if there is one."""
    part = tensor
    for dim, index in enumerate(places[: tensor.dim()]):
        if index is not None:
            part = part.index_select(dim, index)
    return tensor.clone() if part is tensor else part


class _Graph:
    """What :func:`compact` knows of a model: its layers, and which channels are the same."""

    def __init__(self, model: nn.Module, masks: Mapping[nn.Module, SparseMask]) -> None:
        self.layers: list[_Layer] = []
        self._masks = masks  # instead of the layers' own
        self._count = 0  # of ids
        self._same: list[tuple[Tensor, Tensor]] = []  # ids, and ids of the same channels
        self._pinned: list[Tensor] = []
        self._owners = parameter_owners(model)
        tracer = _Tracer()
        if tracer.is_leaf_module(model, ""):
            return
        try:
            graph = tracer.trace(model)
        except Exception as error:
            raise ValueError(f"model: torch.fx cannot trace its forward: {error}") from error
        self._modules = dict(model.named_modules())
        self._values: dict[fx.Node, _Value | None] = {}  # None: no tensor, or one whose channels all stay
        for node in graph.nodes:
            try:
                self._values[node] = self._visit(node)
            except ValueError as error:
                raise ValueError(f"model: {_place(node)} cannot be compacted: {error}") from error

    def live(self) -> Tensor:
        """bool, by id: the channels that stay."""
        root = self._roots()
        live = torch.zeros(len(root), dtype=torch.bool)
        for layer in self.layers:
            layer.ids = root[layer.ids]
            if layer.source is not None:
                layer.source.ids = root[layer.source.ids]
        for ids in self._pinned:
            live[root[ids]] = True
        while True:
            before = live.clone()
            for layer in reversed(self.layers):
                live[layer.needs(live)] = True
            if before.equal(live):
                for layer in self.layers:  # torch has no layers without channels
                    for ids in (layer.ids, layer.ids if layer.source is None else layer.source.ids):
                        if not live[ids].any():
                            live[ids[:1]] = True
                if before.equal(live):
                    return live

    def _roots(self) -> Tensor:
        """By id, the least id of the same channel."""
        root = torch.arange(self._count)
        while True:
            before = root.clone()
            for ids, others in self._same:
                least = torch.minimum(root[ids], root[others])
                root.scatter_reduce_(0, ids, least, "amin").scatter_reduce_(0, others, least, "amin")
            root = root[root]
            if before.equal(root):
                return root

    def _new_ids(self, count: int) -> Tensor:
        self._count += count
        return torch.arange(self._count - count, self._count)

    def _visit(self, node: fx.Node) -> _Value | None:
        inputs = [self._values[n] for n in node.all_input_nodes]
        known = [value for value in inputs if value is not None]
        if node.op == "output":
            self._pinned += [value.ids for value in known]
            return None
        if node.op == "call_module":
            return self._module(
                self._modules[str(node.target)], inputs[0] if len(inputs) == 1 else None, known
            )
        if not known:
            return None
        first, target = known[0], node.target
        if target in _ELEMENTWISE_FUNCTIONS | _ELEMENTWISE_METHODS:
            return self._elementwise(node, known, fixed=len(known) < len(inputs))
        if target in _POOL_FUNCTIONS and first.form == "maps":
            return first
        if target is F.avg_pool2d or target is F.dropout:
            return first.become(first.constant.where(first.constant == 0, torch.nan))
        if target in (torch.mean, "mean") and first.form == "maps":
            dims = _argument(node, 1, "dim", ())
            if sorted(d % 4 for d in dims) == [2, 3]:
                return replace(first, form="maps" if _argument(node, 2, "keepdim", False) else "features")
        if target in (torch.flatten, "flatten"):
            return _flattened(first, _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))
        if (
            target in ("view", "reshape")
            and len(node.args) == 3
            and _is_batch(node.args[1])
            and node.args[2] == -1
        ):
            return _flattened(first, 1, -1)
        if target is torch.cat and _argument(node, 1, "dim", 0) == 1:
            return self._concatenated([self._values[part] for part in node.args[0]])  # type: ignore
        if target == "size" and node.args[1:] in _SIZES:
            return None
        if target is getattr and all(user.args[1:] in _SIZES for user in node.users):  # x.shape
            return None
        raise ValueError("what it does to channels is not known")

    def _module(self, module: Any, value: _Value | None, known: list[_Value]) -> _Value | None:
        kind = type(module)
        if kind in _CONVS | _LINEARS and not (value is None and known):
            return self._product(module, value)
        if value is None:
            if known:
                raise ValueError("it has several inputs")
            return None
        if kind in _NORMS:
            value = value.of_size(module.num_features)
            self._add(_Layer(module, value.ids))
            return value.become(_normalized(module, value.constant))
        if kind in _ELEMENTWISE:
            return value.become(module.forward(value.constant.clone()))
        if kind in _DROPOUTS:
            stays = (value.constant == 0) | (not module.training)
            return value.become(value.constant.where(stays, torch.nan))
        if kind in _AVERAGES and value.form == "maps":
            exact = module.divisor_override is None and (
                module.padding in (0, (0, 0)) or not module.count_include_pad
            )
            return value.become(value.constant.where((value.constant == 0) | exact, torch.nan))
        if kind in _POOLS and value.form == "maps" and not getattr(module, "return_indices", False):
            return value
        if kind is nn.Flatten:
            return _flattened(value, module.start_dim, module.end_dim)
        raise ValueError("what it does to channels is not known")

    def _product(self, module: Any, value: _Value | None) -> _Value | None:
        linear = type(module) in _LINEARS
        form = "features" if linear else "maps"
        groups = 1 if linear else module.groups
        if groups > 1 and value is None:
            return None
        if value is not None:
            value = value.of_size(module.in_features if linear else module.in_channels)
            if value.form != form:
                raise ValueError(f"its input has the form of {value.form}")
        rows, columns = module.weight.shape[:2]
        mask = self._masks.get(module, module.mask if type(module) in _MASKED else None)
        if groups > 1:
            assert value is not None
            if not groups == rows == module.in_channels:
                raise ValueError(f"it has {groups} groups, and only depthwise convolutions may have groups")
            layer = self._add(_Layer(module, value.ids, mask=mask))
            return replace(value, constant=layer.constant(value.constant.unsqueeze(1)))
        layer = self._add(_Layer(module, self._new_ids(rows), value, mask))
        constant = torch.full((columns,), torch.nan).double() if value is None else value.constant
        return _Value(layer.ids, layer.constant(constant), form)

    def _add(self, layer: _Layer) -> _Layer:
        if any(layer.module is other.module for other in self.layers):
            raise ValueError("it is called twice")
        for parameter in layer.module.parameters():
            if len(shared := self._owners[id(parameter)]) > 1:
                raise ValueError(f"it shares a parameter: {' and '.join(map(repr, shared))}")
        self.layers.append(layer)
        return layer

    def _concatenated(self, parts: list[_Value | None]) -> _Value:
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or {part.form for part in known} not in ({"maps"}, {"features"}):
            raise ValueError("it joins with something whose number of channels is not known")
        ids, constants = [part.ids for part in known], [part.constant for part in known]
        return _Value(torch.cat(ids), torch.cat(constants), known[0].form)

    def _elementwise(self, node: fx.Node, known: list[_Value], *, fixed: bool) -> _Value:
        first = known[0]
        for other in known[1:]:
            if other.form != first.form or len(other.ids) != len(first.ids):
                raise ValueError(
                    f"its operands differ: {len(first.ids)} channels of {first.form}, {len(other.ids)} of {other.form}"
                )
            self._same.append((first.ids, other.ids))
        if fixed:  # and of a shape that is not known
            self._pinned += [value.ids for value in known]
            return replace(first, constant=torch.full_like(first.constant, torch.nan))
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: self._values[n].constant.clone())  # type: ignore[union-attr]
        function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        constant = function(*arguments[0], **arguments[1])
        for value in known:
            constant = constant.where(~value.constant.isnan(), torch.nan)
        return replace(first, constant=constant)


def _normalized(norm: Any, constant: Tensor) -> Tensor:
    """What BatchNorm in its mode makes of constant channels."""
    if norm.training or norm.running_mean is None:
        constant = torch.zeros_like(constant)  # its own mean
    else:
        constant = (constant - _double(norm.running_mean)) * (_double(norm.running_var) + norm.eps).rsqrt()
    return constant if norm.weight is None else constant * _double(norm.weight) + _double(norm.bias)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _flattened(value: _Value, start: Any, end: Any) -> _Value:
    if start != 1 or end not in (-1, 3):
        raise ValueError(f"it flattens dimensions {start} to {end}, and only 1 to -1 keeps channels together")
    return replace(value, form="flat") if value.form == "maps" else value


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _is_batch(node: Any) -> bool:
    """Whether a node is x.size(0) or x.shape[0]."""
    return isinstance(node, fx.Node) and node.args[1:] == (0,) and node.target in ("size", operator.getitem)


def _place(node: fx.Node) -> str:
    """A node's name in a message: its module's path, and the function in it."""
    if node.op == "call_module":
        return repr(node.target)
    path = next(reversed(node.meta.get("nn_module_stack", {"": None})), "")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"{name} in {path!r}" if path else f"{name} in the model's forward"
