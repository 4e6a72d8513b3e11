"""Trainable tokens against their definition and peft, alone and beside LoRA, on tied embeddings too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import nn

import tiny
import veneer
from parity.families import FAMILIES
from parity.oracle import TIGHT, output, peft_says, same_tensors, tensors, trained
from parity.test_training import train
from tiny import llama, randomise, tokens
from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, TargetError, VeneerWarning
from veneer.methods.trainable_tokens import TrainableTokensConfig

SETTINGS = [{"token_indices": [1, 4]}, {"token_indices": [5, 0, 2], "init_weights": False}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"token_indices": [3, 7, 20], "target_modules": None}),
    ("gpt2", {"token_indices": [4, 3], "target_modules": ["wte"]}),
    ("bert", {"token_indices": [20, 7, 3], "target_modules": ["word_embeddings"], "task_type": None}),
]
TIED = replace(FAMILIES["llama"], make=lambda: tiny.llama(attention_bias=True, tie_word_embeddings=True))
ROWS = [3, 7, 20]
SAYS = (
    "Model has `tie_word_embeddings=True`",
    "You have requested `ensure_weight_tying`",
    "Unexpected keyword arguments",
)


def test_rows_stand_in_for_those_of_the_tokens() -> None:
    table = nn.Embedding(4, 2)
    model = get_peft_model(nn.Sequential(table), TrainableTokensConfig(token_indices=[3, 1], target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    assert torch.equal(adapter.held.rows, table.weight[[3, 1]])
    with torch.no_grad():
        adapter.held.rows.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    y = model(torch.arange(4))
    assert torch.equal(y[[3, 1]], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(y[[0, 2]], table.weight[[0, 2]])
    assert model.get_nb_trainable_parameters()[0] == 2 * 2


def test_outputs_of_a_linear_layer_merge_with_its_bias() -> None:
    """In peft the layer loses its bias while it is adapted, so its merged model is another one."""
    layer = nn.Linear(3, 4)
    model = get_peft_model(nn.Sequential(layer), TrainableTokensConfig(token_indices=[2], target_modules=["0"]))
    randomise(model)
    x = torch.randn(5, 3)
    by_hand = layer.weight.detach().clone()
    by_hand[2] = next(adapter for _, adapter in adapters_of(model, "default")).held.rows.detach()
    torch.testing.assert_close(model(x), x @ by_hand.t() + layer.bias)
    torch.testing.assert_close(model.merge_and_unload()(x), x @ by_hand.t() + layer.bias)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "token_indices is empty"),
        ({"token_indices": [1, 50]}, r"\[50\] are not in a layer of 50 tokens"),
        ({"token_indices": [1, -1]}, r"\[-1\] are not in"),
        ({"token_indices": [1, 2, 1]}, "names a token twice"),
    ],
)
def test_tokens_that_cannot_be_trained(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        get_peft_model(llama(), TrainableTokensConfig(**changes))


# Tied output layers


def both(config: Any, family: Any = TIED) -> tuple[veneer.PeftModel, Any]:
    """Ours and peft's, with the same tensors."""
    cls = {LoraConfig: peft.LoraConfig, TrainableTokensConfig: peft.TrainableTokensConfig}[type(config)]
    own = {k: v for k, v in vars(config).items() if k in cls.__dataclass_fields__ and k != "runtime_config"}
    with peft_says(*SAYS):
        here, there = get_peft_model(family.model(), config), peft.get_peft_model(family.model(), cls(**own))
        randomise(here)
        given = tensors(here)
        result = peft.set_peft_model_state_dict(there, given)
    assert not result.unexpected_keys
    assert given.keys() == tensors(there).keys()
    return here.eval(), there.eval()


TYING = [
    TrainableTokensConfig(token_indices=ROWS),
    LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS),
    LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS, ensure_weight_tying=True),
    LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS}),
    LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ROWS, "lm_head": [2]}),
]


@pytest.mark.parametrize("config", TYING)
def test_tied_layers_are_as_in_peft(config: Any, tmp_path: Path) -> None:
    here, there = both(config)
    x = TIED.inputs()
    assert here.get_nb_trainable_parameters()[0] == there.get_nb_trainable_parameters()[0]
    assert trained(here) == trained(there)
    torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
    for name, model in (("theirs", there), ("ours", here)):
        with peft_says(*SAYS):
            model.save_pretrained(str(tmp_path / name))
        loaded = veneer.PeftModel.from_pretrained(TIED.model(), tmp_path / name, is_trainable=True)
        assert torch.equal(output(loaded, x), output(here, x))
        assert loaded.get_nb_trainable_parameters() == here.get_nb_trainable_parameters()
    with peft_says(*SAYS):
        loaded_there = peft.PeftModel.from_pretrained(TIED.model(), str(tmp_path / "ours"))
    torch.testing.assert_close(output(loaded_there, x), output(here, x), **TIGHT)
    assert train(here, TIED) == pytest.approx(train(there, TIED), rel=1e-7)
    same_tensors(tensors(here), tensors(there), rtol=1e-6, atol=1e-8)


def test_a_merged_tied_model_stays_tied() -> None:
    model = get_peft_model(TIED.model(), TYING[1])
    randomise(model)
    expected, merged = output(model, TIED.inputs()), model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(output(merged, TIED.inputs()), expected, **TIGHT)


def test_an_output_layer_alone_leaves_the_embedding_and_says_so() -> None:
    with pytest.warns(VeneerWarning, match=r"lm_head shares its weight with model\.embed_tokens"):
        model = get_peft_model(TIED.model(), TrainableTokensConfig(token_indices=[2], target_modules=["lm_head"]))
    assert [wrapper.path for wrapper, _ in adapters_of(model, "default")] == ["lm_head"]


def test_tied_layers_with_other_tokens_cannot_be_kept_tied() -> None:
    config = LoraConfig(
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [1], "lm_head": [2]},
        ensure_weight_tying=True,
    )
    with pytest.raises(ConfigError, match=r"the tokens \[1\] and \[2\]"):
        get_peft_model(TIED.model(), config)


# Beside LoRA


@pytest.mark.parametrize(
    "indices", [ROWS, {"embed_tokens": ROWS}, {"lm_head": [2]}, {"embed_tokens": ROWS, "lm_head": [2]}]
)
def test_beside_lora_as_in_peft(indices: Any) -> None:
    family = FAMILIES["llama"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=indices)
    here, there = both(config, family)
    torch.testing.assert_close(output(here, family.inputs()), output(there, family.inputs()), **TIGHT)
    assert train(here, family) == pytest.approx(train(there, family), rel=1e-7)
    same_tensors(tensors(here), tensors(there), rtol=1e-6, atol=1e-8)


def test_one_place_cannot_have_both() -> None:
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], trainable_token_indices=[1])
    with pytest.raises(TargetError, match=r"model\.embed_tokens is adapted by LoraConfig and by TokensBesideConfig"):
        get_peft_model(llama(), config)


def test_scaled_embeddings() -> None:
    sizes = {**tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    base = T.Gemma3ForCausalLM(T.Gemma3TextConfig(**sizes)).eval()
    model = get_peft_model(base, TrainableTokensConfig(token_indices=[3, 7]))
    randomise(model)
    expected = model(tokens()).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, expected)
