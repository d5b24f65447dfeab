"""SparseMask: its bits, the streams made from them, copies and changes."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blokern.ops import SparseMask

SHAPES = [(1, 1), (3, 64), (5, 65), (64, 63), (70, 200), (2, 1), (0, 4), (4, 0), (6, 5, 3, 3)]


def masks(shape: tuple[int, ...], density: float = 0.3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


def from_stream(mask: SparseMask, transposed: bool) -> Tensor:
    """The dense matrix that a stream describes; fails where its order is not the promised one."""
    rows, cols = (mask.cols, mask.rows) if transposed else (mask.rows, mask.cols)
    start, column, block, _ = mask.stream(transposed=transposed)
    dense = torch.zeros(rows, cols, dtype=torch.bool)
    ends = start.tolist()
    for part, (first, last) in enumerate(itertools.pairwise(ends)):
        columns = column[first:last]
        assert columns.equal(columns.sort().values)
        assert ((columns // block) == part // rows).all()
        assert not dense[part % rows, columns.long()].any()
        dense[part % rows, columns.long()] = True
    return dense


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_bits_and_streams_are_the_mask(shape: tuple[int, ...], density: float) -> None:
    dense = masks(shape, density)
    mask = SparseMask(dense)
    assert mask.to_dense().equal(dense)
    assert mask.kept == int(dense.sum())
    matrix = dense.reshape(mask.rows, mask.cols)
    assert from_stream(mask, transposed=False).equal(matrix)
    assert from_stream(mask, transposed=True).equal(matrix.t())


@given(st.integers(1, 140), st.integers(1, 140), st.integers(0, 2**31))
def test_any_matrix_comes_back(rows: int, cols: int, seed: int) -> None:
    dense = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = SparseMask(dense)
    assert mask.to_dense().equal(dense)
    assert from_stream(mask, transposed=True).equal(dense.t())


def test_bits_beyond_the_last_column_are_zero() -> None:
    assert SparseMask(torch.ones(2, 65, dtype=torch.bool)).words.tolist() == [[-1, 1], [-1, 1]]


def test_any_strides() -> None:
    dense = masks((8, 6, 3, 3)).to(memory_format=torch.channels_last)
    assert SparseMask(dense).to_dense().equal(dense)
    assert SparseMask(masks((9, 130)).t()[::2]).to_dense().equal(masks((9, 130)).t()[::2])


def test_a_change_is_seen_and_counted() -> None:
    mask = SparseMask(masks((5, 70)))
    mask.stream(), mask.stream(transposed=True)
    changed = ~masks((5, 70))
    before = mask.version
    assert mask.update_(changed) is mask
    assert mask.version > before
    assert mask.kept == int(changed.sum())
    assert from_stream(mask, transposed=False).equal(changed)
    assert from_stream(mask, transposed=True).equal(changed.t())


def test_a_change_while_something_is_made_for_it() -> None:
    """As by another thread: what was asked for is given, and not kept."""
    mask = SparseMask(torch.eye(3) > 0)

    def make() -> int:
        mask.update_(torch.ones(3, 3) > 0)
        return mask.kept

    assert mask.cached("made", make) == 9
    assert mask.cached("made", lambda: 0) == 0


def test_words_are_shared_and_checked() -> None:
    mask = SparseMask(masks((5, 70)))
    twin = SparseMask.of_words(mask.words, mask.shape)
    assert twin == mask
    twin.stream()
    mask.update_(~masks((5, 70)))
    assert from_stream(twin, transposed=False).equal(~masks((5, 70)))
    with pytest.raises(
        ValueError, match=r"words must be int64 \[5, 3\] for a mask of shape \(5, 140\), got torch"
    ):
        SparseMask.of_words(mask.words, torch.Size((5, 140)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: object) -> None:
    mask = SparseMask(masks((5, 70)))
    mask.stream()
    twin = copied(mask)  # type: ignore[operator]
    assert twin == mask
    twin.update_(~masks((5, 70)))
    assert twin != mask
    assert mask.to_dense().equal(masks((5, 70)))
    assert from_stream(twin, transposed=False).equal(~masks((5, 70)))


def test_equality_is_of_bits_and_shape() -> None:
    dense = masks((4, 6))
    assert SparseMask(dense) == SparseMask(dense.clone())
    assert SparseMask(dense) != SparseMask(dense.view(4, 2, 3))
    assert SparseMask(dense) != dense.tolist()
    assert repr(SparseMask(torch.ones(2, 2, dtype=torch.bool))) == "SparseMask(shape=(2, 2), density=1)"


def test_wrong_masks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.float32"):
        SparseMask(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"at least two dimensions.*\(3,\)"):
        SparseMask(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"fewer than 2\^31 entries"):
        SparseMask(torch.ones(1, 1, dtype=torch.bool).expand(2**16, 2**15))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 2\), got \(2, 3\)"):
        SparseMask(torch.ones(2, 2, dtype=torch.bool)).update_(torch.ones(2, 3, dtype=torch.bool))
