"""Data sets and batches: what loads, what is refused and how, and that every batch can be had again."""

import gzip
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blokern import data
from blokern.data import NAMES, Batches, ImageDataset, image_shape, load


def dataset(count: int = 10, size: int = 16, channels: int = 2, flip: bool = True) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return ImageDataset("noise", images, torch.arange(count), num_classes=count, flip=flip)


# --- ImageDataset -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(3, 1, 2, 2)}, TypeError, "images must be torch.uint8, got torch.float32"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be torch.int64, got torch.float32"),
        ({"images": torch.zeros(3, 2, 2, dtype=torch.uint8)}, ValueError, r"\[N, C, H, W\], got \[3, 2, 2\]"),
        ({"images": torch.zeros(3, 0, 2, 2, dtype=torch.uint8)}, ValueError, r"got \[3, 0, 2, 2\]"),
        ({"labels": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"labels must be \[N\], got \[3, 1\]"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, "3 images but 2 labels"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"labels": torch.tensor([0, 4, 9])}, ValueError, r"\[0, 4\), got 4 at index 1"),
        ({"labels": torch.tensor([0, 1, -2])}, ValueError, r"\[0, 4\), got -2 at index 2"),
    ],
)
def test_dataset_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "name": "mine",
        "images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 3]),
        "num_classes": 4,
    }
    ImageDataset(**good)
    with pytest.raises(error, match=f"^mine: .*{message}"):
        ImageDataset(**(good | change))


def test_statistics_are_those_of_the_float_images() -> None:
    some = dataset()
    pixels = some.images.double() / 255
    assert some.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert some.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    with pytest.raises(ValueError, match="need at least one image"):
        _ = some.subset([]).mean


def test_subset() -> None:
    some = dataset()
    part = some.subset(torch.tensor([7, 2]))
    assert part.labels.tolist() == [7, 2]
    assert torch.equal(part.images, some.images[[7, 2]])
    assert (part.name, part.num_classes, part.flip) == (some.name, some.num_classes, some.flip)
    assert len(some.subset([])) == 0
    for indices in ([0, 10], [-1]):
        with pytest.raises(ValueError, match=rf"indices must be in \[0, 10\), got {indices[-1]}"):
            some.subset(indices)
    for wrong in (torch.ones(10, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int64), [0.5]):
        with pytest.raises(TypeError, match=r"indices must be integers \[K\]"):
            some.subset(wrong)


# --- load ---------------------------------------------------------------------------------------------------


def test_digits() -> None:
    splits = load("digits", val_fraction=0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1437, 0, 360)
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert splits.train.images.max() == 255
    assert not splits.train.flip
    in_test = splits.test.labels.bincount() / (splits.test.labels.bincount() + splits.train.labels.bincount())
    assert in_test.sub(0.2).abs().max() < 0.01  # stratified


def test_validation_split() -> None:
    def shown(part: ImageDataset) -> set[bytes]:
        return {image.numpy().tobytes() for image in part.images}

    whole = load("digits", val_fraction=0, train_limit=500)
    first, again, other = (load("digits", train_limit=500, seed=seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.val)) == (450, 50)
    assert shown(first.train) | shown(first.val) == shown(whole.train)
    assert not shown(first.train) & shown(first.val)
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)
    assert torch.equal(first.test.images, other.test.images)


def test_limits_keep_the_first_images() -> None:
    whole = load("digits", val_fraction=0)
    few = load("digits", val_fraction=0, train_limit=7, test_limit=3)
    assert torch.equal(few.train.images, whole.train.images[:7])
    assert torch.equal(few.test.labels, whole.test.labels[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"val_fraction": -0.1}, r"val_fraction must be in \[0, 1\), got -0.1"),
        ({"val_fraction": math.nan}, r"val_fraction must be in \[0, 1\), got nan"),
        ({"val_fraction": 0.9, "train_limit": 1}, "val_fraction 0.9 of 1 images leaves none"),
        ({"train_limit": 0}, r"train_limit must be in \[1, 1437\] for digits, got 0"),
        ({"test_limit": 361}, r"test_limit must be in \[1, 360\] for digits, got 361"),
    ],
)
def test_load_rejects(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("digits", **arguments)


def test_unknown_name() -> None:
    with pytest.raises(
        ValueError, match=r"must be one of 'digits', .*got 'cifar-10'; did you mean 'cifar10'\?"
    ):
        load("cifar-10")
    with pytest.raises(ValueError, match=r"name must be one of .*got 'digits:2'"):
        load("digits:2")


def test_synthetic() -> None:
    splits = load("synthetic", val_fraction=0.25)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1536, 512, 512)
    assert splits.test.images.shape[1:] == (3, 32, 32)
    assert torch.equal(splits.test.images, load("synthetic", seed=5).test.images)
    other = load("synthetic:1x4x6x3").test
    assert other.images.shape[1:] == (1, 4, 6)
    assert other.num_classes == 3
    for name in ("synthetic:3x32x32", "synthetic:0x4x4x2", "synthetic:big"):
        with pytest.raises(ValueError, match=f"expected synthetic:CxHxWxK, .*got '{name}'"):
            load(name)


@pytest.mark.parametrize("name", ["digits", "synthetic", "synthetic:1x4x6x3"])
def test_image_shape_is_that_of_the_loaded_images(name: str) -> None:
    assert image_shape(name) == load(name).test.images.shape[1:]


def test_every_data_set_has_an_image_shape() -> None:
    assert all(len(image_shape(name)) == 3 for name in NAMES)
    with pytest.raises(ValueError, match=r"name must be one of .*got 'cifar-10'"):
        image_shape("cifar-10")
    with pytest.raises(ValueError, match="expected synthetic:CxHxWxK"):
        image_shape("synthetic:big")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny-imagenet"])
def test_data_dir_is_required(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", fake_torchvision({}))
    with pytest.raises(ValueError, match=f"^data_dir: {name} needs the folder"):
        load(name)


# --- idx files ----------------------------------------------------------------------------------------------

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(params=["gzip", "plain"])
def idx_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Four good idx files: 6 training images and 4 test images of 3x2 pixels."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 4)):
        images = rng.integers(0, 256, (count, 3, 2), dtype=np.uint8)
        for stem, array in (
            ("images-idx3-ubyte", images),
            ("labels-idx1-ubyte", np.arange(count, dtype=np.uint8)),
        ):
            write(tmp_path / f"{prefix}-{stem}", idx(array), compressed=request.param == "gzip")
    return tmp_path


def write(path: Path, content: bytes, compressed: bool) -> None:
    if compressed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def rewrite(folder: Path, stem: str, content: bytes) -> None:
    """Replace one idx file of the fixture by other content, in the form it had."""
    write(folder / stem, content, compressed=(folder / f"{stem}.gz").exists())


@pytest.mark.parametrize(("name", "flip"), [("mnist", False), ("fashion-mnist", True)])
def test_idx(idx_folder: Path, name: str, flip: bool) -> None:
    splits = load(name, data_dir=str(idx_folder), val_fraction=0)
    expected = np.random.default_rng(0).integers(0, 256, (6, 3, 2), dtype=np.uint8)
    assert torch.equal(splits.train.images, torch.from_numpy(expected).unsqueeze(1))
    assert splits.train.labels.tolist() == list(range(6))
    assert len(splits.test) == 4
    assert splits.train.flip == flip


def test_idx_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{TRAIN_IMAGES}\.gz nor .* is there$"):
        load("mnist", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        load("fashion-mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("stem", "content", "message"),
    [
        (TRAIN_IMAGES, b"", "wrong magic number ''"),
        (TRAIN_IMAGES, b"\x00\x00\x0d\x03" + bytes(40), "wrong magic number '00000d03', expected '00000803'"),
        (TRAIN_LABELS, idx(np.zeros((6, 1), np.uint8)), "wrong magic number '00000802', expected '00000801'"),
        (TRAIN_IMAGES, idx(np.zeros((6, 3, 2), np.uint8))[:9], "truncated after 9 bytes, inside the header"),
        (TRAIN_IMAGES, idx(np.zeros((6, 3, 2), np.uint8))[:-1], r"claims \(6, 3, 2\), .* 36 bytes.*; got 35"),
        (TRAIN_IMAGES, idx(np.zeros((6, 3, 2), np.uint8)) + b"\0", r"\(6, 3, 2\), .* 36 bytes.*; got more"),
        (TRAIN_IMAGES, idx(np.zeros((0, 3, 2), np.uint8)), r"claims \(0, 3, 2\)"),
        (TRAIN_IMAGES, b"\x00\x00\x08\x03" + b"\xff" * 12, r"cannot hold the \(4294967295, .* claims"),
        (TRAIN_IMAGES, idx(np.zeros((5, 3, 2), np.uint8)), "do not fit: .*5 images but 6 labels"),
        (TRAIN_LABELS, idx(np.array([0, 1, 2, 10, 11, 0], np.uint8)), r"\[0, 10\), got 10 at index 3"),
    ],
)
def test_idx_bad_content(idx_folder: Path, stem: str, content: bytes, message: str) -> None:
    rewrite(idx_folder, stem, content)
    with pytest.raises(ValueError, match=f"{idx_folder}/{stem}.*{message}"):
        load("fashion-mnist", data_dir=idx_folder)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-20], id="truncated"),
        pytest.param(lambda content: content[:-4], id="without its size"),
        pytest.param(lambda content: content[:-8] + bytes(4) + content[-4:], id="wrong CRC"),
        pytest.param(lambda content: content[:12] + b"\xff" * 8 + content[20:], id="corrupt deflate stream"),
        pytest.param(lambda content: b"PK" + content[2:], id="no gzip file"),
    ],
)
def test_idx_bad_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    noise = np.random.default_rng(0).integers(0, 256, (6, 3, 2), dtype=np.uint8)
    path.write_bytes(damage(gzip.compress(idx(noise))))
    (tmp_path / TRAIN_LABELS).write_bytes(idx(np.zeros(6, np.uint8)))
    with pytest.raises(ValueError, match=f"^{path}: truncated or corrupt gzip file: "):
        load("mnist", data_dir=tmp_path)


def test_real_fashion_mnist() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (Debian: apt install dataset-fashion-mnist)")
    splits = load("fashion-mnist")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [54_000, 6_000, 10_000]
    assert splits.test.images.shape[1:] == image_shape("fashion-mnist")
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    assert splits.train.mean == pytest.approx([0.286], abs=2e-3)
    assert splits.train.std == pytest.approx([0.353], abs=2e-3)


# --- torchvision --------------------------------------------------------------------------------------------


def fake_torchvision(datasets: dict[str, Any]) -> ModuleType:
    module = ModuleType("torchvision")
    module.datasets = SimpleNamespace(**datasets)  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("name", "num_classes", "flip"), [("cifar10", 10, True), ("cifar100", 100, True), ("svhn", 10, False)]
)
def test_torchvision(
    name: str, num_classes: int, flip: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nchw = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)

    def cifar(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        assert root == tmp_path
        assert not download
        count = 6 if train else 2
        return SimpleNamespace(data=nchw[:count].transpose(0, 2, 3, 1), targets=list(range(count)))

    def svhn(root: Path, *, split: str, download: bool) -> SimpleNamespace:
        assert root == tmp_path
        assert not download
        count = {"train": 6, "test": 2}[split]
        return SimpleNamespace(data=nchw[:count], labels=np.arange(count, dtype=np.int64))

    fake = fake_torchvision({"CIFAR10": cifar, "CIFAR100": cifar, "SVHN": svhn})
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    splits = load(name, data_dir=tmp_path, val_fraction=0)
    assert torch.equal(splits.train.images, torch.from_numpy(nchw))
    assert splits.train.images.is_contiguous()
    assert splits.test.labels.tolist() == [0, 1]
    assert (splits.test.num_classes, splits.test.flip) == (num_classes, flip)


def test_torchvision_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ImportError, match=r"svhn is read through torchvision: pip install 'blokern\[vision\]'"
    ):
        load("svhn", data_dir=tmp_path)


def test_torchvision_files_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(root: Path, **_: object) -> None:
        raise RuntimeError("Dataset not found or corrupted.")

    monkeypatch.setitem(sys.modules, "torchvision", fake_torchvision({"CIFAR10": missing}))
    with pytest.raises(
        FileNotFoundError, match=f"no intact train files in {tmp_path} .*not found or corrupted"
    ):
        load("cifar10", data_dir=tmp_path)


# --- Tiny ImageNet ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """Three training pictures of class n1, one of n2, two test pictures; the red channel numbers them."""

    def picture(path: Path, red: int, mode: str = "RGB") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (red, 0, 0)).convert(mode).save(path, "JPEG", quality=100)

    for index in range(3):
        picture(tmp_path / f"train/n1/images/n1_{index}.JPEG", 10 * index)
    picture(tmp_path / "train/n2/images/n2_0.JPEG", 200)
    picture(tmp_path / "val/images/val_0.JPEG", 100)
    picture(tmp_path / "val/images/val_1.JPEG", 255, mode="L")  # a few of the real ones are grey
    (tmp_path / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn2\t0\t0\t62\t62\nval_1.JPEG\tn1\t0\t0\t9\t9\n"
    )
    return tmp_path


def test_tiny_imagenet(tiny_imagenet: Path) -> None:
    splits = load("tiny-imagenet", data_dir=tiny_imagenet, val_fraction=0)
    assert splits.train.labels.tolist() == [0, 1, 0, 0]  # a class at a time in turn
    reds = splits.train.images[:, 0].double().mean((1, 2))
    assert (reds - torch.tensor([0, 200, 10, 20])).abs().max() < 3
    assert splits.test.labels.tolist() == [1, 0]
    assert splits.test.images.shape == (2, *image_shape("tiny-imagenet"))
    assert (splits.test.num_classes, splits.test.flip) == (2, True)


def annotate(text: bytes) -> Callable[[Path], object]:
    return lambda root: (root / "val/val_annotations.txt").write_bytes(text)


def truncate(root: Path) -> None:
    path = root / "train/n1/images/n1_0.JPEG"
    path.write_bytes(path.read_bytes()[:-200])


def remove_pictures(root: Path) -> None:
    for path in (root / "train/n2/images").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda root: (root / "train").rename(root / "t"), FileNotFoundError, "train is not there"),
        (
            lambda root: (root / "val").rename(root / "v"),
            FileNotFoundError,
            "val_annotations.txt is not there",
        ),
        (lambda root: (root / "val/images/val_1.JPEG").unlink(), FileNotFoundError, "val/images/val_1.JPEG"),
        (remove_pictures, ValueError, "train/n2/images: expected"),
        (annotate(b""), ValueError, "val_annotations.txt: expected a line for each picture"),
        (annotate(b"val_0.JPEG\tn1\nval_1.JPEG"), ValueError, "val_annotations.txt, line 2: .*'val_1.JPEG'"),
        (annotate(b"val_0.JPEG\tn9\t0"), ValueError, "val_annotations.txt, line 1: .*n9"),
        (annotate(b"val_0.JPEG\tn\xff1\t0"), ValueError, "val_annotations.txt, line 1: "),
        (truncate, ValueError, "n1_0.JPEG: not a readable JPEG file"),
        (
            lambda root: (root / "train/n1/images/n1_1.JPEG").write_bytes(b"GIF89a"),
            ValueError,
            "n1_1.JPEG: not a readable JPEG file",
        ),
        (
            lambda root: Image.new("RGB", (32, 64)).save(root / "train/n2/images/n2_0.JPEG"),
            ValueError,
            r"n2_0.JPEG: expected 64x64 pixels, got \(32, 64\)",
        ),
    ],
)
def test_tiny_imagenet_damaged(
    tiny_imagenet: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(tiny_imagenet)
    with pytest.raises(error, match=f"{tiny_imagenet}/.*{message}"):
        load("tiny-imagenet", data_dir=tiny_imagenet)


@pytest.mark.parametrize("name", ["../../secret.JPEG", "/secret.JPEG"])
def test_tiny_imagenet_reads_no_other_folder(tiny_imagenet: Path, name: str) -> None:
    annotations = tiny_imagenet / "val" / "val_annotations.txt"
    first, *rest = annotations.read_text().splitlines()
    annotations.write_text("\n".join(["\t".join([name, *first.split("\t")[1:]]), *rest]))
    with pytest.raises(ValueError, match="line 1: expected the name of a file"):
        load("tiny-imagenet", data_dir=tiny_imagenet)


def test_tiny_imagenet_without_classes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "val/val_annotations.txt").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/train: expected a folder for each class"):
        load("tiny-imagenet", data_dir=tmp_path)


# --- Batches ------------------------------------------------------------------------------------------------


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x1, x2) and torch.equal(y1, y2) for (x1, y1), (x2, y2) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augment", [False, True])
def test_batches_form(channels_last: bool, augment: bool) -> None:
    batches = Batches(dataset(), 4, augment=augment, channels_last=channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for x, y in batches:
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.shape[1:] == (2, 16, 16)
        assert x.is_contiguous(memory_format=memory_format)
        assert x.min() >= 0
        assert x.max() <= 1


def test_plain_batches_are_the_images_in_order() -> None:
    some = dataset()
    batches = list(Batches(some, 4))
    assert torch.equal(torch.cat([y for _, y in batches]), some.labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), some.images / 255)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_drop_last(drop_last: bool, sizes: list[int]) -> None:
    batches = Batches(dataset(), 4, drop_last=drop_last)
    assert [len(y) for _, y in batches] == sizes
    assert len(batches) == len(sizes)


def test_no_images_make_no_batches() -> None:
    batches = Batches(dataset().subset([]), 4, shuffle=True, augment=True)
    assert len(batches) == 0
    assert list(batches) == []


def test_shuffled_epochs_are_different_orders_of_all_images() -> None:
    batches = Batches(dataset(50), 8, shuffle=True)
    orders = [torch.cat([y for _, y in batches.epoch(epoch)]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_resumed_epoch_is_the_tail_of_the_epoch(start: int) -> None:
    arguments: dict[str, Any] = {"shuffle": True, "augment": True, "seed": 3}
    whole = list(Batches(dataset(), 2, **arguments).epoch(2))
    torch.manual_seed(999)  # torch's own generator must not matter
    resumed = list(Batches(dataset(), 2, **arguments).epoch(2, start=start))
    assert same(resumed, whole[start:])


def test_iterators_do_not_disturb_each_other() -> None:
    batches = Batches(dataset(), 2, shuffle=True, augment=True)
    expected = list(batches.epoch(1))
    pairs = list(zip(batches.epoch(1), batches.epoch(0), strict=True))
    assert same([first for first, _ in pairs], expected)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_order_and_augmentation(change: dict[str, int]) -> None:
    def batch(shuffle: bool, augment: bool, seed: int = 0, epoch: int = 0) -> Tensor:
        return next(Batches(dataset(40), 40, shuffle=shuffle, augment=augment, seed=seed).epoch(epoch))[0]

    for kind in ({"shuffle": True, "augment": False}, {"shuffle": False, "augment": True}):
        assert not torch.equal(batch(**kind), batch(**kind, **change))


def test_batches_of_an_epoch_are_augmented_differently() -> None:
    twice = dataset(40).subset([*range(40), *range(40)])
    (first, _), (second, _) = Batches(twice, 40, augment=True)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [15, 16])
def test_augmentation_is_crop_and_flip_of_each_image(size: int, flip: bool) -> None:
    """Against a loop over the images, with the same draws."""
    some = dataset(60, size=size, flip=flip)
    draws = data._Draws(len(some), slice(None), torch.Generator().manual_seed(7))
    actual = data._augment(some.images, flip, draws)

    generator = torch.Generator().manual_seed(7)
    pad = 4 if size == 16 else 1
    shifts = torch.randint(0, 2 * pad + 1, (2, 60), generator=generator)
    mirrored = torch.randint(0, 2, (60,), generator=generator) if flip else torch.zeros(60)
    for index, image in enumerate(some.images):
        padded = torch.zeros(2, size + 2 * pad, size + 2 * pad, dtype=torch.uint8)
        padded[:, pad : pad + size, pad : pad + size] = image
        top, left = shifts[:, index].tolist()
        expected = padded[:, top : top + size, left : left + size]
        if mirrored[index]:
            expected = expected.flip(2)
        assert torch.equal(actual[index], expected)
    assert set(shifts.flatten().tolist()) == set(range(2 * pad + 1))  # every shift occurs


def test_digits_are_never_mirrored() -> None:
    """A lone bright pixel left of the middle stays there under shifts by one pixel."""
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 4, 1] = 255
    some = ImageDataset("dot", images, torch.zeros(200, dtype=torch.int64), 1, flip=load("digits").train.flip)
    (x, _), *_ = Batches(some, 200, augment=True)
    assert x[..., :3].sum() == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 11, "drop_last": True}, "batch_size must be at most the 10 images .*, got 11"),
    ],
)
def test_batches_reject(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(dataset(), **arguments)


def test_epoch_rejects_at_once() -> None:
    batches = Batches(dataset(), 4)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        batches.epoch(-1)
    for start in (-1, 4):
        with pytest.raises(ValueError, match=rf"start must be in \[0, 3\], got {start}"):
            batches.epoch(0, start=start)
