"""What the contract says of every method, for methods that need a whole model: their state goes from block to block."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from parity.families import FAMILIES
from tiny import bert, llama, randomise, tokens
from veneer.adapted import BASE, adapters_of
from veneer.errors import StateError, TargetError, UnsupportedError
from veneer.method_strings import parse_method

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(attention_bias=True, mlp_bias=True).double(),
    "wide heads": lambda: llama(head_dim=16, num_hidden_layers=3).double(),
    "gpt2": lambda: FAMILIES["gpt2"].model(),
    "bert": lambda: bert().double(),
}
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ladder": ({"reduction": 4}, ("llama", "wide heads", "gpt2", "bert")),
    "shadow": ({"init_weights": False, "shadow_dropout": 0.0, "task_type": "CAUSAL_LM"}, ("llama", "gpt2")),
    "xlora": (
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 6, "xlora_dropout_p": 0.0},
        ("llama", "bert"),
    ),
    "mam": ({"num_virtual_tokens": 3, "bottleneck_size": 5}, ("llama", "gpt2", "bert")),
    "unipelt": ({"r": 3, "num_virtual_tokens": 3, "reduction": 8}, ("llama", "gpt2", "bert")),
}
CASES = [pytest.param(name, model, id=f"{name}-{model}") for name, (_, models) in METHODS.items() for model in models]
CAUSAL = [case for case in CASES if "bert" not in case.values]


@functools.cache
def _folders(model: str, where: Path) -> dict[str, str]:
    """Two trained LoRA adapters, for methods that weigh such."""
    for seed, name in enumerate("01"):
        lora = veneer.get_peft_model(MODELS[model](), {"name": "lora", "r": 2 + seed})
        randomise(lora, seed)
        lora.save_pretrained(where / model / name)
    return {name: str(where / model / name) for name in "01"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    where = tmp_path_factory.mktemp("experts")

    def make(name: str, model: str) -> Any:
        more = {"adapters": _folders(model, where)} if name == "xlora" else {}
        return parse_method({"name": name, **METHODS[name][0], **more})

    return make


def inputs() -> dict[str, Tensor]:
    """Three rows, one padded on the left."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def logits(model: nn.Module, **how: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(), **how).logits
    return found


def adapted(config: Any, model: str) -> veneer.PeftModel:
    made = veneer.get_peft_model(MODELS[model](), config)
    randomise(made, scale=0.3)
    return made.eval()


@pytest.mark.parametrize(("name", "model"), CASES)
def test_start_effect_and_disabling(name: str, model: str, config: Any) -> None:
    base = logits(MODELS[model]())
    settings = config(name, model)
    if name == "shadow":
        settings.init_weights = True
    fresh = veneer.get_peft_model(MODELS[model](), settings).eval()
    assert torch.allclose(logits(fresh), base, **TIGHT) == settings.method().starts_as_base
    made = adapted(config(name, model), model)
    assert not torch.allclose(logits(made), base, rtol=1e-3, atol=1e-4)
    with made.disable_adapter():
        assert torch.equal(logits(made), base)
    assert torch.equal(logits(made.unload()), base)


@pytest.mark.parametrize(("name", "model"), CASES)
def test_saved_loaded_copied_and_pickled_is_the_same(name: str, model: str, config: Any, tmp_path: Path) -> None:
    made = adapted(config(name, model), model)
    expected = logits(made)
    made.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(MODELS[model](), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(logits(twin), expected)
        randomise(twin, seed=5)
        assert not torch.equal(logits(twin), expected)
        assert torch.equal(logits(made), expected)


@pytest.mark.parametrize(("name", "model"), CASES)
def test_only_the_adapter_is_trained_and_a_second_one_is_independent(name: str, model: str, config: Any) -> None:
    made = adapted(config(name, model), model)
    expected = logits(made)
    made.add_adapter("second", config(name, model))
    assert torch.equal(logits(made), expected)
    made.set_adapter("second")
    randomise(made, seed=3)
    second = logits(made)
    assert not torch.allclose(second, expected, rtol=1e-3)
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    made.train()
    (made(**inputs()).logits ** 2).sum().backward()
    trained = {key for key, parameter in made.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    without = {key for key, p in made.named_parameters(remove_duplicate=False) if p.requires_grad and p.grad is None}
    torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1).step()
    changed = {key for key, tensor in made.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed <= trained
    assert all(".adapters.second." in key for key in trained)
    # Of keys' biases no softmax depends, and of the state behind the last block nothing does.
    assert all(key.endswith("key.bias") or ".update_" in key for key in trained - changed)
    assert without <= trained - changed
    made.set_adapter("default")
    assert torch.equal(logits(made.eval()), expected)
    made.delete_adapter("second")
    assert torch.equal(logits(made), expected)


@pytest.mark.parametrize(("name", "model"), CASES)
def test_a_mixed_batch_is_each_row_alone(name: str, model: str, config: Any) -> None:
    made = adapted(config(name, model), model)
    made.add_adapter("lora", {"name": "lora", "r": 3})
    made.set_adapter("lora")
    randomise(made, seed=2)
    alone = {"lora": logits(made)}
    made.set_adapter("default")
    alone["default"] = logits(made)
    with made.disable_adapter():
        alone[BASE] = logits(made)
    rows = ["default", "lora", BASE]
    mixed = logits(made, adapter_names=rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(mixed[i], alone[row][i], **TIGHT)


@pytest.mark.parametrize(("name", "model"), CAUSAL)
def test_cached_decoding_gives_the_same_logits(name: str, model: str, config: Any) -> None:
    made, x = adapted(config(name, model), model), inputs()
    whole, real = logits(made, use_cache=False), x["attention_mask"].bool()
    parts, cache = [], None
    for start, end in ((0, 4), (4, 5), (5, 7)):
        new = {"input_ids": x["input_ids"][:, start:end], "attention_mask": x["attention_mask"][:, :end]}
        with torch.no_grad():
            out = made(**new, past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache = out.past_key_values
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **TIGHT)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        cached = made.generate(**x, num_beams=beams, **how)
        assert torch.equal(cached, made.generate(**x, num_beams=beams, use_cache=False, **how))
    if name == "mam":  # keeps nothing in the cache
        return
    with torch.no_grad(), made.disable_adapter():
        cache = made(**x, use_cache=True).past_key_values
    with pytest.raises(StateError, match="was filled while another adapter was active"):
        made(input_ids=x["input_ids"][:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(UnsupportedError, match="has no place in it"):
        made.generate(**x, cache_implementation="static", **how)


@pytest.mark.parametrize(("name", "model"), CASES)
def test_it_lies_under_and_over_other_adapters(name: str, model: str, config: Any) -> None:
    made = adapted(config(name, model), model)
    expected = logits(made)
    made.add_adapter("lora", {"name": "lora", "r": 3})
    for order in (["default", "lora"], ["lora", "default"]):
        made.set_adapter(order)
        torch.testing.assert_close(logits(made), expected, **TIGHT)  # the new one changes nothing
        with pytest.raises(UnsupportedError, match=r"adapter 'default': .*cannot be merged"):
            made.merge_adapter()
        assert made.switch.merged == ()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "mam"])
def test_models_without_one_stack_of_blocks_are_refused(name: str, config: Any) -> None:
    for family, message in (("t5", "one stack of transformer blocks"), ("resnet", "one stack of transformer blocks")):
        model = FAMILIES[family].model()
        before = set(dict(model.named_modules()))
        with pytest.raises(TargetError, match=message):
            veneer.get_peft_model(model, config(name, "llama"))
        assert set(dict(model.named_modules())) == before


def test_a_ladder_builds_no_graph_through_the_model() -> None:
    made = adapted(parse_method("ladder:reduction=4"), "llama").train()
    seen: list[bool] = []
    for wrapper, _ in adapters_of(made.get_base_model(), "default"):
        for module in wrapper.frozen_layer.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    made(**inputs(), labels=tokens()).loss.backward()
    assert seen
    assert not any(seen)
