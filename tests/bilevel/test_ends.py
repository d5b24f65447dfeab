"""Which layers are a network's outputs and inputs, of networks as others write them, last registered or not."""

import copy
import types
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blokern import models
from blokern.bilevel import OMP, BiP, BiPSettings, Hydra, HydraSettings, OMPSettings
from blokern.bilevel.ends import ends_of, find_ends
from blokern.bilevel.masking import prunable
from blokern.sparse import masks_of

IMAGES = torch.rand(2, 3, 16, 16)


class Segmentation(nn.Module):
    """As torchvision's FCN: heads registered before the body, the auxiliary one last; a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(True), nn.Conv2d(8, 5, 1))
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.aux_classifier = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 5, 1))

    def forward(self, x):
        h = self.backbone(x)
        big = F.interpolate(self.classifier(h), x.shape[-2:], mode="bilinear")
        return {"out": big, "aux": F.interpolate(self.aux_classifier(h.detach()), x.shape[-2:])}


class Detector(nn.Module):
    """Boxes and classes out of heads registered first; a list of dicts, sorted, of integers among others."""

    def __init__(self):
        super().__init__()
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)
        self.stem, self.neck = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        h = self.neck(F.relu(self.stem(x)))
        boxes, scores = self.boxes(h).flatten(2), self.classes(h).flatten(2).softmax(1).amax(1)
        order = scores.argsort(1)
        return [{"boxes": b[:, o], "labels": o} for b, o in zip(boxes, order, strict=True)]


class InPlace(nn.Module):
    """Outputs written into a buffer, by a layer's weight alone, under checkpoint; the input joins again at the end."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(11, 4, 1)
        self.other = nn.Conv2d(8, 3, 1)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        h = checkpoint(lambda x: self.b(F.relu_(self.a(x))).add_(1), x, use_reentrant=True)
        out = x.new_empty(len(x), 7, *x.shape[2:])
        out[:, :4] = self.fc(torch.cat([h, x], 1))
        out[:, 4:].copy_(F.conv2d(h, self.other.weight))
        return types.SimpleNamespace(logits=out)


class Tokens(nn.Module):
    """A language model whose mask is made of the tokens, and whose head reads the embedding."""

    def __init__(self, tied=False):
        super().__init__()
        self.head = nn.Linear(16, 20)
        self.embedding = nn.Embedding(20, 16)
        self.position = nn.Parameter(torch.randn(1, 12, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids, attention_mask=None):
        h = self.embedding(ids) + self.position[:, : ids.shape[1]]
        return self.head(self.encoder(h, src_key_padding_mask=ids == 0))


class Separable(nn.Module):
    """Depthwise layers at both ends, which keep channels apart; one layer twice."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 4, 3, groups=4)
        self.point, self.twice = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.first, self.widen = nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.last(self.point(self.twice(self.twice(self.widen(self.first(x))))))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(6, 3), nn.Linear(4, 6)

    def forward(self, x):
        h = self.body(x).relu()
        return Output(self.head(h), h.argmax(1))


@pytest.mark.parametrize(
    ("net", "x", "first", "last"),
    [
        (Segmentation, IMAGES, ["backbone.0"], ["aux_classifier.2", "classifier.2"]),
        (Detector, IMAGES, ["stem"], ["boxes", "classes"]),
        (InPlace, IMAGES, ["a", "fc"], ["fc", "other"]),
        (Separable, IMAGES, ["first", "widen"], ["last", "point"]),
        (Tokens, torch.randint(20, (2, 12)), [], ["head"]),
        (Tuple, torch.rand(2, 4), ["body"], ["body", "head"]),
    ],
)
@pytest.mark.parametrize("made_up", [False, True])
def test_ends_of_networks_that_others_write(net, x, first, last, made_up):
    torch.manual_seed(0)
    model = net()
    ends = ends_of(model, None if made_up else x)
    assert sorted(ends.first) == [f"{name}.weight" for name in first]
    assert sorted(ends.last) == [f"{name}.weight" for name in last]


def test_ends_are_those_that_gradients_show():
    """The oracle: an output layer's output reaches a logit when all other layers' outputs are cut off from theirs."""
    for name in ("small_cnn", "resnet18", "vgg16_bn", "preact_resnet18"):
        model = getattr(models, name)(num_classes=3, in_channels=3, width=2).eval()
        x = torch.rand(1, 3, 32, 32)
        layers = {n: model.get_submodule(n.removesuffix(".weight")) for n in prunable(model)}
        outputs = {}
        for key, layer in layers.items():

            def cut(module, args, output, key=key, outputs=outputs):
                outputs[key] = output.detach().requires_grad_()
                return outputs[key].clone()

            layer.register_forward_hook(cut)
        logits = model(x)
        grads = torch.autograd.grad(logits.sum(), [*outputs.values()], allow_unused=True)
        expected = {key for key, grad in zip(outputs, grads, strict=True) if grad is not None}
        clean = getattr(models, name)(num_classes=3, in_channels=3, width=2)
        assert find_ends(clean, x).last == expected
        assert find_ends(clean, x).first == {next(iter(layers))}


def test_whole_filters_of_all_heads_stay():
    torch.manual_seed(0)
    model = Segmentation()
    for batches in ([], [(IMAGES, torch.zeros(2, 16, 16, dtype=torch.int64))], iter([(IMAGES, None)])):
        masks = OMP(OMPSettings(density=0.5, granularity="filter")).masks(model, batches)
        densities = {name: mask.density for name, mask in masks.items()}
        assert densities.pop("classifier.2.weight") == densities.pop("aux_classifier.2.weight") == 1
        assert set(densities.values()) == {0.5}
    channels = OMP(OMPSettings(density=0.5, granularity="channel")).masks(model)
    densities = {name: mask.density for name, mask in channels.items()}
    assert densities.pop("backbone.0.weight") == 1
    assert set(densities.values()) == {0.5}


def test_bip_and_hydra_keep_the_outputs_too():
    torch.manual_seed(0)
    model = Segmentation()
    y = torch.randint(5, (2, 16, 16))
    words = {"density": 0.5, "granularity": "filter"}
    masks = Hydra(HydraSettings(score_epochs=2, **words)).masks(model, [(IMAGES, y)])
    rule = BiP(model, torch.optim.SGD(model.parameters(), 0.1), BiPSettings(**words), example=IMAGES)
    rule.step((IMAGES, y), (IMAGES, y))
    for found in (masks, masks_of(model)):
        whole = {name for name, mask in found.items() if mask.density == 1}
        assert whole == {"classifier.2.weight", "aux_classifier.2.weight"}


def test_a_layer_that_takes_no_part_stays_whole_and_is_told():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            h = self.body(x)
            return (self.head(h), self.aux(h)) if self.training else self.head(h)

    with pytest.warns(UserWarning, match=r"filter: 'aux\.weight'.* no part when the model runs in eval mode"):
        masks = OMP(OMPSettings(density=0.5, granularity="filter")).masks(Aux())
    assert [mask.density for mask in masks.values()] == [0.5, 1, 1]


def test_inputs_that_nobody_can_make_up_are_asked_for():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Bilinear(8, 2, 3)

        def forward(self, x, *, z):
            return self.b(self.a(x), z)

    words = OMPSettings(density=0.5, granularity="filter")
    with pytest.raises(ValueError, match=r"inputs that it takes are not known .*'z'.* give batches"):
        OMP(words).masks(Two())
    x = {"x": torch.rand(5, 4), "z": torch.rand(5, 2)}
    with pytest.warns(UserWarning, match=r"'b\.weight' must be .* got Bilinear"):
        masks = OMP(words).masks(Two(), [(x, torch.zeros(5))])
    assert masks["a.weight"].density == 0.5


def test_an_output_out_of_nowhere_is_refused():
    class Numpy(nn.Linear):
        def forward(self, x):
            return torch.from_numpy(super().forward(x).detach().numpy().copy())

    with pytest.raises(ValueError, match="output, Tensor, does not show which layers it comes from"):
        ends_of(nn.Sequential(nn.Linear(2, 2), Numpy(2, 2)), torch.rand(1, 2))


def test_one_layer_has_no_filters_to_prune():
    with pytest.raises(
        ValueError, match="filter needs a layer whose filters are not the model's own outputs"
    ):
        OMP(OMPSettings(density=0.5, granularity="filter")).masks(nn.Linear(4, 4))


def test_the_model_is_left_as_it_was():
    model = Segmentation().train()
    model.backbone[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    OMP(OMPSettings(density=0.5, granularity="filter")).masks(model)
    assert torch.equal(torch.rand(1), drawn)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
