"""QLoRA as scripts for `peft` have it: preparation, outputs, gradients, steps and files on layers of bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

import tiny
import veneer
from parity.oracle import peft_says

FORMS: dict[str, dict[str, Any]] = {
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8-bit": {"load_in_8bit": True},
}
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny.llama(hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(path)
    return path


def base(folder: Path, form: str, dtype: str = "float32") -> Any:
    how = BitsAndBytesConfig(**FORMS[form])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=dtype)


def twins(folder: Path, form: str) -> tuple[Any, Any]:
    """The same random adapter in both libraries."""
    models = []
    for library in (veneer, peft):
        config = library.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
        with peft_says():
            models.append(library.get_peft_model(base(folder, form), config))
    here, there = models
    tiny.randomise(here)
    peft.set_peft_model_state_dict(there, veneer.get_peft_model_state_dict(here))
    return here, there


@pytest.mark.parametrize("form", FORMS)
def test_ten_steps_and_files_both_ways(folder: Path, form: str, tmp_path: Path) -> None:
    here, there = twins(folder, form)
    ids = tiny.tokens()
    losses: dict[Any, list[float]] = {here: [], there: []}
    # In training all along: otherwise bitsandbytes computes in bfloat16, where the processor is fast at that.
    here.train()
    there.train()
    torch.testing.assert_close(here(ids).logits, there(ids).logits, **NEAR)
    first: list[list[Tensor]] = []
    for model, seen in losses.items():
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(chosen, lr=1e-2)
        for step in range(10):
            loss = model(ids, labels=ids).loss
            loss.backward()
            if step == 0:
                first.append([p.grad.clone() for p in chosen])
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    for a, b in zip(*first, strict=True):
        torch.testing.assert_close(a, b, **NEAR)
    assert losses[here] == pytest.approx(losses[there], rel=1e-3)
    assert losses[here][-1] < losses[here][0]

    here.save_pretrained(tmp_path / "here")
    there.save_pretrained(str(tmp_path / "there"))
    with peft_says(), torch.no_grad():
        read = peft.PeftModel.from_pretrained(base(folder, form), str(tmp_path / "here")).train()
        torch.testing.assert_close(read(ids).logits, here(ids).logits, **NEAR)
        read = veneer.PeftModel.from_pretrained(base(folder, form), tmp_path / "there").train()
        torch.testing.assert_close(read(ids).logits, there(ids).logits, **NEAR)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("form", [*FORMS, None])
def test_the_preparation_is_the_same(folder: Path, form: str | None, reentrant: bool | None) -> None:
    how = None if reentrant is None else {"use_reentrant": reentrant}
    seen = []
    for library in (veneer, peft):
        plain = {"pretrained_model_name_or_path": folder, "dtype": "bfloat16"}
        model = base(folder, form, "bfloat16") if form else AutoModelForCausalLM.from_pretrained(**plain)
        with peft_says("`gradient_checkpointing_enable` is deprecated"):  # said by transformers of peft's call
            assert library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=how) is model
        embedded = model.get_input_embeddings()(tiny.tokens())
        seen.append(
            (
                {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()},
                embedded.requires_grad,
                [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
            )
        )
    assert seen[0] == seen[1]


def test_without_checkpointing(folder: Path) -> None:
    model = veneer.prepare_model_for_kbit_training(base(folder, "4-bit"), use_gradient_checkpointing=False)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.get_input_embeddings()(tiny.tokens()).requires_grad


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")  # where they are those of 8 bits
@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_a_script_for_peft_runs(folder: Path, tmp_path: Path, optim: str) -> None:
    from veneer import LoraConfig, Trainer, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(base(folder, "4-bit"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = tiny.tokens(8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with torch.no_grad():
        before = model(ids, labels=ids).loss
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=2e-2, optim=optim, save_strategy="no", report_to="none", use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    with torch.no_grad():
        assert model(ids, labels=ids).loss < before
