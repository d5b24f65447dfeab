"""The ops on lists of tensors on emulated CUDA kernels: a stand-in for :mod:`blokern.ops` in the tests of that module.
Arranges tensors as csrc/curvature/multi_tensor_host.h and register_multi_tensor_cuda.cpp do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from emulated_curvature import EmulatedCurvatureOps
from server import Server
from torch import Tensor

BLOCK = 4096
Lists = Mapping[str, Sequence[Tensor]]


class EmulatedMultiTensor:
    def __init__(self, schedule: str) -> None:
        self._server = Server(EmulatedCurvatureOps.program(), schedule)

    def close(self) -> None:
        self._server.close()

    def multi_tensor_dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return self._run("multi_tensor_dot", {"a": a, "b": b}, {})

    def multi_tensor_axpby_(self, y: Sequence[Tensor], x: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
        self._run("multi_tensor_axpby_", {"y": y, "x": x}, {"of_x": a, "of_y": b}, written=("y",))

    def cg_update_(
        self,
        x: Sequence[Tensor],
        r: Sequence[Tensor],
        p: Sequence[Tensor],
        ap: Sequence[Tensor],
        alpha: Tensor,
    ) -> Tensor:
        lists = {"x": x, "r": r, "p": p, "ap": ap}
        return self._run("cg_update_", lists, {"alpha": alpha}, written=("x", "r"))

    def _run(self, op: str, lists: Lists, coefficients: Mapping[str, Tensor], written=()) -> Tensor:
        first = next(iter(lists.values()))
        columns = len(first[0])
        sizes = [t[0].numel() if columns else 0 for t in first]
        blocks = [-(-size // BLOCK) for size in sizes]
        places = sum(blocks)
        sums = torch.full((columns, places), torch.nan, dtype=torch.float64)
        numbers = {"columns": columns, "places": places}
        for dtype in {t.dtype for t in first}:
            mine = [i for i, t in enumerate(first) if t.dtype == dtype]
            tensors: dict[str, Tensor] = {name: t.contiguous() for name, t in coefficients.items()}
            given = dict(numbers, tensors=len(mine))
            for k, i in enumerate(mine):
                tensors |= {f"{name}{k}": _arranged(of[i], first[i]) for name, of in lists.items()}
                given |= {f"size{k}": sizes[i], f"place{k}": sum(blocks[:i])}
            got = self._server.call(op, (dtype,), given, tensors | {"sums": sums})
            for name in written:
                for k, i in enumerate(mine):
                    lists[name][i].copy_(got[f"{name}{k}"])
            sums = got["sums"]
        total = torch.full((columns,), torch.nan, dtype=torch.float64)
        if columns and op != "multi_tensor_axpby_":
            total = self._server.call("total_of_blocks", (), numbers, {"sums": sums, "total": total})["total"]
        return total


def _arranged(t: Tensor, like: Tensor) -> Tensor:
    """t, or a copy with like's strides if like's columns are dense and one behind another, else contiguous."""
    dense = torch.empty_like(like).stride() == like.stride()  # which it keeps of a tensor without gaps
    if not dense or (len(like) > 1 and like.stride(0) != like[0].numel()):
        like = torch.empty(like.shape)
    wanted = like.stride()
    return t if t.stride() == wanted else torch.empty_strided(t.shape, wanted, dtype=t.dtype).copy_(t)
