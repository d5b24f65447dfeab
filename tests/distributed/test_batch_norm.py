"""SyncBatchNorm is BatchNorm of the whole batch, to the second derivative."""

import pytest
import torch
from gang import Gang
from torch import Tensor, nn

from blokern.distributed import Processes, SyncBatchNorm, sync_batch_norm

LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "1d, long": (lambda: nn.BatchNorm1d(3, affine=False), (8, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3, momentum=None), (8, 3, 4, 2)),
    "3d": (lambda: nn.BatchNorm3d(3, track_running_stats=False), (8, 3, 2, 2, 2)),
}


def derivatives(processes: Processes, name: str) -> list[Tensor]:
    make, shape = LAYERS[name]
    layer = nn.Sequential(make()).double()
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p)
    x, v, u = (torch.randn(shape, dtype=torch.float64)[processes.part(8)] for _ in range(3))
    sync_batch_norm(layer, processes)
    x.requires_grad_()
    out = layer(x)
    leaves = [x, *layer.parameters()]
    first = torch.autograd.grad((out.sin() * v).sum(), leaves, create_graph=True)
    second = torch.autograd.grad((first[0] * u).sum(), leaves, allow_unused=True, materialize_grads=True)
    layer.eval()
    shared = [*first[1:], *second[1:]]
    processes.sum_(shared)  # a parameter's gradient is over all samples
    tracked = [b for b in layer.buffers() if b.is_floating_point()]
    # In eval mode without running statistics the layer sees its own part: others may not even be called.
    tracking = layer[0].track_running_stats
    return [out, layer(x) if tracking else out, first[0], second[0]], [*shared, *tracked]


@pytest.mark.parametrize("name", LAYERS)
def test_equals_batch_norm_of_the_whole(name: str, two: Gang) -> None:
    per_sample, shared = derivatives(Processes(), name)
    for rank, (ours, alike) in enumerate(two(_detached, name)):
        half = slice(4 * rank, 4 * rank + 4)
        for got, want in zip([*ours, *alike], [*(t[half] for t in per_sample), *shared], strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=1e-11)


def _detached(processes: Processes, name: str) -> list[list[Tensor]]:
    return [[t.detach() for t in tensors] for tensors in derivatives(processes, name)]


def converted(processes: Processes) -> list[str]:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm1d(2)))
    keys = [*model.state_dict()]
    assert sync_batch_norm(model, processes) is model
    sync_batch_norm(model, processes)
    assert isinstance(model[0], SyncBatchNorm)
    assert [*model.state_dict()] == keys
    half = model[0](torch.randn(2, 2, 3, 3, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x must be \[N, C, ...\], got shape"):
        model[0](torch.randn(3))
    with pytest.raises(ValueError, match=r"'0' must be a BatchNorm of torch\.nn, got Fused"):
        sync_batch_norm(nn.Sequential(Fused(2)), processes)


class Fused(nn.BatchNorm2d):
    pass


def test_conversion(two: Gang) -> None:
    two(converted)
    model = nn.Sequential(nn.BatchNorm2d(2))
    assert type(sync_batch_norm(model, Processes())[0]) is nn.BatchNorm2d
