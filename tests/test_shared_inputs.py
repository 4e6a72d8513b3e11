"""Layers that read one input run as one, and give what they give alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import veneer
from veneer import shared_inputs


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each product ran."""
    sizes: list[int] = []
    original = shared_inputs.run_layers

    def run(x: Tensor, sites: Any, *rest: Any) -> tuple[Tensor, ...]:
        sizes.append(len(sites))
        return original(x, sites, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shared_inputs, "run_layers", run)
        yield sizes


def adapted(model: nn.Module | None = None, **settings: Any) -> Any:
    config = veneer.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **settings)
    model = veneer.get_peft_model(model or tiny.llama().double(), config)
    tiny.randomise(model)
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_query_key_and_value_run_as_one_from_the_second_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), tiny.tokens()
    with counted(monkeypatch) as sizes:
        first = gradients(model, x)
        assert sizes == [1] * 14
        sizes.clear()
        second = gradients(model, x)
    assert sizes == [3, 1, 2, 1] * 2  # q k v, o, gate up, down
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


def test_cross_attention_groups_what_reads_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    model, x = adapted(T5ForConditionalGeneration(config).double().eval()), tiny.tokens()
    first = gradients(model, x)
    with counted(monkeypatch) as sizes:
        second = gradients(model, x)
    assert sizes == [3, 1, 1, 1, 3, 1, 1, 2, 1, 1, 1]
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


def test_nothing_changes_while_a_backward_pass_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing calls the blocks again in the backward pass, here of two forward passes at once."""
    plain, model, x = adapted(), adapted().train(), tiny.tokens()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for _ in range(3):
        expected = [2 * gradient for gradient in gradients(plain, x)]
        model.zero_grad()
        losses = [model(input_ids=x, labels=x).loss for _ in range(2)]
        sum(losses).backward()
        torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], expected)


class Branching(nn.Module):
    """Calls the second layer only sometimes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + (self.two(x) if self.both else self.two(x.cos()))


def test_a_layer_that_does_not_follow_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Branching()
    model = veneer.get_peft_model(layers, veneer.LoraConfig(r=2, target_modules=["one", "two"]))
    tiny.randomise(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = {}
    for both in (True, False):
        layers.both = both
        expected[both] = model(x).detach()
    layers.both = True
    model(x), model(x)
    with counted(monkeypatch) as sizes:
        for both in (False, False, True, False):
            layers.both = both
            torch.testing.assert_close(model(x).detach(), expected[both])
    assert sizes == [2, 1, 1, 1, 1, 1, 1, 1]  # tried once more, then no longer


def test_an_input_changed_in_place_is_another_input() -> None:
    layers = Branching()
    model = veneer.get_peft_model(layers, veneer.LoraConfig(r=2, target_modules=["one", "two"]))
    tiny.randomise(model)

    class Changing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = layers.one(x)
            x.mul_(2)
            return y + layers.two(x)

    x = torch.randn(3, 8, dtype=torch.float64)
    model(x), model(x)  # a group by now
    with torch.no_grad():
        expected = layers.one(x.clone()) + layers.two(2 * x)
        torch.testing.assert_close(Changing()(x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_runs_the_groups_again(reentrant: bool) -> None:
    plain, model, x = adapted(), adapted(), tiny.tokens()
    model.train(), plain.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for _ in range(3):
        torch.testing.assert_close(gradients(model, x), gradients(plain, x), rtol=1e-12, atol=1e-14)


def test_switching_mixing_and_disabling_see_no_stale_outputs() -> None:
    model, x = adapted(), tiny.tokens()
    model.add_adapter("other", veneer.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("other")
    tiny.randomise(model, seed=1)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = copy.deepcopy(model)(x).logits  # knows of no groups yet
    with model.disable_adapter():
        bare = model(x).logits
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        for _ in range(2):
            torch.testing.assert_close(model(x).logits, expected[name])
        with model.disable_adapter():
            torch.testing.assert_close(model(x).logits, bare)
    mixed = model(x, adapter_names=["default", "other", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.stack([expected["default"][0], expected["other"][1], bare[2]]))
    model.set_adapter("default")
    torch.testing.assert_close(model(x).logits, expected["default"])


def test_nothing_of_a_call_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), tiny.tokens()
    gradients(model, x), gradients(model, x)
    shared = model.base_model.model.model.layers[0].self_attn.q_proj.switch.shared
    assert shared._ready == {}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(gradients(other, x), gradients(model, x))


def test_dropout_keeps_layers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(lora_dropout=0.5).train(), tiny.tokens()
    with counted(monkeypatch) as sizes:
        gradients(model, x), gradients(model, x)
        assert sizes == []
        model.eval()
        gradients(model, x), gradients(model, x)
    assert sizes == [1] * 14 + [3, 1, 2, 1] * 2
