"""A copy of a network without the channels that go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from blokern.sparse.compaction.channels import Axis, Product

__all__ = ["add_biases", "copied", "cut", "drop_biases", "part_of"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def copied(model: ModelT, replaced: Mapping[int, Tensor] | None = None) -> ModelT:
    """A deep copy, with other tensors for some, by id; results that modules hold, such as weight_norm's, too."""
    memo: dict[int, Any] = dict(replaced or {})
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, Tensor) and not held.is_leaf:  # which torch does not copy
                memo.setdefault(id(held), held.detach().clone())
    return copy.deepcopy(model, memo)


def cut(model: ModelT, axes: Mapping[str, list[Axis]], live: Tensor, products: Iterable[Product]) -> ModelT:
    """A copy of the model, by the axes of its parameters and buffers, in which constants that go are in the biases."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    smaller = {name: part_of(tensors[name], axes[name], live) for name in axes}
    for product in products:
        moved = product.moved(live)
        if product.bias_name is not None and moved.any():
            rows = slice(None) if product.outputs is None else live[product.outputs]
            smaller[product.bias_name] += moved[rows].to(smaller[product.bias_name])
    replaced: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        part = smaller[name]
        replaced[id(tensor)] = nn.Parameter(part, tensor.requires_grad) if is_parameter else part
    small = copied(model, replaced)
    for module in small.modules():
        _tell_sizes(module)
    return small


def part_of(tensor: Tensor, axes: Iterable[Axis], live: Tensor) -> Tensor:
    """A copy of what stays of a tensor, its dimensions in the same order in memory."""
    part = tensor.detach()
    for dim, axis in enumerate(axes):
        if axis is not None and not (stays := live[axis]).all():
            part = part.index_select(dim, stays.nonzero().flatten().to(tensor.device))
    if part.data_ptr() == tensor.data_ptr():
        return part.clone()
    strides: tuple[int, ...] = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    back = [order.index(dim) for dim in range(tensor.dim())]
    return part.permute(order).contiguous().permute(back)


def _shape(module: nn.Module, name: str = "weight") -> torch.Size | None:
    """A parameter's shape, also where a hook makes it of others."""
    for form in (f"{name}_v", f"{name}_orig", name):
        tensor = module._parameters.get(form)
        if tensor is not None:
            return tensor.shape
    tensor = getattr(module, name, None)
    return tensor.shape if isinstance(tensor, Tensor) else None


def _tell_sizes(module: Any) -> None:
    """Let a module know the sizes of its tensors."""
    for kinds, tell in _SIZES.items():
        if isinstance(module, kinds) and (shape := _shape(module)) is not None:
            tell(module, shape)
    if isinstance(module, _NormBase) and module.running_mean is not None:
        module.num_features = len(module.running_mean)


def _tell_conv(module: Any, shape: torch.Size) -> None:
    transposed = isinstance(module, _ConvTransposeNd)
    whole = module.in_channels if transposed else module.out_channels
    groups = 1 if module.groups == 1 else module.groups * shape[0] // whole
    sizes = (shape[0], shape[1] * groups)
    module.groups = groups
    module.in_channels, module.out_channels = sizes if transposed else sizes[::-1]


def _tell_linear(module: Any, shape: torch.Size) -> None:
    module.out_features, module.in_features = shape


def _tell_norm(module: Any, shape: torch.Size) -> None:
    module.num_features = shape[0]


def _tell_group_norm(module: Any, shape: torch.Size) -> None:
    module.num_groups = module.num_groups * shape[0] // module.num_channels
    module.num_channels = shape[0]


def _tell_layer_norm(module: Any, shape: torch.Size) -> None:
    module.normalized_shape = tuple(shape)


def _tell_prelu(module: Any, shape: torch.Size) -> None:
    module.num_parameters = shape[0]


def _tell_embedding(module: Any, shape: torch.Size) -> None:
    module.num_embeddings, module.embedding_dim = shape


_SIZES: dict[type[nn.Module], Callable[[Any, torch.Size], None]] = {
    _ConvNd: _tell_conv,
    nn.Linear: _tell_linear,
    _NormBase: _tell_norm,
    nn.GroupNorm: _tell_group_norm,
    nn.LayerNorm: _tell_layer_norm,
    nn.PReLU: _tell_prelu,
    nn.Embedding: _tell_embedding,
}

_FORWARDS = {
    kind.forward
    for kind in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Linear,
    )
}


def add_biases(model: nn.Module) -> list[str]:
    """Give layers without a bias one of zeros, to which constants may move; returns their names."""
    added = []
    for name, module in model.named_modules():
        if (
            isinstance(module, (_ConvNd, nn.Linear))
            and type(module).forward in _FORWARDS
            and module._parameters.get("bias", "") is None
            and (shape := _shape(module)) is not None
        ):
            size = module.out_channels if isinstance(module, _ConvNd) else shape[0]
            like = next(iter(module.parameters()), None)
            if like is not None:
                module.bias = nn.Parameter(like.new_zeros(size), like.requires_grad)
                added.append(f"{name}.bias".lstrip("."))
    return added


def drop_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Take those of them away that have stayed zeros."""
    for name in names:
        if not model.get_parameter(name).any():
            model.get_submodule(name.rpartition(".")[0]).register_parameter("bias", None)
