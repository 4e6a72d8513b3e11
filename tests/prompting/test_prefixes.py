"""Prefixes in every kind of attention, against attention written out, and against runs without padding or cache."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
import veneer
from parity.families import NO_DROPOUT, bart, gpt2, t5
from veneer.adapted import BASE
from veneer.errors import TargetError, UnsupportedError

N = 3
GROUPED: dict[str, Any] = {**tiny.SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
OPT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
    "dropout": 0.0, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, Callable[..., Any]] = {
    "llama": tiny.llama,
    "one layer": lambda: tiny.llama(num_hidden_layers=1),
    "gpt2": gpt2,
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(**OPT)),
    "mistral, window": lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=3)),
    "gemma3, window": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=3)),
    "bert": lambda: tiny.bert(**NO_DROPOUT["bert"]),
    "t5": t5,
    "bart": bart,
}
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
SINGLE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}  # parts of models are in float32, whatever their type
METHODS = {
    "prefix_tuning": f"prefix_tuning:num_virtual_tokens={N}",
    "cartridge": f"cartridge:num_virtual_tokens={N}",
    "llama_adapter": f"llama_adapter:adapter_len={N}",
}


def adapted(family: str, method: str, attention: str = "sdpa", seed: int = 0, **settings: Any) -> veneer.PeftModel:
    """The model with an adapter of which nothing is zero."""
    torch.manual_seed(seed)
    base = MODELS[family]().eval().double()
    base.set_attn_implementation(attention)
    model = veneer.get_peft_model(base, dataclasses.replace(veneer.parse_method(METHODS[method]), **settings))
    tiny.randomise(model, seed, scale=0.8)
    return model.eval()


def batch(side: str, lengths: tuple[int, ...] = (4, 7, 6)) -> dict[str, Tensor]:
    """Rows of unequal length."""
    columns, longest = torch.arange(max(lengths)), max(lengths)
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": tiny.tokens(len(lengths), longest) * mask, "attention_mask": mask}


def row(inputs: dict[str, Tensor], index: int) -> Tensor:
    """One row without its padding, (1, length)."""
    return inputs["input_ids"][index][inputs["attention_mask"][index].bool()][None]


@pytest.fixture
def written_out() -> Iterator[dict[int, list[Any]]]:
    """An attention of its own, under the name `written_out`: softmax over the keys of a prefix and the real ones.

    Gives the table, by number of the layer, of what each finds: keys, values, and none or a gate.
    """
    table: dict[int, list[Any]] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        bias = torch.zeros(1, 1, query.shape[2], key.shape[2], dtype=query.dtype) if mask is None else mask
        scale = query.shape[-1] ** -0.5 if how.get("scaling") is None else how["scaling"]
        prefix, more = [], 0.0
        for keys, values, gate in table.get(getattr(module, "layer_idx", None), ()):
            wide = [x.repeat_interleave(groups, 0) for x in (keys, values)]
            if gate is None:
                prefix.append(wide)
            else:
                more = gate * ((query @ wide[0].mT * scale).softmax(-1) @ wide[1])
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.mT * scale + bias[..., : key.shape[2]]
        for keys, values in prefix:
            scores = torch.cat([query @ keys.mT * scale, scores], -1)
            value = torch.cat([values.expand(len(value), -1, -1, -1), value], 2)
        return (scores.softmax(-1) @ value + more).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("written_out", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("written_out", eager_mask)
    yield table
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("written_out")
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("written_out")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral, window", "gemma3, window"])
def test_attention_is_that_written_out(family: str, attention: str, written_out: dict[int, list[Any]]) -> None:
    """Grouped queries, windows (a prefix stays in sight), padding on both sides."""
    model = adapted(family, "cartridge", attention)
    shared: Any = next(m for m in model.modules() if type(m).__name__ == "Parts")
    written_out.update({i: [(*shared.of_layer(i), None)] for i in (0, 1)})
    for side in ("left", "right"):
        inputs = batch(side)
        places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            y = model(**inputs, position_ids=places).logits
            base = model.get_base_model()
            with model.disable_adapter():
                base.set_attn_implementation("written_out")
                expected = base(**inputs, position_ids=places + N).logits  # the text begins at position N
                base.set_attn_implementation(attention)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(y[real], expected[real], **(SINGLE if family != "gpt2" else EXACT))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral, window"])
def test_padded_cached_and_in_a_batch_as_alone(family: str, method: str) -> None:
    """Against single rows, unpadded, without a cache."""
    model = adapted(family, method)
    inputs = batch("left")
    ids = inputs["input_ids"]
    greedy: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(**inputs, **greedy, output_logits=True, return_dict_in_generate=True)
    static = model.generate(**inputs, **greedy, cache_implementation="static")
    assert torch.equal(found.sequences, static)
    rights = batch("right")
    right = model(**rights).logits
    for index in range(len(ids)):
        text = row(inputs, index)
        for step in range(5):
            logits = model(text, use_cache=False).logits[:, -1]
            torch.testing.assert_close(found.logits[step][index], logits[0].to(found.logits[step]), **SINGLE)
            text = torch.cat([text, found.sequences[index : index + 1, ids.shape[1] + step][None]], 1)
        alone = row(rights, index)
        torch.testing.assert_close(right[index, : alone.shape[1]], model(alone).logits[0], **SINGLE)


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_assistants(method: str) -> None:
    model = adapted("llama", method)
    inputs = batch("left")
    beams: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    cached = model.generate(**inputs, **beams)
    assert torch.equal(cached, model.generate(**inputs, **beams, use_cache=False))
    for index in range(3):
        alone = model.generate(row(inputs, index), **beams)[0, -4:]
        assert alone.tolist() == cached[index, -4:].tolist()
    text = row(inputs, 1)
    plain = model.generate(text, max_new_tokens=6, do_sample=False)
    helped = model.generate(text, max_new_tokens=6, do_sample=False, assistant_model=tiny.llama(seed=2).double())
    assert torch.equal(plain, helped)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("place", ["self", "encoder", "cross"])
def test_encoder_decoders(family: str, place: str) -> None:
    """Places in both halves, with relative positions in T5: eager as sdpa, cached as whole, and all of it matters."""
    model = adapted(family, "cartridge", places=[place])
    inputs = batch("right")
    greedy: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = model.generate(**inputs, **greedy, output_logits=True, return_dict_in_generate=True)
    base = model.get_base_model()
    for attention in ("sdpa", "eager"):
        base.set_attn_implementation(attention)
        for index in range(3):
            whole = model(row(inputs, index), decoder_input_ids=found.sequences[index : index + 1, :-1]).logits[0]
            for step in range(4):
                torch.testing.assert_close(found.logits[step][index], whole[step].to(found.logits[step]), **SINGLE)
    with model.disable_adapter():
        assert not torch.allclose(whole, base(row(inputs, 2), decoder_input_ids=found.sequences[2:, :-1]).logits[0])


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """In float64, unlike the models' own."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        return F.cross_entropy(model(**inputs, decoder_input_ids=ids).logits.flatten(0, 1), ids.flatten())
    if not model.can_generate():
        return F.cross_entropy(model(**inputs).logits, torch.tensor([0, 2, 1]))
    logits = model(**inputs, use_cache=False).logits
    told = real[:, :-1] & real[:, 1:]  # nothing is told by what stands at padding
    return F.cross_entropy(logits[:, :-1][told], ids[:, 1:][told])


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(model, inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_gradients(family: str, method: str) -> None:
    """Those of finite differences; the same with both kinds of checkpointing."""
    model, inputs = adapted(family, method).train(), batch("right")
    expected = gradients(model, inputs)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            direction = torch.randn_like(parameter)
            with torch.no_grad():
                parameter += 1e-3 * direction
                above = _loss(model, inputs)
                parameter -= 2e-3 * direction
                below = _loss(model, inputs)
                parameter += 1e-3 * direction
            slope = float((expected[name] * direction).sum())
            assert float(above - below) / 2e-3 == pytest.approx(slope, rel=1e-2, abs=2e-4)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients(model, inputs)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, **SINGLE)


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_from_a_file(method: str, tmp_path: Path) -> None:
    def steps(model: veneer.PeftModel, state: Any, count: int) -> Any:
        chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(chosen, lr=0.01)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(count):
            _loss(model, batch("right")).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.state_dict()

    whole = adapted("llama", method)
    half = copy.deepcopy(whole)
    steps(whole, None, 4)
    state = steps(half, None, 2)
    half.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(tiny.llama().double(), tmp_path, is_trainable=True)
    steps(again, state, 2)
    ours, theirs = (veneer.get_peft_model_state_dict(model) for model in (whole, again))
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "side"), [("llama", "right"), ("mistral, window", "left"), ("bert", "right")])
def test_packed_rows(family: str, side: str, method: str) -> None:
    model, inputs = adapted(family, method), batch(side)
    expected, loss = gradients(model, inputs), _loss(model, inputs)
    with veneer.packed_rows(model):
        torch.testing.assert_close(_loss(model, inputs), loss, **SINGLE)
        torch.testing.assert_close(gradients(model, inputs), expected, **SINGLE)


def test_rows_of_one_batch_have_their_own(tmp_path: Path) -> None:
    """Two prefixes of unequal length, a gate, LoRA and the base model: forward, greedy and beams as alone."""
    model = adapted("llama", "prefix_tuning")
    others = {"longer": "cartridge:num_virtual_tokens=5", "gated": METHODS["llama_adapter"], "lora": "lora:r=2"}
    for seed, (name, method) in enumerate(others.items(), 1):
        model.add_adapter(name, method)
        model.set_adapter(name)
        tiny.randomise(model, seed, scale=0.5)
    model.set_adapter("default")
    names = ["longer", BASE, "default", "lora", "gated", "longer"]
    inputs = batch("left", (4, 7, 6, 5, 7, 3))
    y = model(**inputs, adapter_names=names).logits
    how: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    greedy = model.generate(**inputs, **how, adapter_names=names)
    beams = model.generate(**inputs, **how, num_beams=2, adapter_names=names)
    for index, name in enumerate(names):
        text = row(inputs, index)
        if name != BASE:
            model.set_adapter(name)
        with model.disable_adapter() if name == BASE else torch.no_grad():
            torch.testing.assert_close(y[index, -text.shape[1] :], model(text).logits[0], **EXACT)
            assert model.generate(text, **how)[0, -4:].tolist() == greedy[index, -4:].tolist()
            assert model.generate(text, **how, num_beams=2)[0, -4:].tolist() == beams[index, -4:].tolist()


def test_rows_of_an_encoder_decoder() -> None:
    model = adapted("t5", "prefix_tuning")
    model.add_adapter("longer", "cartridge:num_virtual_tokens=5")
    names, inputs = ["longer", BASE, "default"], batch("right")
    answers = tiny.tokens(3, 4, seed=5)
    y = model(**inputs, decoder_input_ids=answers, adapter_names=names).logits
    for index, name in enumerate(names):
        model.set_adapter(name if name != BASE else "default")
        with model.disable_adapter() if name == BASE else torch.no_grad():
            alone = model(row(inputs, index), decoder_input_ids=answers[index : index + 1]).logits[0]
        torch.testing.assert_close(y[index], alone, **SINGLE)
    numbered = adapted("bart", "prefix_tuning")
    numbered.add_adapter("longer", "cartridge:num_virtual_tokens=5")
    with pytest.raises(UnsupportedError, match="numbers the tokens of all rows alike"):
        numbered(**inputs, decoder_input_ids=answers, adapter_names=names)


@pytest.mark.parametrize("method", METHODS)
def test_stacked_disabled_copied(method: str) -> None:
    model, inputs = adapted("llama", method), batch("left")
    expected = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**inputs).logits, expected, rtol=0, atol=0)
        tiny.randomise(twin, seed=5)
        assert not torch.equal(twin(**inputs).logits, expected)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, tiny.llama().double()(**inputs).logits, **EXACT)
    model.add_adapter("lora", "lora:r=2")
    model.set_adapter(["default", "lora"])
    torch.testing.assert_close(model(**inputs).logits, expected, **EXACT)  # LoRA starts as nothing
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.merge_adapter(["default"])
    model.float()
    expected = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        y = model(**inputs).logits
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max().detach()))


def test_compiled() -> None:
    model, inputs = adapted("one layer", "prefix_tuning"), {"input_ids": tiny.tokens()}
    expected = model(**inputs, use_cache=False).logits
    try:
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, **EXACT)
    finally:
        torch.compiler.reset()


def _flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any) -> tuple[Tensor, None]:
    """What flash kernels do: (rows, keys) as mask, and a causal one that is aligned at the end."""
    assert module.config._attn_implementation == "flash_attention_stub"  # they read their name from there
    groups, (length, keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    seen = torch.ones(length, keys, dtype=torch.bool)
    if module.is_causal if how.get("is_causal") is None else how["is_causal"]:
        seen = seen.tril(keys - length)
    if mask is not None:
        seen = seen & mask[:, None, None, -keys:].bool()
    scores = (query @ key.mT * how["scaling"]).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("method", METHODS)
def test_flash_kernels_are_called_as_they_want_it(method: str) -> None:
    """By a function that does what they do: no kernel runs here."""
    ALL_ATTENTION_FUNCTIONS.register("flash_attention_stub", _flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_attention_stub", flash_attention_mask)
    model = adapted("llama", method)
    inputs, texts = batch("left"), {"input_ids": tiny.tokens()}
    expected = [model(**given).logits for given in (inputs, texts)]
    model.get_base_model().config._attn_implementation_internal = "flash_attention_stub"
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[0][real], **SINGLE)
    torch.testing.assert_close(model(**texts).logits, expected[1], **SINGLE)
    if method != "llama_adapter":
        model.add_adapter("lora", "lora:r=2")
        with pytest.raises(UnsupportedError, match="prefixes of some rows only"):
            model(**inputs, adapter_names=["default", BASE, "lora"])
        windowed = adapted("mistral, window", method)
        windowed.get_base_model().config._attn_implementation_internal = "flash_attention_stub"
        with pytest.raises(UnsupportedError, match="beside a sliding window"):
            windowed(**inputs)


@pytest.mark.parametrize("method", METHODS)
def test_models_outside_the_interface(method: str) -> None:
    base = T.DebertaV2Model(T.DebertaV2Config(**tiny.SIZES))
    with pytest.raises(TargetError, match="none of its modules looks its attention function up"):
        veneer.get_peft_model(base, METHODS[method])
    base = T.MPNetModel(T.MPNetConfig(**tiny.SIZES))
    with pytest.raises(TargetError, match="none of its modules looks its attention function up"):
        veneer.get_peft_model(base, METHODS[method])
