"""Image-classification data sets, held in memory as uint8, and the batches drawn from them.

>>> splits = load("digits")
>>> x, y = next(iter(Batches(splits.train, 128, shuffle=True, augment=True)))
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blokern._names import unknown_name

__all__ = ["NAMES", "Batches", "ImageDataset", "Splits", "image_shape", "load"]


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images in memory.

    Args:
        name: what messages call it.
        images: uint8 [N, C, H, W], 0..255.
        labels: int64 [N], each in [0, num_classes).
        num_classes: how many classes there are, at least 1.
        flip: whether a mirrored image still has its label (not so for digits); :class:`Batches` reads it.

    Raises:
        TypeError: images or labels of another dtype.
        ValueError: another shape, different numbers of images and labels, or a label out of range.

    >>> data = ImageDataset("noise", torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), 4)
    >>> len(data.subset([0, 2]))
    2
    """

    name: str
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    num_classes: int
    flip: bool = False

    def __post_init__(self) -> None:
        for argument, tensor, dtype in (
            ("images", self.images, torch.uint8),
            ("labels", self.labels, torch.int64),
        ):
            if tensor.dtype != dtype:
                raise TypeError(f"{self.name}: {argument} must be {dtype}, got {tensor.dtype}")
        if self.images.ndim != 4 or 0 in self.images.shape[1:]:
            raise ValueError(f"{self.name}: images must be [N, C, H, W], got {list(self.images.shape)}")
        if self.labels.ndim != 1:
            raise ValueError(f"{self.name}: labels must be [N], got {list(self.labels.shape)}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{self.name}: {len(self.images)} images but {len(self.labels)} labels")
        if self.num_classes < 1:
            raise ValueError(f"{self.name}: num_classes must be at least 1, got {self.num_classes}")
        bad = ((self.labels < 0) | (self.labels >= self.num_classes)).nonzero()
        if len(bad):
            index = int(bad[0])
            raise ValueError(
                f"{self.name}: labels must be in [0, {self.num_classes}), got {int(self.labels[index])} "
                f"at index {index}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel over all images, in [0, 1] units. ValueError when there is no image."""
        return self._statistics[0]

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel, in [0, 1] units. ValueError when there is no image."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if not len(self):
            raise ValueError(f"{self.name}: mean and std need at least one image, got none")
        # From histograms: exact, and without a float copy of the images.
        values = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.images.unbind(1):
            frequency = torch.bincount(channel.flatten(), minlength=256).cpu().double() / channel.numel()
            mean = (frequency * values).sum()
            means.append(float(mean))
            stds.append(float((frequency * (values - mean) ** 2).sum().sqrt()))
        return tuple(means), tuple(stds)

    def to(self, device: torch.device | str) -> ImageDataset:
        """The data set with its images and labels on the device.

        >>> data = data.to("cuda")
        """
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: Tensor | Sequence[int]) -> ImageDataset:
        """The images at ``indices`` (integers in [0, N), in that order), copied.

        TypeError for anything but a row of integers, ValueError for one out of range.

        >>> first = data.subset(range(100))
        """
        index = indices if isinstance(indices, Tensor) else torch.tensor(list(indices))
        if index.numel() == 0:
            index = index.long()  # torch makes an empty list float32
        if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices must be integers [K], got {index.dtype} {list(index.shape)}")
        bad = index[(index < 0) | (index >= len(self))]
        if len(bad):
            raise ValueError(f"indices must be in [0, {len(self)}), got {int(bad[0])}")
        index = index.to(self.images.device)
        return replace(self, images=self.images[index], labels=self.labels[index])


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of a data set: to train on, to choose settings on, to report on."""

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    val_fraction: float = 0.1,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
) -> Splits:
    """Load a data set into memory and set a validation part aside.

    Args:
        name: one of :data:`NAMES`. ``synthetic`` is noise of 3x32x32 pixels and 10 classes, for throughput;
            ``synthetic:CxHxWxK`` is noise of another shape and K classes.
        data_dir: the folder with the files; ``digits`` and ``synthetic`` need none, and ``fashion-mnist`` is
            looked for where Debian's package puts it when None.
        val_fraction: the part of the training images set aside for validation, in [0, 1).
        train_limit, test_limit: use only the first so many images; ``train_limit`` counts before validation
            images are set aside.
        seed: which training images become validation images; nothing else depends on it.

    Raises:
        ValueError: an unknown name, an argument out of range, or a bad file (the message names it).
        FileNotFoundError: files are missing.
        ImportError: the data set is read through a library that is not installed.

    >>> splits = load("fashion-mnist", train_limit=10_000)
    >>> len(splits.train), len(splits.val), len(splits.test)
    (9000, 1000, 10000)
    """
    loader = _LOADERS.get("synthetic" if name.startswith("synthetic:") else name)
    if loader is None:
        raise unknown_name("name", name, NAMES)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")

    train, test = loader(name, None if data_dir is None else Path(data_dir))
    train = _first(train, "train_limit", train_limit)
    test = _first(test, "test_limit", test_limit)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held_out = round(val_fraction * len(train))
    if held_out == len(train):
        raise ValueError(f"val_fraction {val_fraction} of {len(train)} images leaves none to train on")
    # Sorted, so that the training order does not depend on the seed beyond who is in which part.
    val_index, train_index = order[:held_out].sort().values, order[held_out:].sort().values
    return Splits(train=train.subset(train_index), val=train.subset(val_index), test=test)


def image_shape(name: str) -> tuple[int, int, int]:
    """C, H and W of the images of a data set, whose files need not be there. ValueError for an unknown name.

    >>> image_shape("fashion-mnist")
    (1, 28, 28)
    """
    if name.startswith("synthetic"):
        channels, height, width, _ = _synthetic_size(name)
        return channels, height, width
    if name not in _SHAPES:
        raise unknown_name("name", name, NAMES)
    return _SHAPES[name]


class Batches:
    """Batches of an in-memory data set: float32 images in [0, 1], optionally shuffled and augmented.

    The order of an epoch is a function of (seed, epoch), and the augmentation of its batch b of
    (seed, epoch, b): a resumed run starts at any batch with the same bits and no stored generator state.

    Args:
        dataset: what to draw from; batches are made on the device of its tensors.
        batch_size: images in a batch, at least 1; the last batch may be smaller.
        shuffle: a new random order each epoch.
        augment: random crops from an image zero-padded by 4 pixels on each side (by 1 when it is smaller than
            16), and random horizontal flips where ``dataset.flip`` says that they keep the label.
        drop_last: leave out a smaller last batch.
        seed: of order and augmentation.
        channels_last: yield images in ``torch.channels_last`` memory format.
        shard: (rank, size): yield part `rank` of the `size` equal ones of each batch, the same images with the same
            augmentation as within the whole.

    Yields ``(x, y)``: x float32 [B, C, H, W], y int64 [B].

    Raises:
        ValueError: ``batch_size`` below 1, ``drop_last`` would leave no batch at all, or a ``shard`` of batches that
            have no such parts.

    >>> batches = Batches(load("digits").train, 128, shuffle=True, augment=True)
    >>> for x, y in batches.epoch(3, start=5): ...
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        channels_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if drop_last and len(dataset) < batch_size:
            raise ValueError(
                f"batch_size must be at most the {len(dataset)} images with drop_last, got {batch_size}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.drop_last = drop_last
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.shard = shard
        rank, size = shard
        if not 0 <= rank < size:
            raise ValueError(f"shard must be (rank, size) with 0 <= rank < size, got {shard}")
        if size > 1 and (batch_size % size or not drop_last):
            raise ValueError(
                f"batch_size must be a multiple of the {size} shards, with drop_last, got {batch_size} and {drop_last}"
            )

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        batches = len(self.dataset) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``epoch`` (0, 1, …) from batch ``start`` on; ValueError when out of range.

        >>> x, y = next(batches.epoch(3, start=5))
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be in [0, {len(self)}], got {start}")
        order = self._order(epoch)
        return (self._batch(order, epoch, batch) for batch in range(start, len(self)))

    def dealt(
        self, rank: int, size: int, generator: torch.Generator, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every `size`-th batch of epoch 0 from number `rank` on: whole batches for one of several processes.

        Before each, the generator is seeded with `seed` and the batch's number: what is drawn for a batch does not
        depend on whose it is.

        >>> for x, y in batches.dealt(processes.rank, processes.size, generator, seed=0): ...
        """
        order = self._order(0)
        for batch in range(rank, len(self), size):
            generator.manual_seed(seed + batch)
            yield self._batch(order, 0, batch)

    def _order(self, epoch: int) -> Tensor:
        if self.shuffle:
            order = torch.randperm(len(self.dataset), generator=_generator(self.seed, epoch))
        else:
            order = torch.arange(len(self.dataset))
        return order.to(self.dataset.images.device)

    def _batch(self, order: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        rank, size = self.shard
        count, share = len(index), len(index) // size
        part = slice(rank * share, (rank + 1) * share)
        index = index[part]
        images = self.dataset.images[index]
        if self.augment:
            draws = _Draws(count, part, _generator(self.seed, epoch, batch))
            images = _augment(images, self.dataset.flip, draws)
        x = images.to(torch.float32, memory_format=self.memory_format).div_(255)
        return x, self.dataset.labels[index]


def _generator(*key: int) -> torch.Generator:
    """A generator seeded with the 8-byte BLAKE2b digest of "seed,epoch" or "seed,epoch,batch".

    Hashed rather than added up, so that (seed, epoch + 1) is not (seed + 1, epoch).
    """
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class _Draws:
    """Random numbers for a part of a batch of ``count`` images: those that it has within the whole.

    Drawn on the CPU whatever the images' device, so that they are the same everywhere.
    """

    count: int
    part: slice
    generator: torch.Generator

    def below(self, limit: int, rows: int) -> Tensor:
        """Integers in [0, limit), [rows, images of the part]."""
        return torch.randint(0, limit, (rows, self.count), generator=self.generator)[:, self.part]


def _augment(images: Tensor, flip: bool, draws: _Draws) -> Tensor:
    """Randomly shifted and, with ``flip``, mirrored copies of uint8 images [B, C, H, W]."""
    count, _, height, width = images.shape
    pad = 4 if min(height, width) >= 16 else 1
    top, left = draws.below(2 * pad + 1, 2).to(images.device)
    # Every crop at once, [B, C, 2·pad+1, 2·pad+1, H, W], as a view; the indexing copies one crop per image.
    crops = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    images = crops[torch.arange(count, device=images.device), :, top, left]
    if flip:
        mirrored = draws.below(2, 1).view(count, 1, 1, 1).bool().to(images.device)
        images = torch.where(mirrored, images.flip(3), images)
    return images


# --- Loaders: (name, data_dir) -> (train, test) -------------------------------------------------------------

_Pair: TypeAlias = tuple[ImageDataset, ImageDataset]

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _first(dataset: ImageDataset, argument: str, limit: int | None) -> ImageDataset:
    if limit is None:
        return dataset
    if not 1 <= limit <= len(dataset):
        raise ValueError(f"{argument} must be in [1, {len(dataset)}] for {dataset.name}, got {limit}")
    return dataset.subset(range(limit))


def _required(name: str, data_dir: Path | None, content: str) -> Path:
    if data_dir is None:
        raise ValueError(f"data_dir: {name} needs the folder that holds {content}, got None")
    return data_dir


def _digits(name: str, data_dir: Path | None) -> _Pair:
    """scikit-learn's 1797 real 8x8 handwritten digits; 1437 to train on, 360 to test on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # float64 [1797, 64], 0..16
    images = torch.from_numpy(np.rint(pixels * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    data = ImageDataset(name, images, torch.from_numpy(labels.astype(np.int64)), num_classes=10)
    # Every fifth image in order of class: each class is split 4 to 1, with no random draw.
    by_class = data.labels.argsort(stable=True)
    is_test = torch.zeros(len(data), dtype=torch.bool)
    is_test[by_class[::5]] = True
    return data.subset((~is_test).nonzero().flatten()), data.subset(is_test.nonzero().flatten())


def _synthetic(name: str, data_dir: Path | None) -> _Pair:
    """Uniform noise with random labels, always the same: 2048 images to train on, 512 to test on."""
    *size, num_classes = _synthetic_size(name)
    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> ImageDataset:
        images = torch.randint(0, 256, (count, *size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, num_classes, (count,), generator=generator)
        return ImageDataset(name, images, labels, num_classes, flip=True)

    return noise(2048), noise(512)


def _synthetic_size(name: str) -> tuple[int, int, int, int]:
    """C, H, W and the number of classes."""
    shape = name.removeprefix("synthetic").removeprefix(":") or "3x32x32x10"
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", shape)
    if match is None:
        raise ValueError(f"name: expected synthetic:CxHxWxK, such as synthetic:3x64x64x200, got {name!r}")
    channels, height, width, num_classes = map(int, match.groups())
    return channels, height, width, num_classes


def _idx(name: str, data_dir: Path | None, *, flip: bool, installed: Path | None = None) -> _Pair:
    """The four idx files of MNIST and its relatives, plain or gzipped."""
    folder = _required(name, data_dir or installed, "its four idx files")

    def part(prefix: str) -> ImageDataset:
        images_path = _find_idx(name, folder, f"{prefix}-images-idx3-ubyte")
        labels_path = _find_idx(name, folder, f"{prefix}-labels-idx1-ubyte")
        images, labels = _read_idx(images_path, ndim=3), _read_idx(labels_path, ndim=1)
        try:
            return ImageDataset(name, images.unsqueeze(1), labels.long(), num_classes=10, flip=flip)
        except ValueError as error:
            raise ValueError(f"{images_path} and {labels_path} do not fit: {error}") from error

    return part("train"), part("t10k")


def _find_idx(name: str, folder: Path, stem: str) -> Path:
    candidates = (folder / f"{stem}.gz", folder / stem)
    for path in candidates:
        if path.is_file():
            return path
    hint = "; on Debian: apt install dataset-fashion-mnist" if name == "fashion-mnist" else ""
    raise FileNotFoundError(f"{name}: neither {candidates[0]} nor {candidates[1].name} is there{hint}")


#: Bytes; the largest of MNIST's relatives, EMNIST, has 0.6e9.
_LARGEST_IDX = 2**31


def _read_idx(path: Path, ndim: int) -> Tensor:
    """The uint8 tensor in an idx file: bytes 0, 0, type (8 is uint8), ndim; big-endian uint32 sizes; data."""
    file_size = path.stat().st_size
    compressed = path.suffix == ".gz"
    with gzip.open(path) if compressed else path.open("rb") as file:
        try:
            magic = file.read(4)
            if magic != bytes((0, 0, 8, ndim)):
                raise ValueError(
                    f"{path}: wrong magic number {magic.hex()!r}, expected '000008{ndim:02x}' "
                    f"(uint8, {ndim} dimensions)"
                )
            header = file.read(4 * ndim)
            if len(header) < 4 * ndim:
                raise ValueError(f"{path}: truncated after {4 + len(header)} bytes, inside the header")
            shape = struct.unpack(f">{ndim}I", header)
            count = math.prod(shape)
            # A false header must not make us allocate its size: deflate expands at most 1032 times.
            if count > file_size * (1032 if compressed else 1):
                raise ValueError(f"{path}: {file_size} bytes cannot hold the {shape} that its header claims")
            if count > _LARGEST_IDX:  # a file of zeros may be as small as it likes
                raise ValueError(f"{path}: its header claims {shape}, more than {_LARGEST_IDX} bytes")
            data = file.read(count + 1)  # one more than expected shows a surplus, and has gzip check its CRC
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: truncated or corrupt gzip file: {error}") from error
    if len(data) != count or count == 0:
        found = "more" if len(data) > count else len(data)
        raise ValueError(f"{path}: the header claims {shape}, that is {count} bytes of data; got {found}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)


def _torchvision(name: str, data_dir: Path | None, *, cls: str, num_classes: int, flip: bool) -> _Pair:
    """CIFAR-10, CIFAR-100 and SVHN as torchvision stores and reads them."""
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} is read through torchvision: pip install 'blokern[vision]' ({error})"
        ) from error
    except Exception as error:  # one for another torch raises anything
        raise ImportError(
            f"{name} is read through torchvision, which cannot be imported beside torch {torch.__version__}: {error}; "
            "install the one that belongs to that torch"
        ) from error
    root = _required(name, data_dir, f"torchvision's {cls} files")

    def part(split: str) -> ImageDataset:
        which = {"split": split} if cls == "SVHN" else {"train": split == "train"}
        try:
            source = getattr(datasets, cls)(root, download=False, **which)
        except RuntimeError as error:  # torchvision's word for missing files and for wrong checksums
            raise FileNotFoundError(
                f"{name}: torchvision finds no intact {split} files in {root} ({error}); "
                f"fetch them with torchvision.datasets.{cls}({str(root)!r}, download=True, …)"
            ) from error
        if cls == "SVHN":  # already NCHW
            pixels, labels = source.data, source.labels
        else:
            pixels, labels = np.moveaxis(source.data, 3, 1), source.targets
        images = torch.from_numpy(np.array(pixels, dtype=np.uint8, order="C"))
        return ImageDataset(
            name, images, torch.from_numpy(np.array(labels, dtype=np.int64)), num_classes, flip
        )

    return part("train"), part("test")


def _tiny_imagenet(name: str, data_dir: Path | None) -> _Pair:
    """Tiny ImageNet's folders; its val part is the test set, as the labels of its test part are secret."""
    root = _required(name, data_dir, "train/ and val/")
    train_dir, annotations = root / "train", root / "val" / "val_annotations.txt"
    for path in (train_dir, annotations):
        if not path.exists():
            raise FileNotFoundError(f"{name}: {path} is not there")
    classes = sorted(path.name for path in train_dir.iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"{train_dir}: expected a folder for each class, found none")

    files_by_class = []
    for cls in classes:
        folder = train_dir / cls / "images"
        files = sorted(folder.glob("*.JPEG"))
        if not files:
            raise ValueError(f"{folder}: expected *.JPEG files, found none")
        files_by_class.append(files)
    # One image of every class in turn, so that the first K images see all classes.
    train = [
        (path, label)
        for turn in zip_longest(*files_by_class)
        for label, path in enumerate(turn)
        if path is not None
    ]

    test = []
    # Bytes that are no UTF-8 become a class name that does not exist: reported below with their line.
    for number, line in enumerate(annotations.read_text("utf-8", errors="replace").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in classes:
            raise ValueError(
                f"{annotations}, line {number}: expected FILE, tab, a class in {train_dir}, got {line!r}"
            )
        if Path(fields[0]).name != fields[0]:
            raise ValueError(f"{annotations}, line {number}: expected the name of a file, got {fields[0]!r}")
        test.append((annotations.parent / "images" / fields[0], classes.index(fields[1])))
    if not test:
        raise ValueError(f"{annotations}: expected a line for each picture, got none")

    def part(files: list[tuple[Path, int]]) -> ImageDataset:
        labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        return ImageDataset(name, _read_pictures([path for path, _ in files]), labels, len(classes), True)

    return part(train), part(test)


def _read_pictures(paths: list[Path], size: int = 64) -> Tensor:
    """Decode JPEG files of size x size pixels to uint8 [N, 3, size, size]."""
    from PIL import Image

    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for image, path in zip(images, paths, strict=True):
        try:
            with Image.open(path, formats=["JPEG"]) as picture:
                if picture.size != (size, size):  # asked before decoding: the header may claim anything
                    raise ValueError(f"{path}: expected {size}x{size} pixels, got {picture.size}")
                pixels = np.array(picture.convert("RGB"))
        except FileNotFoundError:
            raise  # it names the file
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: not a readable JPEG file: {error}") from error
        image.copy_(torch.from_numpy(pixels).permute(2, 0, 1))
    return images


_LOADERS: dict[str, Callable[[str, Path | None], _Pair]] = {
    "digits": _digits,
    "fashion-mnist": partial(_idx, flip=True, installed=_DEBIAN_FASHION_MNIST),
    "mnist": partial(_idx, flip=False),
    "cifar10": partial(_torchvision, cls="CIFAR10", num_classes=10, flip=True),
    "cifar100": partial(_torchvision, cls="CIFAR100", num_classes=100, flip=True),
    "svhn": partial(_torchvision, cls="SVHN", num_classes=10, flip=False),
    "tiny-imagenet": _tiny_imagenet,
    "synthetic": _synthetic,
}

#: Of each but synthetic, C, H and W.
_SHAPES = {
    "digits": (1, 8, 8),
    "fashion-mnist": (1, 28, 28),
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "svhn": (3, 32, 32),
    "tiny-imagenet": (3, 64, 64),
}

#: The names that :func:`load` knows.
NAMES = tuple(_LOADERS)
