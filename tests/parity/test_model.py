"""What is done with an adapted model: merging, switching, disabling, mixed batches, generating, counting, injecting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from parity.families import FAMILIES, Family
from parity.oracle import (
    BIASES,
    CONV1D,
    RANK,
    SINGLE,
    TIGHT,
    load_there,
    output,
    peft_says,
    same_tensors,
    settings,
    take,
    tensors,
    twins,
)
from tiny import randomise

MERGING: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("llama", "gpt2", "bert", "t5", "resnet", "perceptron", "convolutions", "mixtral")),
    ("llama", {"lora_bias": True, "use_rslora": True}),
    ("gpt2", {"lora_bias": True}),
    ("convolutions", {"lora_bias": True, "target_modules": ["line", "plane"]}),
]


def pair(family: Family, **changes: Any) -> tuple[veneer.PeftModel, peft.PeftModel]:
    """Both models with adapters `default` and `other`, the second on more modules, of another rank, random too."""
    here, there = twins(family, settings(family, **changes))
    more = settings(family, r=2, lora_alpha=5, target_modules="all-linear", **changes)
    here.add_adapter("other", veneer.LoraConfig(**more))
    here.set_adapter("other")
    randomise(here, seed=5)
    here.set_adapter("default")
    there.add_adapter("other", peft.LoraConfig(**more))
    take(there, here, "other")
    same_tensors(tensors(here, "other"), tensors(there, "other"))
    return here.eval(), there.eval()


@pytest.mark.parametrize(("name", "changes"), MERGING)
def test_merged_weights(name: str, changes: dict[str, Any]) -> None:
    family = FAMILIES[name]
    with peft_says(CONV1D, BIASES):
        here, there = twins(family, settings(family, **changes))
    x = family.inputs()
    adapted = output(here, x)
    merged_here, merged_there = here.merge_and_unload(), there.merge_and_unload(safe_merge=True)
    same_tensors(dict(merged_here.state_dict()), dict(merged_there.state_dict()), **TIGHT)
    torch.testing.assert_close(output(merged_here, x), adapted, **TIGHT)
    assert type(merged_here) is type(merged_there)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_switching_disabling_merging_and_deleting(name: str) -> None:
    family = FAMILIES[name]
    here, there = pair(family)
    x = family.inputs()

    def same() -> torch.Tensor:
        torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
        return output(here, x)

    first = same()
    for model in (here, there):
        model.set_adapter("other")
    assert not torch.allclose(same(), first, rtol=1e-3)
    with here.disable_adapter(), there.disable_adapter():
        torch.testing.assert_close(same(), output(family.model(), x), **TIGHT)
    for model in (here, there):
        model.merge_adapter()
    same()
    with peft_says("Already unmerged"):  # of layers that the adapter is not on
        for model in (here, there):
            model.unmerge_adapter()
            model.set_adapter("default")
    torch.testing.assert_close(same(), first, **TIGHT)
    with peft_says("Adapter default was active which is now deleted"):
        for model in (here, there):
            model.delete_adapter("default")
    same()
    assert here.active_adapter == there.active_adapter == "other"
    same_tensors(tensors(here, "other"), tensors(there, "other"))


def test_several_active_adapters_add_up() -> None:
    here, there = pair(FAMILIES["llama"])
    here.set_adapter(["default", "other"])
    there.base_model.set_adapter(["default", "other"])
    x = FAMILIES["llama"].inputs()
    torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
    merged_here, merged_there = here.merge_and_unload(), there.merge_and_unload()
    same_tensors(dict(merged_here.state_dict()), dict(merged_there.state_dict()), **TIGHT)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "perceptron"])
def test_mixed_batch(name: str) -> None:
    family = FAMILIES[name]
    here, there = pair(family)
    x = family.inputs()
    names = ["other", "__base__", "default"]
    mixed = output(here, x, adapter_names=names)
    torch.testing.assert_close(mixed, output(there, x, adapter_names=names), **TIGHT)
    for row, adapter in enumerate(names):
        if adapter != "__base__":
            here.set_adapter(adapter)
            torch.testing.assert_close(mixed[row], output(here, x)[row], **TIGHT)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_mixed_generation(name: str, beams: int) -> None:
    family = FAMILIES[name]
    here, there = pair(family)
    prompt = {key: value for key, value in family.inputs().items() if key != "decoder_input_ids"}
    how = {"num_beams": beams, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    names = ["default", "__base__", "other"]
    generated = here.generate(**prompt, adapter_names=names, **how)
    assert generated.tolist() == there.generate(**prompt, adapter_names=names, **how).tolist()
    assert len({tuple(row) for row in generated[:, -5:].tolist()}) > 1
    assert here.generate(**prompt, **how).tolist() == there.generate(**prompt, **how).tolist()


@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("bert", {}), ("t5", {}), ("gpt2", {"lora_bias": True}), ("mixtral", {}), ("bart", {})],
)
def test_counts(name: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    family = FAMILIES[name]
    with peft_says(CONV1D, BIASES):
        here, there = twins(family, settings(family, **changes))
    said = []
    for model in (here, there):
        model.print_trainable_parameters()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert here.get_nb_trainable_parameters() == there.get_nb_trainable_parameters()


def test_status() -> None:
    here, there = pair(FAMILIES["llama"])
    ours, theirs = veneer.get_model_status(here), there.get_model_status()
    for name in ("num_adapter_layers", "trainable_params", "total_params", "enabled", "active_adapters"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("base_model_type", "merged_adapters", "available_adapters", "requires_grad", "devices"):
        assert getattr(ours, name) == getattr(theirs, name), name
    layers = {layer.name.removeprefix("model."): layer for layer in there.get_layer_status()}
    for layer in veneer.get_layer_status(here):
        other = layers[layer.name]
        assert layer.available_adapters == other.available_adapters
        assert (layer.requires_grad, layer.merged_adapters) == (other.requires_grad, other.merged_adapters)


@pytest.mark.parametrize("name", ["llama", "vit", "perceptron", "convolutions", "mixtral"])
def test_injected_without_a_peft_model(name: str) -> None:
    family = FAMILIES[name]
    values = settings(family)
    here = veneer.inject_adapter_in_model(veneer.LoraConfig(**values), family.model())
    there = peft.inject_adapter_in_model(peft.LoraConfig(**values), family.model())
    randomise(here)
    state = veneer.get_peft_model_state_dict(here)
    result = peft.set_peft_model_state_dict(there, state)
    assert not result.unexpected_keys
    same_tensors(state, peft.get_peft_model_state_dict(there))
    x = family.inputs()
    torch.testing.assert_close(output(here.eval(), x), output(there.eval(), x), **TIGHT)
    randomise(there, seed=3)
    veneer.set_peft_model_state_dict(here, peft.get_peft_model_state_dict(there))
    torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)


def test_state_dict_of_a_named_adapter() -> None:
    here, there = twins(FAMILIES["bert"], settings(FAMILIES["bert"]), name="mine")
    same_tensors(tensors(here, "mine"), tensors(there, "mine"))
    assert here.active_adapter == there.active_adapter == "mine"


def test_files_of_several_adapters_lie_where_peft_puts_them(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    here, there = pair(family)
    here.save_pretrained(tmp_path / "ours")
    there.save_pretrained(str(tmp_path / "theirs"))

    def listing(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".md"}

    assert listing(tmp_path / "ours") == listing(tmp_path / "theirs")
    again = load_there(family, tmp_path / "ours")
    again.load_adapter(str(tmp_path / "ours" / "other"), "other")
    fresh = veneer.PeftModel.from_pretrained(family.model(), tmp_path / "theirs" / "other", adapter_name="first")
    fresh.load_adapter(tmp_path / "theirs", "second")
    x = family.inputs()
    for name, ours, theirs in (("other", "first", "other"), ("default", "second", "default")):
        here.set_adapter(name)
        fresh.set_adapter(ours)
        again.set_adapter(theirs)
        torch.testing.assert_close(output(fresh, x), output(here, x), **TIGHT)
        torch.testing.assert_close(output(again, x), output(here, x), **TIGHT)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_half_precision_base(name: str, autocast: bool, tmp_path: Path) -> None:
    family, bf16 = FAMILIES[name], torch.bfloat16
    how = {"autocast_adapter_dtype": autocast}
    here = veneer.get_peft_model(family.model(bf16), veneer.LoraConfig(**settings(family)), **how).eval()
    with peft_says():
        there = peft.get_peft_model(family.model(bf16), peft.LoraConfig(**settings(family)), **how).eval()
    randomise(here)
    take(there, here)
    types = {key: tensor.dtype for key, tensor in tensors(here).items()}
    theirs = {key: tensor.dtype for key, tensor in tensors(there).items()}
    lora = [key for key in types if "lora_" in key]
    assert {types[key] for key in lora} == {theirs[key] for key in lora} == {torch.float32 if autocast else bf16}
    x = family.inputs(bf16)
    # Sums in 16 bits depend on their order; against the float32 model both are off by this much.
    torch.testing.assert_close(output(here, x), output(there, x), rtol=0.05, atol=0.05)
    here.save_pretrained(tmp_path)
    loaded = load_there(family, tmp_path, bf16, **how)
    same_tensors({key: tensors(loaded)[key] for key in lora}, {key: tensors(here)[key] for key in lora})


@pytest.mark.parametrize("name", ["llama", "mixtral", "vit"])
def test_single_precision(name: str) -> None:
    family = FAMILIES[name]
    here, there = twins(family, settings(family), torch.float32)
    x = family.inputs(torch.float32)
    if name == "mixtral":
        for model in (here, there):  # the fused kernel, which takes float32 only
            model.get_base_model().set_experts_implementation("grouped_mm")
    torch.testing.assert_close(output(here, x), output(there, x), **SINGLE)


def test_calls_that_are_not_named_and_modules_without_config() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    here = veneer.get_peft_model(model, veneer.LoraConfig(**RANK, target_modules=["0"], modules_to_save=["2"]))
    twin = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    twin.load_state_dict(here.unload().state_dict())
    here = veneer.get_peft_model(model, veneer.LoraConfig(**RANK, target_modules=["0"], modules_to_save=["2"]))
    there = peft.get_peft_model(twin, peft.LoraConfig(**RANK, target_modules=["0"], modules_to_save=["2"]))
    randomise(here)
    take(there, here)
    x = torch.randn(5, 4)
    torch.testing.assert_close(here(x), there(x), **SINGLE)
