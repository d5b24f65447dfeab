"""To and from torch.nn.utils.prune and sparse CSR."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from blokern.sparse import from_csr, from_torch_prune, masks_of, sparsify, to_csr, to_torch_prune


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 70),
        nn.Linear(70, 3, bias=False),
    )


def pruned():
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.3)  # a container of both
    prune.ln_structured(model[3], "weight", 0.4, n=2, dim=0)
    return model


def test_what_torch_has_pruned_becomes_masked_layers_and_goes_back():
    model, x = pruned(), torch.randn(5, 2, 4, 4)
    expected = model(x)
    masks = {f"{i}.weight": model[i].weight_mask.bool() for i in (0, 3)}
    parameters = {id(p) for p in model.parameters()}
    values = [model[i].weight_orig.detach().clone() for i in (0, 3)]

    assert from_torch_prune(model) is model
    assert not prune.is_pruned(model)
    assert {id(p) for p in model.parameters()} == parameters
    found = masks_of(model)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name].to_dense(), mask) for name, mask in masks.items())
    values = [value * masks[f"{i}.weight"] for i, value in zip((0, 3), values, strict=True)]
    assert all(torch.equal(model[i].weight, value) for i, value in zip((0, 3), values, strict=True))
    torch.testing.assert_close(model(x), expected)

    assert to_torch_prune(model) is model
    assert prune.is_pruned(model)
    assert masks_of(model) == {}
    assert {id(p) for p in model.parameters()} == parameters
    for i, value in zip((0, 3), values, strict=True):
        assert torch.equal(model[i].weight_mask.bool(), masks[f"{i}.weight"])
        assert torch.equal(model[i].weight_orig, value)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_layer_alone_and_a_model_without_pruning():
    layer = from_torch_prune(prune.l1_unstructured(nn.Linear(4, 3), "weight", 5))
    assert layer.mask.kept == 7
    assert to_torch_prune(layer).weight_mask.sum() == 7
    model = net()
    assert masks_of(from_torch_prune(model)) == masks_of(to_torch_prune(model)) == {}


def test_what_cannot_be_masked_is_named_and_nothing_changes():
    model = pruned()
    prune.l1_unstructured(model[3], "bias", 0.5)
    with pytest.raises(ValueError, match=r"'3\.bias' is pruned"):
        from_torch_prune(model)
    assert "weight_orig" in dict(model[0].named_parameters())
    model = nn.Sequential(prune.l1_unstructured(nn.Conv1d(2, 3, 3), "weight", 0.5))
    with pytest.raises(ValueError, match=r"'0\.weight' is pruned, and must be"):
        from_torch_prune(model)
    model = pruned()
    model[0].weight_mask[0, 0, 0, 0] = 0.5
    with pytest.raises(ValueError, match=r"mask of '0\.weight' must be of zeros and ones"):
        from_torch_prune(model)


@pytest.mark.parametrize("shape", [(3, 5), (70, 130), (6, 3, 3, 3), (0, 4), (4, 0)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_csr_and_back(shape, density, dtype):
    torch.manual_seed(0)
    weight, mask = torch.randn(shape, dtype=dtype), torch.rand(shape) < density
    if mask.any():
        weight[tuple(mask.nonzero()[0])] = 0.0  # kept, and zero
    csr = to_csr(weight, mask)
    assert csr.layout == torch.sparse_csr
    assert csr.values().numel() == mask.sum()
    assert torch.equal(csr.to_dense(), (weight * mask).reshape(csr.shape))
    back, kept = from_csr(csr, shape)
    assert torch.equal(back, weight * mask)
    assert torch.equal(kept.to_dense(), mask)


def test_csr_of_a_view_multiplies_as_torch_does():
    torch.manual_seed(0)
    weight, x = torch.randn(9, 6).t(), torch.randn(9, 2)
    csr = to_csr(weight, weight > 0)
    torch.testing.assert_close(csr @ x, weight.clamp(min=0) @ x)
    model = sparsify(nn.Sequential(nn.Linear(9, 6, bias=False)), {"0.weight": from_csr(csr)[1]})
    model[0].weight.data.copy_(from_csr(csr)[0])
    torch.testing.assert_close(model(x.t()).t(), csr @ x)


def test_wrong_csr_is_named():
    csr = torch.eye(3).to_sparse_csr()
    with pytest.raises(TypeError, match="csr must be a sparse CSR tensor"):
        from_csr(torch.eye(3))
    with pytest.raises(TypeError, match=r"got torch\.sparse_coo"):
        from_csr(torch.eye(3).to_sparse_coo())
    for shape in ((9, 1), (3, 4), ()):
        with pytest.raises(ValueError, match="shape must have the rows and the size of csr"):
            from_csr(csr, shape)
    twice = torch.sparse_csr_tensor([0, 2], [1, 1], [1.0, 2.0], size=(1, 3), check_invariants=False)
    with pytest.raises(ValueError, match="each entry once, got 2 for 1 places"):
        from_csr(twice)
    with pytest.raises(ValueError, match="mask must have the shape of weight"):
        to_csr(torch.eye(3), torch.ones(2, 3).bool())
