"""The state that a model is put in while it is attacked, and put back from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode", "frozen_parameters"]


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Switches the parameters' gradients off, so that a backward pass computes only the input's.

    That saves a third of each attack pass. On leaving, also by an exception, exactly the parameters that had
    ``requires_grad`` get it back::

        with frozen_parameters(model):
            (grad,) = torch.autograd.grad(loss(model(x), y), x)
    """
    thawed = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in thawed:
            p.requires_grad_(False)
        yield
    finally:
        for p in thawed:
            p.requires_grad_(True)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode; on leaving, also by an exception, every submodule gets its own flag back::

    with eval_mode(model):
        logits = model(x)
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for (
            module,
            training,
        ) in flags:  # not model.train(): part of a model may have been in eval mode on purpose
            module.training = training
