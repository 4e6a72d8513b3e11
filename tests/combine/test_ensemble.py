from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import veneer
from veneer.adapted import adapters_of
from veneer.combine.ensemble import ensemble, ensemble_generate
from veneer.errors import ConfigError, StateError, UnsupportedError

# Prompts of unequal length, prefixes, weights, and the frozen model itself.
METHODS = {
    "long": "prompt_tuning:num_virtual_tokens=4",
    "short": "prompt_tuning:num_virtual_tokens=2",
    "prefix": "prefix_tuning:num_virtual_tokens=3",
    "lora": "lora:r=2,target_modules=all-linear",
}
NAMES = [*METHODS, "__base__"]


def adapted(base: Any, task: str | None = None, methods: dict[str, str] = METHODS) -> veneer.PeftModel:
    """The base with all adapters, every number of theirs random."""
    model = None
    for name, method in methods.items():
        config = veneer.parse_method(method)
        config.task_type = task
        if model is None:
            model = veneer.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in methods:
            for _, adapter in adapters_of(model.get_base_model(), name):
                for parameter in adapter.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) / 2)
    return model.double().eval()


@pytest.fixture(scope="module")
def decoder() -> veneer.PeftModel:
    return adapted(tiny.llama())


def batch(side: str = "right") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 50, (3, 6), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids.where(mask.bool(), torch.tensor(0)), "attention_mask": mask}


def alone(model: veneer.PeftModel, name: str, ids: Tensor) -> Tensor:
    """Logits of one row without padding, of the tokens of its text, with one adapter active."""
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=ids[None]).logits[0]
    model.set_adapter(name)
    return model(input_ids=ids[None]).logits[0, -len(ids) :]


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("combine", ["probabilities", "logits", "votes"])
def test_an_ensemble_says_what_its_members_say_alone(decoder: veneer.PeftModel, side: str, combine: str) -> None:
    inputs = batch(side)
    found = ensemble(decoder, NAMES, combine=combine, **inputs)
    assert found.shape == (3, 6, 50)
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        each = torch.stack([alone(decoder, name, ids[mask]) for name in NAMES])
        if combine == "votes":
            wanted = torch.zeros_like(each[0])
            for logits in each:
                wanted[torch.arange(len(logits)), logits.argmax(-1)] += 1 / len(NAMES)
        else:
            wanted = (each.softmax(-1) if combine == "probabilities" else each).mean(0)
        torch.testing.assert_close(found[row][mask], wanted)


@torch.no_grad()
def test_classifiers_answer_together_each_with_its_head() -> None:
    model = adapted(tiny.bert(), "SEQ_CLS")
    inputs = batch()
    found = ensemble(model, list(METHODS), combine="logits", **inputs)
    each = []
    for name in METHODS:
        model.set_adapter(name)
        each.append(model(**inputs).logits)
    torch.testing.assert_close(found, torch.stack(each).mean(0))
    assert not torch.equal(each[0], each[1])


@torch.no_grad()
@pytest.mark.parametrize("combine", ["probabilities", "logits", "votes"])
def test_members_write_one_text(decoder: veneer.PeftModel, combine: str) -> None:
    inputs = batch("left")
    written = ensemble_generate(
        decoder, NAMES, combine=combine, **inputs, max_new_tokens=5, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(written[:, :6], inputs["input_ids"])
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        text = inputs["input_ids"][row][mask]
        for _ in range(5):
            last = ensemble(decoder, NAMES, combine=combine, input_ids=text[None])[0, -1]
            text = torch.cat([text, last.argmax()[None]])
        assert torch.equal(written[row, 6:], text[-5:])


@torch.no_grad()
def test_a_text_that_ends_is_padded_and_other_settings_hold(decoder: veneer.PeftModel) -> None:
    inputs = batch("left")
    plain = {**inputs, "max_new_tokens": 4, "pad_token_id": 0}
    free = ensemble_generate(decoder, NAMES, **plain, eos_token_id=None)
    stop = int(free[0, 7])
    ended = ensemble_generate(decoder, NAMES, **plain, eos_token_id=stop, return_dict_in_generate=True).sequences
    assert ended[0, 6:].tolist() == [int(free[0, 6]), stop, 0, 0][: ended.shape[1] - 6]
    banned = ensemble_generate(decoder, NAMES, **plain, eos_token_id=None, suppress_tokens=[int(free[0, 6])])
    assert banned[0, 6] != free[0, 6]


@torch.no_grad()
def test_with_a_temperature_tokens_are_drawn_as_often_as_members_say_together(decoder: veneer.PeftModel) -> None:
    ids = batch()["input_ids"][1:2]
    torch.manual_seed(0)
    drawn = ensemble_generate(
        decoder, ["long", "lora"], temperature=0.5, input_ids=ids.expand(1500, -1), max_new_tokens=1, pad_token_id=0
    )[:, -1]
    wanted = (ensemble(decoder, ["long", "lora"], input_ids=ids)[0, -1].log() / 0.5).softmax(-1)
    shares = torch.bincount(drawn, minlength=50) / len(drawn)
    deviation = (wanted * (1 - wanted) / len(drawn)).sqrt()
    assert bool(((shares - wanted).abs() < 5 * deviation + 1e-3).all())
    assert len(drawn.unique()) > 5


def test_what_does_not_go_together_is_refused(decoder: veneer.PeftModel) -> None:
    inputs = batch()
    with pytest.raises(ConfigError, match="combine='mean'; one of probabilities, logits, votes"):
        ensemble(decoder, NAMES, combine="mean", **inputs)
    with pytest.raises(ConfigError, match=r"adapters=\[\]; a list of one or more names"):
        ensemble(decoder, [], **inputs)
    with pytest.raises(ConfigError, match="adapters='long'; a list"):
        ensemble(decoder, "long", **inputs)
    with pytest.raises(StateError, match="no adapter 'lon'"):
        ensemble(decoder, ["lon"], **inputs)
    with pytest.raises(ConfigError, match="Leave out labels"):
        ensemble(decoder, NAMES, **inputs, labels=inputs["input_ids"])
    with pytest.raises(ConfigError, match=r"without input_ids or inputs_embeds \(given: attention_mask\)"):
        ensemble(decoder, NAMES, attention_mask=inputs["attention_mask"])
    with pytest.raises(UnsupportedError, match="num_beams=2: the members"):
        ensemble_generate(decoder, NAMES, **inputs, num_beams=2)
    with pytest.raises(ConfigError, match="votes are counted, not drawn"):
        ensemble_generate(decoder, NAMES, **inputs, combine="votes", temperature=1.0)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_prefixes_and_weights_write_in_one_batch_what_they_write_alone(
    decoder: veneer.PeftModel, beams: int
) -> None:
    """Rows of unequal text behind unequal prompts, and beside them the frozen model."""
    how: dict[str, Any] = {
        "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "num_beams": beams, "do_sample": False,
    }  # fmt: skip
    texts = [tiny.tokens(1, length, seed=length)[0] for length in (3, 6, 4, 5, 2)]
    ids = torch.stack([torch.cat([torch.zeros(6 - len(text), dtype=torch.long), text]) for text in texts])
    mask = torch.stack([(torch.arange(6) >= 6 - len(text)).long() for text in texts])
    together = decoder.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **how)
    written = set()
    for row, (name, text) in enumerate(zip(NAMES, texts, strict=True)):
        decoder.set_adapter(name if name in METHODS else "lora")
        one: dict[str, Any] = {"input_ids": text[None], "attention_mask": torch.ones(1, len(text), dtype=torch.long)}
        if name in METHODS:
            alone = decoder.generate(**one, **how)
        else:
            with decoder.disable_adapter():
                alone = decoder.generate(**one, **how)
        assert torch.equal(together[row, 6:], alone[0, len(text) :])
        written.add(tuple(alone[0, len(text) :].tolist()))
    assert len(written) > 1
