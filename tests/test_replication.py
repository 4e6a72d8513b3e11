"""`layer_replication`: a deeper model on the same weights, that can be taken back."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import nn

import veneer
from parity.families import gpt2
from tiny import bert, llama, randomise, tokens
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import ConfigError, TargetError, UnsupportedError

RANGES = [[0, 2], [1, 3], [0, 1]]  # layers 0 1 1 2 0
X = {"input_ids": tokens()}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def base() -> nn.Module:
    return llama(num_hidden_layers=3).double()


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
        "layer_replication": RANGES, **changes,
    }  # fmt: skip


def deeper(model: nn.Module | None = None, **changes: Any) -> PeftModel:
    adapted = get_peft_model(base() if model is None else model, LoraConfig(**settings(**changes)))
    randomise(adapted)
    return adapted.eval()


def by_hand(model: nn.Module) -> nn.Module:
    """The deeper model without adapters, from copies."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(copy.deepcopy(layers[index]) for index in (0, 1, 1, 2, 0))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = 5
    return model


def test_layers_run_in_the_new_order_with_the_same_weights() -> None:
    model = deeper()
    layers = model.get_base_model().model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3, 4]
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert layers[0].mlp.up_proj.weight is layers[4].mlp.up_proj.weight
    assert model.get_nb_trainable_parameters()[0] == 5 * 3 * ((32 + 32) + (32 + 16))
    with model.disable_adapter():
        assert torch.equal(model(**X).logits, by_hand(base())(**X).logits)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**X, **how), model.generate(**X, use_cache=False, **how))


def test_outputs_and_files_are_those_of_peft(tmp_path: Path) -> None:
    model = deeper()
    model.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))
        torch.testing.assert_close(there(**X).logits, model(**X).logits, **EXACT)
        new = peft.get_peft_model(base(), peft.LoraConfig(**settings())).eval()
        randomise(new)
        new.save_pretrained(str(tmp_path / "theirs"))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(**X).logits, new(**X).logits, **EXACT)
    again = PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert torch.equal(again(**X).logits, model(**X).logits)


@pytest.mark.parametrize("make", [lambda: bert(num_hidden_layers=3), gpt2], ids=["bert", "gpt2"])
def test_other_families(make: Any) -> None:
    model = make().eval()
    before, count = model(**X).logits, model.config.num_hidden_layers
    targets = ["query", "value"] if isinstance(model, T.BertForSequenceClassification) else ["c_attn"]
    adapted = deeper(model, layer_replication=[(0, 2), (0, 1)], target_modules=targets, task_type=None)
    assert model.config.num_hidden_layers == 3
    assert not torch.allclose(adapted(**X).logits, before)
    back = adapted.unload()
    assert torch.equal(back(**X).logits, before)
    assert back.config.num_hidden_layers == count


def test_unloading_gives_the_model_back() -> None:
    model = base()
    before, layers = {key: tensor.clone() for key, tensor in model.state_dict().items()}, list(model.model.layers)
    expected = model(**X).logits
    back = deeper(model).unload()
    assert back is model
    assert [*model.model.layers] == layers
    assert type(model.model.layers) is nn.ModuleList
    assert model.config.num_hidden_layers == 3
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(**X).logits, expected)


def test_lists_of_the_configuration_follow() -> None:
    config = T.Qwen2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50, layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4,
        use_sliding_window=True,
    )  # fmt: skip
    model = deeper(T.Qwen2ForCausalLM(config))
    full, sliding = "full_attention", "sliding_attention"
    assert model.config.layer_types == [full, sliding, sliding, full, full]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**X, **how), model.generate(**X, use_cache=False, **how))
    assert model.unload().config.layer_types == [full, sliding, full]


def test_a_merged_model_stands_alone(tmp_path: Path) -> None:
    model = deeper()
    expected = model(**X).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**X).logits, expected, **EXACT)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**X).logits, expected, **EXACT)
    merged.save_pretrained(tmp_path)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(**X).logits, expected, **EXACT)


def test_only_adapters_train_and_copies_are_independent() -> None:
    model = deeper().train()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    old = model(**X).logits.detach()
    model(**X, labels=X["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimiser.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.requires_grad)
    for twin in twins:
        assert torch.equal(twin(**X).logits, old)
        assert len(twin.unload().model.layers) == 3
    assert len(model.get_base_model().model.layers) == 5


def test_layers_that_are_left_out_follow_to_another_type() -> None:
    model = deeper(base().float(), layer_replication=[[0, 1]])
    model.double()
    back = model.unload()
    assert {p.dtype for p in back.parameters()} == {torch.float64}
    torch.testing.assert_close(back(**X).logits, base().float().double()(**X).logits)


def test_adapters_beside_each_other() -> None:
    model = deeper()
    expected = model(**X).logits
    model.add_adapter("second", LoraConfig(**settings(r=2)))
    assert torch.equal(model(**X).logits, expected)
    with pytest.raises(ConfigError, match=r"layer_replication=None, but .* lie on layers replicated as \[\[0, 2\]"):
        model.add_adapter("third", LoraConfig(**settings(layer_replication=None)))
    plain = get_peft_model(base(), LoraConfig(**settings(layer_replication=None)))
    with pytest.raises(ConfigError, match="lie on its own layers"):
        plain.add_adapter("deeper", LoraConfig(**settings()))
    assert list(plain.peft_config) == ["default"]


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = base()
    with pytest.raises(TargetError, match="nothing_of_this_name"):
        get_peft_model(model, LoraConfig(**settings(target_modules=["nothing_of_this_name"])))
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    veneer.inject_adapter_in_model(LoraConfig(**settings()), model)
    assert len(model.model.layers) == 5


@pytest.mark.parametrize("given", [[[0, 1], [2]], [[1, 1]], [[-1, 2]], [[0, "1"]], 3, [0, 1]])
def test_settings_that_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"layer_replication=.*; a list of \[start, end\] was expected"):
        LoraConfig(layer_replication=given)


def test_models_that_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer_replication=\[\[0, 4\]\], but the model has 3 layers"):
        deeper(layer_replication=[[0, 4]])
    with pytest.raises(TargetError, match="one list of layers was expected in Sequential, found none"):
        deeper(nn.Sequential(nn.Linear(3, 3)), target_modules=["0"])
    model = base()
    model.model.layers[0].mlp._hf_hook = object()
    with pytest.raises(UnsupportedError, match="placed by accelerate"):
        deeper(model)
