"""Multitask prompt tuning: prompts of tasks by hand, and what a new task starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import veneer
from parity.families import t5
from tiny import randomise
from veneer.errors import ConfigError, StateError, VeneerWarning

SETTINGS: list[dict[str, Any]] = []  # needs a model that reads text: see tests/prompting/test_prompts.py
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def adapted(seed: int = 0, **settings: Any) -> veneer.PeftModel:
    config = veneer.MultitaskPromptTuningConfig(**{"num_virtual_tokens": 3, "num_ranks": 2, **settings})
    model = veneer.get_peft_model(tiny.llama().double(), config)
    if "prompt_tuning_init" not in settings:
        randomise(model, seed)
    return model.eval()


def tensors(model: veneer.PeftModel) -> tuple[Tensor, Tensor, Tensor]:
    given = veneer.get_peft_model_state_dict(model)
    return given["prompt_embeddings"], given["prefix_task_cols"], given["prefix_task_rows"]


def test_every_row_has_the_prompt_of_its_task() -> None:
    model, ids, tasks = adapted(num_tasks=3), tiny.tokens(), [2, 0, 2]
    prompt, columns, rows = tensors(model)
    expected = []
    with model.disable_adapter():
        base = model.get_base_model()
        for text, task in zip(ids, tasks, strict=True):
            scale = sum(torch.outer(columns[task][:, r], rows[task][r]) for r in range(2))
            embeds = torch.cat([prompt * scale, base.get_input_embeddings()(text)])[None]
            expected.append(base(inputs_embeds=embeds).logits)
    torch.testing.assert_close(model(ids, task_ids=tasks).logits, torch.cat(expected), **TIGHT)


def test_generation_and_mixed_batches_know_the_task_of_each_row() -> None:
    model, ids, tasks = adapted(num_tasks=3), tiny.tokens(), torch.tensor([2, 0, 1])
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    randomise(model, 1)
    names = ["other", "default", "__base__"]
    how = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    mixed = model(ids, task_ids=tasks, adapter_names=names).logits
    continued = model.generate(ids, task_ids=tasks, adapter_names=names, **how)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        alone = {"input_ids": ids[row : row + 1], "task_ids": tasks[row : row + 1]}
        torch.testing.assert_close(mixed[row], model(**alone).logits[0], **TIGHT)
        assert continued[row].tolist() == model.generate(**alone, **how)[0].tolist()


def test_a_task_has_to_be_known() -> None:
    model, ids = adapted(num_tasks=2), tiny.tokens()
    with pytest.raises(StateError, match="task_ids="):
        model(ids)
    with pytest.raises(StateError, match="num_tasks=2"):
        model(ids, task_ids=[0, 1, 2])
    with pytest.raises(ConfigError, match="task=2"):
        adapted(num_tasks=2, task=2)


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_starts_from_other_tasks(start: str, tasks: int, tmp_path: Path) -> None:
    source = adapted(num_tasks=3)
    source.save_pretrained(tmp_path)
    prompt, columns, rows = tensors(source)
    path = tmp_path / "adapter_model.safetensors" if tasks == 1 else tmp_path
    where: dict[str, Any] = {"prompt_tuning_init_state_dict_path": str(path)}
    model = adapted(num_tasks=tasks, prompt_tuning_init=start, prompt_tuning_init_task=2, **where)
    found = tensors(model)
    assert torch.equal(found[0], prompt)
    if start == "ONLY_SOURCE_SHARED":
        assert all(0.003 < tensor.std() < 0.06 for tensor in found[1:])
    else:
        average = start == "AVERAGE_SOURCE_TASKS"
        for got, given in zip(found[1:], (columns, rows), strict=True):
            torch.testing.assert_close(got, (given.mean(0) if average else given[2]).expand_as(got))


def test_sources_that_do_not_fit(tmp_path: Path) -> None:
    adapted(num_tasks=3).save_pretrained(tmp_path)
    here: dict[str, Any] = {"prompt_tuning_init_state_dict_path": str(tmp_path), "num_tasks": 1}
    with pytest.raises(ConfigError, match="the source has 3 tasks"):
        adapted(prompt_tuning_init="EXACT_SOURCE_TASK", prompt_tuning_init_task=3, **here)
    with pytest.raises(ConfigError, match=r"\(3, 2\) for each task, \(3, 4\)"):
        adapted(prompt_tuning_init="AVERAGE_SOURCE_TASKS", num_ranks=4, **here)
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_state_dict_path"):
        adapted(prompt_tuning_init=veneer.MultitaskPromptTuningInit.ONLY_SOURCE_SHARED)
    veneer.get_peft_model(tiny.llama(), "prompt_tuning").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="prefix_task_cols"):
        adapted(prompt_tuning_init="ONLY_SOURCE_SHARED", **here)


def test_of_an_encoder_decoder_the_encoder_is_lengthened() -> None:
    settings: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}
    model = veneer.get_peft_model(t5(), veneer.MultitaskPromptTuningConfig(**settings))
    assert model.peft_config["default"].num_transformer_submodules == 1
    with pytest.warns(VeneerWarning, match="only the encoder's"):
        twice = veneer.get_peft_model(
            t5(), veneer.MultitaskPromptTuningConfig(num_transformer_submodules=2, **settings)
        )
    assert len(veneer.get_peft_model_state_dict(twice)["prompt_embeddings"]) == 6
    logits = twice(input_ids=tiny.tokens(), decoder_input_ids=tiny.tokens(3, 5)).logits
    assert logits.shape[1] == 5
