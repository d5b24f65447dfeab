"""Whether two networks compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from blokern.sparse.compaction.record import Refusal, said, tensors_in, undisturbed

__all__ = ["check_outputs", "coarsest_eps", "doubled"]

# Of the largest output: the epsilon of what a network computes in to this power. In float64, 10⁻⁹; roughly, in float32,
# 10⁻².
_POWER, _ROUGH_POWER = 0.575, 0.3


def check_outputs(
    model: nn.Module, copy: nn.Module, example: tuple[Any, ...], eps: float, *, rough: bool = False
) -> bool:
    """Compare a network with its copy, on an example and on random inputs like it; roughly: on the example, allowing
    for rounding that has added up. eps: of the numbers that they compute in.

    Raises Refusal where they differ. Returns whether they could be compared: not those that draw random numbers.
    """
    tolerance = eps ** (_ROUGH_POWER if rough else _POWER)
    if not rough and not _alike(_outputs(model, example), _outputs(model, example), tolerance):
        return False
    for inputs in (example,) if rough else (example, _varied(example)):
        want, got = _outputs(model, inputs), _outputs(copy, inputs)
        if not _alike(want, got, tolerance):
            raise Refusal(
                "the smaller copy's outputs differ from the masked network's by "
                f"{max(_differences(want, got), default=0.0):.2g}"
            )
    return True


def coarsest_eps(model: nn.Module, eps: float) -> float:
    """The largest epsilon of a model's parameters, at least `eps`."""
    return max([eps, *(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())])


def doubled(tree: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)  # type: ignore[no-any-return]


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with undisturbed(model):
        torch.seed()
        arguments = pytree.tree_map_only(Tensor, Tensor.clone, inputs)  # which the forward may change
        try:
            return list(tensors_in(model(*arguments)))
        except Exception as error:
            raise Refusal(f"its forward fails on the example: {said(error)}") from error


def _alike(want: list[Tensor], got: list[Tensor], tolerance: float) -> bool:
    return len(want) == len(got) and all(
        a.shape == b.shape and _close(a, b, tolerance) for a, b in zip(want, got, strict=True)
    )


def _close(want: Tensor, got: Tensor, tolerance: float) -> bool:
    if not want.is_floating_point():
        return torch.equal(want, got)
    scale = want[want.isfinite()].abs().max() if want.isfinite().any() else want.new_ones(())
    return torch.allclose(want, got, rtol=0.0, atol=float(scale) * tolerance, equal_nan=True)


def _differences(want: list[Tensor], got: list[Tensor]) -> list[float]:
    return [
        float((a - b).abs().max())
        for a, b in zip(want, got, strict=False)
        if a.shape == b.shape and a.numel()
    ]


def _varied(tree: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random inputs of the example's scale."""
    generator = torch.Generator().manual_seed(1)

    def varied(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() < 2:
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        return noise * tensor.std() + tensor.mean()

    return pytree.tree_map_only(Tensor, varied, tree)  # type: ignore[no-any-return]
