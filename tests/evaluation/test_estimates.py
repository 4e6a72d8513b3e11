"""Estimates: a step without numbers against the same step with them, and parts against what they must be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from veneer import get_peft_model, parse_method, quantised_bases
from veneer.errors import ConfigError
from veneer.evaluation import outlines, simulation
from veneer.evaluation.estimates import Estimate, _batch, estimate
from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
from veneer.quantization import quantize
from veneer.stores import quantised_store
from veneer.training.models import load_model

METHODS = ["lora:target_modules=all-linear", "dora:target_modules=all-linear", "bitfit", "ia3", "full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("estimates")
    tiny.llama(max_position_embeddings=64).config.save_pretrained(path / "decoder")
    tiny.bert(max_position_embeddings=64).config.save_pretrained(path / "encoder")
    return path


def ask(folder: Path, model: str = "decoder", method: str = METHODS[0], length: int = 16, **training: Any) -> Estimate:
    """Only the configuration is there: no weights can be loaded."""
    options = RunOptions(
        task="causal-lm" if model == "decoder" else "classification",
        model=ModelOptions(str(folder / model), dtype="float32"),
        method=method,
        data=DataOptions(""),
        training={"threads": torch.get_num_threads(), **training},
        output=OutputOptions(str(folder / "output")),
    )
    return estimate(options, length)


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job is run once and takes a second: times are then numbers of calls."""

    def second(job: Callable[[], Any], device: torch.device) -> float:
        job()
        return 1.0

    monkeypatch.setattr("veneer.machine.best_seconds", second)
    monkeypatch.setattr("veneer.training.recompute._SMALLEST", 0)  # tiny models are treated as large ones


def loss_of(model: nn.Module, device: str) -> Callable[[simulation.Recorder], torch.Tensor]:
    def loss(recorder: simulation.Recorder) -> torch.Tensor:
        x = torch.ones((3, 8), dtype=torch.long, device=device)
        return model(input_ids=x).logits.sum()  # type: ignore[no-any-return]

    return loss


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_numbers_needs_what_one_with_numbers_needs(method: str) -> None:
    real = get_peft_model(tiny.llama(), parse_method(method)).train()
    real(input_ids=torch.ones((3, 2), dtype=torch.long))  # layers of one input find each other
    measured = simulation.step(real, loss_of(real, "cpu"))
    with torch.device("meta"):
        shadow = get_peft_model(tiny.llama(), parse_method(method), low_cpu_mem_usage=True).train()
    with simulation.shadows(shadow, torch.device("cpu")):
        shadow(input_ids=torch.ones((3, 2), dtype=torch.long))
        predicted = simulation.step(shadow, loss_of(shadow, "cpu"))
    assert measured.peak.total() > 10_000
    # Without numbers some scalars and their copies are made otherwise.
    assert predicted.peak.total() == pytest.approx(measured.peak.total(), rel=0.02)
    assert predicted.flops == measured.flops
    assert predicted.peak["gradients"] == measured.peak["gradients"]


BITS = {
    "int8": 8, "nf4": 4, "fp4": 4, "nf4-int8": 4, "bnb-int8": 8, "torchao-int8": 8, "torchao-int4": 8, "hqq-8": 8,
    "hqq-4": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("quantised")
    tiny.llama(hidden_size=64, intermediate_size=128, max_position_embeddings=64).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("form", BITS)
def test_quantised_layers_without_numbers_need_what_those_with_numbers_need(form: Any, plain: str) -> None:
    options = RunOptions(
        "causal-lm", ModelOptions(plain, dtype="float32", quantize=form), DataOptions(""), OutputOptions("")
    )
    base: Any = load_model(options.model, "causal-lm", [])[0]  # type: ignore[arg-type]
    if form == "int8":
        quantize(base)
    with torch.device("meta"):
        empty = LlamaForCausalLM(base.config)
    settings = quantised_bases.loading_settings(form, "float32", False, LlamaConfig())
    outlines.load(form, torch.device("cpu"))
    outlines.replace(empty, quantised_bases.quantised_paths(empty, form, settings), form, torch.device("cpu"))
    layers = {path for path, module in base.named_modules() if quantised_store(module) is not None}
    assert {path for path, module in empty.named_modules() if isinstance(module, outlines.OutlineLinear)} == layers
    found = [module for module in empty.modules() if isinstance(module, outlines.OutlineLinear)]
    least = sum(module.in_features * module.out_features for module in found) * BITS[form] / 8
    kept = sum(module.kept.numel() for module in found)
    assert least <= kept < 1.4 * least + 1100 * len(found)  # scales, and a table of 256 for each layer
    # IA3 calls the layer itself, which may go another way than the products that its store has for LoRA.
    for method, near in (("lora:target_modules=all-linear", 0.001), ("ia3", 0.1)):
        real = get_peft_model(base, parse_method(method)).train()
        with torch.device("meta"):
            shadow = get_peft_model(copy.deepcopy(empty), parse_method(method), low_cpu_mem_usage=True).train()
        assert shadow.get_nb_trainable_parameters()[0] == real.get_nb_trainable_parameters()[0]
        simulation.step(
            real, loss_of(real, "cpu")
        )  # ways of multiplying are tried, layers of one input find each other
        measured = simulation.step(real, loss_of(real, "cpu"))
        with simulation.shadows(shadow, torch.device("cpu")):
            shadow(input_ids=torch.ones((3, 2), dtype=torch.long))
            predicted = simulation.step(shadow, loss_of(shadow, "cpu"))
        assert predicted.peak.total() == pytest.approx(measured.peak.total(), rel=near)
        assert predicted.seconds(torch.device("cpu")) > 0  # every operation can be done
        real.unload()


def test_memory_and_operations_of_a_product_by_hand() -> None:
    layer = nn.Linear(4, 8, bias=False, device="meta")
    with simulation.shadows(layer, torch.device("cpu")):
        x = torch.ones(16, 4)

        def loss(recorder: simulation.Recorder) -> torch.Tensor:
            return layer(x).sum()  # type: ignore[no-any-return]

        found = simulation.step(layer, loss)
    assert found.flops == 2 * (2 * 16 * 4 * 8)  # forward, and the gradient of the weight
    # The output and its sum; what is summed need not be kept for the gradient.
    assert found.peak.total() == 16 * 8 * 4 + 4
    assert sum(call.count for call in found.calls.values() if call.run._opname == "mm") == 2
    assert found.seconds(torch.device("cpu")) == sum(call.count for call in found.calls.values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_parts_are_what_they_must_be(folder: Path, method: str) -> None:
    found = ask(folder, method=method)
    model = get_peft_model(tiny.llama(max_position_embeddings=64), parse_method(method))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found.trained, found.parts["trained parameters"]) == (trained, 4 * trained)
    assert found.parts["optimiser state"] == pytest.approx(8 * trained, rel=0.01)  # two moments
    assert ask(folder, method=method, optim="sgd").parts["optimiser state"] == 0
    assert found.peak == sum(found.parts.values())
    assert found.parts["libraries"] > 50e6


def test_longer_batches_need_more_and_checkpointing_less(folder: Path) -> None:
    short, long = ask(folder), ask(folder, length=64)
    again = ask(folder, length=64, activation_checkpointing=True)
    assert long.parts["activations"] > 3 * short.parts["activations"]
    assert again.parts["activations"] < 0.6 * long.parts["activations"]
    assert again.flops > long.flops


def test_upper_layers_alone_need_less(folder: Path) -> None:
    upper, both = (ask(folder, method=f"lora{which}", length=64).parts for which in (":layers_to_transform=[1]", ""))
    assert upper["activations"] + upper["temporaries"] < 0.8 * (both["activations"] + both["temporaries"])


def test_half_precision_halves_the_frozen_weights(folder: Path) -> None:
    options = RunOptions(
        "classification", ModelOptions(str(folder / "encoder"), dtype="bfloat16"), DataOptions(""), OutputOptions("")
    )
    half, full = estimate(options, 16), ask(folder, "encoder", "lora")
    assert half.parts["frozen weights"] == pytest.approx(full.parts["frozen weights"] / 2, rel=0.05)
    assert half.dtype == "bfloat16"


def test_batches_of_real_data() -> None:
    args = SimpleNamespace(
        per_device_train_batch_size=2, gradient_accumulation_steps=1, seed=0, num_train_epochs=3, max_steps=-1,
        packing="off", tokens_per_batch=None,
    )  # fmt: skip
    lengths = (4, 3, 2, 1)
    rows = {"input_ids": [[1] * n for n in lengths], "labels": [[-100] * (n - 1) + [1] for n in lengths]}
    data: Any = SimpleNamespace(labels=[], train=rows)
    batch = _batch(args, None, data)
    assert (batch.rows, batch.longest, batch.usual, batch.steps) == (2, 4, 3, 6)  # the long ones are together
    assert (batch.real, batch.labelled) == (10 / 12, 4 / 12)
    args.packing = "auto"
    batch = _batch(args, None, data)
    assert (batch.longest, batch.real, batch.labelled) == (4, 1.0, 4 / 10)
    args.tokens_per_batch = 5
    assert _batch(args, 2, None).rows == 2
    assert _batch(args, None, data).steps == 9  # 4; 3 and 2; 1


def test_what_cannot_be_estimated_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"65 tokens were asked for, .* takes 1 to 64"):
        ask(folder, length=65)
    with pytest.raises(ConfigError, match=r"training\.optim is 'galore_adamw'"):
        ask(folder, optim="galore_adamw")
    config = tiny.llama(max_position_embeddings=64).config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(folder / "packed")
    with pytest.raises(ConfigError, match="are quantised already"):
        ask(folder, "packed")
