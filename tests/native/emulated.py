"""The attack ops on emulated CUDA kernels: a stand-in for :mod:`blokern.ops` in the tests of that module."""

from __future__ import annotations

from pathlib import Path

import torch
from emulation_build import build_family
from server import Server
from torch import Tensor


class EmulatedOps:
    """blokern.ops' attack functions. Rows go to the kernels with their own strides and alignment; a tensor whose
    samples are not dense in memory is copied first, as the ops do."""

    def __init__(self, schedule: str) -> None:
        self._server = Server(self.program(), schedule)

    @staticmethod
    def program() -> Path:
        return build_family("attack")

    def close(self) -> None:
        self._server.close()

    def pgd_step(self, x_adv, x, grad, step_size, eps, *, norm="linf", active=None, **box):
        out = torch.empty_like(x_adv).fill_(float("nan"))
        tensors = {"x_adv": x_adv, "x": x, "grad": grad, "out": out, "active": active}
        return self._call(f"pgd_step_{norm}", tensors, step_size, eps, **box)["out"]

    def pgd_step_(self, x_adv, x, grad, step_size, eps, *, norm="linf", active=None, **box):
        return x_adv.copy_(self.pgd_step(x_adv, x, grad, step_size, eps, norm=norm, active=active, **box))

    def project(self, x_adv, x, eps, *, norm="linf", active=None, **box):
        out = torch.empty_like(x_adv).fill_(float("nan"))
        tensors = {"x_adv": x_adv, "x": x, "out": out, "active": active}
        return self._call(f"project_{norm}", tensors, 0.0, eps, **box)["out"]

    def project_(self, x_adv, x, eps, *, norm="linf", active=None, **box):
        return x_adv.copy_(self.project(x_adv, x, eps, norm=norm, active=active, **box))

    def apgd_step_(
        self,
        x_adv,
        x_prev,
        x,
        grad,
        step_size,
        eps,
        *,
        momentum=0.75,
        norm="linf",
        keep=None,
        active=None,
        **box,
    ):
        if isinstance(keep, int):
            keep = torch.full((len(x),), keep)
        tensors = {"x_adv": x_adv, "x_prev": x_prev, "x": x, "grad": grad, "keep": keep, "active": active}
        got = self._call(f"apgd_step_{norm}", tensors, step_size, eps, momentum=momentum, **box)
        x_prev.copy_(got["x_prev"])
        return x_adv.copy_(got["x_adv"])

    def fast_bat_step(self, z, x, grad, step_size, eps, **box):
        free = torch.empty_like(z, dtype=torch.bool)
        tensors = {"z": z, "x": x, "grad": grad, "out": torch.empty_like(z), "free": free}
        got = self._call("fast_bat_step", tensors, step_size, eps, **box)
        return got["out"], got["free"]

    def random_start(self, x, eps, *, norm="linf", generator=None, **numbers):
        # The 64 bits that the op draws of a CPU generator.
        seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator))
        tensors = {"x": x, "out": torch.empty_like(x)}
        return self._call(f"random_start_{norm}", tensors, 0.0, eps, seed=seed % 2**64, **numbers)["out"]

    def _call(
        self, op, tensors, step_size, eps, *, momentum=1.0, clip_min=0.0, clip_max=1.0, seed=0, first=0
    ) -> dict[str, Tensor]:
        images = tensors["x"]
        sizes = {"step_size": step_size, "eps": eps}
        if any(isinstance(value, Tensor) for value in sizes.values()):
            tensors |= {name: self._per_sample(value, images) for name, value in sizes.items()}
            step_size = eps = float("nan")
        given = {name: t for name, t in tensors.items() if t is not None}
        if images.numel() == 0:
            return given
        rows = {name: _dense(t) for name, t in given.items()}
        numbers = {
            **{"samples": len(images), "size": images[0].numel(), "step_size": step_size, "eps": eps},
            **{"momentum": momentum, "clip_min": clip_min, "clip_max": clip_max},
            **{"seed_high": seed >> 32, "seed_low": seed % 2**32, "first": first},
        }
        return self._server.call(op, (images.dtype, tensors.get("grad", images).dtype), numbers, rows)

    @staticmethod
    def _per_sample(value, images: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64).expand(len(images)).contiguous()


def _dense(t: Tensor) -> Tensor:
    """t, or a copy where a sample's elements do not lie in the order of a contiguous one without gaps."""
    return t if t[0].is_contiguous() else t.contiguous()
