"""`PeftModel` on whole models: what is active, merging, mixed batches, heads, devices, checkpointing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import veneer
from tiny import bert, llama, mixtral, randomise, tokens
from veneer import BottleneckConfig, LoraConfig, PeftModel, get_peft_model
from veneer.adapted import Adapted, wrappers
from veneer.errors import ConfigError, StateError, TargetError, UnsupportedError, VeneerWarning


def two_adapters() -> PeftModel:
    """A decoder with LoRA adapters `default` (all linear layers) and `other` (q and v), both random."""
    model = get_peft_model(llama(), "lora:r=4,lora_alpha=12,target_modules=all-linear")
    randomise(model)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("other")
    randomise(model, seed=1)
    model.set_adapter("default")
    return model.eval()


def logits(model: nn.Module, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x, **kwargs).logits


def test_the_class_follows_the_task() -> None:
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
    assert isinstance(model, veneer.PeftModelForCausalLM)
    assert type(get_peft_model(nn.Sequential(nn.Linear(2, 2)), "lora:target_modules=['0']")) is PeftModel


def test_attributes_are_those_of_the_base_model() -> None:
    model = get_peft_model(llama(), "lora")
    assert model.config.hidden_size == 32
    assert model.base_model.model.model.layers[0].self_attn.q_proj.in_features == 32
    assert model.peft_type == "LORA"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_switching_disabling_and_deleting() -> None:
    model, x = two_adapters(), tokens()
    first = logits(model, x)
    model.set_adapter("other")
    other = logits(model, x)
    with model.disable_adapter():
        base = logits(model, x)
    assert torch.equal(base, logits(llama(), x))
    assert not torch.allclose(first, other)
    model.set_adapter(["default", "other"])
    both = logits(model, x)
    assert not torch.allclose(both, first)
    assert model.active_adapters == ["default", "other"]
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model, x), other)
    assert len(list(wrappers(model))) == 4  # wrappers left empty are gone
    with pytest.raises(StateError, match=r"no adapter 'othr'.*Did you mean 'other'"):
        model.set_adapter("othr")


def test_trainable_parameters_follow_the_active_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    model = two_adapters()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters.default." in name for name in trained)
    model.set_adapter("other")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters.other." in name for name in trained)
    model.print_trainable_parameters()
    count = 2 * (2 * (32 + 32) + 2 * (32 + 16))
    assert f"trainable params: {count:,d} " in capsys.readouterr().out
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert any(p.requires_grad for p in model.parameters())


def test_a_failed_add_leaves_the_model_as_it_was() -> None:
    model, x = two_adapters(), tokens()
    expected, before = logits(model, x), set(model.state_dict())
    for config in (LoraConfig(target_modules=["nothing"]), BottleneckConfig(target_modules=["embed_tokens"])):
        with pytest.raises(TargetError):
            model.add_adapter("third", config)
    with pytest.raises(ConfigError, match="already there"):
        model.add_adapter("other", LoraConfig())
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(logits(model, x), expected)


@pytest.mark.parametrize("name", ["a.b", "", "keys", "_x", "/tmp/x"])
def test_names_that_cannot_be_used(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        get_peft_model(llama(), "lora", adapter_name=name)


def test_wrapping_twice_is_refused() -> None:
    model = two_adapters()
    with pytest.raises(ConfigError, match="add_adapter"):
        get_peft_model(model, "lora")
    with pytest.raises(ConfigError, match="unload"):
        get_peft_model(model.get_base_model(), "lora")


# Merging


def test_merged_models_run_alone(tmp_path: Path) -> None:
    model, x = two_adapters(), tokens()
    model.set_adapter(["default", "other"])
    expected = logits(model, x)
    alone = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, Adapted) for module in alone.modules())
    torch.testing.assert_close(logits(alone, x), expected, rtol=1e-5, atol=1e-5)
    alone.save_pretrained(tmp_path)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, x), expected, rtol=1e-5, atol=1e-5)


def test_a_merge_holds_back_what_would_make_it_wrong() -> None:
    model, x = two_adapters(), tokens()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model, x)
    model.merge_adapter()
    for forbidden in (
        lambda: model.set_adapter("other"),
        lambda: model.merge_adapter(["other"]),
        lambda: model.delete_adapter("other"),
        lambda: model.add_adapter("third", LoraConfig()),
    ):
        with pytest.raises(StateError, match="unmerge_adapter"):
            forbidden()
    with model.disable_adapter():
        assert torch.equal(logits(model, x), logits(llama(), x))
    model.unmerge_adapter()
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, x), expected)


def test_a_failing_merge_leaves_no_layer_merged() -> None:
    model, x = two_adapters(), tokens()
    expected = logits(model, x)
    with torch.no_grad():
        next(model.get_base_model().model.layers[0].self_attn.k_proj.adapters.parameters())[0, 0] = float("nan")
    with pytest.raises(StateError, match=r"layers\.0\.self_attn\.k_proj\.weight would hold NaN"):
        model.merge_adapter(safe_merge=True)
    assert model.switch.merged == ()
    with model.disable_adapter():
        assert torch.equal(logits(model, x), logits(llama(), x))
    assert expected.isfinite().all()


def test_merging_follows_the_model_to_another_dtype() -> None:
    model, x = two_adapters(), tokens()
    model.merge_adapter()
    model.double()
    merged = logits(model, x)
    model.unmerge_adapter()
    assert merged.dtype == torch.float64
    torch.testing.assert_close(logits(model, x), merged, rtol=1e-5, atol=1e-5)


# Mixed batches


def test_mixed_batches_in_forward() -> None:
    model, x = two_adapters(), tokens(4)
    rows = ["other", "__base__", "default", "other"]
    mixed = logits(model, x, adapter_names=rows)
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, x)
        else:
            model.set_adapter(name)
            alone = logits(model, x)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_mixed_batches_in_generate(how: dict[str, Any]) -> None:
    model, x = two_adapters(), tokens(3)
    rows = ["other", "__base__", "default"]
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(x), **how}
    mixed = model.generate(x, adapter_names=rows, **how)
    copies = how.get("num_return_sequences", 1)
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(x, **how)
        else:
            model.set_adapter(name)
            alone = model.generate(x, **how)
        mine = slice(row * copies, (row + 1) * copies)
        width = min(mixed.shape[1], alone.shape[1])
        assert torch.equal(mixed[mine, :width], alone[mine, :width])


def test_mixed_batches_that_do_not_fit_are_refused() -> None:
    model, x = two_adapters(), tokens(4)
    with pytest.raises(StateError, match="one name for each row"):
        model(x, adapter_names=["default", "other", "default"])
    with pytest.raises(StateError, match="no adapter 'otherr'"):
        model(x, adapter_names=["otherr"] * 4)
    with model.disable_adapter(), pytest.raises(StateError, match="disabled"):
        model(x, adapter_names=["default"] * 4)
    assert model.switch.rows is None
    experts = get_peft_model(mixtral(), LoraConfig(target_parameters=["experts.gate_up_proj"]))
    experts.add_adapter("other", LoraConfig(target_parameters=["experts.gate_up_proj"]))
    with pytest.raises(UnsupportedError, match="several tensors"):
        experts(x, adapter_names=["default", "other", "other", "default"])


# Heads and tied embeddings


def test_a_new_head_belongs_to_its_adapter(tmp_path: Path) -> None:
    base, x = bert(), tokens()
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
    assert {name for name, p in model.named_parameters() if p.requires_grad and "classifier" in name}
    randomise(model)
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS"))
    model.eval()
    first = logits(model, x)
    model.set_adapter("other")
    assert not torch.allclose(logits(model, x), first)
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    tensors = veneer.load_peft_weights(tmp_path)
    assert "base_model.model.classifier.weight" in tensors
    loaded = PeftModel.from_pretrained(bert(seed=0), tmp_path)
    assert torch.equal(logits(loaded, x), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), logits(bert(), x))
    alone = model.merge_and_unload()
    torch.testing.assert_close(logits(alone, x), first, rtol=1e-5, atol=1e-5)
    assert type(alone.classifier) is nn.Linear


def test_modules_to_save_that_match_nothing() -> None:
    with pytest.raises(TargetError, match=r"modules_to_save: 'classifer'.*Did you mean 'classifier'"):
        get_peft_model(bert(), LoraConfig(modules_to_save=["classifer"]))
    with pytest.raises(TargetError, match="lies within"):
        get_peft_model(
            bert(), LoraConfig(modules_to_save=["attention", "query"], target_modules=["intermediate.dense"])
        )


def test_tied_embeddings_trained_alone_are_pointed_out() -> None:
    with pytest.warns(VeneerWarning, match=r"embed_tokens shares its weight with lm_head.*ensure_weight_tying"):
        get_peft_model(llama(tie_word_embeddings=True), LoraConfig(modules_to_save=["embed_tokens"]))


def test_tied_embeddings_are_kept_tied(tmp_path: Path) -> None:
    x = tokens()
    config = LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    base = model.get_base_model()
    copies = [m.adapters["default"].module.weight for m in (base.model.embed_tokens, base.lm_head)]
    assert copies[0] is copies[1]
    randomise(model)
    expected = logits(model.eval(), x)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "adapter")
    assert torch.equal(logits(loaded, x), expected)
    alone = model.merge_and_unload()
    assert alone.config.tie_word_embeddings is True
    assert alone.lm_head.weight is alone.model.embed_tokens.weight
    alone.save_pretrained(tmp_path / "merged")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again, x), expected, rtol=1e-5, atol=1e-5)


def test_a_merge_that_unties_embeddings_says_so_and_is_saved_whole(tmp_path: Path) -> None:
    x = tokens()
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens"]))
    randomise(model)
    expected = logits(model.eval(), x)
    with pytest.warns(VeneerWarning, match="no longer tied"):
        alone = model.merge_and_unload()
    alone.save_pretrained(tmp_path)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, x), expected, rtol=1e-5, atol=1e-5)


def test_resized_embeddings_that_are_not_saved_are_pointed_out(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, "lora").save_pretrained(tmp_path / "same")
    resized = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(53)
    model = get_peft_model(resized, "lora")
    with pytest.warns(VeneerWarning, match=r"has 53 embeddings, .*base has 50.*modules_to_save"):
        model.save_pretrained(tmp_path / "adapter")


# Modules whose weights are read without calling them, or computed


def test_a_weight_that_is_computed_is_no_place() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(TargetError, match="0 is a ParametrizedLinear, no layer with a weight"):
        get_peft_model(nn.Sequential(normed), LoraConfig(target_modules=["0"]))
    model = get_peft_model(nn.Sequential(normed, nn.Linear(4, 2)), "bitfit")
    assert [wrapper.path for wrapper in wrappers(model)] == ["1"]


def test_multihead_attention_is_refused_with_the_way_that_works() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    with pytest.raises(TargetError, match=r"target_parameters=\['attn\.out_proj\.weight'\]"):
        get_peft_model(nn.ModuleDict({"attn": attention}), LoraConfig(target_modules=["out_proj"]))
    x = torch.randn(2, 5, 16)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = copy.deepcopy(attention)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    model = get_peft_model(Model(), LoraConfig(target_parameters=["attn.in_proj_weight"]))
    before = model(x)
    randomise(model)
    after = model(x)
    assert not torch.allclose(before, after)
    model.merge_adapter()
    torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-5)


def test_the_fused_encoder_layer_does_not_pass_adapters_by() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["linear1", "linear2"])).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = model(x)
        randomise(model)
        assert not torch.allclose(model(x), before)


def test_stacked_experts() -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model, x = get_peft_model(mixtral(), config).eval(), tokens()
    torch.testing.assert_close(logits(model, x), logits(mixtral(), x))
    randomise(model)
    expected = logits(model, x)
    assert not torch.allclose(expected, logits(mixtral(), x))
    model.merge_adapter()
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, x), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), x), expected, rtol=1e-5, atol=1e-5)


# Training


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora:target_modules=all-linear", "bitfit", "houlsby"])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, reentrant: bool) -> None:
    x = tokens()

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = get_peft_model(llama(), method).train()
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(x, labels=x, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    model, x = get_peft_model(llama(), LoraConfig(lora_dropout=0.5)), tokens()
    randomise(model)
    model.train()
    assert not torch.equal(logits(model, x), logits(model, x))
    model.eval()
    assert torch.equal(logits(model, x), logits(model, x))


def test_adapters_stay_in_float32_on_a_16_bit_model() -> None:
    x = tokens()
    model = get_peft_model(llama().bfloat16(), LoraConfig(modules_to_save=["lm_head"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(x).logits.dtype == torch.bfloat16
    low = get_peft_model(llama().bfloat16(), LoraConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in low.parameters() if p.requires_grad} == {torch.bfloat16}


def test_injection_returns_the_model_itself() -> None:
    base, x = llama(), tokens()
    model = veneer.inject_adapter_in_model(LoraConfig(r=2), base)
    assert model is base
    assert {name for name, p in model.named_parameters() if p.requires_grad}
    randomise(model)
    state = veneer.get_peft_model_state_dict(model)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in state
    other = veneer.inject_adapter_in_model(LoraConfig(r=2), llama())
    veneer.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other, x), logits(model, x))


# Devices


@pytest.mark.parametrize("method", ["lora:r=2,target_modules=all-linear", "bitfit", "houlsby:reduction=4"])
def test_offloaded_layers(method: str, tmp_path: Path) -> None:
    """Half of the model lies on disk and is fetched for each call, as `device_map` does it on small machines."""
    llama().save_pretrained(tmp_path / "base")
    x = tokens()
    plain = get_peft_model(llama(), method).eval()
    randomise(plain)
    expected = logits(plain, x)
    plain.save_pretrained(tmp_path / "adapter")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    base = T.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert base.model.layers[1].self_attn.q_proj.weight.is_meta
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(model, x), expected)
    model(x, labels=x).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    if method != "houlsby:reduction=4":
        model.merge_adapter()
        torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(logits(model, x), expected)


def test_max_memory_spreads_a_model(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate says that it offloads
        base = T.AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "offload"
        )
    assert "disk" in base.hf_device_map.values()
    model = get_peft_model(base, "lora")
    x = tokens()
    torch.testing.assert_close(logits(model, x), logits(llama(), x))
