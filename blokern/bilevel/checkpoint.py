"""Checkpoints on disk: whole or not at all, verified when read, and free of code.

A checkpoint is a file of ``torch.save`` followed by a marker and the SHA-256 digest of all before it; plain
``torch.load(path, weights_only=True)`` reads it too, without the verification.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blokern import models
from blokern.data import image_shape
from blokern.ops.mask import check_of
from blokern.sparse import SparseMask, sparsify

__all__ = [
    "VERSION",
    "CheckpointError",
    "check_finite",
    "check_same",
    "classes_of",
    "find_input_shape",
    "fingerprint",
    "is_checkpoint",
    "load",
    "load_model",
    "load_weights",
    "packed",
    "recipe_of",
    "save",
    "write_atomically",
    "write_sealed",
]

VERSION = 1

#: Between the data and their digest; zip readers skip what follows an archive.
_MARKER = b"blokern checkpoint\n"
_DIGEST_SIZE = hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or does not belong to what it is loaded into."""


def save(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write ``payload``, which holds tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
        OSError: the file cannot be written, as on a full disk; ``path`` still holds what it held before.

    >>> save("runs/a/last.pt", {"model": model.state_dict()})
    >>> load("runs/a/last.pt")["model"]
    """
    write_sealed(path, packed(payload))


def packed(payload: Mapping[str, Any]) -> bytes:
    """A checkpoint in memory but for its digest: what it holds stays, whatever becomes of the payload's tensors.

    >>> write_sealed("runs/a/last.pt", packed({"model": model.state_dict()}))
    """
    # torch's own writer to a file hides a full disk behind an internal error.
    buffer = io.BytesIO()
    torch.save({**payload, "version": VERSION}, buffer)
    buffer.write(_MARKER)
    # No copy; views of the buffer crash Python 3.12.0 and 3.12.1 as garbage after an error (CPython's issue 111049).
    return buffer.getvalue()


def write_sealed(path: str | Path, body: bytes) -> None:
    """Write what :func:`packed` gave, with its digest. Raises as :func:`save`.

    >>> write_sealed("runs/a/last.pt", packed({"model": model.state_dict()}))
    """
    # torch's zip stores checksums but torch.load does not look at them, and they leave out the directory.
    _replace(path, body, hashlib.sha256(body).digest())


def load(path: str | Path) -> dict[str, Any]:
    """The payload that :func:`save` wrote, its tensors on the CPU; nothing in the file is executed.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is damaged, of another program, or of another version of the format.

    >>> payload = load("runs/a/last.pt")
    >>> payload["version"]
    1
    """
    body, _ = _read(path)
    file = io.BytesIO(body)
    try:
        if not _is_plain(file, len(body)):
            raise CheckpointError(f"{path} holds compressed or overlapping records, which no checkpoint does")
        file.seek(0)
        payload = torch.load(file, map_location="cpu", weights_only=True)
        if _storage_size(payload) > len(body):
            raise CheckpointError(f"{path} claims tensors that are larger than the file")
    except CheckpointError:
        raise
    except Exception as error:  # the digest keeps no one from writing a file that fails torch in any way
        raise CheckpointError(f"{path} cannot be read by torch {torch.__version__}: {error}") from error
    version = payload.get("version") if isinstance(payload, dict) else None
    if not isinstance(version, int) or version != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, but this blokern reads format {VERSION}"
        )
    return dict(payload)


def fingerprint(path: str | Path) -> str:
    """The SHA-256 digest of a checkpoint, in hexadecimal digits: equal for equal contents.

    Raises:
        OSError, CheckpointError: as :func:`load`.

    >>> fingerprint("runs/a/best.pt") == fingerprint("runs/a/last.pt")
    True
    """
    return _read(path)[1].hex()


def recipe_of(payload: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """What the checkpoint says about how its network and data are made, by the keys "model" and "data".

    Raises:
        CheckpointError: it says nothing, as when a trainer was given no recipe.

    >>> recipe_of(load("runs/a/best.pt"), "runs/a/best.pt")["model"]["name"]
    'small_cnn'
    """
    recipe: dict[str, Any] = payload.get("recipe", {})
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model"), dict):
        raise CheckpointError(
            f"{source} does not say how its network is built; see checkpoint.load_weights to use it in Python"
        )
    return recipe


def load_model(payload: Mapping[str, Any], source: str | Path) -> nn.Module:
    """The network of a checkpoint: built as its recipe says, with masked layers where it is pruned, weights loaded.

    Raises:
        CheckpointError: there is no recipe, or the weights are of another architecture.

    >>> model = load_model(load("runs/a/best.pt"), "runs/a/best.pt")
    """
    recipe, weights = recipe_of(payload, source)["model"], _checked_weights(payload.get("model"), source)
    recipe = {**recipe, "name": str(recipe.get("name"))}
    # A network has a weight for each of its channels and classes: no recipe makes us build one that is larger.
    most = sum(weight.numel() for weight in weights.values())
    for name, value in recipe.items():
        if name in _OF_ELSEWHERE:
            raise CheckpointError(f"{source}: its recipe may not have the network read {name}={value!r}")
        if isinstance(value, int) and value > most:
            raise CheckpointError(f"{source}: its recipe asks for {name}={value}, for {most} weights")
    try:
        if not recipe["name"].startswith("timm:"):
            with torch.device("meta"):
                blank = models.build(**recipe)
            _check_fit(blank, _new_masks(blank, weights), weights, source)
        model = models.build(**recipe)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source}: no network can be built by its recipe: {error}") from error
    load_weights(model, weights, source)
    return model


#: Arguments of timm that read other files, or the network's weights from the net.
_OF_ELSEWHERE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def _checked_weights(weights: Any, source: str | Path) -> Mapping[str, Tensor]:
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
    ):
        raise CheckpointError(f"{source} has no weights: its model must be a dict of tensors by name")
    return weights


def find_input_shape(
    model: nn.Module,
    payload: Mapping[str, Any],
    source: str | Path,
    given: tuple[int, int, int] | None = None,
) -> tuple[int, int, int]:
    """C, H and W of images that a checkpoint's network takes: the given ones, else those of its recipe's data set.

    Raises:
        CheckpointError: the recipe names no data set of :mod:`blokern.data`, or the network refuses such images.

    >>> find_input_shape(model, load("runs/a/best.pt"), "runs/a/best.pt")
    (1, 8, 8)
    """
    recipe = recipe_of(payload, source)
    try:
        shape = given or image_shape(recipe["data"]["name"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} does not say how large its network's images are: give input_shape, such as 3,32,32"
        ) from error
    classes_of(model, source, shape)
    return shape


def classes_of(model: nn.Module, source: str | Path, shape: tuple[int, ...]) -> int:
    """How many classes a network in eval mode tells apart, by what it makes of two blank images of this shape.

    Raises:
        CheckpointError: it refuses such images, or returns no logits [2, K].

    >>> classes_of(model, "runs/a/best.pt", (1, 8, 8))
    10
    """
    try:
        with torch.no_grad():
            logits = model(next(model.parameters()).new_zeros(2, *shape))
    except Exception as error:  # a network of another library may raise anything
        raise CheckpointError(
            f"{source} takes no images of input_shape {tuple(shape)}: {_first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        told = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CheckpointError(f"{source} must return logits [2, K] for two images, got {told}")
    return logits.shape[1]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """``model.load_state_dict(weights)``, with a message that sums up what does not fit.

    Layers of which the weights have a mask, and the model not yet, are given it (:func:`blokern.sparse.sparsify`).

    Raises:
        CheckpointError: names or shapes differ; the model is unchanged.

    >>> load_weights(model, load("runs/a/best.pt")["model"], "runs/a/best.pt")
    """
    weights = _checked_weights(weights, source)
    masks = _new_masks(model, weights)
    _check_fit(model, masks, weights, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer without weights: whoever pruned it was told
        sparsify(model, masks)
    model.load_state_dict(weights)


def _check_fit(
    model: nn.Module, masks: Mapping[str, SparseMask], weights: Mapping[str, Tensor], source: str | Path
) -> None:
    expected = model.state_dict()
    known = expected.keys() | {key(name) for name in masks for key in (_words_of, _check_of)}
    problems = {
        # Files of before masks had checks lack those.
        "missing": [name for name in expected if name not in weights and not name.endswith(_CHECK)],
        "unknown to the model": [name for name in weights if name not in known],
        "of another shape": [
            f"{name} {list(weights[name].shape)} for {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
        "of another kind of number": [
            f"{name} {weights[name].dtype} for {tensor.dtype}"
            for name, tensor in expected.items()
            if name in weights and _kind(weights[name]) != _kind(tensor)
        ],
        "with bits that do not fit their check": [
            name for name in weights if name.endswith(_WORDS) and _is_damaged(weights, name)
        ],
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{source} is of another architecture: weights {'; '.join(found)}")


def _kind(t: Tensor) -> tuple[bool, bool]:
    """Real, complex or neither: what a copy would change without a word."""
    return t.is_floating_point(), t.is_complex()


def _new_masks(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, SparseMask]:
    """The masks in `weights` that fit layers without one, by parameter name."""
    masks = {}
    for name, weight in model.named_parameters():
        words = weights.get(_words_of(name))
        if words is not None and type(model.get_submodule(name.rpartition(".")[0])) in (nn.Linear, nn.Conv2d):
            with contextlib.suppress(ValueError):
                masks[name] = SparseMask(SparseMask.of_words(words, weight.shape).to_dense())
    return masks


_WORDS, _CHECK = "mask_words", "mask_check"


def _words_of(weight: str) -> str:
    """The state_dict's key for the mask of this parameter."""
    return f"{weight.removesuffix('weight')}{_WORDS}" if weight.endswith("weight") else ""


def _check_of(weight: str) -> str:
    """The state_dict's key for what that mask's bits are known by."""
    return f"{weight.removesuffix('weight')}{_CHECK}" if weight.endswith("weight") else ""


def _is_damaged(weights: Mapping[str, Tensor], words: str) -> bool:
    check = weights.get(words.removesuffix(_WORDS) + _CHECK)
    fits = weights[words].dtype == torch.int64
    return check is not None and fits and not torch.equal(check.cpu(), check_of(weights[words]).cpu())


def check_finite(weights: Any, source: str | Path) -> None:
    """Raise FloatingPointError, naming the first, unless all weights of a checkpoint are finite.

    >>> check_finite(load("runs/a/best.pt")["model"], "runs/a/best.pt")
    """
    for name, weight in _checked_weights(weights, source).items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise FloatingPointError(f"{source} holds a network that diverged: {name} is not finite")


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file ends as a checkpoint does; it may be damaged before. OSError if it cannot be read.

    >>> is_checkpoint("runs/a/best.pt")
    True
    """
    with Path(path).open("rb") as file:
        file.seek(max(0, Path(path).stat().st_size - _DIGEST_SIZE - len(_MARKER)))
        return file.read(len(_MARKER)) == _MARKER


def check_same(what: str, there: Mapping[str, Any], here: Mapping[str, Any], source: str | Path) -> None:
    """Compare the plain values that a file keeps with those of the present call.

    Raises:
        CheckpointError: "source is of another `what`", naming all values that differ.

    >>> check_same("run", {"lr": 0.1}, {"lr": 0.1}, "runs/a/last.pt")
    """
    found = [f"{name} is {old!r} there and {new!r} here" for name, old, new in _differences(there, here)]
    if found:
        raise CheckpointError(f"{source} is of another {what}: {'; '.join(found)}")


def write_atomically(path: str | Path, *data: bytes) -> None:
    """Make ``data`` the content of ``path``, all of it or nothing, through a temporary file beside it.

    Raises:
        ValueError: ``path`` is a checkpoint, which nothing but a checkpoint is written over.
        OSError: naming ``path``, which holds what it held before.

    >>> write_atomically("runs/a/settings.yaml", b"eps: 0.1\\n")
    """
    with contextlib.suppress(OSError):  # of what is not there, or cannot be read
        if Path(path).is_file() and is_checkpoint(path):
            raise ValueError(f"{path} is a checkpoint, which nothing else is written over: name another file")
    _replace(path, *data)


def _replace(path: str | Path, *data: bytes) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # torch or the system named the temporary file, or none
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: str | Path) -> tuple[memoryview, bytes]:
    """What the digest at the end is of, and the digest, verified."""
    data = memoryview(Path(path).read_bytes())
    body, digest = data[:-_DIGEST_SIZE], data[-_DIGEST_SIZE:]
    if bytes(body[-len(_MARKER) :]) != _MARKER:
        raise CheckpointError(f"{path} is not a checkpoint of blokern, or was cut short")
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return body, bytes(digest)


def _is_plain(file: io.BytesIO, size: int) -> bool:
    """Whether a zip archive is what torch.save writes: records as they are, together no larger than the file."""
    records = zipfile.ZipFile(file).infolist()
    plain = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    return plain and sum(record.file_size for record in records) <= size


def _storage_size(payload: Any) -> int:
    """The bytes of all tensors in nested dicts, lists and tuples; those that share memory are counted once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    left = [payload]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        elif isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
    return sum(sizes.values())


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two nested dicts differ, by dotted name."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif there != here:
        yield name, there, here


def _some(names: Any, limit: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f", … {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
