"""Runs on base models that are kept in fewer bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import veneer
from veneer import quantised_bases
from veneer.commands.merging import merge_folder
from veneer.errors import ConfigError
from veneer.options import ModelOptions, RunOptions
from veneer.stores import quantised_store
from veneer.training.models import load_model, load_tokenizer
from veneer.training.run import evaluate, load_trained, train

# hqq says so of everything that it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def quantised_layers(model: torch.nn.Module) -> set[str]:
    return {type(store).__name__ for module in model.modules() if (store := quantised_store(module)) is not None}


@pytest.mark.parametrize(
    ("form", "store"),
    [
        ("nf4", "BitsAndBytesStore"),
        ("nf4-int8", "Nf4Int8Store"),
        ("bnb-int8", "BitsAndBytesStore"),
        ("torchao-int8", "TorchAoStore"),
        ("hqq-4", "HqqStore"),
    ],
)
def test_a_run_is_trained_read_back_and_merged(
    write: Callable[..., RunOptions], tmp_path: Path, form: Any, store: str
) -> None:
    options = write(max_steps=4)
    options.model.quantize = form
    options.model.dtype = "float32"
    result = train(options)
    assert result.after["loss"] < result.before["loss"]
    model, *_ = load_trained(result.folder)
    assert quantised_layers(model) == {store}
    assert evaluate(result.folder)["loss"] == pytest.approx(result.after["loss"], rel=2e-2)
    if form in ("nf4", "hqq-4"):  # what is merged is the dequantised weight, so that nothing is rounded again
        merge_folder(result.folder, str(tmp_path / "merged"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert not quantised_layers(merged)
        ids = torch.arange(5, 15)[None]
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", sorted(set(quantised_bases.FORMS) - {"int8"}))
def test_every_form_leaves_head_and_embeddings_plain(decoder: Path, form: Any) -> None:
    options = ModelOptions(str(decoder), dtype="float32", quantize=form)
    model, new = load_model(options, "causal-lm", load_tokenizer(options))
    layers = [layer for block in model.model.layers for layer in (block.self_attn.q_proj, block.mlp.down_proj)]
    assert all(quantised_store(layer) is not None for layer in layers)
    assert quantised_store(model.lm_head) is None
    assert not new


def test_a_classifier_keeps_its_new_head_plain(encoder: Path) -> None:
    options = ModelOptions(str(encoder), dtype="float32", quantize="nf4")
    model, new = load_model(options, "classification", load_tokenizer(options), ["a", "b"])
    assert quantised_store(model.classifier) is None
    assert quantised_store(model.bert.encoder.layer[0].attention.self.query) is not None
    assert new == ["classifier.bias", "classifier.weight"]


def test_what_cannot_be_is_refused(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ModelOptions(str(decoder), dtype="float32", quantize="nf4")
    tokenizer = load_tokenizer(options)
    how = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(decoder, quantization_config=how).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    held = dataclasses.replace(options, name=str(tmp_path))
    with pytest.raises(ConfigError, match=r"quantised already \(.*bitsandbytes"):
        load_model(held, "causal-lm", tokenizer)
    model, _ = load_model(dataclasses.replace(held, quantize=None), "causal-lm", tokenizer)
    assert quantised_layers(model) == {"BitsAndBytesStore"}
    with pytest.raises(ConfigError, match="device_map"):
        load_model(dataclasses.replace(options, quantize="hqq-4", device_map="cpu"), "causal-lm", tokenizer)
    monkeypatch.setattr(quantised_bases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*'veneer\[bitsandbytes\]'"):
        load_model(options, "causal-lm", tokenizer)


def test_dequantising_gives_the_same_outputs(decoder: Path) -> None:
    options = ModelOptions(str(decoder), dtype="float32", quantize="nf4")
    base, _ = load_model(options, "causal-lm", load_tokenizer(options))
    model = veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.train()  # bitsandbytes computes in bfloat16 otherwise, where the processor is fast at that
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = model(ids).logits
        quantised_bases.dequantise(model)
        assert not quantised_layers(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not hasattr(base.config, "quantization_config")
