"""Files from strangers: a digest that matches keeps no one from writing what they like. Nothing of it is executed, and
what is refused is refused in words, before it takes memory that the file has not."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import random
import re
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import pruned, single_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blokern.bilevel import checkpoint, export
from blokern.bilevel.checkpoint import CheckpointError
from blokern.data import load

many = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@contextlib.contextmanager
def memory_bound(mib: int = 300) -> Iterator[None]:
    """Fails what would make the process that much larger than it is."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (mib << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def signed(body: bytes) -> bytes:
    """With the digest of a checkpoint."""
    body += b"blokern checkpoint\n"
    return body + hashlib.sha256(body).digest()


def body_of(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def damaged(source: random.Random, content: bytes) -> bytes:
    """Cut, with bytes or numbers changed, or pieces left out, doubled and moved."""
    data = bytearray(content)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data) + 1)
        kind = source.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << source.randrange(8)
        elif kind == 2:
            data[at : at + 4] = source.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"])
        elif kind == 3:
            piece = data[at : at + source.randrange(64)]
            other = source.randrange(len(data) + 1)
            data[other:other] = piece
        else:
            del data[at : at + source.randrange(64)]
    return bytes(data)


def record(body: bytes, name: str, change: Callable[[bytes], bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with one record changed, and the rest as it was."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith(name) else data)
    return buffer.getvalue()


PAYLOAD = {"model": {"w": torch.arange(24.0).view(2, 12), "n": torch.tensor(3)}, "epoch": 3, "version": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "last.pt"


# ---- Checkpoints


def test_what_is_only_repacked_loads(path: Path) -> None:
    """So that the damaged ones below are refused for their damage."""
    for body in (body_of(PAYLOAD), record(body_of(PAYLOAD), "data.pkl", lambda data: data)):
        path.write_bytes(signed(body))
        assert torch.equal(checkpoint.load(path)["model"]["w"], PAYLOAD["model"]["w"])


@many
@given(source=st.randoms(use_true_random=False))
def test_a_damaged_checkpoint_with_a_good_digest(path: Path, source: random.Random) -> None:
    body = body_of(PAYLOAD)
    if source.random() < 0.5:
        body = record(body, "data.pkl", lambda data: damaged(source, data))
    else:
        body = damaged(source, body)
    path.write_bytes(signed(body))
    with memory_bound(), contextlib.suppress(CheckpointError):
        assert isinstance(checkpoint.load(path), dict)


def test_compressed_records_are_refused(path: Path) -> None:
    bomb = record(body_of(PAYLOAD), "data/0", lambda _: bytes(256 << 20), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 20
    path.write_bytes(signed(bomb))
    with (
        memory_bound(100),
        pytest.raises(CheckpointError, match=r"last\.pt holds compressed or overlapping records"),
    ):
        checkpoint.load(path)


def test_a_tensor_larger_than_the_file_is_refused(path: Path) -> None:
    """Its sizes are in the pickle, apart from its bytes: torch makes the storage as large as they ask."""
    body = body_of({"w": torch.zeros(7, 11), "version": 1})
    large = record(
        body, "data.pkl", lambda data: data.replace(b"K\x07K\x0b", b"J" + struct.pack("<i", 10**7) + b"K\x0b")
    )
    assert large != body
    path.write_bytes(signed(large))
    with pytest.raises(
        CheckpointError, match=r"last\.pt (claims tensors that are larger than the file|cannot be read)"
    ):
        checkpoint.load(path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code was run",))


@pytest.mark.parametrize(
    "content", [{"w": Bomb(), "version": 1}, Bomb(), [Bomb()]], ids=["in", "alone", "list"]
)
def test_code_is_not_run(path: Path, content: Any) -> None:
    for body in (body_of(content), pickle.dumps(content)):
        path.write_bytes(signed(body))
        with pytest.raises(CheckpointError, match=r"last\.pt cannot be read"):
            checkpoint.load(path)


@pytest.mark.parametrize("payload", [[1, 2], {"epoch": 3}, torch.zeros(2), None, {"version": torch.zeros(0)}])
def test_other_payloads_are_refused(path: Path, payload: Any) -> None:
    path.write_bytes(signed(body_of(payload)))
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        checkpoint.load(path)


def network() -> dict[str, Any]:
    return pruned(single_weights)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"width": 10**9}, "asks for width=1000000000"),
        ({"width": 2000}, "another architecture"),
        ({"num_classes": 10**12}, "asks for num_classes"),
        ({"depth": 3}, "no network can be built by its recipe"),
        ({"name": ["x"]}, "no network can be built"),
        ({"name": "timm:resnet18", "checkpoint_path": "/tmp/x.pth"}, "may not have the network read checkpoint_path"),
        ({"name": "timm:resnet18", "pretrained": True}, "may not have the network read pretrained"),
    ],
)  # fmt: skip
def test_recipes_of_strangers(recipe: dict[str, Any], message: str) -> None:
    payload = network()
    payload["recipe"]["model"] |= recipe
    with memory_bound(), pytest.raises(CheckpointError, match=rf"x\.pt.*{message}"):
        checkpoint.load_model(payload, "x.pt")


@pytest.mark.parametrize("weights", [None, [], {"a": 1}, {1: torch.zeros(1)}])
def test_weights_that_are_none_are_refused(weights: Any) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt has no weights"):
        checkpoint.load_model({**network(), "model": weights}, "x.pt")


@many
@given(source=st.randoms(use_true_random=False))
def test_any_masks_bits_work_or_are_refused(source: random.Random) -> None:
    payload = network()
    name = source.choice([name for name in payload["model"] if name.endswith("mask_words")])
    words = payload["model"][name].clone()
    kind = source.randrange(4)
    if kind == 0:
        words.flatten()[source.randrange(words.numel())] = source.getrandbits(64) - 2**63
    payload["model"][name] = (words, words.float(), words[:1].expand(words.shape), words[:, :0])[kind]
    try:
        model = checkpoint.load_model(payload, "x.pt")
    except CheckpointError as error:
        assert "x.pt" in str(error)  # noqa: PT017
    else:
        assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)


# ---- Exports


@pytest.fixture(scope="module")
def exported(path: Path) -> bytes:
    pytest.importorskip("safetensors")
    target = path.with_name("pruned.safetensors")
    export.save_sparse(network(), "x.pt", target)
    return target.read_bytes()


@many
@given(source=st.randoms(use_true_random=False))
def test_a_damaged_export(path: Path, exported: bytes, source: random.Random) -> None:
    target = path.with_name("damaged.safetensors")
    size = 8 + struct.unpack("<Q", exported[:8])[0]
    if source.random() < 0.7:  # in the header, whose length then fits
        header = damaged(source, exported[8:size])
        target.write_bytes(struct.pack("<Q", len(header)) + header + exported[size:])
    else:
        target.write_bytes(damaged(source, exported))
    with memory_bound():
        try:
            checkpoint.load_model(export.load_sparse(target), target)
        except CheckpointError as error:
            assert target.name in str(error)  # noqa: PT017


def test_an_exports_shapes_are_checked(path: Path, exported: bytes) -> None:
    target = path.with_name("shapes.safetensors")
    size = 8 + struct.unpack("<Q", exported[:8])[0]
    header = json.loads(exported[8:size])
    shapes = json.loads(header["__metadata__"]["shapes"])
    name = next(iter(shapes))
    for shape in ([-1, 2], [10**12, 10**12], "no", None, [shapes[name][0], 10**15]):
        header["__metadata__"]["shapes"] = json.dumps({**shapes, name: shape})
        new = json.dumps(header).encode()
        target.write_bytes(struct.pack("<Q", len(new)) + new + exported[size:])
        with memory_bound(), pytest.raises(CheckpointError, match=r"shapes\.safetensors"):
            export.load_sparse(target)


# ---- Data


def idx(t: Tensor) -> bytes:
    return bytes((0, 0, 8, t.dim())) + struct.pack(f">{t.dim()}I", *t.shape) + t.numpy().tobytes()


@pytest.fixture(scope="module")
def mnist(path: Path) -> Path:
    folder = path.parent / "mnist"
    folder.mkdir()
    for prefix in ("train", "t10k"):
        images, labels = torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@many
@given(source=st.randoms(use_true_random=False))
def test_damaged_idx_files(mnist: Path, source: random.Random) -> None:
    name = source.choice(["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"])
    file = mnist / name
    good = file.read_bytes()
    if name.endswith(".gz") and source.random() < 0.5:
        file.write_bytes(gzip.compress(damaged(source, gzip.decompress(good))))
    else:
        file.write_bytes(damaged(source, good))
    try:
        with memory_bound():
            load("mnist", data_dir=mnist)
    except ValueError as error:
        assert re.search("train-|train_limit|val_fraction", str(error))  # noqa: PT017
    finally:
        file.write_bytes(good)


def test_an_idx_file_that_claims_too_much(mnist: Path) -> None:
    file = mnist / "train-images-idx3-ubyte.gz"
    good = file.read_bytes()
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**22, 28, 28)
    file.write_bytes(gzip.compress(header) + bytes(4 << 20))
    with memory_bound(), pytest.raises(ValueError, match="more than 2147483648 bytes"):
        load("mnist", data_dir=mnist)
    file.write_bytes(good)
