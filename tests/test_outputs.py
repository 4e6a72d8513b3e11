"""Output methods on whole models: places, files, stacks, mixed batches, and text that is generated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

from test_structure import BART, T5
from tiny import bert, llama, randomise, tokens
from veneer import PeftModel, get_peft_model
from veneer.adapted import BASE, adapters_of
from veneer.errors import ConfigError, StateError, TargetError, UnsupportedError

METHODS = [
    "houlsby:reduction=4",
    "pfeiffer:reduction=4,train_norms=true",
    "scaled_parallel:reduction=4",
    "par_bn:scaling=learned",
    "adapterplus:bottleneck_size=4",
    "compacter:bottleneck_size=8",
    "compacter++:bottleneck_size=8",
    "invertible",
    "loreft:r=2,prefix_positions=2,suffix_positions=1",
    "noreft:r=2,tied_weights=false,prefix_positions=1,suffix_positions=2",
    "direft:r=2,prefix_positions=0,suffix_positions=2",
    "ssf",
]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def adapted(base: nn.Module, method: str, seed: int = 1) -> PeftModel:
    model = get_peft_model(base.double(), method)
    randomise(model, seed)
    return model.eval()


def padded(side: str) -> dict[str, Tensor]:
    """Three rows of unequal length."""
    ids = tokens(3, 7)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(method: str, tmp_path: Path) -> None:
    model = adapted(bert(), method)
    batch = padded("right")
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    plain, expected = base(**batch).logits, model(**batch).logits
    assert (expected - plain).abs().max() > 1e-6
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(**batch).logits, expected)
    assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])
    for made in (model, loaded):
        made.peft_config["default"].inference_mode = True
    assert loaded.peft_config["default"] == model.peft_config["default"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_is_each_row_alone(method: str, side: str) -> None:
    """Beside LoRA on the projections that some of the methods read and change."""
    model = adapted(llama(), method)
    model.add_adapter("second", method)
    model.add_adapter("lora", "lora:target_modules=[down_proj,gate_proj]")
    for seed, name in ((2, "second"), (3, "lora")):
        model.set_adapter(name)
        randomise(model, seed)
    batch = padded(side)
    rows = ["second", "lora", "default"] if side == "left" else ["default", BASE, "second"]
    mixed = model(**batch, adapter_names=rows).logits
    for row, name in enumerate(rows):
        if name == BASE:
            with model.disable_adapter():
                alone = model(**batch).logits
        else:
            model.set_adapter(name)
            alone = model(**batch).logits
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row][real], alone[row][real], **CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("beams", [1, 2])
def test_cached_decoding_is_that_without_a_cache(method: str, beams: int) -> None:
    model = adapted(llama(), method)
    how: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    batch = padded("left")
    cached, plain = (model.generate(**batch, **how, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_generated_rows_of_a_mixed_batch(method: str) -> None:
    model = adapted(llama(), method)
    model.add_adapter("other", method)
    model.set_adapter("other")
    randomise(model, 2)
    batch, how = padded("left"), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
    mixed = model.generate(**batch, **how, adapter_names=["other", "default", BASE])
    alone = [model.generate(**batch, **how)[0]]
    model.set_adapter("default")
    alone.append(model.generate(**batch, **how)[1])
    with model.disable_adapter():
        alone.append(model.generate(**batch, **how)[2])
    assert torch.equal(mixed, torch.stack(alone))


@pytest.mark.parametrize("method", [m for m in METHODS if "norms" not in m and m != "ssf"])
def test_stacked_over_lora(method: str) -> None:
    """The order of the names is the order of the layers; both have their effect."""
    model = adapted(llama(), method)
    model.add_adapter("lora", "lora:target_modules=[down_proj,q_proj]")
    model.set_adapter("lora")
    randomise(model, 4)
    batch = padded("right")
    alone = model(**batch).logits
    model.set_adapter(["lora", "default"])
    both = model(**batch).logits
    assert not torch.allclose(both, alone, atol=1e-4)
    model.set_adapter("lora")
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, alone, **CLOSE)
    merged = copy.deepcopy(model)
    merged.unmerge_adapter()
    twin = PeftModel(merged.merge_and_unload(adapter_names=["lora"]), model.peft_config["default"])
    randomise(twin, 1)
    torch.testing.assert_close(twin.eval()(**batch).logits, both, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_gradient(method: str) -> None:
    grads = []
    for checkpointed in (False, True):
        model = adapted(llama(), method)
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        for _, adapter in adapters_of(model.get_base_model(), "default"):
            adapter.drop_path = 0.0  # drawn anew in every pass
        batch = padded("right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :3] = -100
        model(**batch, labels=labels).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    # What the last block does to the first tokens is seen by no label.
    assert sum(bool(grad.abs().max() > 0) for grad in grads[0].values()) >= 0.75 * len(grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, **CLOSE)


# Encoder-decoders


@pytest.mark.parametrize("method", [m for m in METHODS if m != "invertible"])
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_encoder_decoders_generate_alike_with_a_cache(method: str, family: str) -> None:
    torch.manual_seed(0)
    if family == "T5":
        settings = {**T5, "num_decoder_layers": 1, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        base: Any = T.T5ForConditionalGeneration(T.T5Config(**settings))
    else:
        base = T.BartForConditionalGeneration(T.BartConfig(**BART, max_position_embeddings=32))
    model = adapted(base, method)
    batch, how = padded("right"), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
    cached, plain = (model.generate(**batch, **how, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_places_in_a_decoder_that_reads_another_text_are_refused() -> None:
    base = T.BartForConditionalGeneration(T.BartConfig(**BART))
    model = get_peft_model(copy.deepcopy(base), "loreft")
    assert [w.path for w, _ in adapters_of(model, "default")] == ["model.encoder.layers.0"]
    with pytest.raises(ConfigError, match=r"goes through its encoder.*Name those of the encoder"):
        get_peft_model(base, "loreft:target_modules=block-output")
    with pytest.raises(TargetError, match=r"embeds two texts\. Name"):
        get_peft_model(base, "invertible")


# What is named by hand


def test_modules_named_by_hand() -> None:
    """A module is a part by itself; of a pair, inputs are found by their paths."""
    batch = padded("right")
    whole = adapted(llama(), "scaled_parallel:target_modules=[mlp]")
    pair = adapted(llama(), "scaled_parallel:target_modules=[down_proj],input_modules=[up_proj]")
    found = adapted(llama(), "scaled_parallel")
    assert found.peft_config["default"].input_modules == ["gate_proj"]
    expected = found(**batch).logits
    torch.testing.assert_close(whole(**batch).logits, expected, **CLOSE)
    torch.testing.assert_close(pair(**batch).logits, expected, **CLOSE)


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"are 2 modules and the others 1\. Name one input"):
        get_peft_model(llama(), "parallel:target_modules=['model.layers.0.mlp.down_proj'],input_modules=[gate_proj]")
    with pytest.raises(ConfigError, match=r"takes 48 numbers and .*o_proj gives 32"):
        get_peft_model(llama(), "parallel:target_modules=[o_proj],input_modules=[down_proj]")


def test_a_module_of_unknown_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.act_fn: a SiLU\w* has no layer from which the width"):
        get_peft_model(llama(), "bottleneck:target_modules=[act_fn]")


def test_a_module_of_another_width_than_it_seems_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x)[..., :3]

    model = get_peft_model(nn.Sequential(Odd()), "bottleneck:target_modules=['0']")
    with pytest.raises(StateError, match=r"\(Odd\) to give a tensor \(\.\.\., 6\); what came is of shape \(2, 3\)"):
        model(torch.ones(2, 4))


def test_some_layers_only() -> None:
    model = get_peft_model(llama(), "loreft:target_modules=block-output,layers_to_transform=[1]")
    assert [w.path for w, _ in adapters_of(model, "default")] == ["model.layers.1"]


# ReFT


def test_only_the_ends_of_the_prompt_are_edited() -> None:
    """Of one block, so that what differs is what was edited."""
    model = adapted(llama(num_hidden_layers=1), "loreft:r=2,prefix_positions=1,suffix_positions=2")
    for side in ("left", "right"):
        batch = padded(side)
        edited = model(**batch).logits
        with model.disable_adapter():
            differs = (edited - model(**batch).logits).abs().amax(-1) > 1e-6
        for row, real in enumerate(batch["attention_mask"].bool()):
            assert differs[row][real].nonzero()[:, 0].tolist() == sorted({0, int(real.sum()) - 2, int(real.sum()) - 1})
            assert not differs[row][~real].any()


def test_in_training_the_prompt_ends_at_the_first_label() -> None:
    model = adapted(llama(num_hidden_layers=1), "noreft:r=2,prefix_positions=0,suffix_positions=1")
    batch = padded("right")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 4:], labels[1, :5] = 5, 5  # row 1 has no prompt, and counts as a whole; row 2 has no labels
    edited = model(**batch, labels=labels).logits
    with model.disable_adapter():
        differs = (edited - model(**batch).logits).abs().amax(-1) > 1e-6
    assert differs.nonzero().tolist() == [[0, 3], [1, 4], [2, 2]]


def test_a_prompt_of_one_token() -> None:
    model = adapted(llama(), "direft:r=2,prefix_positions=1,suffix_positions=0")
    how: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = tokens(2, 1)
    assert torch.equal(model.generate(ids, **how), model.generate(ids, **how, use_cache=False))


def test_the_rows_of_loreft_stay_orthonormal() -> None:
    model = get_peft_model(bert(), "loreft:r=4")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = model.state_dict()["base_model.model.bert.encoder.layer.0.adapters.default.edits.0.basis"].clone()
    for _ in range(5):
        optimiser.zero_grad()
        model(**padded("right"), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimiser.step()
    for _, adapter in adapters_of(model, "default"):
        if hasattr(adapter, "edits"):
            rows = adapter.edits[0].rows()
            torch.testing.assert_close(rows @ rows.mT, torch.eye(4), rtol=0, atol=1e-5)
    _, first = next(iter(adapters_of(model, "default")))
    assert not torch.allclose(first.edits[0].basis, start, atol=0.05)


def test_what_reft_cannot_know() -> None:
    model = adapted(llama(), "loreft:r=2")
    with pytest.raises(StateError, match="Call the PeftModel itself"):
        model.get_base_model()(**padded("right"))
    with pytest.raises(UnsupportedError, match=r"cannot be used with prompt_lookup_num_tokens"):
        model.generate(tokens(1, 4), prompt_lookup_num_tokens=2, max_new_tokens=2)
    with pytest.raises(UnsupportedError, match=r"attention_mask has shape \(3, 1, 7, 7\)"):
        model(input_ids=tokens(3, 7), attention_mask=torch.ones(3, 1, 7, 7))
    cache = model(tokens(1, 3), use_cache=True).past_key_values
    with pytest.raises(StateError, match=r"the prompt as a whole, 5 tokens, and got 2"):
        model.generate(tokens(1, 5), past_key_values=cache, max_new_tokens=2)


def test_a_call_with_a_filled_cache_edits_nothing() -> None:
    model = adapted(llama(), "loreft:r=2")
    ids = tokens(2, 6)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    after = model(ids[:, 4:], past_key_values=cache).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(ids[:, 4:], past_key_values=twin).logits, after, **CLOSE)
