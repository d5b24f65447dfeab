"""The curvature ops on emulated CUDA kernels: a stand-in for :mod:`blokern.ops` in the tests of that module. Arranges
tensors as csrc/curvature/register_*.h do."""

from __future__ import annotations

from pathlib import Path

import torch
from emulation_build import build_family
from server import Server
from torch import Tensor

from blokern.ops import curvature


def _poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(like, dtype=dtype).fill_(float("nan"))


def _as(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class EmulatedCurvatureOps:
    """blokern.ops' curvature functions. shift: by how many elements tensors lie past a boundary of 16 bytes."""

    curvature = curvature

    def __init__(self, schedule: str) -> None:
        self._server = Server(self.program(), schedule)
        self.shift = 0

    @staticmethod
    def program() -> Path:
        return build_family("curvature")

    def close(self) -> None:
        self._server.close()

    # ---- Losses

    def softmax_cross_entropy_hvp(
        self,
        logits,
        tangent,
        target,
        *,
        weight=None,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
    ):
        soft = target.is_floating_point()
        rows, classes = logits.shape
        numbers = {"rows": rows, "classes": classes, "ignore_index": ignore_index}
        count, factor = None, 1.0
        if soft and reduction == "mean" and rows > 0:
            factor = 1.0 / rows
        if not soft and reduction == "mean":
            wide = {"labels": target, "weight": _as(weight, torch.float64)}
            total = torch.full((1,), float("nan"), dtype=torch.float64)
            count = self._server.call("label_weights", (), numbers, wide | {"total": total})["total"]
        numbers |= {"label_smoothing": label_smoothing, "factor": factor}
        tensors = {
            "logits": logits.contiguous(),
            "tangent": tangent.contiguous(),
            "target" if soft else "labels": target.contiguous(),
            "weight": _as(weight, _sums(logits.dtype)),
            "count": count,
            "grad": _poisoned(logits.contiguous()),
            "hvp": _poisoned(logits.contiguous()),
            "loss": torch.full((rows,), float("nan"), dtype=torch.float64),
        }
        got = self._call("softmax_cross_entropy_hvp", logits.dtype, numbers, tensors)
        loss = got["loss"].sum()
        if reduction == "mean" and rows == 0:
            loss = loss * float("nan")
        return loss.to(logits.dtype), got["grad"], got["hvp"]

    # ---- Activations

    def activation_adjoint_tangent(
        self, activation, grad, grad_dot, saved, x_dot, *parameters, adjoint=False
    ):
        at = torch.empty_like(saved).copy_(saved)
        numbers = {"size": saved.numel()} | dict(
            zip(curvature.ACTIVATIONS[activation], parameters, strict=True)
        )
        bars = []
        stacked = x_dot.dim() > saved.dim()
        for v, g_dot in zip(x_dot, grad_dot, strict=True) if stacked else [(x_dot, grad_dot)]:
            tensors = {
                "saved": at,
                "x_bar": _poisoned(at) if adjoint and not bars else None,
                "x_bar_dot": _poisoned(at),
                **{
                    name: torch.empty_like(at).copy_(t)
                    for name, t in (("x_dot", v), ("grad", grad), ("grad_dot", g_dot))
                },
            }
            bars.append(self._call(f"{activation}_adjoint_tangent", at.dtype, numbers, tensors))
        moved = [bar["x_bar_dot"] for bar in bars]
        own = bars[0]["x_bar"] if adjoint else saved.new_empty(0)
        return own, torch.stack(moved) if stacked else moved[0]

    # ---- Batch normalisation

    def batch_norm_tangent(
        self,
        x,
        x_dot,
        mean,
        rstd,
        weight=None,
        weight_dot=None,
        bias_dot=None,
        *,
        gate=None,
        train=True,
    ):
        stacked = {"x_dot": x_dot, "weight_dot": weight_dot, "bias_dot": bias_dot}
        shared = {"x": x, "mean": mean, "rstd": rstd, "weight": weight, "gate": gate}

        def one(k: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
            outputs = {"y_dot": x}
            return self._batch_norm("batch_norm_tangent", train, shared | k, outputs)

        return _each(one, stacked, x_dot.dim() > x.dim())[0]

    def batch_norm_adjoint(self, grad, x, mean, rstd, weight=None, *, gate=None, train=True):
        shared = {"x": x, "mean": mean, "rstd": rstd, "weight": weight, "gate": gate}

        def one(k: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
            outputs = {"x_bar": x, "weight_bar": None, "bias_bar": None}
            return self._batch_norm("batch_norm_adjoint", train, shared | k, outputs)

        return _each(one, {"grad": grad}, grad.dim() > x.dim())

    def batch_norm_adjoint_tangent(
        self,
        grad,
        grad_dot,
        x,
        x_dot,
        mean,
        rstd,
        weight=None,
        weight_dot=None,
        *,
        gate=None,
        train=True,
        adjoint=False,
    ):
        shared = {"x": x, "mean": mean, "rstd": rstd, "weight": weight, "gate": gate, "grad": grad}
        stacked = {"grad_dot": grad_dot, "x_dot": x_dot, "weight_dot": weight_dot}

        def one(k: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
            outputs = {"x_bar_dot": x, "weight_bar": None, "bias_bar": None}
            if adjoint:
                outputs = {"x_bar": x} | outputs
            return self._batch_norm("batch_norm_adjoint", train, shared | k, outputs)

        results = _each(one, stacked, x_dot.dim() > x.dim())
        if not adjoint:
            return x.new_empty(0), *results
        own = results[0][0] if x_dot.dim() > x.dim() else results[0]
        return own, *results[1:]

    def _batch_norm(self, op, train, given, outputs) -> tuple[Tensor, ...]:
        x = given["x"]
        samples, channels = x.shape[:2]
        inner = (
            x.is_contiguous() if x.dim() == 2 else not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        )

        def arranged(t: Tensor) -> Tensor:
            return t.movedim(1, -1).contiguous().movedim(-1, 1) if inner else t.contiguous()

        like = arranged(x)
        tensors = {}
        for name, t in given.items():
            values = t is not None and t.dim() == 1
            tensors[name] = _as(t, torch.float64) if values or t is None else arranged(t)
        for name, t in outputs.items():
            of_channel = torch.zeros(channels, dtype=torch.float64)
            tensors[name] = of_channel if t is None else _poisoned(like)
        if x.numel() == 0:
            return tuple(tensors[name] for name in outputs)
        numbers = {
            "samples": samples,
            "channels": channels,
            "pixels": x.numel() // (samples * channels),
            "channels_inner": float(inner),
            "train": float(train),
        }
        got = self._call(op, x.dtype, numbers, tensors)
        return tuple(got[name] for name in outputs)

    # ---- Layer normalisation

    def layer_norm_tangent(self, x, x_dot, mean, rstd, weight=None, weight_dot=None, bias_dot=None):
        stacked = {"x_dot": x_dot, "weight_dot": weight_dot, "bias_dot": bias_dot}

        def one(k: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
            tensors = {"y_dot": _poisoned(x.contiguous())}
            return (self._rows("layer_norm_tangent", x, mean, rstd, weight, k, tensors, {})["y_dot"],)

        return _each(one, stacked, x_dot.dim() > 2)[0]

    def layer_norm_adjoint_tangent(
        self, grad, grad_dot, x, x_dot, mean, rstd, weight=None, weight_dot=None, *, adjoint=False
    ):
        stacked = {"grad_dot": grad_dot, "x_dot": x_dot, "weight_dot": weight_dot}
        kinds = _kinds(weight, weight_dot, x_dot.dim() > 2)
        at = {"blocks": torch.zeros(1, dtype=torch.float64)}
        counts = {"rows": len(x), "kinds": kinds}
        blocks = int(self._server.call("layer_norm_blocks", (), counts, at)["blocks"])

        def one(k: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
            bars = torch.zeros(blocks, kinds, x.shape[1], dtype=_sums(x.dtype))
            tensors = {
                "grad": grad.contiguous(),
                "x_bar_dot": _poisoned(x.contiguous()),
                "weight_bar_dot": bars,
                "bias_bar_dot": bars.clone(),
            }
            if adjoint:
                tensors["x_bar"] = _poisoned(x.contiguous())
            more = {"blocks": blocks}
            got = self._rows("layer_norm_adjoint_tangent", x, mean, rstd, weight, k, tensors, more)
            totals = [got[name].sum(0, dtype=torch.float64) for name in ("weight_bar_dot", "bias_bar_dot")]
            return got.get("x_bar", x.new_empty(0)), got["x_bar_dot"], *totals

        own, *moved = _each(one, stacked, x_dot.dim() > 2)
        return own[0] if x_dot.dim() > 2 else own, *moved

    def _rows(self, op, x, mean, rstd, weight, stacked, tensors, numbers) -> dict[str, Tensor]:
        given = {
            "x": x.contiguous(),
            "mean": _as(mean, torch.float64),
            "rstd": _as(rstd, torch.float64),
            "weight": _as(weight, _sums(x.dtype)),
        }
        for name, t in stacked.items():
            given[name] = _as(t, _sums(x.dtype) if name.startswith(("weight", "bias")) else x.dtype)
        kinds = _kinds(weight, stacked.get("weight_dot"), False)
        sizes = {"rows": len(x), "size": x.shape[1], "kinds": kinds}
        return self._call(op, x.dtype, sizes | numbers, given | tensors)

    def _call(self, op, dtype, numbers, tensors) -> dict[str, Tensor]:
        if self.shift:
            tensors = {
                name: self._shifted(t) if t is not None and t.dtype == dtype else t
                for name, t in tensors.items()
            }
        return self._server.call(op, (dtype,), numbers, tensors)

    def _shifted(self, t: Tensor) -> Tensor:
        memory = t.new_empty(t.numel() + self.shift)
        return memory[self.shift :].as_strided(t.shape, t.stride(), self.shift).copy_(t)


def _kinds(weight: Tensor | None, weight_dot: Tensor | None, stacked: bool) -> int:
    if weight is not None:
        return len(weight)
    return 1 if weight_dot is None else weight_dot.shape[int(stacked)]


def _each(one, stacked: dict[str, Tensor | None], is_stack: bool) -> tuple[Tensor, ...]:
    """one(tensors) for each vector of a stack, and the results as stacks."""
    if not is_stack:
        return one(stacked)
    count = len(next(t for t in stacked.values() if t is not None))
    each = [one({name: None if t is None else t[k] for name, t in stacked.items()}) for k in range(count)]
    return tuple(torch.stack(results) for results in zip(*each, strict=True))
