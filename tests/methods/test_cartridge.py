"""Cartridges by hand: what is frozen, and starts from a context that make the model read it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import tiny
import veneer
from parity.families import bart, gpt2, t5
from veneer.errors import BaseMismatchError, ConfigError, StateError
from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
from veneer.preparation import Run, places_of
from veneer.prompting.contexts import read
from veneer.training.run import train

SETTINGS: list[dict[str, Any]] = []  # needs a model with attention: see tests/prompting/test_prefixes.py
SHOWN = {"num_virtual_tokens": 4}
N = 4
CONTEXT, TEXT = tiny.tokens(1, N, seed=3), tiny.tokens(2, 6)
WORDS = " ".join(f"w{i}" for i in CONTEXT[0].tolist())
EXACT = {"rtol": 1e-9, "atol": 1e-10}
SINGLE = {"rtol": 1e-5, "atol": 1e-6}  # models whose softmax or norms are in float32


def cartridge(model: T.PreTrainedModel, **settings: Any) -> veneer.PeftModel:
    given = {"name": "cartridge", "num_virtual_tokens": N, **settings}
    return veneer.get_peft_model(model.double().eval(), given).eval()


def tokenizer(template: str | None = None) -> T.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


def after(model: Any, context: Tensor = CONTEXT) -> Tensor:
    """The base model's logits of the text behind the context."""
    with model.disable_adapter():
        return model(torch.cat([context.expand(len(TEXT), -1), TEXT], 1)).logits[:, context.shape[1] :]


def context_of(model: veneer.PeftModel, text: Tensor, answer: Tensor) -> Tensor:
    places = places_of(model, "default")
    adapters: Any = {path: wrapper.adapters["default"] for path, wrapper in places.items()}
    return read(adapters, Run(model, places, ()), text, answer)


def test_the_first_tokens_are_a_buffer() -> None:
    model = cartridge(tiny.llama(), num_frozen_tokens=1)
    before = veneer.get_peft_model_state_dict(model)["prompt_embeddings"].clone()
    assert before.shape == (N, 2 * 2 * 16)
    assert model.get_nb_trainable_parameters()[0] == (N - 1) * 2 * 2 * 16
    model(TEXT, labels=TEXT).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = (veneer.get_peft_model_state_dict(model)["prompt_embeddings"] != before).any(1)
    assert changed.tolist() == [False, True, True, True]


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize("method", ["cartridge", "prefix_tuning"])
def test_from_a_text_it_is_the_text(make: Any, method: str) -> None:
    model = cartridge(make(), name=method)
    whole = veneer.initialize_kv_prefix_from_text(model, tokenizer(), text=WORDS + " w9 w9")
    torch.testing.assert_close(model(TEXT).logits, after(model), **EXACT)
    with model.disable_adapter():
        cache = model(CONTEXT, use_cache=True).past_key_values
    again = veneer.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    torch.testing.assert_close(whole, again)
    torch.testing.assert_close(veneer.get_peft_model_state_dict(model)["prompt_embeddings"], whole)


def test_the_system_message_of_a_chat() -> None:
    model = cartridge(tiny.llama())
    spoken = "{% for message in messages %}w5 {{ message.content }}{% endfor %}"
    veneer.initialize_kv_prefix_from_text(model, tokenizer(spoken), text=WORDS)
    behind = torch.cat([torch.tensor([[5]]), CONTEXT[:, :-1]], 1)
    torch.testing.assert_close(model(TEXT).logits, after(model, behind), **EXACT)


@pytest.mark.parametrize("make", [t5, bart])
def test_decoders_begin_with_the_context(make: Any) -> None:
    model = cartridge(make(), places=["self"])
    source, answer = tiny.tokens(1, 5, seed=7), tiny.tokens(1, 3, seed=8)
    context_of(model, source[0, :N], CONTEXT[0])
    y = model(input_ids=source[:, :N], decoder_input_ids=answer).logits
    with model.disable_adapter():
        whole = model(input_ids=source[:, :N], decoder_input_ids=torch.cat([CONTEXT, answer], 1)).logits
    torch.testing.assert_close(y, whole[:, N:], **SINGLE)


def test_encoders_and_cross_attention_begin_with_the_context() -> None:
    """With as many tokens as the context has, a doubled set of keys and values is the set itself."""
    model = cartridge(bart(), places=["cross"])
    answer = tiny.tokens(1, 3, seed=8)
    context_of(model, CONTEXT[0], answer.repeat(1, 2)[0])
    y = model(input_ids=CONTEXT, decoder_input_ids=answer).logits
    with model.disable_adapter():
        torch.testing.assert_close(y, model(input_ids=CONTEXT, decoder_input_ids=answer).logits, **SINGLE)


@pytest.mark.parametrize("method", ["cartridge", "prefix_tuning"])
def test_preparing_reads_the_text_or_the_first_examples(method: str, tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    model = cartridge(tiny.llama(), name=method, init_text=WORDS, tokenizer_name_or_path=str(tmp_path))
    with pytest.raises(StateError, match="has to see data"):
        model.train()(TEXT)
    veneer.prepare(model)
    torch.testing.assert_close(model(TEXT).logits, after(model), **EXACT)
    whole = cartridge(tiny.llama(), name=method, init_text="w3 w4 w5 w6 w7 w8", num_virtual_tokens=None,
                      tokenizer_name_or_path=str(tmp_path))  # fmt: skip
    assert whole.peft_config["default"].num_virtual_tokens == 6
    rows = torch.tensor([[0, 3], [4, 5], [6, 7]])  # the first is padding
    batches = [{"input_ids": row[None], "attention_mask": (row[None] > 0).long()} for row in rows]
    model = cartridge(tiny.llama(), name=method, init_examples=True)
    veneer.prepare(model, batches)
    torch.testing.assert_close(model(TEXT).logits, after(model, torch.tensor([[3, 4, 5, 6]])), **EXACT)


def test_starts_that_are_none(tmp_path: Path) -> None:
    model = cartridge(tiny.llama())
    with pytest.raises(ConfigError, match="the context has 2 tokens"):
        veneer.initialize_kv_prefix_from_text(model, tokenizer(), text="w3 w4")
    with pytest.raises(ConfigError, match=r"1 layers, \(1, 2, 9, 8\); 2 layers"):
        veneer.initialize_kv_prefix_from_past_key_values(model, past_key_values=[(torch.zeros(1, 2, 9, 8),) * 2])
    with pytest.raises(ConfigError, match="num_virtual_tokens=7"):
        veneer.initialize_kv_prefix_from_text(model, tokenizer(), text=WORDS, num_virtual_tokens=7)
    with pytest.raises(ConfigError, match="num_frozen_tokens=5"):
        veneer.parse_method("cartridge:num_virtual_tokens=4,num_frozen_tokens=5")
    window = T.MistralConfig(**tiny.SIZES, num_key_value_heads=2, sliding_window=3, pad_token_id=0)
    model = cartridge(T.MistralForCausalLM(window))
    with model.disable_adapter():
        cache = model(tiny.tokens(1, 8), use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="its window slides"):
        veneer.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    other = veneer.get_peft_model(tiny.llama(), "lora")
    with pytest.raises(ConfigError, match="LoraConfig; one of cartridge or prefix_tuning"):
        veneer.initialize_kv_prefix_from_text(other, tokenizer(), text=WORDS)
    shared = cartridge(t5(), task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ConfigError, match=r"places=\['self'\]"):
        veneer.initialize_kv_prefix_from_text(shared, tokenizer(), text=WORDS)


def test_several_are_composed(tmp_path: Path) -> None:
    parts = []
    for seed, size in ((0, 2), (1, 3)):
        model = cartridge(tiny.llama(), num_virtual_tokens=size)
        tiny.randomise(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        parts.append(veneer.get_peft_model_state_dict(model)["prompt_embeddings"])
    folders = [tmp_path / "0", tmp_path / "1"]
    veneer.compose_cartridge_adapters(folders, output_path=tmp_path / "both")
    both = veneer.PeftModel.from_pretrained(tiny.llama().double(), tmp_path / "both")
    assert both.peft_config["default"].num_virtual_tokens == 5
    torch.testing.assert_close(veneer.get_peft_model_state_dict(both)["prompt_embeddings"], torch.cat(parts))
    cartridge(tiny.llama(seed=1)).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="different base models"):
        veneer.compose_cartridge_adapters([*folders, tmp_path / "other"], output_path=tmp_path / "x")
    with pytest.raises(ConfigError, match="two or more"):
        veneer.compose_cartridge_adapters(folders[:1], output_path=tmp_path / "x")


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    cartridge(tiny.llama()).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="trained on another base model"):
        veneer.PeftModel.from_pretrained(tiny.llama(seed=1), tmp_path)
    veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    veneer.PeftModel.from_pretrained(tiny.llama(seed=1), tmp_path, check_base=False)


@pytest.mark.parametrize("start", ["init_examples=true", "init_text=w3 w4 w5 w6"])
def test_a_training_run_starts_from_it(start: str, tmp_path: Path) -> None:
    """`veneer train` by its options: what it starts from is the context, and it learns from there."""
    base = tmp_path / "base"
    tiny.llama().save_pretrained(base)
    words = tokenizer()
    words.add_special_tokens({"pad_token": "w0", "eos_token": "w2"})
    words.save_pretrained(base)
    lines = [f'{{"prompt": "w{i % 9 + 3} w5", "completion": " w{i % 9 + 4}"}}' for i in range(16)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = RunOptions(
        task="causal-lm",
        model=ModelOptions(str(base), dtype="float32"),
        data=DataOptions(str(tmp_path / "data.jsonl")),
        output=OutputOptions(folder=str(tmp_path / "run")),
        method=f"cartridge:num_virtual_tokens={N},{start}",
        training={"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4},
    )
    console = Console(file=io.StringIO(), width=200)
    train(options, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("starts from the keys and values of init_text" if "text" in start else "Shown to the method") in said
    loaded = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path / "run")
    sink = veneer.get_peft_model_state_dict(loaded)["prompt_embeddings"][0]
    # The first token is frozen: still the one of the context, which is the first word of some example.
    fresh = veneer.get_peft_model(tiny.llama(), f"cartridge:num_virtual_tokens={N}")
    firsts = [3] if "text" in start else range(3, 12)
    for first in firsts:
        whole = veneer.initialize_kv_prefix_from_text(fresh, words, text=f"w{first} w5 w5 w5")
        if torch.allclose(whole[0], sink, atol=1e-5):
            return
    raise AssertionError("the first token is that of no context")
