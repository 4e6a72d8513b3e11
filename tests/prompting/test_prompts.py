"""Virtual tokens before the text: what every method promises, how a batch is lengthened, and generation.

What is expected is always the frozen model on the embeddings of one row, without padding, cache or adapters. The
contract tests try methods on single layers; these need a model that reads text, and are held to the same here.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from tokenizers import Tokenizer, models
from torch import Tensor

import tiny
import veneer
from parity.families import NO_DROPOUT, bart, gpt2, t5
from tiny import randomise
from veneer.data.batches import IGNORED
from veneer.errors import ConfigError, DataError, TargetError, UnsupportedError
from veneer.method_strings import parse_method
from veneer.prompting.prompts import VirtualTokens, VirtualTokensConfig
from veneer.registry import methods

N, WIDTH = 3, 32
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": N},
    "p_tuning": {"num_virtual_tokens": N, "encoder_hidden_size": 6},
    "multitask_prompt_tuning": {"num_virtual_tokens": N, "num_tasks": 2, "task": 1, "num_ranks": 2},
    # Bounds that nothing here reaches: the gradient of what is cut off is not that of a function.
    "cpt": {
        "cpt_token_ids": [5, 6, 7],
        "cpt_tokens_type_mask": [1, 2, 3],
        "opt_projection_epsilon": 1e3,
        "opt_projection_format_epsilon": 1e3,
    },
}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 4, "num_virtual_tokens": N}
CASES = [*METHODS.items(), ("p_tuning", LSTM)]


def test_every_method_is_tried() -> None:
    assert METHODS.keys() == {name for name, cls, _ in methods() if issubclass(cls, VirtualTokensConfig)}


def add(base: torch.nn.Module, name: str = "prompt_tuning", seed: int = 0, **settings: Any) -> veneer.PeftModel:
    """The model, in float64, with random virtual tokens."""
    task = {"task_type": "CAUSAL_LM"} if name == "cpt" else {}
    values = {**(METHODS[name] if not settings else {}), **task, **settings}
    model = veneer.get_peft_model(base.double().eval(), parse_method({"name": name, **values}))
    randomise(model, seed)
    return model.eval()


def prompt_of(model: veneer.PeftModel, name: str = "default") -> Tensor:
    """The virtual tokens, (n, d)."""
    (adapter,) = model._adapters(name).values()
    with torch.no_grad():
        return adapter.shared({})


def by_hand(model: veneer.PeftModel, ids: Tensor, prompt: Tensor | None = None, **more: Any) -> Any:
    """The frozen model on the virtual tokens and one row of text, (length,)."""
    prompt = prompt_of(model) if prompt is None else prompt
    base = model.get_base_model()
    with model.disable_adapter():
        table = base.get_input_embeddings()
        return base(inputs_embeds=torch.cat([prompt, table(ids)])[None], use_cache=False, **more)


def base_of(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = T.BertConfig(**tiny.SIZES, **NO_DROPOUT["bert"], num_labels=3)
    made = {
        "llama": tiny.llama,
        "gpt2": gpt2,
        "t5": t5,
        "bart": bart,
        "bert": lambda: T.BertForSequenceClassification(encoder),
        "tokens": lambda: T.BertForTokenClassification(encoder),
        "question": lambda: T.BertForQuestionAnswering(T.BertConfig(**tiny.SIZES, **NO_DROPOUT["bert"])),
    }
    return made[family]()


# What every method promises


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_switching_copying_and_merging(name: str, settings: dict[str, Any]) -> None:
    base, ids = tiny.llama().double(), tiny.tokens()
    plain = base(ids).logits
    model = add(base, name, **settings)
    expected = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(expected[row], by_hand(model, ids[row]).logits[0], **TIGHT)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.merge_adapter()
    twin = copy.deepcopy(model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    randomise(model, 1)
    assert not torch.allclose(model(ids).logits, expected, rtol=1e-3)
    model.set_adapter(["second", "default"])  # in this order before the text
    both = torch.cat([prompt_of(model, "second"), prompt_of(model)])
    torch.testing.assert_close(model(ids).logits[1], by_hand(model, ids[1], both).logits[0], **TIGHT)
    model.delete_adapter("second")
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(twin(ids).logits, expected)
    assert torch.equal(model.unload()(ids).logits, plain)


def test_ids_stay_apart_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    text, ids = pickle.dumps(add(tiny.llama())), tiny.tokens()
    monkeypatch.setattr(VirtualTokens, "_reserved", 0)
    model = pickle.loads(text)
    model.add_adapter("second", parse_method("prompt_tuning:num_virtual_tokens=2"))
    model.set_adapter(["default", "second"])
    both = torch.cat([prompt_of(model), prompt_of(model, "second")])
    torch.testing.assert_close(model(ids).logits[1], by_hand(model, ids[1], both).logits[0], **TIGHT)


def loss_and_gradients(model: veneer.PeftModel, ids: Tensor, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **more).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_training_goes_on_from_a_file_with_the_same_gradients(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, ids = add(tiny.llama(), name, **settings), tiny.tokens()
    loss, gradients = loss_and_gradients(model, ids)
    assert gradients.keys() == {n for n, _ in model.named_parameters() if ".adapters." in n}
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(tiny.llama().double(), tmp_path, is_trainable=True)
    again.eval()
    same, found = loss_and_gradients(again, ids)
    assert torch.equal(same, loss)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert torch.equal(found[key], gradient), key
    loaded = veneer.PeftModel.from_pretrained(tiny.llama().double(), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradients_are_finite_differences(name: str, settings: dict[str, Any]) -> None:
    model, ids = add(gpt2(), name, **settings), tiny.tokens()  # no part of it computes in float32
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = torch.randn(3, 7, 50, dtype=torch.float64)

    def measure() -> Tensor:
        return (model(ids).logits[:, -7:] * weights).sum()

    gradients = dict(zip(own, torch.autograd.grad(measure(), list(own.values())), strict=True))
    generator = torch.Generator().manual_seed(3)
    way = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in own.items()}
    losses, step = [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for n, p in own.items():
                p += sign * step * way[n]
        losses.append(measure().item())
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(sum(float((gradients[n] * way[n]).sum()) for n in own), rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    ids = tiny.tokens()
    model = add(base_of(family), "p_tuning").train()
    loss, gradients = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same, found = loss_and_gradients(model, ids)
    torch.testing.assert_close(same, loss)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-9)


# How a batch is lengthened


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Three rows of length 7, 4 and 6."""
    ids, mask = tiny.tokens(), torch.ones(3, 7, dtype=torch.long)
    for row, missing in ((1, 3), (2, 1)):
        where = slice(0, missing) if side == "left" else slice(7 - missing, 7)
        mask[row, where], ids[row, where] = 0, 0
    return ids, mask


@pytest.mark.parametrize(
    ("family", "side"),  # BERT numbers positions from the first column, virtual tokens or not
    [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("gpt2", "right"), ("bert", "right")],
)
def test_padded_rows_are_what_they_are_alone(family: str, side: str) -> None:
    model, (ids, mask) = add(base_of(family)), padded(side)
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row in range(3):
        alone = by_hand(model, ids[row][mask[row].bool()]).logits[0]
        if family == "bert":
            here = logits[row]
        else:  # virtual tokens stand right before the text
            whole = torch.cat([torch.ones(N, dtype=torch.bool), mask[row].bool()])
            if side == "left":
                whole = whole.sort().values
            here = logits[row][whole]
        torch.testing.assert_close(here, alone, **TIGHT)


def test_labels_of_the_text_alone_count() -> None:
    model, (ids, mask) = add(tiny.llama()), padded("left")
    labels = ids.masked_fill(mask == 0, IGNORED)
    expected = []
    for row in range(3):
        text = ids[row][mask[row].bool()]
        # The last virtual token says the first of the text.
        expected.append(F.cross_entropy(by_hand(model, text).logits[0, N - 1 : -1], text, reduction="none"))
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert loss.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-6)


def test_token_types_and_labels_of_tokens() -> None:
    model, ids = add(base_of("tokens")), tiny.tokens()
    types, labels = (torch.arange(7) > 3).long().expand(3, 7), ids % 3
    got = model(input_ids=ids, token_type_ids=types, labels=labels)
    whole = torch.cat([torch.zeros(N, dtype=torch.long), types[0]])[None]
    rows = torch.cat([by_hand(model, row, token_type_ids=whole).logits for row in ids])
    torch.testing.assert_close(got.logits, rows, **TIGHT)
    assert got.loss.item() == pytest.approx(F.cross_entropy(rows[:, N:].flatten(0, 1), labels.flatten()).item())


def test_positions_of_answers_are_those_in_the_text() -> None:
    model, ids = add(base_of("question")), tiny.tokens()
    start, end = torch.tensor([1, 0, 4]), torch.tensor([3, 2, 6])
    got = model(input_ids=ids, start_positions=start, end_positions=end)
    rows = [by_hand(model, row) for row in ids]
    first, last = (torch.cat([getattr(row, name) for row in rows]) for name in ("start_logits", "end_logits"))
    expected = (F.cross_entropy(first, start + N) + F.cross_entropy(last, end + N)) / 2
    assert got.loss.item() == pytest.approx(expected.item())


def test_embeddings_and_positions_may_be_given() -> None:
    model, ids = add(base_of("gpt2")), tiny.tokens()
    expected = model(ids).logits
    table = model.get_input_embeddings()
    assert torch.equal(model(inputs_embeds=table(ids)).logits, expected)
    assert torch.equal(model(ids, position_ids=torch.arange(7).expand(3, 7)).logits, expected)
    model, text = add(base_of("t5")), tiny.tokens(3, 4)
    embeds = model.get_input_embeddings()(ids)
    expected = model(input_ids=ids, decoder_input_ids=text).logits
    assert torch.equal(model(inputs_embeds=embeds, decoder_input_ids=text).logits, expected)


@pytest.mark.parametrize("method", ["prompt_tuning:num_virtual_tokens=3", "prefix_tuning:num_virtual_tokens=3"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_text_that_finds_no_positions_behind_the_prompt_is_refused_with_the_numbers(family: str, method: str) -> None:
    base = base_of(family)
    model = veneer.get_peft_model(base.eval(), parse_method(method))
    most = base.config.max_position_embeddings
    model(tiny.tokens(2, most - 3))
    with pytest.raises(DataError, match=f"has {most} positions, and a text of {most - 2} tokens with 3 virtual tokens"):
        model(tiny.tokens(2, most - 2), adapter_names=["__base__", "default"])
    if family == "gpt2":
        with pytest.raises(DataError, match=f"and 5 new ones behind it needs {most + 1}. Cut the text to {most - 7} "):
            model.generate(tiny.tokens(2, most - 6), max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    with pytest.raises((IndexError, RuntimeError)) as failure:  # what is wrong otherwise keeps its own words
        model(tiny.tokens(2, 4) + 10**6)
    assert not isinstance(failure.value, DataError)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_rows_of_different_prompts_in_one_batch(family: str) -> None:
    base = base_of(family)
    model, (ids, mask) = add(base), padded("left" if family == "llama" else "right")
    model.add_adapter("longer", parse_method("prompt_tuning:num_virtual_tokens=5"))
    query = {"llama": "q_proj", "bert": "query", "t5": "q"}[family]
    model.add_adapter("lora", parse_method(f"lora:r=2,target_modules=[{query}]"))
    for seed, name in enumerate(("longer", "lora")):
        model.set_adapter(name)
        randomise(model, seed + 1)
    ids, mask = torch.cat([ids, ids[1:2]]), torch.cat([mask, mask[1:2]])
    names = ["default", "longer", "lora", "__base__"]
    more = {"decoder_input_ids": tiny.tokens(4, 5)} if family == "t5" else {}
    mixed = model(input_ids=ids, attention_mask=mask, **more, adapter_names=names).logits
    for row, name in enumerate(names):
        text = ids[row][mask[row].bool()][None]
        alone = {key: value[row : row + 1] for key, value in more.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = model(input_ids=text, **alone).logits[0]
        else:
            model.set_adapter(name)
            expected = model(input_ids=text, **alone).logits[0]
        if family == "llama":  # the texts end together
            torch.testing.assert_close(mixed[row][-text.shape[1] :], expected[-text.shape[1] :], **TIGHT)
        else:
            torch.testing.assert_close(mixed[row], expected, **TIGHT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_by_hand_with_a_cache(family: str) -> None:
    model, (ids, mask) = add(base_of(family)), padded("left")
    model.add_adapter("longer", parse_method("prompt_tuning:num_virtual_tokens=5"))
    model.set_adapter("longer")
    randomise(model, 1)
    names = {"adapter_names": ["default", "longer", "__base__"]}
    whole = model(input_ids=ids, attention_mask=mask, **names).logits[:, -7:]
    first = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True, **names)
    cache = first.past_key_values
    second = model(input_ids=ids[:, 5:6], attention_mask=mask[:, :6], past_key_values=cache, **names)
    counts, real = torch.tensor([3, 5, 0]), mask.sum(1)
    lengthened = (torch.arange(12) >= 12 - (counts + real)[:, None]).long()  # by the caller
    third = model(input_ids=ids[:, 6:], attention_mask=lengthened, past_key_values=second.past_key_values, **names)
    for got, place in ((first.logits[:, -1:], 4), (second.logits, 5), (third.logits, 6)):
        torch.testing.assert_close(got[:, 0], whole[:, place], **TIGHT)


def test_decoding_by_hand_without_a_mask_and_with_the_encoder_read() -> None:
    model, ids = add(tiny.llama()), tiny.tokens()
    cache = model(ids[:, :6], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits[:, 0], model(ids).logits[:, -1], **TIGHT)
    model, (ids, mask), text = add(base_of("t5")), padded("right"), tiny.tokens(3, 4, seed=1)
    whole = model(input_ids=ids, attention_mask=mask, decoder_input_ids=text)
    read = T.modeling_outputs.BaseModelOutput(whole.encoder_last_hidden_state)
    begun = model(encoder_outputs=read, attention_mask=mask, decoder_input_ids=text[:, :3], use_cache=True)
    cache = begun.past_key_values
    last = model(encoder_outputs=read, attention_mask=mask, decoder_input_ids=text[:, 3:], past_key_values=cache)
    torch.testing.assert_close(last.logits[:, 0], whole.logits[:, -1], **TIGHT)


def test_what_cannot_be_lengthened_is_refused() -> None:
    model = add(tiny.llama())
    with pytest.raises(UnsupportedError, match="without input_ids"):
        model(labels=tiny.tokens())
    with pytest.raises(UnsupportedError, match="attention_mask has shape"):
        model(tiny.tokens(), attention_mask=torch.ones(3, 1, 7, 7))
    cache = model(tiny.tokens(), use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="1 columns; that of the whole text, 8,"):
        model(tiny.tokens(3, 1), attention_mask=torch.ones(3, 1), past_key_values=cache)
    with pytest.raises(ConfigError, match="num_virtual_tokens is not set"):
        veneer.get_peft_model(tiny.llama(), veneer.PromptTuningConfig())
    with pytest.raises(ConfigError, match="Leave target_modules out"):
        veneer.get_peft_model(tiny.llama(), "prompt_tuning:target_modules=[q_proj]")
    with pytest.raises(ConfigError, match="token_dim=7"):
        veneer.get_peft_model(tiny.llama(), "prompt_tuning:token_dim=7")
    with pytest.raises(TargetError, match="no input embedding"):
        veneer.get_peft_model(torch.nn.Linear(2, 2), "prompt_tuning")


# Generation


def greedy(model: veneer.PeftModel, ids: Tensor, steps: int, penalty: float = 1.0) -> Tensor:
    """The continuation of one row, every token from a run of its own."""
    for _ in range(steps):
        scores = by_hand(model, ids).logits[0, -1]
        seen = ids.unique()
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        scores[2] = -torch.inf  # the end
        ids = torch.cat([ids, scores.argmax()[None]])
    return ids[-steps:]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"repetition_penalty": 1.3},
        {"max_length": 12, "min_length": 12, "max_new_tokens": None, "min_new_tokens": None},
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda how: "_".join(how) or "plain",
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_search(family: str, how: dict[str, Any]) -> None:
    model, (ids, mask) = add(base_of(family)), padded("left")
    if "prompt_lookup_num_tokens" in how:  # one row alone
        ids, mask = ids[:1], mask[:1]
    got: Any = model.generate(
        input_ids=ids, attention_mask=mask, **{"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, **how}
    )
    got = got if isinstance(got, Tensor) else got.sequences
    assert torch.equal(got[:, :7], ids)
    for row in range(len(ids)):
        expected = greedy(model, ids[row][mask[row].bool()], 5, how.get("repetition_penalty", 1.0))
        assert got[row, 7:].tolist() == expected.tolist()


@pytest.mark.parametrize("how", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 9}])
def test_beams_and_sampling(how: dict[str, Any]) -> None:
    model, ids = add(tiny.llama()), tiny.tokens()
    base = model.get_base_model()
    steps = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, **how}
    torch.manual_seed(4)
    got = model.generate(ids, **steps)
    with model.disable_adapter():
        embeds = torch.cat([prompt_of(model).expand(3, N, WIDTH), base.get_input_embeddings()(ids)], 1)
        torch.manual_seed(4)
        expected = base.generate(inputs_embeds=embeds, use_cache=False, **steps)
    assert torch.equal(got[:, 7:], expected)


def test_an_assistant_reads_the_text_as_it_is() -> None:
    model, ids = add(tiny.llama()), tiny.tokens(1)
    calls: list[Tensor] = []
    draft = tiny.llama(seed=5).double()
    draft.get_input_embeddings().register_forward_hook(lambda module, args, output: calls.append(args[0]))
    got = model.generate(ids, assistant_model=draft, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    assert got[0, 7:].tolist() == greedy(model, ids[0], 6).tolist()
    assert calls
    assert max(int(x.max()) for x in calls) < 50


class Stream:
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.given += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_and_stopping_see_the_text_as_it_was_given() -> None:
    model, ids = add(tiny.llama()), tiny.tokens(1)
    stream = Stream()
    lengths: list[int] = []

    class Third(T.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **how: Any) -> Tensor:
            lengths.append(input_ids.shape[1])
            assert input_ids[:, :7].equal(ids)
            return torch.full((1,), input_ids.shape[1] >= 10)

    got = model.generate(
        ids, streamer=stream, stopping_criteria=T.StoppingCriteriaList([Third()]), max_new_tokens=9, pad_token_id=0
    )
    assert lengths == [8, 9, 10]
    assert stream.given == got[0].tolist()
    assert stream.ended
    model.generation_config.max_length = 11  # of the text, as the caller knows it
    assert model.generate(ids, min_length=11, pad_token_id=0).shape == (1, 11)
    assert model.generation_config.max_length == 11


def test_stop_strings() -> None:
    model, ids = add(tiny.llama()), tiny.tokens(1)
    # transformers tries tokens behind "abcdef", which has to be one.
    plain = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(49)} | {"abcdef": 49}, unk_token="<0>"))
    words = T.PreTrainedTokenizerFast(tokenizer_object=plain)
    expected = greedy(model, ids[0], 6).tolist()
    stop = next(i for i in range(1, 6) if expected[i] not in expected[:i])
    got = model.generate(
        ids, stop_strings=[f"<{expected[stop]}>"], tokenizer=words, max_new_tokens=6, pad_token_id=0,
        suppress_tokens=[2],
    )  # fmt: skip
    assert got[0, 7:].tolist() == expected[: stop + 1]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_generate(family: str) -> None:
    model, (ids, mask) = add(base_of(family), "p_tuning"), padded("right")
    how = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5}
    got = model.generate(input_ids=ids, attention_mask=mask, **how)
    base = model.get_base_model()
    for row in range(3):
        text = ids[row][mask[row].bool()]
        with model.disable_adapter():
            embeds = torch.cat([prompt_of(model), base.get_input_embeddings()(text)])[None]
            expected = base.generate(inputs_embeds=embeds, use_cache=False, **how)
        assert got[row].tolist() == expected[0].tolist()
