"""Pruned layers and networks by blokern, torch's and scipy's CSR matrices, torch.nn.utils.prune and torch-pruning.

torch.nn.utils.prune has two rows: with its hook, which multiplies by the mask at every forward pass and lets training
go on, and after `prune.remove`, a dense weight with zeros in it. torch's and scipy's CSR products take and give
matrices with samples innermost, and are given such; so is one row of blokern's. Compaction takes away the same filters
by blokern.sparse.compact and by torch-pruning's dependency graph.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator

import scipy.sparse
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from benchmarks.networks import images, inference, network
from benchmarks.peers.contest import Agree, Contest, Run, close, flat
from blokern import ops
from blokern.bilevel import OMP, OMPSettings
from blokern.sparse import SparseMask, compact, samples_innermost, sparsify

WIDTH = 2048
NETWORK = "preact_resnet18"
BATCH = 64


def cases() -> Iterator[Contest]:
    for sparsity, batch in itertools.product((90, 95, 99), (128, 1)):
        yield _linear(sparsity, batch)
    yield _inference()
    yield _training()
    yield from _compaction()


# ---- One layer.


def _linear(sparsity: int, batch: int) -> Contest:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    mask = torch.rand(WIDTH, WIDTH, generator=generator) >= sparsity / 100
    x = torch.randn(batch, WIDTH, generator=generator)
    masked = weight * mask
    columns = x.t().contiguous()
    array, right, innermost = scipy.sparse.csr_matrix(masked.numpy()), columns.numpy(), columns.t()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is in beta
        csr = masked.to_sparse_csr()
    packed, sparse = ops.pack_weight(weight, mask), ops.SparseMask(mask)
    hooked = nn.Linear(WIDTH, WIDTH, bias=False)
    hooked.weight.data.copy_(weight)
    prune.custom_from_mask(hooked, "weight", mask)
    hooked.requires_grad_(False)
    rivals: dict[str, Run] = {
        "blokern, packed": lambda: ops.packed_linear(x, packed),
        "blokern, packed, samples innermost": lambda: ops.packed_linear(innermost, packed),
        "blokern, masked": lambda: ops.masked_linear(x, weight, sparse),
        "torch CSR": lambda: (csr @ columns).t(),
        "scipy CSR": lambda: torch.from_numpy(array @ right).t(),
        "torch.nn.utils.prune": lambda: hooked(x),
        "torch.nn.utils.prune, removed": lambda: F.linear(x, masked),
    }
    name = f"linear {WIDTH}→{WIDTH}, batch {batch}, {sparsity} % sparse: inference"
    return Contest(name, rivals, "blokern, packed", close("blokern, packed", 1e-4))


# ---- A network.


def _masks(density: float = 0.05) -> tuple[nn.Module, dict[str, SparseMask]]:
    model, _ = network(NETWORK, images(1)[0])
    return model, OMP(OMPSettings(density=density, scope="layer")).masks(model, [])


def _pruned_networks() -> dict[str, tuple[nn.Module, torch.memory_format]]:
    """By rival, and the format of the images that it takes."""
    ours, masks = _masks()
    sparsify(ours, masks)

    def pruned(hooks: bool, form: torch.memory_format) -> nn.Module:
        model, _ = network(NETWORK, images(1)[0])
        for name, mask in masks.items():
            path, _, leaf = name.rpartition(".")
            prune.custom_from_mask(model.get_submodule(path), leaf, mask.to_dense())
            if not hooks:
                prune.remove(model.get_submodule(path), leaf)
        return model.to(memory_format=form)

    networks = {"blokern": (samples_innermost(ours), torch.contiguous_format)}
    for name, hooks in (("torch.nn.utils.prune", True), ("torch.nn.utils.prune, removed", False)):
        for suffix, form in (("", torch.contiguous_format), (", channels_last", torch.channels_last)):
            networks[name + suffix] = pruned(hooks, form), form
    return networks


def _inference() -> Contest:
    x, _ = images(BATCH)
    rivals = {
        name: inference(model, x.contiguous(memory_format=form))
        for name, (model, form) in _pruned_networks().items()
    }
    return Contest(
        f"{NETWORK}, batch {BATCH}, 95 % sparse: inference", rivals, "blokern", close("blokern", 1e-3)
    )


def _training() -> Contest:
    """Compared are all gradients; those by what is pruned are zero. The batch's statistics enlarge rounding."""
    x, y = images(BATCH)

    def training(model: nn.Module, x: Tensor) -> Run:
        named = {name.removesuffix("_orig"): p for name, p in model.named_parameters()}
        parameters = [named[name] for name in sorted(named)]

        def run() -> Tensor:
            return flat(torch.autograd.grad(F.cross_entropy(model(x), y), parameters))

        return run

    rivals = {
        name: training(model, x.contiguous(memory_format=form))
        for name, (model, form) in _pruned_networks().items()
        if "removed" not in name  # nothing would keep the zeros
    }
    return Contest(
        f"{NETWORK}, batch {BATCH}, 95 % sparse: forward and backward pass",
        rivals,
        "blokern",
        close("blokern", 0.03),
    )


# ---- Compaction.


def _compaction() -> Iterator[Contest]:
    """Half the filters of each block's first convolution go. Their BatchNorms are new, so that a filter without weights
    leaves zeros and both ways are exact."""
    x, _ = images(BATCH)
    dense = network("resnet18", x)[0].eval()
    inner = [
        name
        for name, module in dense.named_modules()
        if name.endswith("conv1") and isinstance(module, nn.Conv2d)
    ]
    kept = {name: ops.filter_mask(dense.get_submodule(name).weight.detach().abs(), 0.5) for name in inner}

    def ours() -> nn.Module:
        return compact(dense, {f"{name}.weight": mask for name, mask in kept.items()})

    def theirs() -> nn.Module:
        model = copy.deepcopy(dense)
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x[:1])
        for name in inner:
            gone = (~kept[name].flatten(1).any(dim=1)).nonzero().flatten().tolist()
            layer = model.get_submodule(name)
            graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=gone).prune()
        return model.eval().requires_grad_(True)

    makers = {"blokern.sparse.compact": ours, "torch-pruning": theirs}
    first = next(iter(makers))

    def alike(results: dict[str, nn.Module]) -> dict[str, str]:
        with torch.inference_mode():
            said = close(first, 1e-4)({name: model(x) for name, model in results.items()})
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in results.items()}
        assert len(set(sizes.values())) == 1, sizes
        return {
            name: f"{sizes[name] / 1e6:.2f} million parameters {note}".rstrip() for name, note in said.items()
        }

    agree: Agree = alike  # type: ignore[assignment]
    yield Contest("resnet18 without half of its inner filters: making the network", makers, first, agree)

    made = {name: inference(make(), x) for name, make in makers.items()}
    made["torch.nn.utils.prune, removed"] = inference(sparse_zeros(dense, kept), x)
    yield Contest(
        f"resnet18 without half of its inner filters, batch {BATCH}: inference",
        made,
        first,
        close(first, 1e-4),
    )


def sparse_zeros(dense: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """The network with zeros for what is gone."""
    model = copy.deepcopy(dense)
    for name, mask in kept.items():
        model.get_submodule(name).weight.data.mul_(mask)
    return model
