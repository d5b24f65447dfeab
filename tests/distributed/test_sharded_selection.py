"""topk_mask over the processes' parts chooses what the op chooses in the whole."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gang import Gang
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from blokern import ops
from blokern.distributed import Processes, topk_mask

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 1e-310, 3e38, 2.5]


def cut(tensors: list[Tensor], bounds: list[list[int]], rank: int) -> list[Tensor]:
    return [t[b[rank] : b[rank + 1]] for t, b in zip(tensors, bounds, strict=True)]


def selected(
    group: Processes, tensors: list[Tensor], bounds: list[list[int]], density: float
) -> list[Tensor]:
    return topk_mask(cut(tensors, bounds, group.rank), density, group)


@st.composite
def sharded(draw: st.DrawFn, size: int) -> tuple[list[Tensor], list[list[int]], float]:
    """Tensors with many equal values, and where each is cut; parts may be empty."""
    tensors, bounds = [], []
    for _ in range(draw(st.integers(1, 3))):
        rows, columns = draw(st.integers(0, 7)), draw(st.integers(1, 5))
        dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
        values = draw(st.lists(st.sampled_from(SPECIAL), min_size=rows * columns, max_size=rows * columns))
        tensors.append(torch.tensor(values, dtype=torch.float64).to(dtype).view(rows, columns))
        inner = draw(st.lists(st.integers(0, rows), min_size=size - 1, max_size=size - 1))
        bounds.append([0, *sorted(inner), rows])
    return tensors, bounds, draw(st.floats(0.01, 1.0))


@pytest.mark.parametrize("size", [2, 4])
def test_same_as_in_the_whole(size: int, request: pytest.FixtureRequest) -> None:
    gang = request.getfixturevalue({2: "two", 4: "four"}[size])

    @settings(max_examples={2: 40, 4: 15}[size], deadline=None, derandomize=True)
    @given(sharded(size))
    def check(case: tuple[list[Tensor], list[list[int]], float]) -> None:
        tensors, bounds, density = case
        want = ops.topk_mask(tensors, density)
        for rank, masks in enumerate(gang(selected, tensors, bounds, density)):
            for got, expected in zip(masks, cut(want, bounds, rank), strict=True):
                assert torch.equal(got, expected)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.003, 0.1, 0.9, 1.0])
def test_many_random_scores(dtype: torch.dtype, density: float, four: Gang) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 7, generator=generator, dtype=dtype) for n in (1000, 3, 5000)]
    tensors[1].fill_(tensors[0][3, 3])  # ties with a later one
    bounds = [[0, 10, 400, 400, 1000], [0, 1, 2, 3, 3], [0, 0, 1, 2, 5000]]
    want = ops.topk_mask(tensors, density)
    for rank, masks in enumerate(four(selected, tensors, bounds, density)):
        for got, expected in zip(masks, cut(want, bounds, rank), strict=True):
            assert torch.equal(got, expected)


def traffic(group: Processes, dtype: torch.dtype) -> int:
    """Bytes that one process hands to the collectives."""
    sent = 0
    real = dist.all_reduce

    def counting(tensor: Tensor, *args: object, **kwargs: object) -> object:
        nonlocal sent
        sent += tensor.nbytes
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        topk_mask([torch.randn(3000, dtype=dtype) for _ in range(60)], 0.1, group)
    finally:
        dist.all_reduce = real
    return sent


def test_moves_few_bytes(four: Gang) -> None:
    for dtype, limit in ((torch.float32, 25_000), (torch.float64, 34_000)):
        assert max(four(traffic, dtype)) < limit


def refused(group: Processes) -> list[str]:
    messages = []
    bad = torch.ones(3)
    bad[1] = math.nan if group.rank == 1 else 1.0
    mesh = init_device_mesh("cpu", (group.size,))
    columns = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    for scores, density in (
        ([bad], 0.5),
        ([torch.ones(3)], 0.0),
        ([], 0.5),
        ([columns], 0.5),
        ([torch.ones(3, dtype=torch.int64)], 0.5),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            topk_mask(scores, density, group)
        messages.append(str(error.value))
    return messages


def test_refuses_in_every_process(two: Gang) -> None:
    first, second = two(refused)
    assert first == second
    assert "no NaN, got 1 in 6" in first[0]
    assert "density must be in (0, 1], got 0" in first[1]
    assert "at least one tensor" in first[2]
    assert "sharded along dim 0" in first[3]
    assert "scores[0] must be a float64" in first[4]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(7, 9), nn.Linear(9, 3))


def fsdp_network(group: Processes) -> tuple[nn.Module, DeviceMesh]:
    model = network()
    mesh = init_device_mesh("cpu", (group.size,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model, mesh


def fsdp(group: Processes) -> list[Tensor]:
    model, mesh = fsdp_network(group)
    parameters = [*model.parameters()]
    masks = topk_mask([p.detach().abs() for p in parameters], 0.3, group)
    for p, mask in zip(parameters, masks, strict=True):
        p.data.mul_(mask)  # shard by shard, nothing is exchanged
    assert all(mask.placements == p.placements for p, mask in zip(parameters, masks, strict=True))
    copies = [distribute_tensor(p.detach(), mesh, [Replicate()]) for p in network().parameters()]
    again = topk_mask([t.abs() for t in copies], 0.3, group)
    assert all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in zip(masks, again, strict=True))
    return [mask.full_tensor() for mask in masks] + [p.full_tensor().detach() for p in parameters]


def test_prunes_what_fsdp_shards(four: Gang) -> None:
    parameters = [p.detach() for p in network().parameters()]
    masks = ops.topk_mask([p.abs() for p in parameters], 0.3)
    want = masks + [p * mask for p, mask in zip(parameters, masks, strict=True)]
    for results in four(fsdp):
        assert all(torch.equal(got, expected) for got, expected in zip(results, want, strict=True))


def state_of(model: nn.Module, masks: list[Tensor]) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return model.state_dict() | {f"mask of {name}": mask for name, mask in zip(names, masks, strict=True)}


def save_pruned(group: Processes, folder: Path) -> list[Tensor]:
    model, _ = fsdp_network(group)
    masks = topk_mask([p.detach().abs() for p in model.parameters()], 0.3, group)
    for p, mask in zip(model.parameters(), masks, strict=True):
        p.data.mul_(mask)
    state = state_of(model, masks)
    dcp.save(state, checkpoint_id=folder)
    return [t.full_tensor() for t in state.values()]


def load_pruned(group: Processes, folder: Path) -> list[Tensor]:
    model, _ = fsdp_network(group)
    masks = [torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()]
    for p in model.parameters():
        p.data.zero_()
    state = state_of(model, masks)
    dcp.load(state, checkpoint_id=folder)
    return [t.full_tensor() for t in state.values()]


def test_sharded_weights_and_masks_are_saved_and_loaded_by_another_number_of_processes(
    two: Gang, four: Gang, tmp_path: Path
) -> None:
    want = four(save_pruned, tmp_path)[0]
    assert any(t.dtype == torch.bool and t.any() for t in want)
    for got in two(load_pruned, tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
