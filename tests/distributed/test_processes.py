"""What processes exchange: that all get the same, and that nobody waits for the dead."""

import os

import pytest
import torch
from gang import Gang
from torch import nn

from blokern.distributed import Processes, processes


def exchanged(group: Processes) -> None:
    tensors = [
        torch.full((3, 2), group.rank + 1.0),
        torch.full((), group.rank + 1.0, dtype=torch.float64),
        torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last) * (group.rank + 1),
        torch.full((5,), group.rank + 1.0).expand(5)[::2],
    ]
    group.average_(tensors)
    mean = (group.size + 1) / 2
    assert all(bool((t == mean).all()) for i, t in enumerate(tensors) if i != 2)
    assert torch.equal(tensors[2], torch.arange(24.0).view(1, 2, 3, 4) * mean)

    counts = [torch.tensor([1, group.rank])]
    group.sum_(counts)
    assert counts[0].tolist() == [group.size, sum(range(group.size))]
    assert group.largest([group.rank, -group.rank]) == [group.size - 1, 0]
    assert group.part(8) == slice(group.rank * 8 // group.size, (group.rank + 1) * 8 // group.size)
    with pytest.raises(ValueError, match=r"equal parts for . processes, got 9"):
        group.part(9)


def test_exchanges(two: Gang, four: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    for gang in (two, four):
        gang(exchanged)


def small_buckets(group: Processes) -> list[float]:
    processes._BUCKET = 16
    tensors = [torch.full((n,), float(group.rank + n)) for n in (1, 3, 9, 2)]
    group.sum_(tensors)
    return [float(t[0]) for t in tensors]


def test_buckets_come_back_to_their_tensors(two: Gang) -> None:
    assert two(small_buckets) == [[3.0, 7.0, 19.0, 5.0]] * 2


def mixed_gradients(group: Processes) -> list[object]:
    """The first layer is used by all, the second by the last process only, the third by none."""
    torch.manual_seed(group.rank)
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)])
    group.equalize_(model)
    x = torch.full((4, 2), 1.0 + group.rank)
    loss = model[0](x).sum() + model[3](x).sum()
    if group.rank == group.size - 1:
        loss = loss + model[1](x).sum()
    loss.backward()
    group.average_gradients(model)
    grads = [None if p.grad is None else p.grad.tolist() for p in model[:3].parameters()]
    return [grads, model[3].running_mean.tolist(), [p.tolist() for p in model.parameters()]]


def test_gradients_some_have(two: Gang) -> None:
    first, second = two(mixed_gradients)
    assert first == second
    grads, mean, _ = first
    assert grads == [[[6.0] * 2] * 2, [4.0] * 2, [[4.0] * 2] * 2, [2.0] * 2, None, None]
    assert mean == pytest.approx([0.15, 0.15])


def led(group: Processes) -> list[object]:
    result = group.lead(lambda: f"by {group.rank}")
    with pytest.raises(OSError, match="no space"):
        group.lead(_full_disk)
    return [result, group.lead(lambda: os.getpid()) == os.getpid(), group.leads]


def _full_disk() -> None:
    raise OSError("no space")


def test_one_acts_for_all(two: Gang) -> None:
    assert two(led) == [["by 0", True, True], ["by 0", False, False]]


def survive(group: Processes) -> str:
    if group.rank == 1:
        os._exit(1)
    with pytest.raises(ConnectionError, match="another process of the run does not answer"):
        group.average_([torch.zeros(3)])
    with pytest.raises(ConnectionError):
        group.lead(lambda: None)
    return "alive"


def test_the_death_of_one_is_noticed() -> None:
    gang = Gang(2)
    try:
        assert gang.outcomes(survive) == [("alive", None), (None, "died")]
    finally:
        gang.close()


def test_alone_nothing_is_exchanged() -> None:
    alone = Processes()
    assert (alone.rank, alone.size, alone.leads, alone.part(5)) == (0, 1, True, slice(0, 5))
    tensor = torch.ones(3)
    alone.average_([tensor])
    alone.sum_([tensor])
    assert tensor.tolist() == [1.0] * 3
    assert alone.largest([3, 1]) == [3, 1]
    assert alone.lead(lambda: 7) == 7
