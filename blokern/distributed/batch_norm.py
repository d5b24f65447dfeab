"""BatchNorm over the batches of all processes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from blokern.distributed.processes import Processes

__all__ = ["SyncBatchNorm", "sync_batch_norm"]

ModelT = TypeVar("ModelT", bound=nn.Module)


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d, 2d or 3d whose training statistics are those of the batches of all processes, of equal size.

    On every device and differentiable any number of times, which torch's is not: Fast-BAT's cross term is a second
    derivative. Two exchanges of C numbers in a forward pass. Made by :func:`sync_batch_norm`.
    """

    processes: Processes

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"x must be [N, C, ...], got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.processes.size == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = self.processes.size * (x.numel() // x.shape[1])
        mean = self._sum(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = self._sum(centred.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(input.dtype)

    def _sum(self, t: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(t, self.processes)  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _Sum(torch.autograd.Function):
    """The sum over the processes, which is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        total = t.clone()
        processes.sum_([total])
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total: Tensor = _Sum.apply(grads[0], ctx.processes)  # type: ignore[no-untyped-call]
        return total, None


def sync_batch_norm(model: ModelT, processes: Processes) -> ModelT:
    """Turn every nn.BatchNorm1d, 2d and 3d of the model into a :class:`SyncBatchNorm`, in place; returns the model.

    Parameters, buffers and their names stay, so that an optimizer and a checkpoint fit before and after. Of one process
    the layers stay as they are. Raises ValueError for a subclass of them, which may do more than normalise.

    >>> model = sync_batch_norm(models.build("small_cnn"), processes)
    """
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and processes.size > 1
    }
    for name, layer in layers.items():
        if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SyncBatchNorm):
            raise ValueError(f"model: {name!r} must be a BatchNorm of torch.nn, got {type(layer).__name__}")
    for layer in layers.values():
        layer.__class__ = SyncBatchNorm
        layer.processes = processes  # type: ignore[assignment]
    return model
