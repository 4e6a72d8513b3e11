"""Where attention and feed-forward parts end, in every family of models by exact paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from veneer.errors import TargetError
from veneer.structure import PLACES, attention_inputs, blocks, is_linear, output_width, place
from veneer.targets import input_embedding, walk

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}
GROUPED = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 60,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
WHISPER = {**BART, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 2, "vocab_size": 50}


def each(template: str, count: int = 2) -> list[str]:
    """The path in every layer."""
    return [template.format(i) for i in range(count)]


def decoder(attention: str, feed_forward: str, layers: str = "model.layers.{}") -> tuple[list[str], list[str]]:
    return each(f"{layers}.{attention}"), each(f"{layers}.{feed_forward}")


def encoder_decoder() -> tuple[list[str], list[str]]:
    """BART's layout with one encoder layer and two of the decoder."""
    attention = ["model.encoder.layers.0.self_attn.out_proj"]
    for i in range(2):
        attention += [f"model.decoder.layers.{i}.{name}_attn.out_proj" for name in ("self", "encoder")]
    return attention, ["model.encoder.layers.0.fc2", *each("model.decoder.layers.{}.fc2")]


# Maker of the model; its attention outputs, cross-attention included; its feed-forward outputs.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[list[str], list[str]]]] = {
    "Bert": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT)),
        decoder("attention.output.dense", "output.dense", "bert.encoder.layer.{}"),
    ),
    "Roberta": (
        lambda: T.RobertaModel(T.RobertaConfig(**TEXT)),
        decoder("attention.output.dense", "output.dense", "encoder.layer.{}"),
    ),
    "DebertaV2": (
        lambda: T.DebertaV2Model(T.DebertaV2Config(**TEXT)),
        decoder("attention.output.dense", "output.dense", "encoder.layer.{}"),
    ),
    "Electra": (
        lambda: T.ElectraModel(T.ElectraConfig(embedding_size=8, **TEXT)),
        decoder("attention.output.dense", "output.dense", "encoder.layer.{}"),
    ),
    "Albert": (  # one block, shared by all layers
        lambda: T.AlbertModel(T.AlbertConfig(embedding_size=8, **TEXT)),
        (
            ["encoder.albert_layer_groups.0.albert_layers.0.attention.dense"],
            ["encoder.albert_layer_groups.0.albert_layers.0.ffn_output"],
        ),
    ),
    "DistilBert": (
        lambda: T.DistilBertModel(T.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24)),
        decoder("attention.out_lin", "ffn.lin2", "transformer.layer.{}"),
    ),
    "ModernBert": (
        lambda: T.ModernBertModel(T.ModernBertConfig(**TEXT, pad_token_id=0, cls_token_id=1, sep_token_id=2)),
        decoder("attn.Wo", "mlp.Wo", "layers.{}"),
    ),
    "Llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), decoder("self_attn.o_proj", "mlp.down_proj")),
    "Gemma": (
        lambda: T.GemmaForCausalLM(T.GemmaConfig(**GROUPED, head_dim=4)),
        decoder("self_attn.o_proj", "mlp.down_proj"),
    ),
    "Gemma3": (
        lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**GROUPED, head_dim=12)),
        decoder("self_attn.o_proj", "mlp.down_proj"),
    ),
    "Qwen3": (
        lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=4)),
        decoder("self_attn.o_proj", "mlp.down_proj"),
    ),
    "Phi": (lambda: T.PhiForCausalLM(T.PhiConfig(**TEXT)), decoder("self_attn.dense", "mlp.fc2")),
    "Phi3": (  # its fused input projection stands after the output projection
        lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED)),
        decoder("self_attn.o_proj", "mlp.down_proj"),
    ),
    "GPT2": (
        lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)),
        decoder("attn.c_proj", "mlp.c_proj", "transformer.h.{}"),
    ),
    "GPTNeoX": (
        lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**TEXT)),
        decoder("attention.dense", "mlp.dense_4h_to_h", "gpt_neox.layers.{}"),
    ),
    "OPT": (
        lambda: T.OPTForCausalLM(
            T.OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24)
        ),
        decoder("self_attn.out_proj", "fc2", "model.decoder.layers.{}"),
    ),
    "Falcon": (
        lambda: T.FalconModel(
            T.FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        ),
        decoder("self_attention.dense", "mlp.dense_4h_to_h", "h.{}"),
    ),
    "ViT": (
        lambda: T.ViTModel(T.ViTConfig(**VISION, intermediate_size=24)),
        decoder("attention.o_proj", "mlp.fc2", "layers.{}"),
    ),
    "Dinov2": (
        lambda: T.Dinov2Model(T.Dinov2Config(**VISION)),
        decoder("attention.o_proj", "mlp.fc2", "encoder.layer.{}"),
    ),
    "T5": (
        lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
        (
            [
                "encoder.block.0.layer.0.SelfAttention.o",
                "decoder.block.0.layer.0.SelfAttention.o",
                "decoder.block.0.layer.1.EncDecAttention.o",
                "decoder.block.1.layer.0.SelfAttention.o",
                "decoder.block.1.layer.1.EncDecAttention.o",
            ],
            ["encoder.block.0.layer.1.DenseReluDense.wo", *each("decoder.block.{}.layer.2.DenseReluDense.wo")],
        ),
    ),
    "Bart": (lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)), encoder_decoder()),
    "Whisper": (lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER)), encoder_decoder()),
    "torch's encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 2, enable_nested_tensor=False),
        decoder("self_attn.out_proj", "linear2", "layers.{}"),
    ),
}


def tree(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    with torch.device("meta"):  # nothing here looks at values
        return dict(walk(make()))


@pytest.mark.parametrize("family", FAMILIES)
def test_places(family: str) -> None:
    make, (attention, feed_forward) = FAMILIES[family]
    modules = tree(make)
    assert place("attention-output", modules) == attention
    assert place("ffn-output", modules) == feed_forward
    assert all(is_linear(modules[path]) for path in (*attention, *feed_forward))
    assert {modules[path].weight.shape[1 if "Conv1D" in type(modules[path]).__name__ else 0] for path in attention} == {
        16
    }


# First projection of the feed-forward part, and what embeds, by family.
BEGINNINGS: dict[str, tuple[str, str | None]] = {
    "Bert": ("bert.encoder.layer.{}.intermediate.dense", "bert.embeddings"),
    "Roberta": ("encoder.layer.{}.intermediate.dense", "embeddings"),
    "DebertaV2": ("encoder.layer.{}.intermediate.dense", "embeddings"),
    "Electra": ("encoder.layer.{}.intermediate.dense", "embeddings"),
    "Albert": ("encoder.albert_layer_groups.0.albert_layers.0.ffn", "embeddings"),
    "DistilBert": ("transformer.layer.{}.ffn.lin1", "embeddings"),
    "ModernBert": ("layers.{}.mlp.Wi", "embeddings"),
    "Llama": ("model.layers.{}.mlp.gate_proj", "model.embed_tokens"),
    "Gemma": ("model.layers.{}.mlp.gate_proj", "model.embed_tokens"),
    "Gemma3": ("model.layers.{}.mlp.gate_proj", "model.embed_tokens"),
    "Qwen3": ("model.layers.{}.mlp.gate_proj", "model.embed_tokens"),
    "Phi": ("model.layers.{}.mlp.fc1", "model.embed_tokens"),
    "Phi3": ("model.layers.{}.mlp.gate_up_proj", "model.embed_tokens"),
    "GPT2": ("transformer.h.{}.mlp.c_fc", "transformer.wte"),
    "GPTNeoX": ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "gpt_neox.embed_in"),
    "OPT": ("model.decoder.layers.{}.fc1", "model.decoder.embed_tokens"),
    "Falcon": ("h.{}.mlp.dense_h_to_4h", "word_embeddings"),
    "ViT": ("layers.{}.mlp.fc1", "embeddings"),
    "Dinov2": ("encoder.layer.{}.mlp.fc1", "embeddings"),
    "T5": ("block.{}.layer.{}.DenseReluDense.wi", "shared"),
    "Bart": ("layers.{}.fc1", "model.shared"),
    "Whisper": ("layers.{}.fc1", "model.decoder.embed_tokens"),
    "torch's encoder": ("layers.{}.linear1", None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_beginnings_blocks_and_embeddings(family: str) -> None:
    with torch.device("meta"):
        root = FAMILIES[family][0]()
    modules = dict(walk(root))
    (attention, feed_forward), (first, embeds) = FAMILIES[family][1], BEGINNINGS[family]
    inputs, found = place("ffn-input", modules), place("block-output", modules)
    first = re.sub(r"\d+", "{}", first)
    assert {re.sub(r"\d+", "{}", path)[-len(first) :] for path in inputs} == {first}
    # One of each for every block, in it; cross-attention left out.
    assert found == blocks(modules)
    own = place("self-attention-output", modules)
    assert [p for p in attention if "encoder_attn" not in p and "EncDec" not in p] == own
    for paths in (inputs, feed_forward, own):
        assert all(path.startswith(f"{block}.") for path, block in zip(paths, found, strict=True))
    assert {output_width(modules[block]) for block in found} == {16}
    tokens = input_embedding(root, modules)
    if embeds is None:
        with pytest.raises(TargetError, match=r"'embedding-output' was not found .*no embedding of input tokens"):
            place("embedding-output", modules, tokens)
    else:
        assert place("embedding-output", modules, tokens) == [embeds]
        width = getattr(getattr(root, "config", None), "embedding_size", 16)
        assert output_width(modules[embeds]) == width


def test_experts_have_attention_places_only() -> None:
    modules = tree(lambda: T.MixtralForCausalLM(T.MixtralConfig(**GROUPED, num_local_experts=2)))
    assert place("attention-output", modules) == each("model.layers.{}.self_attn.o_proj")
    with pytest.raises(TargetError, match=r"'ffn-output' was not found .*saw none of widths \[\], attention of \[16\]"):
        place("ffn-output", modules)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: T.ResNetModel(T.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        lambda: nn.Sequential(),
        lambda: T.MambaModel(T.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50)),
    ],
    ids=["ResNet", "MLP", "nothing", "Mamba"],
)  # fmt: skip
def test_models_without_such_places(make: Callable[[], nn.Module], name: str) -> None:
    with pytest.raises(
        TargetError, match=rf"The place '{name}' was not found .*Name the modules in `target_modules`\."
    ):
        place(name, tree(make))


def test_a_width_that_changes_from_block_to_block_is_refused() -> None:
    swin = T.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    with pytest.raises(TargetError, match=r"saw \['encoder\.layers\.0.*of widths \[8, 16\]"):
        place("ffn-output", tree(lambda: T.SwinModel(swin)))


def test_blocks_are_the_innermost_that_hold_both_parts() -> None:
    assert blocks(tree(lambda: T.T5Model(T.T5Config(**T5)))) == ["encoder.block.0", *each("decoder.block.{}")]
    albert = tree(lambda: T.AlbertModel(T.AlbertConfig(embedding_size=8, **TEXT)))
    assert blocks(albert) == ["encoder.albert_layer_groups.0.albert_layers.0"]
    assert blocks(tree(lambda: nn.Sequential(nn.Linear(2, 2)))) == []


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("Llama", ["q_proj", "v_proj"]),
        ("Bert", ["query", "value"]),
        ("DebertaV2", ["query_proj", "value_proj"]),
        ("DistilBert", ["q_lin", "v_lin"]),
        ("T5", ["q", "v"]),
        ("GPT2", ["c_attn"]),
        ("GPTNeoX", ["query_key_value"]),
        ("Phi3", ["qkv_proj"]),
        ("ModernBert", ["Wqkv"]),
        ("torch's encoder", None),
    ],
)
def test_query_and_value_projections(family: str, expected: list[str] | None) -> None:
    assert attention_inputs(tree(FAMILIES[family][0])) == expected


@pytest.mark.parametrize(
    ("family", "keys", "values"),
    [
        ("Llama", each("model.layers.{}.self_attn.k_proj"), each("model.layers.{}.self_attn.v_proj")),
        ("Bert", each("bert.encoder.layer.{}.attention.self.key"), each("bert.encoder.layer.{}.attention.self.value")),
        ("GPT2", each("transformer.h.{}.attn.c_attn"), each("transformer.h.{}.attn.c_attn")),
        ("DistilBert", each("transformer.layer.{}.attention.k_lin"), each("transformer.layer.{}.attention.v_lin")),
    ],
)
def test_key_and_value_projections(family: str, keys: list[str], values: list[str]) -> None:
    modules = tree(FAMILIES[family][0])
    assert place("attention-keys", modules) == keys
    assert place("attention-values", modules) == values
