"""The sparse family's native ops on emulated CUDA kernels: what csrc/sparse/register_*_cuda.cpp makes of them, to stand
in for ``torch.ops.blokern`` below :mod:`blokern.ops`."""

from __future__ import annotations

from pathlib import Path

import torch
from emulation_build import build_family
from server import Server
from torch import Tensor

FEW_SAMPLES = 16


class EmulatedSparse:
    """The ops by name. `by_entries`: products of more than a few samples go by a mask's entries, not by torch's dense
    product."""

    OPS = (
        *(
            "mask_words",
            "words_mask",
            "count_words",
            "transpose_words",
            "mask_stream",
            "topk_mask",
            "nm_mask",
        ),
        *("bip_score_step_", "bip_released_step_", "masked_sgd_step_", "spmm", "sddmm"),
        *("packed_values", "packed_spmm"),
    )

    def __init__(self, schedule: str) -> None:
        self._server = Server(self.program(), schedule)
        self.by_entries = True

    @staticmethod
    def program() -> Path:
        return build_family("sparse")

    def close(self) -> None:
        self._server.close()

    # ---- Masks

    def mask_words(self, mask: Tensor) -> Tensor:
        mask = mask.contiguous()
        words = _poisoned(len(mask), _words(mask.shape[1]), dtype=torch.int64)
        return self._call("pack_mask", [], _sizes(mask), mask=mask, words=words)["words"]

    def words_mask(self, words: Tensor, cols: int) -> Tensor:
        mask = torch.ones(len(words), cols, dtype=torch.bool)
        return self._call("unpack_mask", [], _sizes(mask), mask=mask, words=words)["mask"]

    def count_words(self, words: Tensor) -> Tensor:
        count = torch.zeros((), dtype=torch.int64)
        return self._call("count_words", [], {"size": words.numel()}, words=words.contiguous(), count=count)[
            "count"
        ]

    def transpose_words(self, words: Tensor, cols: int) -> Tensor:
        to = _poisoned(cols, _words(len(words)), dtype=torch.int64)
        return self._call("transpose_mask", [], {"rows": len(words), "cols": cols}, words=words, to=to)["to"]

    def mask_stream(self, words: Tensor, cols: int, block: int) -> tuple[Tensor, Tensor]:
        numbers = {"rows": len(words), "cols": cols, "block": block}
        start = _poisoned(-(-cols // block) * len(words) + 1, dtype=torch.int32)
        start[0] = 0
        start = self._call("count_stream", [], numbers, words=words, start=start)["start"]
        start = start.cumsum(0, dtype=torch.int32)
        column = _poisoned(int(start[-1]), dtype=torch.int32)
        return start, self._call("fill_stream", [], numbers, words=words, start=start, column=column)[
            "column"
        ]

    # ---- Selections

    def topk_mask(self, scores: list[Tensor], density: float, per_layer: bool) -> list[Tensor]:
        layers = [t.contiguous() for t in scores]
        sizes = [t.numel() for t in layers]
        wanted = [round(density * n) for n in (sizes if per_layer else [sum(sizes)])]
        numbers = {"layers": len(layers), "selections": len(wanted)}
        tensors = {}
        for i, t in enumerate(layers):
            numbers |= {f"size{i}": t.numel(), f"of{i}": i if per_layer else 0}
            tensors |= {f"scores{i}": t, f"mask{i}": torch.ones_like(t, dtype=torch.bool)}
        numbers |= {f"wanted{s}": n for s, n in enumerate(wanted)}
        got = self._refusing_nan("topk_mask", [t.dtype for t in layers], numbers, tensors, scores)
        return [got[f"mask{i}"] for i in range(len(layers))]

    def nm_mask(self, scores: Tensor, n: int, m: int, dim: int) -> Tensor:
        dense = scores.contiguous()
        inner = dense[(0,) * (dim % dense.dim() + 1)].numel() if dense.numel() else 1
        numbers = {"n": n, "m": m, "inner": inner, "groups": dense.numel() // m}
        tensors = {"scores": dense, "mask": torch.ones_like(dense, dtype=torch.bool)}
        return self._refusing_nan("nm_mask", [scores.dtype], numbers, tensors, [scores])["mask"]

    def _refusing_nan(self, op, dtypes, numbers, tensors, scores) -> dict[str, Tensor]:
        """On the device it is an assertion; here what the CPU's op says, for the tests of it."""
        got = self._call(op, dtypes, numbers, **tensors, ok=torch.ones(1, dtype=torch.int32))
        if not got["ok"]:
            i = next(i for i, t in enumerate(scores) if t.isnan().any())
            name = "scores" if len(scores) == 1 else f"scores[{i}]"
            raise ValueError(
                f"{name} must have no NaN, got {int(scores[i].isnan().sum())} in {scores[i].numel()} values"
            )
        assert not any(t.isnan().any() for t in scores), "a NaN that the kernel did not see"
        return got

    # ---- Steps

    def bip_score_step_(self, scores, weights, grads, words, buffers, lr, gamma, momentum, weight_decay):
        self._step(
            "bip_score_step_", scores, weights, grads, words, buffers, (lr, momentum, weight_decay), gamma
        )

    def bip_released_step_(self, weights, grads, buffers, lr, gamma, momentum, weight_decay):
        self._step("bip_released_step_", weights, [], grads, [], buffers, (lr, momentum, weight_decay), gamma)

    def masked_sgd_step_(self, weights, grads, words, buffers, lr, momentum, weight_decay):
        self._step("masked_sgd_step_", weights, [], grads, words, buffers, (lr, momentum, weight_decay), 1.0)

    def _step(self, op, values, weights, grads, words, buffers, rates, gamma) -> None:
        for dtype in {t.dtype for t in values}:
            numbers = dict(zip(("lr", "momentum", "weight_decay"), rates, strict=True)) | {
                "implicit": 1 / gamma
            }
            tensors, written = {}, {}
            index = [i for i, t in enumerate(values) if t.dtype == dtype and t.numel()]
            for k, i in enumerate(index):
                numbers |= {f"rows{k}": len(values[i]), f"cols{k}": values[i][0].numel()}
                written |= {f"value{k}": values[i]}
                lists = {"weight": weights, "grad": grads, "words": words, "buffer": buffers}
                tensors |= {f"{name}{k}": of[i] for name, of in lists.items() if of}
                written |= {f"buffer{k}": buffers[i]} if buffers else {}
            tensors = {name: t.contiguous() for name, t in (tensors | written).items()}
            got = self._call(op, [dtype], numbers | {"layers": len(index)}, **tensors)
            for name, t in written.items():
                t.copy_(got[name])

    # ---- Products

    def spmm(self, weight, x, bias, start, column, block, words, *_) -> Tensor:
        rows, cols, samples = *weight.shape, x.shape[1]
        y = _empty_product(rows, x)
        if 0 in (rows, cols, samples):
            return y.copy_(bias[:, None]) if bias is not None else y.zero_()
        numbers = {"rows": rows, "cols": cols, "samples": samples, "block": block}
        if samples <= FEW_SAMPLES:
            weight = weight if weight.stride(1) == 1 else weight.contiguous()
            x = x if x.stride(0) == 1 else x.t().contiguous().t()
            numbers |= {"weight_stride": weight.stride(0), "x_stride": x.stride(1)}
            numbers |= {"row_stride": y.stride(0), "sample_stride": y.stride(1)}
            tensors = {"weight": weight, "x": x.t(), "words": words, "bias": bias, "y": y}
            return self._call("skinny_spmm", [x.dtype], numbers, **tensors)["y"]
        if self.by_entries and x.dtype.itemsize >= 4:
            numbers |= {"row_stride": weight.stride(0), "col_stride": weight.stride(1)}
            tensors = {"weight": weight, "x": x.contiguous(), "bias": bias, "start": start, "column": column}
            tensors["y"] = y.contiguous()
            return y.copy_(self._call("stream_spmm", [x.dtype], numbers, **tensors)["y"])
        masked = torch.full_like(weight, torch.nan, memory_format=torch.contiguous_format)
        tensors = {"weight": weight.contiguous(), "words": words, "to": masked}
        masked = self._call("apply_mask", [x.dtype], numbers, **tensors)["to"]
        return y.copy_(masked @ x if bias is None else masked @ x + bias[:, None])

    def sddmm(self, a, b, start, column, block, words, *_) -> Tensor:
        rows, cols, samples = len(a), len(b), a.shape[1]
        numbers = {"rows": rows, "cols": cols, "samples": samples, "block": block, "entries": column.numel()}
        if samples == 0 or rows == 0 or cols == 0:
            return a.new_zeros(rows, cols)
        if self.by_entries and a.dtype.itemsize >= 4:
            tensors = {"a": a.contiguous(), "b": b.contiguous(), "start": start, "column": column}
            product = a.new_zeros(rows, cols)
            return self._call("stream_sddmm", [a.dtype], numbers, **tensors, product=product)["product"]
        return self._call("clear_masked", [a.dtype], numbers, words=words, product=a @ b.t())["product"]

    def packed_values(self, weight, start, column, block) -> Tensor:
        numbers = {"rows": len(weight), "cols": weight.shape[1], "block": block}
        numbers |= {"row_stride": weight.stride(0), "col_stride": weight.stride(1)}
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        values = torch.full(column.shape, torch.nan, dtype=wide)
        tensors = {"start": start, "column": column, "weight": weight, "value": values}
        return self._call("pack_entries", [weight.dtype], numbers, **tensors)["value"]

    def packed_spmm(self, values, x, bias, start, column, block, rows) -> Tensor:
        cols, samples = x.shape
        y = _empty_product(rows, x)
        if 0 in (rows, cols, samples):
            return y.copy_(bias[:, None]) if bias is not None else y.zero_()
        numbers = {"rows": rows, "cols": cols, "samples": samples, "block": block}
        entries = {"start": start, "column": column, "value": values}
        if not self.by_entries:
            weight = x.new_zeros(rows, cols)
            weight = self._call("unpack_entries", [x.dtype], numbers, **entries, weight=weight)["weight"]
            return y.copy_(weight @ x if bias is None else weight @ x + bias[:, None])
        numbers |= {"row_stride": y.stride(0), "sample_stride": y.stride(1)}
        return self._call("packed_spmm", [x.dtype], numbers, **entries, x=x.contiguous(), bias=bias, y=y)["y"]

    def _call(self, op, dtypes, numbers, **tensors: Tensor | None) -> dict[str, Tensor]:
        return self._server.call(op, dtypes, numbers, tensors)


def _words(cols: int) -> int:
    return (cols + 63) // 64


def _sizes(mask: Tensor) -> dict[str, int]:
    return {"rows": mask.shape[0], "cols": mask.shape[1]}


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, -1, dtype=dtype)


def _empty_product(rows: int, x: Tensor) -> Tensor:
    """[rows, samples] in x's layout, as product_ops::empty_product of csrc/sparse/register_products.h."""
    batch_first = x.stride(0) == 1 and x.stride(1) != 1
    y = torch.full((x.shape[1], rows) if batch_first else (rows, x.shape[1]), torch.nan, dtype=x.dtype)
    return y.t() if batch_first else y
