"""MTL-LoRA against the paper's formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import llama, randomise, tokens
from veneer import PeftModel, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.methods.mtl_lora import MtlLoraConfig

SETTINGS: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 7, "num_tasks": 3, "task": 1},
    {"r": 2, "lora_alpha": 3, "num_ups": 2, "diagonal": True, "task": 0},
]


class Layer(nn.Module):
    """A layer that the model's inputs reach by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def model_of(**settings: Any) -> tuple[PeftModel, Any, Tensor]:
    """A random adapter on one layer, and the weights that the paper's formula gives each task."""
    config = MtlLoraConfig(
        **{"r": 2, "lora_alpha": 6, "num_ups": 2, "num_tasks": 2, "target_modules": ["inner"], **settings}
    )
    model = get_peft_model(Layer().double(), config)
    randomise(model)
    ((_, adapter),) = adapters_of(model, "default")
    weights = []
    for t in range(config.num_tasks):
        shares = torch.exp(adapter.mix[t] / config.temperature)
        shares = shares / shares.sum()
        transform = torch.diag(adapter.transform[t]) if config.diagonal else adapter.transform[t]
        up = sum(share * up for share, up in zip(shares, adapter.ups, strict=True))
        weights.append(adapter.site.read() + 6 / 2 * up @ transform @ adapter.down)
    return model, adapter, torch.stack(weights).detach()


@pytest.mark.parametrize("diagonal", [False, True])
def test_every_row_has_the_weight_of_its_task(diagonal: bool) -> None:
    model, adapter, weights = model_of(diagonal=diagonal, temperature=0.7)
    x = torch.randn(4, 5, 2, dtype=torch.float64)
    tasks = [1, 0, 0, 1]
    expected = torch.stack([row @ weights[t].t() for row, t in zip(x, tasks, strict=True)]) + adapter.site.bias()
    for given in (tasks, torch.tensor(tasks)):
        torch.testing.assert_close(model(x=x, task_ids=given), expected, rtol=1e-12, atol=1e-12)
    flat = model(x=x.flatten(0, 1), task_ids=tasks)  # as layers that take all tokens in a row
    torch.testing.assert_close(flat, expected.flatten(0, 1), rtol=1e-12, atol=1e-12)


def test_one_task_is_run_and_merged() -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    for task in (0, 1):
        model, adapter, weights = model_of(task=task)
        expected = x @ weights[task].t() + adapter.site.bias()
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)


def test_the_number_of_parameters() -> None:
    model = get_peft_model(llama(), "mtl_lora:r=4,num_tasks=5,num_ups=3,target_modules=[v_proj]")
    each = 4 * 32 + 3 * 4 * 16 + 5 * (4 * 4 + 3)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * each


def test_a_model_with_tasks_is_saved_generates_and_mixes(tmp_path: Path) -> None:
    model = get_peft_model(llama(), "mtl_lora:num_tasks=3,target_modules=all-linear").eval()
    randomise(model)
    ids, tasks = tokens(), [2, 0, 2]
    logits = model(ids, task_ids=tasks).logits
    for row, task in enumerate(tasks):
        alone = model(ids[row : row + 1], task_ids=[task]).logits
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(ids, task_ids=tasks).logits, logits)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        together = model.generate(ids, task_ids=tasks, num_beams=beams, **how)
        for row, task in enumerate(tasks):
            alone = model.generate(ids[row : row + 1], task_ids=[task], num_beams=beams, **how)
            assert torch.equal(together[row, : alone.shape[1]], alone[0])
    model.add_adapter("other", "mtl_lora:num_tasks=2,target_modules=[q_proj]")
    mixed = model(ids, task_ids=[2, 0, 1], adapter_names=["default", "default", "other"]).logits
    torch.testing.assert_close(mixed[:2], logits[:2], rtol=1e-4, atol=1e-5)


def test_tasks_learn_apart() -> None:
    model, adapter, _ = model_of()
    model(x=torch.randn(3, 2, dtype=torch.float64), task_ids=[1, 1, 1]).sum().backward()
    assert adapter.transform.grad[0].abs().max() == 0
    assert adapter.transform.grad[1].abs().max() > 0
    assert adapter.mix.grad[0].abs().max() == 0


def test_an_unknown_task_is_an_error() -> None:
    model, _, _ = model_of()
    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(StateError, match="has to know the task of every row"):
        model(x)
    with pytest.raises(StateError, match=r"the task 2, but the adapter has num_tasks=2"):
        model(x=x, task_ids=[0, 1, 2])
    with pytest.raises(StateError, match=r"task_ids has the shape \(2,\), and a layer was called with 3 rows"):
        model(x=x, task_ids=[0, 1])
    with pytest.raises(UnsupportedError, match="inner, adapter 'default': An MTL-LoRA adapter changes the weight for"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"task": 2}, "task=2; with num_tasks=2"), ({"num_ups": 0}, "num_ups=0"), ({"temperature": 0.0}, "temperature=0")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MtlLoraConfig(**settings)
