"""Pruned networks as files for other programs: dense, or the kept weights and their masks alone."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blokern.bilevel.checkpoint import CheckpointError, load_model, write_atomically
from blokern.sparse import SparseMask, to_dense

__all__ = ["load_sparse", "save_dense", "save_sparse"]

_KIND = "blokern sparse 1"
_WORDS = "mask_words"


def save_dense(payload: Mapping[str, Any], source: str | Path, path: str | Path) -> None:
    """Write a checkpoint's network as the state_dict of its dense twin, pruned weights being zeros.

    payload: as :func:`blokern.bilevel.checkpoint.load` gives it, `source` being its name in messages. Raises
    CheckpointError if it does not say how its network is built, OSError if the file cannot be written.

    >>> save_dense(checkpoint.load("best.pt"), "best.pt", "dense.pt")
    >>> model.load_state_dict(torch.load("dense.pt", weights_only=True))
    """
    buffer = io.BytesIO()
    torch.save(to_dense(load_model(payload, source)).state_dict(), buffer)
    write_atomically(path, buffer.getbuffer())


def save_sparse(payload: Mapping[str, Any], source: str | Path, path: str | Path) -> None:
    """Write a checkpoint's network in the safetensors format, of a masked weight only what is kept.

    By parameter name, a masked weight is its kept values [kept], in row-major order; beside it is "mask_words", see
    :class:`blokern.sparse.SparseMask`. All else is as in the state_dict. The metadata hold the weights' shapes and the
    recipe. Raises as :func:`save_dense`, and ImportError without the safetensors library.

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
    shapes = json.loads(metadata["shapes"])
    for name in _masked(weights):
        mask = SparseMask.of_words(weights[_words_of(name)], torch.Size(shapes[name]))
        if weights[name].shape != (mask.kept,):
            raise CheckpointError(
                f"{path}: {name} must have {mask.kept} values to fit its mask, got {list(weights[name].shape)}"
            )
        weights[name] = weights[name].new_zeros(mask.shape).masked_scatter_(mask.to_dense(), weights[name])
    return {"recipe": json.loads(metadata["recipe"]), "model": weights}


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
