"""Tiny random models of every family that parity is checked on, each with a batch of input."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

import tiny

ROWS = 3

NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bart": {"dropout": 0.0},
}


@dataclass(frozen=True)
class Family:
    """A model and what is adapted in it.

    Args:
        name: For test ids.
        make: Builds the model, the same at every call.
        batch: Input of three rows, without labels.
        targets: `target_modules`, with suffixes of two and more kinds of layers where the model has them.
        settings: Further settings that the model needs.
        labels: What it is trained on; none where it is not.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    targets: Any
    settings: dict[str, Any] = field(default_factory=dict)
    labels: Callable[[], Tensor] | None = None

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model, with biases and norms that are not what they start as."""
        return copy.deepcopy(_build(self.make)).to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.batch().items()}


@functools.cache
def _build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


class Perceptron(nn.Module):
    """Two layers and a lookup, one of them without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.lin0 = nn.Linear(6, 10)
        self.lin1 = nn.Linear(10, 10, bias=False)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.lin0(self.table(x)).mean(1))
        return self.head(self.norm(hidden + self.lin1(hidden)))


class Convolutions(nn.Module):
    """Convolutions over one, two and three axes, with stride and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(2, 1))
        self.space = nn.Conv3d(2, 3, 2, bias=False)
        self.head = nn.Linear(12, 4)

    def forward(self, line: Tensor, plane: Tensor, space: Tensor) -> Tensor:
        parts = [self.line(line).mean(-1), self.plane(plane).mean((-1, -2)), self.space(space).mean((-1, -2, -3))]
        return self.head(torch.tanh(torch.cat(parts, dim=1)))


def gpt2() -> T.GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return T.GPT2LMHeadModel(T.GPT2Config(**sizes, **special, **NO_DROPOUT["gpt2"]))


def t5() -> T.T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    special = {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    return T.T5ForConditionalGeneration(T.T5Config(**sizes, **special, **NO_DROPOUT["t5"]))


def bart() -> T.BartForConditionalGeneration:
    sizes = {"d_model": 32, "vocab_size": 50, "max_position_embeddings": 64, "scale_embedding": True}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    return T.BartForConditionalGeneration(T.BartConfig(**sizes, **NO_DROPOUT["bart"], forced_eos_token_id=None))


def whisper() -> T.WhisperForConditionalGeneration:
    sizes = {"d_model": 32, "vocab_size": 50, "num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 16}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    special = {"decoder_start_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return T.WhisperForConditionalGeneration(T.WhisperConfig(**sizes, **special, suppress_tokens=None))


def vit() -> T.ViTForImageClassification:
    sizes = {k: v for k, v in tiny.SIZES.items() if k != "vocab_size"}
    return T.ViTForImageClassification(T.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4))


def resnet() -> T.ResNetForImageClassification:
    return T.ResNetForImageClassification(
        T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    )


def convnext() -> T.ConvNextForImageClassification:
    return T.ConvNextForImageClassification(
        T.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=4)
    )


def text() -> dict[str, Tensor]:
    """Three rows of different length, padded on the left."""
    ids, mask = tiny.tokens(ROWS), torch.ones(ROWS, 7, dtype=torch.long)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _pairs() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": tiny.tokens(ROWS, 5, seed=1)}


def _noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def _image() -> dict[str, Tensor]:
    return {"pixel_values": _noise(3, 16, 16)}


def _classes() -> Tensor:
    return torch.tensor([0, 2, 1])


def _llama() -> nn.Module:
    return tiny.llama(attention_bias=True, mlp_bias=True)


def _mixtral() -> nn.Module:
    model = tiny.mixtral()
    model.set_experts_implementation("eager")  # the fast one has no float64
    return model


def _bert() -> nn.Module:
    return tiny.bert(**NO_DROPOUT["bert"])


_HEAD = {"task_type": "SEQ_CLS"}

FAMILIES = {
    family.name: family
    for family in [
        Family("llama", _llama, text, ["q_proj", "v_proj", "down_proj"], {"task_type": "CAUSAL_LM"}, tiny.tokens),
        Family("gpt2", gpt2, text, ["c_attn", "mlp.c_proj"], {"task_type": "CAUSAL_LM"}, tiny.tokens),
        Family("bert", _bert, text, ["query", "value", "output.dense"], _HEAD, _classes),
        Family(
            "t5",
            t5,
            _pairs,
            ["q", "v", "wo"],
            {"task_type": "SEQ_2_SEQ_LM"},
            lambda: tiny.tokens(ROWS, 5, seed=3),
        ),
        Family(
            "bart",
            bart,
            _pairs,
            ["q_proj", "v_proj", "fc2"],
            {"task_type": "SEQ_2_SEQ_LM"},
            lambda: tiny.tokens(ROWS, 5, seed=3),
        ),
        Family(
            "whisper",
            whisper,
            lambda: {"input_features": _noise(6, 16), "decoder_input_ids": tiny.tokens(ROWS, 5, seed=1)},
            ["q_proj", "v_proj", "fc1"],
        ),
        Family("vit", vit, _image, ["q_proj", "v_proj", "projection"], {"modules_to_save": ["classifier"]}, _classes),
        Family("resnet", resnet, _image, ["convolution"], {"modules_to_save": ["classifier"]}, _classes),
        Family("convnext", convnext, _image, ["pwconv1", "patch_embeddings"], {"modules_to_save": ["classifier"]}),
        Family(
            "perceptron",
            Perceptron,
            lambda: {"x": torch.arange(ROWS * 4).view(ROWS, 4) % 11},
            ["table", "lin0", "lin1"],
            {"modules_to_save": ["head"]},
        ),
        Family(
            "convolutions",
            Convolutions,
            lambda: {"line": _noise(3, 9), "plane": _noise(2, 7, 6), "space": _noise(2, 4, 4, 4)},
            ["line", "plane", "space"],
            {"modules_to_save": ["head"]},
        ),
        Family(
            "mixtral",
            _mixtral,
            text,
            ["q_proj", "v_proj"],
            {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "task_type": "CAUSAL_LM"},
            tiny.tokens,
        ),
    ]
}
