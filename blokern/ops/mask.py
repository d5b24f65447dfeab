"""Which entries of a weight are kept, as bits, and the forms in which the kernels walk them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from blokern._backend import C

__all__ = ["SparseMask", "Stream", "as_mask", "block_of", "check_mask", "check_of", "is_jit_traced"]

T = TypeVar("T")

_NO_CHECK = torch.zeros((), dtype=torch.int64)

# Entries of one row in one block of columns, at least on average: fewer, and a block's partial sums cost more than
# the block's stay in the first-level cache saves.
_ENTRIES_A_PART = 8
_SMALLEST_BLOCK = 192
# On CUDA: the density from which products are always dense ones, and need no stream (register_products_cuda.cpp).
_CUDA_STREAM_DENSITY = 0.05


class Stream(NamedTuple):
    """Kept entries in the order of csrc/sparse/stream.h. On CUDA a mask that keeps much has none, but its words, and
    so has one on the meta device, which has no entries."""

    start: Tensor
    column: Tensor
    block: int
    words: Tensor


class SparseMask:
    """The kept entries of a weight [out, ...]; a matrix [out, the rest] to every kernel.

    The truth is one bit an entry, `words`; what the kernels walk is made from it when first asked for, and kept until
    the mask changes. Copies and pickles carry the bits alone.

    Words may be written by anybody, `.data` and other processes included: `check`, a hash of them, goes wherever they
    go, so that new bits are told from averaged or half-copied ones, which are refused with a ValueError at the next
    use. On CUDA, where the host would have to wait for it, only writes that torch counts (`_version`) are seen.

    mask: bool, at least two-dimensional, fewer than 2³¹ entries. Raises TypeError or ValueError for others.

    >>> mask = SparseMask(torch.tensor([[True, False], [False, False]]))
    >>> mask.kept, mask.density
    (1, 0.25)
    """

    #: A weak reference to what is called with the mask before and after `update_` changes its bits.
    on_change: Callable[[], Callable[[SparseMask], None] | None] | None = None

    def __init__(self, mask: Tensor) -> None:
        _check(mask)
        mask = _plain(mask, "mask")
        self.shape = mask.shape
        #: int64 [rows, ⌈cols / 64⌉]; column c is bit c % 64 of word c // 64.
        self.words: Tensor = self._packed(mask)
        self._begin()

    @classmethod
    def of_words(cls, words: Tensor, shape: torch.Size, check: Tensor | None = None) -> SparseMask:
        """The mask of this shape whose `words` and `check` these are; they are shared, not copied.

        check: None for words that come without one, which are taken as they are. Raises ValueError for words of another
        shape.
        """
        mask = cls.__new__(cls)
        mask.shape, mask.words = shape, _plain(words, "words")
        mask._begin(check)
        wanted = (mask.rows, (mask.cols + 63) // 64)
        if words.dtype != torch.int64 or words.shape != wanted:
            raise ValueError(
                f"words must be int64 {list(wanted)} for a mask of shape {tuple(shape)}, "
                f"got {words.dtype} {list(words.shape)}"
            )
        return mask

    def update_(self, mask: Tensor | SparseMask) -> SparseMask:
        """Take the bits of `mask`, of the same shape. Where they are the same, what was made of them stays good."""
        new = self._like(mask)
        if self.is_damaged() or not torch.equal(new.words, self.words):
            changing = None if self.on_change is None else self.on_change()
            if changing is not None and not self.is_damaged():
                changing(self)
            self.words.copy_(new.words)
            if self._check is not None:
                self._check.copy_(new.check)
            self._begin(self._check)
            if changing is not None:
                changing(self)
        return self

    def differing(self, mask: Tensor | SparseMask) -> Tensor:
        """How many entries are kept by one of the two only; int64 [].

        >>> int(SparseMask(torch.eye(3) > 0).differing(torch.ones(3, 3) > 0))
        6
        """
        differing: Tensor = torch.ops.blokern.count_words(self._like(mask).words ^ self.words)
        return differing

    def _like(self, mask: Tensor | SparseMask) -> SparseMask:
        new = as_mask(mask)
        if new.shape != self.shape:
            raise ValueError(f"mask must have shape {tuple(self.shape)}, got {tuple(new.shape)}")
        return new

    def _packed(self, mask: Tensor) -> Tensor:
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _own_level():
            words: Tensor = torch.ops.blokern.mask_words(mask.reshape(self.rows, self.cols))
        return words

    def _begin(self, check: Tensor | None = None) -> None:
        self._check = check
        self._trusted: int | None = None  # what the check was when the words fitted it
        self._seen: Hashable = None  # the content that the cache is of
        self._cache: dict[Hashable, Any] = {}

    @property
    def check(self) -> Tensor:
        """int64 [], a hash of `words`, to be kept with them."""
        if self._check is None:
            self._check = check_of(self.words)
        return self._check

    @property
    def version(self) -> int:
        """Grows with every change of the bits that torch counts: a state_dict that is loaded changes `words` too."""
        return 0 if self.words.is_inference() else self.words._version

    def _state(self) -> Hashable:
        """Another value whenever the bits have changed."""
        if self.words.is_cpu:
            return self.version, C.mask_fingerprint(
                self.words, _NO_CHECK if self._check is None else self._check
            )
        return self.version

    def valid(self) -> SparseMask:
        """The mask itself, with nothing kept of bits that it had. Raises ValueError if they are damaged."""
        state = self._state()
        if state != self._seen:
            self._renew(state)
        return self

    def _renew(self, state: Hashable) -> None:
        if self._check is not None and not self.words.is_meta:
            truth, stored = _hash(self.words), int(self._check)
            if stored not in (truth, self._trusted):
                raise ValueError(
                    f"mask of a weight {list(self.shape)}: its bits have been averaged, or overwritten in part, or "
                    "were never loaded. Average parameters alone (AveragedModel with use_buffers=False) or copy "
                    "buffers that are no floats as they are; give the layer its mask anew by mask.update_ or "
                    "load_state_dict"
                )
            if stored != truth:  # the words alone were written, by whoever knows no check
                self._check.data.fill_(truth)
                state = self._state()
            self._trusted = truth
        self._cache, self._seen = {}, state

    def is_damaged(self) -> bool:
        """Whether the bits do not fit their check."""
        try:
            self.valid()
        except ValueError:
            return True
        return False

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def cols(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def kept(self) -> int:
        """How many entries are kept."""
        return self.cached("kept", lambda: int(torch.ops.blokern.count_words(self.words)))

    @property
    def density(self) -> float:
        """The kept entries' share; 0 for an empty mask."""
        return self.kept / max(1, self.rows * self.cols)

    @property
    def device(self) -> torch.device:
        return self.words.device

    def to_dense(self) -> Tensor:
        """The mask as bool, in its shape."""
        if not (torch.compiler.is_compiling() or is_jit_traced()):
            self.valid()
        dense: Tensor = torch.ops.blokern.words_mask(self.words, self.cols)
        return dense.view(self.shape)

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when it was first asked for under this key, since the bits last changed."""
        cache = self.valid()._cache  # another thread may begin a new one
        if key not in cache:
            with _own_level():
                cache[key] = make()
        value: T = cache[key]
        return value

    def stream(self, *, transposed: bool = False) -> Stream:
        """The entries as the kernels walk them, of the matrix or of its transpose."""

        def make() -> Stream:
            words, cols = self.words, self.cols
            if transposed:
                words, cols = torch.ops.blokern.transpose_words(words, cols), self.rows
            if self.device.type == "meta" or (
                self.device.type == "cuda" and self.density > _CUDA_STREAM_DENSITY
            ):
                none = words.new_empty(0, dtype=torch.int32)
                return Stream(none, none, 0, words)
            block = block_of(cols, self.density if self.device.type == "cpu" else 0.0)
            start, column = torch.ops.blokern.mask_stream(words, cols, block)
            return Stream(start, column, block, words)

        return self.cached(("stream", transposed), make)

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "words": self.words, "check": self._check}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shape, self.words = state["shape"], state["words"]
        self._begin(state.get("check"))

    def __eq__(self, other: object) -> bool:
        """Whether the same entries are kept."""
        if not isinstance(other, SparseMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.words, other.words)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"SparseMask(shape={tuple(self.shape)}, density={self.density:.4g})"


def _plain(t: Tensor, name: str) -> Tensor:
    """A mask outside torch.func's transforms: it has no derivative, and is the same for all that is mapped."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            raise ValueError(
                f"{name} must be the same for all that torch.vmap maps, got one for each: map the weights alone"
            )
        t = torch._C._functorch.get_unwrapped(t)
    return t


@contextlib.contextmanager
def _own_level() -> Iterator[None]:
    """For tensors that outlive the call: they are no inference tensors, which have no version and serve no training,
    and no stand-ins of a torch.func transform, which die with it."""
    with torch.inference_mode(False), temporarily_clear_interpreter_stack():
        yield


def _check(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
    if mask.layout != torch.strided:
        raise TypeError(f"mask must be a dense tensor, got layout {mask.layout}")
    if mask.dim() < 2:
        raise ValueError(f"mask must have at least two dimensions, [out, ...], got shape {tuple(mask.shape)}")
    if mask.numel() >= 2**31:
        raise ValueError(f"mask must have fewer than 2^31 entries, got shape {tuple(mask.shape)}")


def is_jit_traced() -> bool:
    """Whether torch.jit.trace is at work.

    >>> is_jit_traced()
    False
    """
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return traced


def check_of(words: Tensor) -> Tensor:
    """The `check` of a mask's words, on their device.

    >>> check_of(torch.zeros(2, 1, dtype=torch.int64)).shape
    torch.Size([])
    """
    with torch.inference_mode(False):
        if words.is_meta:
            return torch.zeros((), dtype=torch.int64, device="meta")
        return torch.tensor(_hash(words), dtype=torch.int64, device=words.device)


def _hash(words: Tensor) -> int:
    value: int = torch.ops.blokern.mask_check(words.detach().cpu().contiguous())
    return value


def block_of(cols: int, density: float) -> int:
    """Columns a block, a multiple of 64, for a matrix of that density."""
    wanted = max(_SMALLEST_BLOCK, _ENTRIES_A_PART / max(density, 1e-9))
    return 64 * math.ceil(min(wanted, max(cols, 1)) / 64)


def as_mask(mask: Tensor | SparseMask) -> SparseMask:
    """The mask of an op's call; raises TypeError for anything else."""
    if isinstance(mask, SparseMask):
        return mask
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool Tensor or a SparseMask, got {type(mask).__name__}")
    return SparseMask(mask)


def check_mask(mask: SparseMask, like: Tensor, name: str) -> None:
    """Raises ValueError unless the mask has the shape of `like`, called `name`."""
    if mask.shape != like.shape:
        raise ValueError(f"mask must have the shape of {name}, {tuple(like.shape)}, got {tuple(mask.shape)}")


# ---- Fakes


def _fake_words(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], (mask.shape[1] + 63) // 64, dtype=torch.int64)


def _fake_mask(words: Tensor, cols: int) -> Tensor:
    return words.new_empty(words.shape[0], cols, dtype=torch.bool)


def _fake_transpose(words: Tensor, cols: int) -> Tensor:
    return words.new_empty(cols, (words.shape[0] + 63) // 64)


def _fake_stream(words: Tensor, cols: int, block: int) -> tuple[Tensor, Tensor]:
    parts = (cols + block - 1) // block * words.shape[0]
    kept = torch.library.get_ctx().new_dynamic_size()
    return words.new_empty(parts + 1, dtype=torch.int32), words.new_empty(kept, dtype=torch.int32)


torch.library.register_fake("blokern::mask_words", _fake_words)
torch.library.register_fake("blokern::words_mask", _fake_mask)
torch.library.register_fake("blokern::count_words", lambda words: words.new_empty(()))
torch.library.register_fake("blokern::transpose_words", _fake_transpose)
torch.library.register_fake("blokern::mask_stream", _fake_stream)
