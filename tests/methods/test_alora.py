"""aLoRA against LoRA on a part of the text, and against peft."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import veneer
from tiny import llama, randomise, tokens
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.adapted import BASE, adapters_of
from veneer.errors import ConfigError, StateError, UnsupportedError

SETTINGS: list[dict[str, Any]] = []  # needs a text to look through, which the contract's single layers have not
SHOWN = {"alora_invocation_tokens": [7, 8]}
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "lora_alpha": 7, "alora_invocation_tokens": [44, 6]}),
    ("gpt2", {"r": 3, "lora_alpha": 7, "alora_invocation_tokens": [37], "use_rslora": True}),
]

INVOCATION = [7, 8]
# Invoked at 2 and again at 5; at 0; never, though the first of its tokens ends the row; at 3, behind padding.
ROWS = torch.tensor(
    [[9, 3, 7, 8, 5, 7, 8, 4], [7, 8, 9, 9, 4, 5, 3, 6], [9, 8, 7, 4, 4, 5, 6, 7], [0, 0, 0, 7, 8, 5, 6, 4]]
)
MASK = (ROWS != 0).long()
STARTS = [5, 0, 8, 3]
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def settings(**changes: Any) -> dict[str, Any]:
    targets = ["q_proj", "v_proj", "down_proj"]
    return {"r": 3, "lora_alpha": 7, "target_modules": targets, "task_type": "CAUSAL_LM", **changes}


def adapted(model: nn.Module | None = None, **changes: Any) -> PeftModel:
    config = LoraConfig(**settings(alora_invocation_tokens=INVOCATION, **changes))
    model = get_peft_model(llama().double() if model is None else model, config)
    randomise(model)
    return model.eval()


def logits(model: nn.Module, ids: Tensor = ROWS, mask: Tensor = MASK, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **how).logits


class Layer(nn.Module):
    """A lookup and a layer, called with tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.layer = nn.Linear(6, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.table(input_ids))


@pytest.mark.parametrize(("target", "bias"), [("layer", False), ("layer", True), ("table", False)])
def test_it_is_lora_from_the_invocation_on_and_the_base_before(target: str, bias: bool) -> None:
    base = Layer().double()
    model = adapted(copy.deepcopy(base), target_modules=[target], task_type=None, lora_bias=bias)
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=7, target_modules=[target], lora_bias=bias))
    veneer.set_peft_model_state_dict(plain, veneer.get_peft_model_state_dict(model))
    y, with_lora, without = model(ROWS), plain(ROWS), base(ROWS)
    for row, start in enumerate(STARTS):
        assert torch.equal(y[row, :start], without[row, :start])
        assert torch.equal(y[row, start:], with_lora[row, start:])
        assert not torch.isclose(with_lora[row, start:], without[row, start:]).any() or start == 8


def test_a_new_one_is_the_base_model_and_one_that_is_disabled_too() -> None:
    new = get_peft_model(llama().double(), LoraConfig(**settings(alora_invocation_tokens=INVOCATION)))
    base = logits(llama().double())
    assert torch.equal(logits(new.eval()), base)
    model = adapted()
    assert not torch.allclose(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_what_is_cached_before_the_invocation_is_the_base_models() -> None:
    model = adapted()
    with torch.no_grad():
        keys = model(input_ids=ROWS[:1], use_cache=True).past_key_values.layers[1].values
        with model.disable_adapter():
            base = model(input_ids=ROWS[:1], use_cache=True).past_key_values.layers[1].values
    assert torch.equal(keys[:, :, :5], base[:, :, :5])
    assert not torch.isclose(keys[:, :, 5:], base[:, :, 5:]).all()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generation_is_the_same_with_and_without_a_cache(how: dict[str, Any]) -> None:
    model = adapted()
    how |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ROWS, attention_mask=MASK, **how)
    assert torch.equal(model.generate(input_ids=ROWS, attention_mask=MASK, use_cache=False, **how), cached)
    assert torch.equal(model.generate(ROWS, attention_mask=MASK, **how), cached)
    assert torch.equal(model.generate(inputs=ROWS, attention_mask=MASK, **how), cached)
    if how.get("num_beams"):
        return
    # By hand: token by token, the adapter on from where the prompt invokes it.
    ids, mask = ROWS, MASK
    offsets = [8 - start or None for start in STARTS]
    for step in range(6):
        on = [None if offset is None else offset + step for offset in offsets]
        best = logits(model, ids, mask, alora_offsets=on)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    assert torch.equal(ids, cached)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ROWS, attention_mask=MASK, **how), cached)


def test_generation_is_that_of_peft() -> None:
    model = adapted()
    config = peft.LoraConfig(**settings(alora_invocation_tokens=INVOCATION))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(llama().double(), config).eval()
        peft.set_peft_model_state_dict(theirs, veneer.get_peft_model_state_dict(model))
        how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(input_ids=ROWS, attention_mask=MASK, **how)
        torch.testing.assert_close(logits(model), logits(theirs), **EXACT)
    assert torch.equal(model.generate(input_ids=ROWS, attention_mask=MASK, **how), expected)


def test_a_base_models_cache_is_gone_on_with() -> None:
    model = adapted()
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=ROWS[:1, :5], use_cache=True).past_key_values
        after = model(input_ids=ROWS[:1, 5:], past_key_values=cache).logits
    torch.testing.assert_close(after, logits(model, ROWS[:1], MASK[:1])[:, 5:], **EXACT)
    # `generate` is given the whole text, and runs what the cache has not.
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ROWS[:1, :5], use_cache=True).past_key_values
    again = model.generate(input_ids=ROWS[:1], past_key_values=cache, **how)
    assert torch.equal(again, model.generate(input_ids=ROWS[:1], **how))


def test_a_mixed_batch_is_each_row_alone() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(**settings(alora_invocation_tokens=[5])))
    model.add_adapter("plain", LoraConfig(**settings()))
    for name in ("other", "plain"):
        model.set_adapter(name)
        randomise(model, seed=len(name))
    names = ["default", "other", BASE, "plain"]
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = logits(model, adapter_names=names)
    generated = model.generate(input_ids=ROWS, attention_mask=MASK, adapter_names=names, **how)
    for row, name in enumerate(names):
        ids, mask = ROWS[row : row + 1], MASK[row : row + 1]
        if name == BASE:
            with model.disable_adapter():
                alone, text = logits(model, ids, mask), model.generate(input_ids=ids, attention_mask=mask, **how)
        else:
            model.set_adapter(name)
            alone, text = logits(model, ids, mask), model.generate(input_ids=ids, attention_mask=mask, **how)
        torch.testing.assert_close(mixed[row : row + 1], alone, **EXACT)
        assert torch.equal(generated[row : row + 1], text)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    model = adapted().train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ROWS, attention_mask=MASK, labels=ROWS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    assert all(gradient.abs().max() > 0 for gradient in plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    model.eval()
    logits(model)
    assert model.switch.inputs is None


def test_only_rows_with_an_invocation_train() -> None:
    model = adapted().train()
    model(input_ids=ROWS[2:3], labels=ROWS[2:3]).loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_it_compiles() -> None:
    model = adapted(Layer().double(), target_modules=["layer"], task_type=None)
    expected = model(ROWS)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(ROWS), expected)
    torch.compiler.reset()


def test_it_cannot_be_merged() -> None:
    model = adapted()
    expected = logits(model)
    with pytest.raises(UnsupportedError, match=r"adapter 'default': .*no change of the weight.*merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.add_adapter("above", LoraConfig(**settings(use_dora=True)))
    model.set_adapter(["default", "above"])
    with pytest.raises(UnsupportedError, match="nor lie below a method that needs the adapted weight"):
        logits(model)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="alora_invocation_tokens is empty"):
        get_peft_model(llama(), "alora")
    with pytest.raises(ConfigError, match="an encoder-decoder has two texts"):
        get_peft_model(llama(), LoraConfig(alora_invocation_tokens=[3], task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ConfigError, match="alora_invocation_tokens=3; "):
        LoraConfig(alora_invocation_tokens=3)  # type: ignore[arg-type]
    model = adapted()
    with pytest.raises(StateError, match="called without"):
        model(inputs_embeds=torch.randn(1, 4, 32, dtype=torch.float64))
    with pytest.raises(StateError, match="Call the PeftModel itself"):
        model.get_base_model()(input_ids=tokens())
    with pytest.raises(UnsupportedError, match="prompt_lookup_num_tokens"):
        model.generate(input_ids=ROWS[:1], prompt_lookup_num_tokens=2, max_new_tokens=4)
    how = GenerationConfig(prefill_chunk_size=2, max_new_tokens=4)
    with pytest.raises(UnsupportedError, match="prefill_chunk_size"):
        model.generate(input_ids=ROWS[:1], generation_config=how)


def test_parameters_are_those_of_lora_and_only_they_train() -> None:
    model = adapted(Layer().double(), target_modules=["layer"], task_type=None)
    ((_, adapter),) = adapters_of(model, "default")
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (6 + 4)
    assert {p for p in model.parameters() if p.requires_grad} == set(adapter.parameters())
