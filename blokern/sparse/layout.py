"""Activations with samples innermost, [N, C, H, W] in memory as [C, H, W, N], through whole networks.

Masked convolutions are fastest on them and keep them, as elementwise ops do. BatchNorm and pooling of torch do neither,
but their fast kernels fit if the same memory is read under another shape: to BatchNorm it is one contiguous sample of
H·W × N pixels; to pooling it is a channels_last tensor of C samples with N channels.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from blokern.sparse.nodes import node_of

__all__ = [
    "SamplesInnermostAdaptiveAvgPool2d",
    "SamplesInnermostAvgPool2d",
    "SamplesInnermostBatchNorm2d",
    "SamplesInnermostMaxPool2d",
    "drop_layout",
    "is_samples_innermost",
    "samples_innermost",
    "to_samples_innermost",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


def is_samples_innermost(x: Tensor) -> bool:
    """Whether x is [N, C, H, W] with N > 1 and lies in memory as a contiguous [C, H, W, N].

    >>> is_samples_innermost(to_samples_innermost(torch.rand(2, 3, 8, 8)))
    True
    """
    return x.dim() == 4 and x.shape[0] > 1 and x.permute(1, 2, 3, 0).is_contiguous()


def to_samples_innermost(x: Tensor) -> Tensor:
    """x [N, C, H, W], of any dtype, with samples innermost: a copy, or x itself if it is so already or N is 1.

    Raises ValueError if x is not four-dimensional.

    >>> to_samples_innermost(torch.rand(2, 3, 8, 8)).stride()
    (1, 128, 16, 2)
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got shape {tuple(x.shape)}")
    if x.shape[0] == 1 or is_samples_innermost(x):
        return x
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


class SamplesInnermostBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that keeps samples innermost, and is fast on them; on other layouts it is nn.BatchNorm2d.

    >>> layer = SamplesInnermostBatchNorm2d(3)
    >>> is_samples_innermost(layer(to_samples_innermost(torch.rand(2, 3, 8, 8))))
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return node_of(self, input)
        if not is_samples_innermost(input):
            return super().forward(input)
        image = input.permute(1, 2, 3, 0).flatten(1, 2).unsqueeze(0)  # [1, C, H·W, N]
        out: Tensor = super().forward(image)
        return out.view(*input.shape[1:], input.shape[0]).permute(3, 0, 1, 2)


class _Pool(nn.Module):
    """Put before a pooling layer in a class's bases. Results that come in pairs, with indices, do too."""

    def forward(self, input: Tensor) -> Any:
        if not isinstance(input, Tensor):
            return node_of(self, input)
        if not is_samples_innermost(input):
            return super().forward(input)
        pooled = super().forward(input.transpose(0, 1))
        if isinstance(pooled, Tensor):
            return pooled.transpose(0, 1)
        return tuple(part.transpose(0, 1) for part in pooled)


class SamplesInnermostMaxPool2d(_Pool, nn.MaxPool2d):
    """nn.MaxPool2d for both layouts, as :class:`SamplesInnermostBatchNorm2d`."""


class SamplesInnermostAvgPool2d(_Pool, nn.AvgPool2d):
    """nn.AvgPool2d for both layouts, as :class:`SamplesInnermostBatchNorm2d`."""


class SamplesInnermostAdaptiveAvgPool2d(_Pool, nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d for both layouts, as :class:`SamplesInnermostBatchNorm2d`."""


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: SamplesInnermostBatchNorm2d,
    nn.MaxPool2d: SamplesInnermostMaxPool2d,
    nn.AvgPool2d: SamplesInnermostAvgPool2d,
    nn.AdaptiveAvgPool2d: SamplesInnermostAdaptiveAvgPool2d,
}
_PLAIN = {layer: plain for plain, layer in _LAYERS.items()}


def samples_innermost(model: ModelT) -> ModelT:
    """Let the model compute with samples innermost, the fastest layout for masked convolutions; in place.

    A forward pre-hook converts its positional arguments of shape [N, C, H, W]; BatchNorm2d, MaxPool2d, AvgPool2d and
    AdaptiveAvgPool2d become classes that keep the layout. Results are those of before up to rounding; parameters and
    state_dict stay. :func:`blokern.sparse.to_dense` undoes it. Returns the model.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> model = samples_innermost(sparsify(net, {"0.weight": torch.rand(4, 3, 3, 3) < 0.5}))
    >>> is_samples_innermost(model(torch.rand(2, 3, 8, 8)))
    True
    """
    for module in model.modules():
        module.__class__ = _LAYERS.get(type(module), type(module))
    if _convert not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_convert)
    return model


def drop_layout(model: nn.Module) -> None:
    """Undo :func:`samples_innermost`."""
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _convert]:
            del module._forward_pre_hooks[key]


def _convert(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(to_samples_innermost(a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args)
