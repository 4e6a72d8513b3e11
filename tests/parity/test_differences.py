"""The places where Veneer does otherwise than peft on purpose; docs/differences.md lists them."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import tiny
import veneer
from parity.families import FAMILIES, Family, text, whisper
from parity.oracle import (
    CONV1D,
    RANK,
    TIGHT,
    load_there,
    ours,
    output,
    peft_says,
    settings,
    take,
    tensors,
    theirs,
    twins,
)
from tiny import randomise
from veneer.errors import CheckpointError, ConfigError, StateError, TargetError, UnsupportedError, VeneerWarning


def conv(layer: nn.Module) -> Family:
    """A model of one convolution and a head."""
    image = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    make = copy.deepcopy(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)))
    make(image)
    return Family("conv", lambda: copy.deepcopy(make), lambda: {"input": image}, ["0"])


# Convolutions


def test_grouped_convolutions_have_another_layout(tmp_path: Path) -> None:
    """One group's filters see that group's channels only, so that the adapter is a change of the weight."""
    family = conv(nn.Conv2d(4, 8, 3, groups=2))
    values, x = settings(family, r=2), family.inputs()
    here = ours(family, values)
    adapted = output(here, x)
    with peft_says("LoRA adapter added to ConvNd layer with groups > 1"):
        there = theirs(family, values)
    key = "base_model.model.0.lora_{}.weight"
    assert (tensors(here)[key.format("A")].shape, tensors(there)[key.format("A")].shape) == ((2, 2, 3, 3), (2, 4, 3, 3))
    assert (tensors(here)[key.format("B")].shape, tensors(there)[key.format("B")].shape) == ((8, 2, 1, 1), (8, 1, 1, 1))
    torch.testing.assert_close(output(here.merge_and_unload(), x), adapted, **TIGHT)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        there.merge_and_unload()
    there = None
    with peft_says("LoRA adapter added to ConvNd layer with groups > 1"):
        there = theirs(family, values)
        there.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"0\.lora_A\.weight has shape \(2, 4, 3, 3\), expected \(2, 2, 3, 3\)"):
        veneer.PeftModel.from_pretrained(family.model(), tmp_path)
    with pytest.raises(ValueError, match="rank is divisible by groups"), peft_says("LoRA adapter added to ConvNd"):
        theirs(family, settings(family))  # rank 3
    ours(family, settings(family))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_hold_for_the_adapter_too(mode: str) -> None:
    """peft pads the adapter's part with zeros, so that its forward differs from its own merge."""
    family = conv(nn.Conv2d(4, 5, 3, padding=1, padding_mode=mode))
    here, there = twins(family, settings(family))
    x = family.inputs()
    right = output(there.merge_and_unload(), x)
    torch.testing.assert_close(output(here, x), right, **TIGHT)
    wrong = theirs(family, settings(family))
    take(wrong, here)
    assert not torch.allclose(output(wrong, x), right, rtol=1e-2)


def test_dilated_convolutions_work() -> None:
    family = conv(nn.Conv2d(4, 5, 3, dilation=2))
    here, there = twins(family, settings(family))
    with pytest.raises(RuntimeError, match="size of tensor"):
        output(there, family.inputs())
    torch.testing.assert_close(
        output(here, family.inputs()), output(there.merge_and_unload(), family.inputs()), **TIGHT
    )


def test_attributes_of_an_adapted_layer_can_be_read() -> None:
    """Whisper reads the stride of its convolutions."""
    family = Family("whisper", whisper, FAMILIES["whisper"].batch, ["conv1", "conv2"])
    here, there = twins(family, settings(family))
    with pytest.raises(AttributeError, match="stride"):
        output(there, family.inputs())
    torch.testing.assert_close(output(here, x := family.inputs()), output(here.merge_and_unload(), x), **TIGHT)


# Merging


def test_unmerging_is_exact_in_sixteen_bits() -> None:
    family, bf16 = FAMILIES["llama"], torch.bfloat16
    here, there = twins(family, settings(family), bf16)
    before = family.model(bf16).state_dict()["model.layers.0.mlp.down_proj.weight"]
    for model in (here, there):
        for _ in range(3):
            model.merge_adapter()
            model.unmerge_adapter()
    unmerged = [m.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight for m in (here, there)]
    assert torch.equal(unmerged[0], before)
    assert not torch.equal(unmerged[1], before)


def test_merged_adapters_are_not_unmerged_behind_ones_back() -> None:
    here = ours(FAMILIES["llama"], settings(FAMILIES["llama"]))
    here.merge_adapter()
    with pytest.raises(StateError, match=r"Cannot switch adapters while \['default'\] are merged"):
        here.set_adapter("default")
    with pytest.raises(StateError, match="merged"):
        here.merge_adapter()
    with here.disable_adapter():  # and yet the base model is one context away
        base = output(here, FAMILIES["llama"].inputs())
    torch.testing.assert_close(base, output(FAMILIES["llama"].model(), FAMILIES["llama"].inputs()), rtol=0, atol=0)
    with here.disable_adapter():
        assert here.switch.merged == ("default",)


def test_a_safe_merge_that_fails_leaves_nothing_merged() -> None:
    family, key = FAMILIES["llama"], "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    here, there = twins(family, settings(family))
    broken = {**tensors(here), key: tensors(here)[key].fill_(torch.inf)}
    veneer.set_peft_model_state_dict(here, broken)
    peft.set_peft_model_state_dict(there, broken)
    for model in (here, there):
        with pytest.raises((StateError, ValueError), match=r"NaN"):
            model.merge_adapter(safe_merge=True)
    assert here.switch.merged == ()
    assert there.get_base_model().model.layers[0].mlp.down_proj.merged


def test_a_bias_on_a_layer_without_one_cannot_be_merged_where_it_has_no_place() -> None:
    """Linear layers have one: they come out of a merge with a bias, where peft raises."""
    family = Family("llama", tiny.llama, text, ["q_proj"])
    values, x = settings(family, lora_bias=True), family.inputs()
    here = ours(family, values)
    adapted = output(here, x)
    torch.testing.assert_close(output(here.merge_and_unload(), x), adapted, **TIGHT)
    with peft_says("`lora_bias=True` was passed but the targeted layer"):
        there = theirs(family, values)
    with pytest.raises(RuntimeError, match="bias"):
        there.merge_and_unload()


# Adapters


def test_unloading_gives_the_base_model_back_with_its_own_head() -> None:
    family = FAMILIES["bert"]
    here, there = twins(family, settings(family))
    x, base = family.inputs(), family.model()
    torch.testing.assert_close(output(here.unload(), x), output(base, x), rtol=0, atol=0)
    assert not torch.allclose(output(there.unload(), x), output(base, x), rtol=1e-2)  # keeps the trained head


def test_several_active_adapters_through_the_model() -> None:
    here, there = twins(FAMILIES["llama"], settings(FAMILIES["llama"]))
    for model, config in ((here, veneer.LoraConfig), (there, peft.LoraConfig)):
        model.add_adapter("other", config(**settings(FAMILIES["llama"])))
    here.set_adapter(["default", "other"])
    assert here.active_adapters == ["default", "other"]
    with pytest.raises(TypeError, match="unhashable"):
        there.set_adapter(["default", "other"])


def test_mixed_batches_reach_bare_parameters() -> None:
    """peft cannot; here rows of one adapter run together."""
    family = FAMILIES["mixtral"]
    here, there = twins(family, settings(family, target_modules=[]))
    names = ["default", "__base__", "default"]
    with pytest.raises(ValueError, match="does not support mixed"):
        output(there, family.inputs(), adapter_names=names)
    x = family.inputs()
    with pytest.raises(UnsupportedError, match="cannot be split by adapter"):
        output(here, x, adapter_names=names)  # experts take several tensors, so this is refused here too
    torch.testing.assert_close(output(here, x, adapter_names=["default"] * 3), output(here, x), **TIGHT)


def test_names_of_adapters() -> None:
    """A dot would split the key of a tensor, and `keys` is a method of the container of adapters."""
    for name in ("my.adapter", "", "_mine", "keys"):
        with pytest.raises(ConfigError, match="cannot name an adapter"):
            veneer.get_peft_model(tiny.llama(), "lora", name)


# Targets and settings


def test_one_of_several_targets_that_matches_nothing_is_said() -> None:
    family = FAMILIES["llama"]
    with pytest.warns(VeneerWarning, match=r"\['q_porj'\] match no module\. Did you mean 'q_proj'"):
        ours(family, settings(family, target_modules=["q_porj", "v_proj"]))
    theirs(family, settings(family, target_modules=["q_porj", "v_proj"]))  # says nothing
    with pytest.raises(TargetError, match="matches no module"):
        ours(family, settings(family, modules_to_save=["no_such"]))
    theirs(family, settings(family, modules_to_save=["no_such"]))


def test_no_layers_are_no_layers() -> None:
    """An empty list chooses none, which is an error; in peft it chooses all."""
    family = FAMILIES["llama"]
    with pytest.raises(TargetError, match=r"layers_to_transform=\[\]"):
        ours(family, settings(family, layers_to_transform=[]))
    assert set(tensors(theirs(family, settings(family, layers_to_transform=[])))) == set(
        tensors(ours(family, settings(family)))
    )


def test_unexpected_tensors_are_errors() -> None:
    family = FAMILIES["llama"]
    here, there = twins(family, settings(family))
    more = {**tensors(here), "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(3, 32)}
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.0\.mlp\.up_proj\.lora_A"):
        veneer.set_peft_model_state_dict(here, more)
    assert peft.set_peft_model_state_dict(there, more).unexpected_keys
    less = dict(list(more.items())[:-2])
    with pytest.raises(CheckpointError, match="missing"):
        veneer.set_peft_model_state_dict(here, less)
    peft.set_peft_model_state_dict(there, less)  # what is missing keeps its values


def test_heads_inside_attention_are_refused() -> None:
    """torch's attention reads their weight without calling them; peft changes it for the time of the call."""
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(TargetError, match=r"MultiheadAttention.*target_parameters=\['self_attn\.out_proj\.weight'\]"):
        veneer.get_peft_model(model, veneer.LoraConfig(**RANK, target_modules=["out_proj"]))
    with pytest.raises(TargetError, match="self_attn is a MultiheadAttention"):
        veneer.get_peft_model(model, veneer.LoraConfig(**RANK, target_modules=["self_attn"]))


def test_attention_of_torch_is_adapted_through_its_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).double().eval(), torch.randn(3, 5, 8).double()
    expected = copy.deepcopy(base)
    config = veneer.LoraConfig(**RANK, target_parameters=["self_attn.in_proj_weight", "out_proj.weight"])
    here = veneer.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(here)
    state = tensors(here)
    for key, weight in (("", expected.self_attn.in_proj_weight), ("out_proj.", expected.self_attn.out_proj.weight)):
        down, up = (state[f"base_model.model.self_attn.{key}lora_{letter}.weight"] for letter in "AB")
        weight.data += 7 / 3 * up @ down
    torch.testing.assert_close(here(x), expected(x), **TIGHT)
    here.save_pretrained(tmp_path)
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(base, tmp_path)(x), expected(x), **TIGHT)
    torch.testing.assert_close(here.merge_and_unload()(x), expected(x), **TIGHT)
    alone = nn.MultiheadAttention(8, 2)
    with pytest.raises(TargetError, match="Put the attention into a module"):
        veneer.get_peft_model(alone, veneer.LoraConfig(target_parameters=["out_proj.weight"]))


# Arguments


def test_arguments_that_place_tensors_have_no_use_and_others_are_checked(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    here = ours(family, settings(family))
    here.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(
        family.model(), tmp_path, torch_device="cpu", device_map="auto", offload_folder="x", local_files_only=True
    )
    loaded.load_adapter(tmp_path, "second", torch_device="cpu", ephemeral_gpu_offload=False)
    torch.testing.assert_close(output(loaded, x := family.inputs()), output(here, x), **TIGHT)
    with pytest.raises(TypeError, match="without an argument 'ignore_mismatched_sizes'"):
        veneer.PeftModel.from_pretrained(family.model(), tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(TypeError, match=r"without an argument 'subfolders'\. Did you mean 'subfolder'"):
        loaded.load_adapter(tmp_path, "third", subfolders="x")


@pytest.mark.parametrize(
    "argument",
    [
        {"safe_serialization": False},
        {"save_embedding_layers": True},
        {"path_initial_model_for_weight_conversion": "start"},
    ],
)
def test_saving_does_not_take_what_it_would_not_do(argument: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(argument))):
        ours(FAMILIES["llama"], settings(FAMILIES["llama"])).save_pretrained(tmp_path / "out", **argument)
    assert not (tmp_path / "out").exists()


def test_the_base_models_own_push_is_not_called() -> None:
    with pytest.raises(UnsupportedError, match="upload_folder"):
        ours(FAMILIES["llama"], settings(FAMILIES["llama"])).push_to_hub("me/adapter")


# In memory


def test_factors_are_named_by_role_in_memory_and_as_in_peft_in_files() -> None:
    here = ours(FAMILIES["llama"], settings(FAMILIES["llama"]))
    names = [name for name, parameter in here.named_parameters() if parameter.requires_grad]
    assert all(".adapters.default." in name and "lora_" not in name for name in names)
    assert {name.rpartition(".")[2] for name in names} == {"down", "up"}
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in tensors(here))


def test_the_caller_keeps_its_configuration() -> None:
    """peft writes targets and heads into it; then a second model gets what the first one resolved."""
    for library in (veneer, peft):
        config = library.LoraConfig(task_type="SEQ_CLS")
        with peft_says(CONV1D):
            library.get_peft_model(tiny.bert(), config)
        assert (config.target_modules is None and config.modules_to_save is None) == (library is veneer)


def test_a_start_that_peft_does_not_have_with_a_bias(tmp_path: Path) -> None:
    """A file says how its adapter started, and peft refuses this pair even where only the tensors count."""
    family = FAMILIES["llama"]
    ours(family, settings(family, lora_bias=True, init_lora_weights="gaussian")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lora_bias=True is only supported with init_lora_weights=True or False"):
        load_there(family, tmp_path)


def test_modules_trained_whole_are_kept_in_float32() -> None:
    """As adapters are, in both libraries; peft keeps these in the type of the base model."""
    family, key = FAMILIES["bert"], "base_model.model.classifier.weight"
    here, there = (make(family, settings(family), torch.bfloat16) for make in (ours, theirs))
    assert (tensors(here)[key].dtype, tensors(there)[key].dtype) == (torch.float32, torch.bfloat16)


def test_bare_parameters_come_without_default_modules() -> None:
    family = FAMILIES["llama"]
    values = settings(family, target_modules=None, target_parameters=["down_proj.weight"])
    here, there = ours(family, values), theirs(family, values)
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in tensors(here)} == {"down_proj"}
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in tensors(there)} == {"down_proj", "q_proj", "v_proj"}


def test_padding_tokens_train_nothing() -> None:
    """The row of a padding token is never trained, so that it trains nothing either; peft's `up` learns from it."""
    embedding = nn.Sequential(nn.Embedding(5, 4, padding_idx=0))
    family = Family("embedding", lambda: copy.deepcopy(embedding), lambda: {"input": torch.tensor([[0, 0, 0]])}, ["0"])
    gradients = []
    for model in twins(family, settings(family)):
        model(**family.inputs()).sum().backward()
        gradients.append(sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None))
    assert gradients[0] == 0 < gradients[1]


def test_embeddings_that_peft_saves_whole_are_taken_over(tmp_path: Path) -> None:
    """As after a resize there; they are the base model's own, so it is said where they differ from it."""
    family = FAMILIES["llama"]
    there = theirs(family, settings(family))
    there.save_pretrained(str(tmp_path), save_embedding_layers=True)
    x = family.inputs()
    torch.testing.assert_close(output(veneer.PeftModel.from_pretrained(family.model(), tmp_path), x), output(there, x))
    other = family.model()
    nn.init.zeros_(other.get_input_embeddings().weight)
    with pytest.warns(VeneerWarning, match=r"brings its own model\.embed_tokens\.weight; it replaced"):
        loaded = veneer.PeftModel.from_pretrained(other, tmp_path)
    torch.testing.assert_close(output(loaded, x), output(there, x), **TIGHT)
