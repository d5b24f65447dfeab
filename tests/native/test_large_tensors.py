"""Tensors of more than 2³¹ elements, and launches of more blocks than a grid is given, under emulation: addresses have
memory where windows lie (server.Vast), and the blocks run that work on them, the first two of a launch and the last
two. Kernels whose blocks wait for each other, or walk the whole tensor, are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import test_curvature_ops
import test_ops
import torch
from emulated import EmulatedOps
from emulated_curvature import EmulatedCurvatureOps
from ops_cases import TOLERANCE, images
from server import Server, Vast
from sparse_emulated import EmulatedSparse
from torch import Tensor

from blokern import ops
from blokern.ops import SparseMask

LIMIT, MOST_BLOCKS, THREADS = 2**31, 2**20, 256
Ranges = list[tuple[int, int]]


class Spread(Server):
    """Sends small tensors as parts of vast ones: place(t) says, for one that is, its ranges in the vast one."""

    def __init__(
        self, program, place: Callable[[Tensor], tuple[int, int, Ranges] | None], **numbers: float
    ) -> None:
        super().__init__(program, "shuffled")
        self._place, self._numbers = place, numbers

    def call(self, op, dtypes, numbers, tensors):
        given = dict(tensors)
        for name, t in tensors.items():
            placed = None if t is None else self._place(t)
            if placed is not None:
                numel, stride, ranges = placed
                parts = t.contiguous().flatten().split([end - begin for begin, end in ranges])
                given[name] = Vast(numel, {r[0]: part for r, part in zip(ranges, parts, strict=True)}, stride)
        got = super().call(op, dtypes, {**numbers, **self._numbers}, given)
        return {
            name: torch.cat([*t.values()]).view(tensors[name].shape) if isinstance(t, dict) else t
            for name, t in got.items()
        }


@pytest.fixture(scope="module")
def sparse() -> Iterator[Server]:
    server = Server(EmulatedSparse.program(), "shuffled")
    yield server
    server.close()


@pytest.fixture(scope="module")
def curvature() -> Iterator[Server]:
    server = Server(EmulatedCurvatureOps.program(), "shuffled")
    yield server
    server.close()


def in_turns(size: int, a_block: int, blocks: int) -> Ranges:
    """What the first two and the last two blocks work on, which take a_block elements each in turn."""
    covered: Ranges = []
    for first in range(0, size, blocks * a_block):
        for begin in (first, first + (blocks - 2) * a_block):
            end = min(begin + 2 * a_block, size)
            if covered and covered[-1][1] == begin:
                covered[-1] = (covered[-1][0], end)
            elif begin < end:
                covered.append((begin, end))
    assert covered[-1][1] == size > LIMIT
    return covered


def vast(size: int, ranges: Ranges, values: Callable[[int], Tensor]) -> Vast:
    return Vast(size, {begin: values(end - begin) for begin, end in ranges})


def nan(dtype: torch.dtype) -> Callable[[int], Tensor]:
    return lambda n: torch.full((n,), torch.nan, dtype=dtype)


# ---- Attack


def flat_call(op: str, dtype: torch.dtype, size: int, ranges: Ranges, names: list[str]) -> None:
    gen = torch.Generator().manual_seed(0)
    tensors = {name: vast(size, ranges, lambda n: torch.rand(n, generator=gen).to(dtype)) for name in names}
    numbers = {"samples": 1, "size": size, "step_size": 0.1, "eps": 0.2, "clip_min": 0.0, "clip_max": 1.0}
    server = Server(EmulatedOps.program(), "shuffled")
    got = server.call(
        f"{op}_linf", (dtype, dtype), numbers, tensors | {"out": vast(size, ranges, nan(dtype))}
    )
    server.close()
    for begin, out in got["out"].items():
        windows = [tensors[name].windows[begin][None] for name in names]
        sizes = (0.1, 0.2) if op == "pgd_step" else (0.2,)
        assert torch.equal(getattr(ops, op)(*windows, *sizes)[0], out)


def test_a_batch_of_more_elements_than_an_int_counts() -> None:
    blocks = LIMIT // (4 * THREADS * 8) + 3  # four packs of 8 elements a thread
    size = 4 * THREADS * 8 * blocks - 5
    flat_call("pgd_step", torch.bfloat16, size, in_turns(size, THREADS * 8, blocks), ["x_adv", "x", "grad"])


def test_a_batch_of_more_blocks_than_a_grid_is_given() -> None:
    size = LIMIT + 600  # a fifth turn of packs of 2 elements
    flat_call("project", torch.float64, size, in_turns(size, THREADS * 2, MOST_BLOCKS), ["x_adv", "x"])


@pytest.mark.parametrize(("op", "norm"), test_ops.ALL)
def test_samples_far_apart(op: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stride = LIMIT // 2 + 7

    def place(t: Tensor) -> tuple[int, int, Ranges] | None:
        if t.dim() < 2:
            return None
        size = t[0].numel()
        return 2 * stride + size, stride, [(n * stride, n * stride + size) for n in range(3)]

    kernels = EmulatedOps("shuffled")
    kernels._server = Spread(kernels.program(), place)
    monkeypatch.setattr(test_ops, "ops", kernels)
    test_ops.check(op, norm, images((3, 3, 7, 11)), TOLERANCE[torch.float32])
    kernels.close()


# ---- Curvature: the cases of the CPU's tests, their rows or channels moved to both ends of vast tensors

AT_FIRST, TURNED = 16, 11  # rows of the first two blocks, a warp each; rows that are their second turn
ROWS = 8 * MOST_BLOCKS + TURNED


def spread_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> EmulatedCurvatureOps:
    """`rows` rows as the first and last of a matrix that has ROWS."""
    assert rows == 2 * AT_FIRST + TURNED

    def place(t: Tensor) -> tuple[int, int, Ranges] | None:
        if t.dim() == 0 or len(t) != rows:
            return None
        size = t[0].numel()
        end = ROWS - rows + AT_FIRST
        return ROWS * size, 0, [(0, AT_FIRST * size), (end * size, ROWS * size)]

    kernels = EmulatedCurvatureOps("shuffled")
    kernels._server = Spread(kernels.program(), place, rows=ROWS)
    monkeypatch.setattr(test_curvature_ops, "ops", kernels)
    return kernels


def test_rows_of_more_elements_than_an_int_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, size = 2 * AT_FIRST + TURNED, 261
    assert ROWS * size > LIMIT
    kernels = spread_rows(monkeypatch, rows)
    arguments, _ = test_curvature_ops.cross_entropy_case(rows, size, torch.float32)
    got = kernels.softmax_cross_entropy_hvp(*arguments, reduction="sum")
    want = ops.softmax_cross_entropy_hvp(*arguments, reduction="sum")
    test_curvature_ops.close(got, tuple(t.double() for t in want), torch.float32)
    case = test_curvature_ops.layer_norm_case(rows, size, 1, torch.float32)
    got = test_curvature_ops.row_call(kernels, "layer_norm_tangent", case)
    want = test_curvature_ops.row_call(ops, "layer_norm_tangent", case)
    test_curvature_ops.close(got, tuple(t.double() for t in want), torch.float32)
    kernels.close()


@pytest.mark.parametrize(
    ("op", "inner"),
    [
        *((op, False) for op in test_curvature_ops.ARGUMENTS),
        *(
            (op, True) for op in test_curvature_ops.ARGUMENTS if op != "batch_norm_adjoint_tangent"
        ),  # 2 GB of sums
    ],
)
def test_channels_of_more_elements_than_an_int_counts(op: str, inner: bool) -> None:
    if inner:  # strips of 32 channels, the last of 5
        at_first, channels, (samples, *pixels) = 64, 32 * (2**19 + 1) + 5, (128,)
        small = at_first + 37
    else:  # channels of the first two blocks, and of their second turn
        at_first, channels, (samples, *pixels) = 2, MOST_BLOCKS + 2, (3, 700)
        small = 6
    plane = 1 if inner else 700
    end = channels - small + at_first
    assert samples * channels * plane > LIMIT

    def place(t: Tensor) -> tuple[int, int, Ranges] | None:
        if t.dim() == 0 or small not in t.shape:
            return None
        size, planes = (1, 1) if t.dim() == 1 else (plane, samples)
        ranges = []
        for sample in range(planes):
            start = sample * channels
            ranges += [
                (start * size, (start + at_first) * size),
                ((start + end) * size, (start + channels) * size),
            ]
        return planes * channels * size, 0, ranges

    kernels = EmulatedCurvatureOps("shuffled")
    kernels._server = Spread(
        kernels.program(), place, channels=channels, pixels=plane, channels_inner=float(inner)
    )
    case = test_curvature_ops.batch_norm_case((samples, small, *pixels), torch.float32)
    got = test_curvature_ops.call(kernels, op, case)
    want = test_curvature_ops.call(ops, op, case)
    test_curvature_ops.close(got, tuple(t.double() for t in want), torch.float32)
    kernels.close()


def test_activations_of_more_elements_than_an_int_counts(curvature: Server) -> None:
    blocks = LIMIT // (4 * THREADS * 8) + 3
    size = 4 * THREADS * 8 * blocks - 5
    ranges, names = in_turns(size, THREADS * 8, blocks), ["saved", "x_dot", "grad", "grad_dot"]
    tensors = {name: vast(size, ranges, lambda n: torch.randn(n).bfloat16()) for name in names}
    out = vast(size, ranges, nan(torch.bfloat16))
    got = curvature.call(
        "silu_adjoint_tangent", (torch.bfloat16,), {"size": size}, tensors | {"x_bar_dot": out}
    )
    for begin, moved in got["x_bar_dot"].items():
        saved, *vectors = (tensors[name].windows[begin] for name in ("saved", "grad", "grad_dot", "x_dot"))
        want = ops.activation_adjoint_tangent("silu", *vectors[:2], saved, vectors[2])[1]
        torch.testing.assert_close(moved, want)


def test_lists_of_more_elements_than_an_int_counts(curvature: Server) -> None:
    columns, size, block = 3, LIMIT // 2 + 5, 4096
    places = -(-size // block)
    ranges = [(0, 2 * block), (columns * size - block - 5, columns * size)]
    draw = {name: vast(columns * size, ranges, torch.randn) for name in ("x0", "r0", "p0", "ap0")}
    alpha = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    sums = torch.zeros(columns, places, dtype=torch.float64)
    numbers = {"tensors": 1, "size0": size, "place0": 0, "columns": columns, "places": places}
    got = curvature.call("cg_update_", (torch.float32,), numbers, draw | {"alpha": alpha, "sums": sums})
    squares = torch.zeros(columns, dtype=torch.float64)
    for column, (begin, _) in zip((0, 2), ranges, strict=True):
        x, r, p, ap = (t.windows[begin][None].clone() for t in draw.values())
        squares[column] += ops.cg_update_([x], [r], [p], [ap], alpha[column, None])[0]
        assert torch.equal(got["x0"][begin], x[0])
        assert torch.equal(got["r0"][begin], r[0])
    total = torch.zeros(columns, dtype=torch.float64)
    total = curvature.call("total_of_blocks", (), numbers, {"sums": got["sums"], "total": total})["total"]
    torch.testing.assert_close(total, squares, rtol=1e-6, atol=0.0)


# ---- Sparse

SHAPE = 1_047_553, 4100  # 2³² + 4 entries: more than an unsigned counts
SIZE = SHAPE[0] * SHAPE[1]


def masked(ranges: Ranges) -> tuple[Vast, dict[int, Tensor]]:
    """The words of a mask where rows meet the ranges, and its entries there."""
    words, kept, cols = {}, {}, SHAPE[1]
    row_words = -(-cols // 64)
    for begin, end in ranges:
        first, last = begin // cols, -(-end // cols)
        mask = torch.rand(last - first, cols) < 0.5
        words[first * row_words] = SparseMask(mask).words.flatten()
        kept[begin] = mask.flatten()[begin - first * cols :][: end - begin]
    return Vast(SHAPE[0] * row_words, words), kept


def test_masked_weights_of_more_entries_than_an_unsigned_counts(sparse: Server) -> None:
    ranges = in_turns(SIZE, THREADS * 4, MOST_BLOCKS)
    words, kept = masked(ranges)
    weight, out = vast(SIZE, ranges, torch.randn), vast(SIZE, ranges, nan(torch.float32))
    numbers = dict(zip(("rows", "cols"), SHAPE, strict=True))
    got = sparse.call("apply_mask", (torch.float32,), numbers, {"words": words, "weight": weight, "to": out})
    for begin, mask in kept.items():
        assert torch.equal(got["to"][begin], weight.windows[begin] * mask)
    got = sparse.call("clear_masked", (torch.float32,), numbers, {"words": words, "product": weight})
    for begin, mask in kept.items():
        assert torch.equal(got["product"][begin], weight.windows[begin] * mask)


def test_steps_of_more_entries_than_an_unsigned_counts(sparse: Server) -> None:
    a_block = THREADS * 4 * 4
    blocks = SIZE // a_block + 1
    ranges = in_turns(SIZE, a_block, blocks)
    words, kept = masked(ranges)
    value, grad, buffer = (vast(SIZE, ranges, torch.randn) for _ in range(3))
    rates = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, "implicit": 1.0}
    numbers = rates | {"layers": 1, "rows0": SHAPE[0], "cols0": SHAPE[1]}
    tensors = {"value0": value, "grad0": grad, "buffer0": buffer, "words0": words}
    got = sparse.call("masked_sgd_step_", (torch.float32,), numbers, tensors)
    for begin, mask in kept.items():
        weight, g, momentum = (t.windows[begin][None].clone() for t in (value, grad, buffer))
        how = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, "momentum_buffers": [momentum]}
        ops.masked_sgd_step_([weight], [g], [mask[None]], **how)
        assert torch.equal(got["value0"][begin], weight[0])
        assert torch.equal(got["buffer0"][begin], momentum[0])


@pytest.mark.parametrize(("m", "a_thread"), [(4, 16), (5, 1)])
def test_groups_of_more_entries_than_an_int_counts(sparse: Server, m: int, a_thread: int) -> None:
    size, a_block = LIMIT // 20 * 20 + 80, THREADS * a_thread
    ranges = in_turns(size, a_block, min(MOST_BLOCKS, -(-size // a_block)))
    # Groups that the ranges cut are read, and written in part.
    scores = vast(size, [(begin // m * m, -(-end // m) * m) for begin, end in ranges], torch.randn)
    mask = Vast(size, {begin: torch.zeros(len(t), dtype=torch.bool) for begin, t in scores.windows.items()})
    numbers = {"n": 2, "m": m, "inner": 1, "groups": size // m}
    tensors = {"scores": scores, "mask": mask, "ok": torch.ones(1, dtype=torch.int32)}
    got = sparse.call("nm_mask", (torch.float32,), numbers, tensors)["mask"]
    for (first, found), (begin, end) in zip(got.items(), ranges, strict=True):
        own = slice(begin - first, end - first)
        assert torch.equal(found[own], ops.nm_mask(scores.windows[first], 2, m)[own])


@pytest.mark.parametrize("op", ["stream_spmm", "packed_spmm"])
def test_products_of_more_entries_than_an_int_counts(sparse: Server, op: str) -> None:
    rows, cols, samples, tile = 3, 2, LIMIT // 2 + 131, 128
    tiles = -(-samples // tile)
    units = [
        unit
        for first in range(0, rows * tiles, 8 * MOST_BLOCKS)
        for begin in (first, first + 8 * MOST_BLOCKS - 16)
        for unit in range(begin, min(begin + 16, rows * tiles))
    ]
    places = {(unit // tiles, unit % tiles * tile) for unit in units}
    assert max(row * samples + at for row, at in places) > LIMIT

    def windows(positions: set[tuple[int, int]], values: Callable[[int], Tensor]) -> dict[int, Tensor]:
        return {row * samples + at: values(min(tile, samples - at)) for row, at in sorted(positions)}

    x = Vast(cols * samples, windows({(c, at) for _, at in places for c in range(cols)}, torch.randn))
    y = Vast(rows * samples, windows(places, nan(torch.float32)))
    weight = torch.tensor([[1.5, -2.0], [0.0, 3.0], [0.25, 0.0]])
    stream = SparseMask(weight != 0).stream()
    numbers = {"rows": rows, "cols": cols, "samples": samples, "block": 64, "sample_stride": 1}
    tensors = {"start": stream.start, "column": stream.column, "x": x, "y": y}
    if op == "stream_spmm":
        numbers |= {"row_stride": cols, "col_stride": 1}
        tensors["weight"] = weight
    else:
        numbers["row_stride"] = samples
        tensors["value"] = weight[weight != 0]
    got = sparse.call(op, (torch.float32,), numbers, tensors)["y"]
    for row, at in places:
        own = torch.stack([x.windows[c * samples + at] for c in range(cols)])
        torch.testing.assert_close(got[row * samples + at], weight[row] @ own)


def test_a_product_at_entries_of_more_samples_than_an_int_counts(sparse: Server) -> None:
    rows, cols, samples = 2**22 + 5, 2, 520
    ends = [*range(16), *range(rows - 13, rows)]  # a warp a row, 8 a block
    ranges = [(0, 16 * samples), ((rows - 13) * samples, rows * samples)]
    a, b = vast(rows * samples, ranges, torch.randn), torch.randn(cols, samples)
    column = torch.arange(len(ends), dtype=torch.int32) % cols
    start = torch.arange(len(ends) + 1, dtype=torch.int32)
    starts = Vast(rows + 1, {0: start[:17], rows - 13: start[16:]})
    product = Vast(rows * cols, {row * cols: torch.zeros(cols) for row in ends})
    numbers = {"rows": rows, "cols": cols, "samples": samples, "block": 64, "entries": len(ends)}
    tensors = {"start": starts, "column": column, "a": a, "b": b, "product": product}
    got = sparse.call("stream_sddmm", (torch.float32,), numbers, tensors)["product"]
    factors = torch.cat([t.view(-1, samples) for t in a.windows.values()])
    for i, row in enumerate(ends):
        want = torch.zeros(cols)
        want[i % cols] = factors[i] @ b[i % cols]
        torch.testing.assert_close(got[row * cols], want)


def test_weight_rows_far_apart(sparse: Server) -> None:
    rows, cols, samples, stride = 5, 70, 3, LIMIT // 4 + 64
    mask, dense, x = torch.rand(rows, cols) < 0.5, torch.randn(rows, cols), torch.randn(samples, cols)
    weight = Vast(4 * stride + cols, {row * stride: dense[row] for row in range(rows)})
    numbers = {"rows": rows, "cols": cols, "samples": samples, "weight_stride": stride, "x_stride": cols}
    numbers |= {"row_stride": samples, "sample_stride": 1}
    y = torch.full((rows, samples), torch.nan)
    tensors = {"weight": weight, "x": x, "words": SparseMask(mask).words, "y": y}
    got = sparse.call("skinny_spmm", (torch.float32,), numbers, tensors)["y"]
    torch.testing.assert_close(got, (dense * mask) @ x.t())
