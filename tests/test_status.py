"""What stands where on a model, and in which state."""

from __future__ import annotations

import copy

import pytest
from torch import nn

import veneer
from tiny import bert, llama
from veneer import LoraConfig, get_layer_status, get_model_status, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import StateError


def two() -> veneer.PeftModel:
    """A decoder with `default` on q and v, and `other` on q alone."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    return model


def test_layers() -> None:
    layers = get_layer_status(two())
    paths = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
    assert [layer.name for layer in layers] == paths
    q, v = layers[:2]
    assert q.module_type == v.module_type == "Linear"
    assert q.available_adapters == ["default", "other"]
    assert v.available_adapters == ["default"]
    assert q.active_adapters == v.active_adapters == ["default"]
    assert q.requires_grad == {"default": True, "other": False}
    assert v.requires_grad == {"default": True}
    assert q.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert (q.enabled, q.merged_adapters) == (True, [])


def test_layers_follow_what_is_done_to_the_model() -> None:
    model = two()
    model.set_adapter("other")
    q, v = get_layer_status(model)[:2]
    assert (q.active_adapters, v.active_adapters) == (["other"], [])
    assert q.requires_grad == {"default": False, "other": True}
    model.merge_adapter(["default", "other"])
    q, v = get_layer_status(model)[:2]
    assert (q.merged_adapters, v.merged_adapters) == (["default", "other"], ["default"])
    assert q.module_type == "Linear"
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not any(layer.enabled for layer in get_layer_status(model))
    assert all(layer.enabled for layer in get_layer_status(model))
    model.delete_adapter("other")
    assert all(layer.available_adapters == ["default"] for layer in get_layer_status(model))


def test_the_whole_model() -> None:
    model = two()
    status = get_model_status(model)
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.num_adapter_layers == 4
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.total_params == sum(p.numel() for p in llama().parameters()) + 6 * 8 * 64 - 2 * 8 * 16
    assert status.enabled
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    with model.disable_adapter():
        assert not get_model_status(model).enabled


def test_what_is_trained_in_part_is_irregular() -> None:
    model = two()
    _, adapter = next(iter(adapters_of(model, "default")))
    adapter.up.requires_grad_(False)
    first, second = get_layer_status(model)[:2]
    assert (first.requires_grad["default"], second.requires_grad["default"]) == ("irregular", True)
    assert get_model_status(model).requires_grad == {"default": "irregular", "other": False}
    adapter.down.requires_grad_(False)
    assert get_layer_status(model)[0].requires_grad["default"] is False
    assert get_model_status(model).requires_grad["default"] == "irregular"


def test_heads_and_other_methods() -> None:
    model = get_peft_model(bert(), "bitfit:task_type=SEQ_CLS,target_modules=[query]")
    status = {layer.name: layer for layer in get_layer_status(model)}
    assert set(status) == {"classifier", *(f"bert.encoder.layer.{i}.attention.self.query" for i in range(2))}
    assert status["classifier"].requires_grad == {"default": True}
    assert get_model_status(model).trainable_params == 2 * 32 + 32 * 3 + 3


def test_modules_trained_whole_are_listed_as_they_stand_in_the_model() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"]))
    names = [layer.name for layer in get_layer_status(model)]
    assert names == [*(f"model.layers.{i}.self_attn.q_proj" for i in range(2)), "model.norm", "lm_head"]


def test_models_without_a_wrapper_around_them() -> None:
    model = veneer.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama())
    status = get_model_status(model)
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.num_adapter_layers == 2
    assert status.requires_grad == {"default": True}
    assert get_model_status(copy.deepcopy(model)) == status


def test_adapters_without_memory_are_on_no_device() -> None:
    model = get_peft_model(llama(), "lora", low_cpu_mem_usage=True)
    assert get_model_status(model).devices == {"default": ["meta"]}


@pytest.mark.parametrize("ask", [get_layer_status, get_model_status])
def test_models_without_adapters(ask: object) -> None:
    for model in (nn.Sequential(nn.Linear(2, 2)), two().unload()):
        with pytest.raises(
            StateError, match=rf"This {type(model).__name__} has no adapters\. Call get_peft_model first"
        ):
            ask(model)  # type: ignore[operator]
