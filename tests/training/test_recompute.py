"""What follows cheaply from other activations is not kept, and gradients are those of the usual way to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import veneer
from parity.families import gpt2
from veneer.errors import StateError
from veneer.training import recompute
from veneer.training.arguments import TrainingArguments
from veneer.training.recompute import Recompute

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny.llama(intermediate_size=96),
    "gpt2": gpt2,
    "bert": lambda: tiny.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_SMALLEST", 0)


def adapted(family: str, dtype: torch.dtype = torch.float32, method: str = "lora:r=2") -> veneer.PeftModel:
    model = veneer.get_peft_model(FAMILIES[family]().to(dtype), f"{method},target_modules=all-linear")
    tiny.randomise(model)
    loss_of(model.train())  # layers of one input are known from the second call on
    return model


def loss_of(model: veneer.PeftModel) -> Tensor:
    ids = tiny.tokens(3, 16)
    labels = ids if hasattr(model, "lm_head") else ids[:, 0] % 2
    loss: Tensor = model(ids, labels=labels).loss
    return loss


def gradients(model: veneer.PeftModel, way: Any) -> dict[str, Tensor]:
    with way:
        loss = loss_of(model)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@contextmanager
def counted(less: Recompute | None, sizes: list[int]) -> Iterator[None]:
    """Counts the numbers that are kept, each memory once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Any:
        packed = (tensor, tensor._version) if less is None else less._pack(tensor)
        if isinstance(packed, tuple) and not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, recompute._unpack):
        yield
    sizes.append(sum(tensor.numel() for tensor in kept.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_to_the_last_bit_and_less_is_kept(family: str, dtype: torch.dtype) -> None:
    model, sizes = adapted(family, dtype), []
    usual = gradients(model, counted(None, sizes))
    less = gradients(model, counted(Recompute(), sizes))
    assert usual.keys() == less.keys()
    assert all(torch.equal(usual[name], less[name]) for name in usual)
    assert sizes[1] < {"llama": 0.8, "gpt2": 0.95, "bert": 0.95}[family] * sizes[0]


@pytest.mark.parametrize("method", ["dora:r=2", "houlsby:bottleneck_size=4", "ia3", "loha:r=2"])
def test_methods_under_autograd_too(method: str) -> None:
    model = veneer.get_peft_model(tiny.llama(), method)
    tiny.randomise(model)
    usual, less = gradients(model, nullcontext()), gradients(model, veneer.recomputed_activations())
    assert all(torch.equal(usual[name], less[name]) for name in usual)


@pytest.mark.parametrize("reentrant", [True, False])
def test_beside_checkpoints(reentrant: bool) -> None:
    model = adapted("llama")
    usual = gradients(model, nullcontext())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    less = gradients(model, veneer.recomputed_activations())
    assert all(torch.equal(usual[name], less[name]) for name in usual)


def test_a_graph_may_be_gone_through_twice_and_differentiated() -> None:
    model = adapted("llama")
    model.get_base_model().set_attn_implementation("eager")  # the kernels have no second derivative
    weight = next(p for name, p in model.named_parameters() if name.endswith("up"))
    found = []
    for way in (nullcontext(), veneer.recomputed_activations()):
        with way:
            loss = loss_of(model)
        loss.backward(retain_graph=True)
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        found.append(second)
    assert torch.equal(*found)


def test_a_recipe_that_gives_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    usual = gradients(model, nullcontext())
    value = recompute._value
    monkeypatch.setattr(recompute, "_value", lambda node, dtype: value(node, dtype) + 1)
    less = Recompute()
    found = gradients(model, less())
    assert set(less._right.values()) == {False}
    assert all(torch.equal(usual[name], found[name]) for name in usual)


def test_what_was_changed_in_place_since_is_not_taken_for_what_it_was() -> None:
    x = torch.ones(4, requires_grad=True)
    gate = x + 1
    with veneer.recomputed_activations():
        y = torch.nn.functional.silu(gate).square()
    with torch.no_grad():
        gate.add_(1)
    with pytest.raises(StateError, match="changed in place"):
        y.sum().backward()


def test_the_trainer_does_so_where_nothing_else_decides_what_is_kept(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(4, 8).tolist()]
    settings: dict[str, Any] = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    args = TrainingArguments(str(tmp_path), dataloader_pin_memory=False, **settings)
    trainer = veneer.Trainer(adapted("llama"), args, train_dataset=rows)
    trainer.train()
    assert any(trainer._activations._right.values())
    assert not recompute.suits(TrainingArguments(str(tmp_path), compile_blocks=True, **settings))
