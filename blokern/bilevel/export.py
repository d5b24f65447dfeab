"""Pruned networks as files for other programs: dense, smaller, or the kept weights and their masks alone."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blokern.bilevel.checkpoint import CheckpointError, find_input_shape, load_model, write_atomically
from blokern.bilevel.threat import ThreatModel
from blokern.sparse import SparseMask, compact, masks_of, to_dense

__all__ = ["compacted", "load_sparse", "save_compacted", "save_dense", "save_sparse"]

_KIND = "blokern sparse 1"
_WORDS = "mask_words"
#: Behind a zip archive, where its readers skip it: a file that a later export may replace.
_OWN = b"blokern export\n"


def save_dense(payload: Mapping[str, Any], source: str | Path, path: str | Path) -> None:
    """Write a checkpoint's network as the state_dict of its dense twin, pruned weights being zeros.

    payload: as :func:`blokern.bilevel.checkpoint.load` gives it, `source` being its name in messages. Raises
    CheckpointError if it does not say how its network is built, OSError if the file cannot be written.

    >>> save_dense(checkpoint.load("best.pt"), "best.pt", "dense.pt")
    >>> model.load_state_dict(torch.load("dense.pt", weights_only=True))
    """
    buffer = io.BytesIO()
    torch.save(to_dense(load_model(payload, source)).state_dict(), buffer)
    write_atomically(path, buffer.getvalue(), _OWN)


def save_compacted(
    payload: Mapping[str, Any],
    source: str | Path,
    path: str | Path,
    input_shape: tuple[int, int, int] | None = None,
) -> None:
    """Write a checkpoint's network, without the channels that its masks make superfluous, as a torch.export program.

    The program is that of eval mode and takes any number of images; blokern need not be installed where it is loaded.
    Its extra file "threat.json" is what the network was trained for (:class:`blokern.bilevel.ThreatModel`), or null.
    input_shape: C, H and W of the images; None for those of the recipe's data set. Raises as :func:`save_dense`, and
    CheckpointError as :func:`compacted` and :func:`blokern.bilevel.checkpoint.find_input_shape`.

    >>> save_compacted(checkpoint.load("best.pt"), "best.pt", "small.pt2")
    >>> logits = torch.export.load("small.pt2").module()(x)
    """
    model = load_model(payload, source).eval()
    shape = find_input_shape(model, payload, source, input_shape)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    model = compacted(model, source, images)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # half of the file, and paths of this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"threat.json": _threat(payload, source)})
    write_atomically(path, buffer.getvalue(), _OWN)


def compacted(model: nn.Module, source: str | Path, images: Tensor | None = None) -> nn.Module:
    """A copy of the masked model with fewer channels and no masks, in eval mode, in which its outputs are the model's.

    images: of the sizes that the copy is to work with; None: made up. Raises CheckpointError, naming
    `source`, if no channel is superfluous or :func:`blokern.sparse.compact` refuses.

    >>> small = compacted(load_model(payload, "best.pt"), "best.pt")
    """
    try:
        small = compact(model.eval(), example=images)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if all(small.get_parameter(name).shape == p.shape for name, p in model.named_parameters()):
        why = "its masks free no channel" if masks_of(model) else "it has no masks"
        raise CheckpointError(f"{source} cannot be compacted: {why}")
    return to_dense(small)


def save_sparse(payload: Mapping[str, Any], source: str | Path, path: str | Path) -> None:
    """Write a checkpoint's network in the safetensors format, of a masked weight only what is kept.

    By parameter name, a masked weight is its kept values [kept], in row-major order; beside it is "mask_words", see
    :class:`blokern.sparse.SparseMask`. All else is as in the state_dict. The metadata hold the weights' shapes, the
    recipe and the threat model. Raises as :func:`save_dense`, and ImportError without the safetensors library.

    >>> save_sparse(checkpoint.load("best.pt"), "best.pt", "pruned.safetensors")
    """
    save = _safetensors().torch.save
    weights = load_model(payload, source).state_dict()
    tensors, shapes = {name: tensor.contiguous() for name, tensor in weights.items()}, {}
    for name in _masked(weights):
        shape = weights[name].shape
        shapes[name] = list(shape)
        tensors[name] = weights[name][SparseMask.of_words(weights[_words_of(name)], shape).to_dense()]
    metadata = {"kind": _KIND, "shapes": json.dumps(shapes), "recipe": json.dumps(payload["recipe"])}
    metadata["threat"] = _threat(payload, source)
    write_atomically(path, save(tensors, metadata))


def load_sparse(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_sparse` wrote, as a payload for :func:`blokern.bilevel.checkpoint.load_model`.

    Raises OSError if the file cannot be read, CheckpointError if it is another file or a damaged one, ImportError
    without the safetensors library.

    >>> model = load_model(load_sparse("pruned.safetensors"), "pruned.safetensors")
    """
    safetensors = _safetensors()
    Path(path).open("rb").close()  # for the system's own message: safetensors names no file
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or is damaged: {error}") from error
    if metadata.get("kind") != _KIND:
        raise CheckpointError(
            f"{path} is no export of blokern: its kind is {metadata.get('kind')!r}, not {_KIND!r}"
        )
    try:
        shapes, recipe = json.loads(metadata["shapes"]), json.loads(metadata["recipe"])
        told = (
            {"threat": json.loads(metadata["threat"])} if "threat" in metadata else {}
        )  # not in those of before
        for name in _masked(weights):
            weights[name] = _spread(weights[name], weights[_words_of(name)], torch.Size(shapes[name]))
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {"recipe": recipe, "model": weights, **told}


def _threat(payload: Mapping[str, Any], source: str | Path) -> str:
    """What the network was trained for, in JSON."""
    threat = ThreatModel.of_checkpoint(payload, source)
    return json.dumps(None if threat is None else threat.plain())


def _spread(values: Tensor, words: Tensor, shape: torch.Size) -> Tensor:
    """The dense weight of this shape that has the values where the mask is 1, and else zeros."""
    mask = SparseMask.of_words(words, shape)
    if values.shape != (mask.kept,):
        raise ValueError(
            f"a masked weight must have {mask.kept} values to fit its mask, got {list(values.shape)}"
        )
    return values.new_zeros(mask.shape).masked_scatter_(mask.to_dense(), values)


def _masked(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of the weights that have a mask."""
    return [name for name in weights if name.endswith("weight") and _words_of(name) in weights]


def _words_of(weight: str) -> str:
    return weight.removesuffix("weight") + _WORDS


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "the sparse form is written and read by safetensors: pip install 'blokern[export]'"
        ) from error
    return safetensors
