"""The networks that training steps are measured on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blokern import models


def network(name: str, x: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """In train mode and in the memory format of the images x [N, C, H, W], always with the same weights."""
    torch.manual_seed(0)
    model = models.build(name, num_classes=10, in_channels=x.shape[1]).train()
    nhwc = torch.channels_last
    model = model.to(memory_format=nhwc if x.is_contiguous(memory_format=nhwc) else torch.contiguous_format)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def images(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [batch, 3, 32, 32] and y of 10 classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 3, 32, 32, generator=generator)
    return x, torch.randint(10, (batch,), generator=generator)


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass in eval mode, of which autograd takes no note."""
    model.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(x)
        return output

    return run
