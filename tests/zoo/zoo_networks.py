"""Networks that others wrote, with random weights, each with a batch and a loss: timm, torchvision, transformers,
torch.nn.

Small ones of each family, or a family's own classes with small settings, so that all of them fit two cores. Dropout
is off or drawn from torch's seed. Sizes are the smallest that the family's strides allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import zoo_packages  # noqa: F401  # before timm and torchvision
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5


def _itself(output: Any) -> Tensor:
    logits: Tensor = output
    return logits


def _of_object(output: Any) -> Tensor:
    """Of transformers' models."""
    logits: Tensor = output.logits
    return logits


def _of_dict(output: Any) -> Tensor:
    """Of torchvision's segmentation networks."""
    logits: Tensor = output["out"]
    return logits


def softened(logits: Tensor, y: Tensor) -> Tensor:
    """For networks whose random weights are sure of a class: a softmax's derivatives then lose their digits."""
    return F.cross_entropy(logits / 8, y)


def per_token(logits: Tensor, y: Tensor) -> Tensor:
    """Of logits [N, L, words]."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@dataclass(frozen=True)
class Network:
    """A network of others: how it is made, and what it is given.

    inputs: "images" are floating-point and can be attacked, "tokens" cannot. logits: out of what the forward returns.
    loss: of logits and labels. tolerance: of products, relative; some norms compute in float32 whatever they are given.
    """

    name: str
    source: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    inputs: str = "images"
    convolutional: bool = False
    logits: Callable[[Any], Tensor] = _itself
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    tolerance: float = 1e-8

    def loss_fn(self, output: Any, y: Tensor) -> Tensor:
        return self.loss(self.logits(output), y)


def networks() -> list[Network]:
    found = [*_timm(), *_torchvision(), *_transformers(), *_torch()]
    names = [network.name for network in found]
    assert len(names) == len(set(names)), "a name twice"
    return found


# ---- Batches.


def images(size: int, channels: int = 3, samples: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(samples, channels, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(samples) % CLASSES


def pixels(size: int) -> tuple[Tensor, Tensor]:
    x, _ = images(size)
    return x, (torch.arange(2 * size * size) % CLASSES).view(2, size, size)


def tokens(length: int = 8, words: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, words, (2, length), generator=generator), torch.arange(2) % CLASSES


def next_tokens(length: int = 8, words: int = 40) -> tuple[Tensor, Tensor]:
    x, _ = tokens(length + 1, words)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


def sequences(length: int = 6, features: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, length, features, generator=generator, dtype=torch.float64), torch.arange(
        2
    ) % CLASSES


# ---- timm.

#: name: size of the images, settings other than the architecture's own. All of them are convolutional.
TIMM_CONVOLUTIONAL: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet10t": (64, {}),
    "resnet18d": (64, {}),
    "resnetv2_18": (64, {}),
    "resnest14d": (64, {}),
    "seresnet18": (64, {}),
    "skresnet18": (64, {}),
    "ecaresnet26t": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "efficientnet_lite0": (64, {}),
    "efficientnet_b0": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv2_050": (64, {}),
    "mobilenetv4_conv_small_050": (64, {}),
    "mnasnet_small": (64, {}),
    "fbnetc_100": (64, {}),
    "hardcorenas_a": (64, {}),
    "tinynet_e": (64, {}),
    "lcnet_050": (64, {}),
    "mixnet_s": (64, {}),
    "ghostnet_050": (64, {}),
    "rexnet_100": (64, {}),
    "densenet121": (64, {"block_config": (2, 2, 2, 2)}),
    "dla46_c": (64, {}),
    "hrnet_w18_small": (64, {}),
    "darknet17": (64, {}),
    "cs3darknet_s": (64, {}),
    "ese_vovnet19b_slim": (64, {}),
    "selecsls42": (128, {}),  # at 64 its last BatchNorm sees two values, and rounding decides a step
    "convnext_atto": (64, {}),
    "edgenext_xx_small": (64, {}),
    "mobileone_s0": (64, {}),
    "repvgg_a0": (64, {}),
    "nf_regnet_b0": (64, {}),
    "eca_nfnet_l0": (64, {}),
    "gernet_s": (64, {}),
    "dpn48b": (64, {}),
    "starnet_s1": (64, {}),
    "inception_next_atto": (64, {}),
    "vgg11_bn": (64, {"mlp_ratio": 0.0625}),
}
_VIT: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
_SWIN: dict[str, Any] = {
    "img_size": 64, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4
}  # fmt: skip
TIMM_OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (32, {**_VIT, "patch_size": 8}),
    "deit_tiny_distilled_patch16_224": (32, {**_VIT, "patch_size": 8}),
    "beit_base_patch16_224": (32, {**_VIT, "patch_size": 8}),
    "cait_xxs24_224": (32, {**_VIT, "patch_size": 8}),
    "swin_tiny_patch4_window7_224": (64, _SWIN),
    "mixer_s32_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "mobilevit_xxs": (64, {}),
    "levit_128s": (224, {}),
    "poolformer_s12": (64, {}),
}


def _timm() -> Iterator[Network]:
    for convolutional, table in ((True, TIMM_CONVOLUTIONAL), (False, TIMM_OTHERS)):
        for name, (size, options) in table.items():
            make = partial(_of_timm, name, options)
            kind: Any = {"convolutional": convolutional, "loss": softened}
            yield Network(f"timm/{name}", "timm", make, partial(images, size), **kind)


def _of_timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
    return model


# ---- torchvision.

#: name: batch, settings.
TORCHVISION: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "resnet18": (partial(images, 64), {}),
    "alexnet": (partial(images, 64), {}),
    "squeezenet1_1": (partial(images, 64), {}),
    "googlenet": (partial(images, 64), {"aux_logits": False, "init_weights": False}),
    "mobilenet_v3_small": (partial(images, 64), {}),
    "shufflenet_v2_x0_5": (partial(images, 64), {}),
    "mnasnet0_5": (partial(images, 64), {}),
    "lraspp_mobilenet_v3_large": (partial(pixels, 64), {"weights_backbone": None}),
    "deeplabv3_mobilenet_v3_large": (
        partial(pixels, 64),
        {"weights_backbone": None, "aux_loss": True},
    ),
}


def _torchvision() -> Iterator[Network]:
    for name, (batch, options) in TORCHVISION.items():
        make, logits = (
            partial(_of_torchvision, name, options),
            _of_dict if "_backbone" in str(options) else _itself,
        )
        yield Network(f"torchvision/{name}", "torchvision", make, batch, convolutional=True, logits=logits)
    yield Network("torchvision/VisionTransformer", "torchvision", _torchvision_vit, partial(images, 32))
    yield Network("torchvision/SwinTransformer", "torchvision", _torchvision_swin, partial(images, 32))


def _of_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return model


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)
    return model


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    model: nn.Module = SwinTransformer(
        [4, 4], 16, [1, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES
    )
    return model


# ---- transformers.

_TEXT: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 32, "max_position_embeddings": 16, "pad_token_id": 0},
}
_GPT: dict[str, Any] = {
    **{"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    **{"bos_token_id": 1, "eos_token_id": 1},
}
_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": CLASSES}
_IMAGE_TEXT = {
    key: _TEXT[key]
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
#: class: configuration, its settings, batch.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "BertForSequenceClassification": ("BertConfig", {**_TEXT, "num_labels": CLASSES}, tokens),
    "BertForMaskedLM": ("BertConfig", _TEXT, next_tokens),
    "RobertaForSequenceClassification": (
        "RobertaConfig",
        {**_TEXT, "num_labels": CLASSES, "max_position_embeddings": 20},
        tokens,
    ),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "num_labels": CLASSES},
        tokens,
    ),
    "GPT2LMHeadModel": ("GPT2Config", _GPT, next_tokens),
    "LlamaForCausalLM": ("LlamaConfig", {**_TEXT, "num_key_value_heads": 1}, next_tokens),
    "Qwen2ForCausalLM": ("Qwen2Config", {**_TEXT, "num_key_value_heads": 1}, next_tokens),
    "ViTForImageClassification": ("ViTConfig", {**_IMAGE, **_IMAGE_TEXT}, partial(images, 32)),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
         "num_labels": CLASSES},
        partial(images, 32),
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64, "num_labels": CLASSES},
        partial(images, 64),
    ),
}  # fmt: skip


def _transformers() -> Iterator[Network]:
    for name, (configuration, options, batch) in TRANSFORMERS.items():
        make = partial(_of_transformers, name, configuration, options)
        inputs = "tokens" if batch in (tokens, next_tokens) else "images"
        yield Network(
            *(f"transformers/{name}", "transformers", make, batch, inputs, "ConvNext" in name, _of_object),
            per_token if batch is next_tokens else F.cross_entropy,
            1e-6 if name in ("LlamaForCausalLM", "Qwen2ForCausalLM") else 1e-8,
        )


def _of_transformers(name: str, configuration: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    model: nn.Module = getattr(transformers, name)(getattr(transformers, configuration)(**options))
    return model


# ---- torch.nn, and torch's own examples.


class Pooled(nn.Module):
    """A sequence layer of torch.nn between two linear ones; dropout off."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(8, 16), layer, nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.embed(x))
        out = out[0] if isinstance(out, tuple) else out
        pooled: Tensor = self.head(out.mean(1))
        return pooled


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Seq2Seq(nn.Module):
    """torch.nn.Transformer, its decoder reading the same sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, CLASSES)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        at = self.embed(x)
        out: Tensor = self.head(self.transformer(at, at).mean(1))
        return out


class WordLanguageModel(nn.Module):
    """torch's example word_language_model: an LSTM whose decoder shares the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(40, 16), nn.LSTM(16, 16, 2, batch_first=True)
        self.decoder = nn.Linear(16, 40)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.rnn(self.encoder(x))[0])
        return out


def _torch() -> Iterator[Network]:
    encoder = partial(nn.TransformerEncoderLayer, 16, 2, 32, dropout=0.0, batch_first=True)
    layers: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "TransformerEncoder": (lambda: nn.TransformerEncoder(encoder(), 2), 16),
        "TransformerEncoder, norm first": (
            lambda: nn.TransformerEncoder(encoder(norm_first=True), 2, enable_nested_tensor=False),
            16,
        ),
        "MultiheadAttention": (SelfAttention, 16),
        "LSTM": (partial(nn.LSTM, 16, 12, 2, batch_first=True), 12),
        "GRU": (partial(nn.GRU, 16, 12, bidirectional=True, batch_first=True), 24),
    }
    for name, (layer, features) in layers.items():
        yield Network(f"torch/{name}", "torch", partial(_pooled, layer, features), sequences)
    yield Network("torch/Transformer", "torch", Seq2Seq, sequences)
    yield Network(
        "torch/word_language_model", "torch", WordLanguageModel, next_tokens, "tokens", loss=per_token
    )
    yield Network("segmentation_models_pytorch/Unet", "segmentation_models_pytorch", _unet, partial(pixels, 64),
                  convolutional=True)  # fmt: skip


def _pooled(layer: Callable[[], nn.Module], features: int) -> nn.Module:
    return Pooled(layer(), features)


def _unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    model: nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)
    return model
