"""LLaMA-Adapter by hand: a softmax of its own, let in by a gate, before the output projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tiny
import veneer
from parity.families import gpt2, t5
from veneer.errors import ConfigError, TargetError
from veneer.preparation import Run, places_of
from veneer.prompting.contexts import _Recorder
from veneer.structure import attentions
from veneer.targets import walk

SETTINGS: list[dict[str, Any]] = []  # needs a model with attention: see tests/prompting/test_prefixes.py
PARITY: list[tuple[str, dict[str, Any]]] = [  # Llama, without biases: tests/parity/test_prefixes.py
    ("gpt2", {"target_modules": None, "adapter_len": 3, "adapter_layers": 2})
]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # peft's softmax is in float32
GROUPED = {**tiny.SIZES, "num_key_value_heads": 2, "pad_token_id": 0}


def open_gates(model: veneer.PeftModel) -> veneer.PeftModel:
    tiny.randomise(model, scale=0.7)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_term(bias: bool) -> None:
    base = tiny.llama(attention_bias=bias, attn_implementation="eager").double()
    model = veneer.get_peft_model(base, "llama_adapter:adapter_len=3,adapter_layers=1")
    layer = base.model.layers[1].self_attn
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    turn = base.model.rotary_emb(x, torch.arange(5)[None])
    start = layer(x, position_embeddings=turn, attention_mask=None)[0]
    torch.testing.assert_close(start, layer.base_layer(x, position_embeddings=turn, attention_mask=None)[0])
    open_gates(model)
    y = layer(x, position_embeddings=turn, attention_mask=None)[0]
    prompt, gate = (veneer.get_peft_model_state_dict(model)[
        f"base_model.model.model.layers.1.self_attn.adaption_{name}"] for name in ("prompt", "gate"))  # fmt: skip
    assert prompt.shape == (1, 3, 32)
    frozen = layer.base_layer
    query = frozen.q_proj(x).view(1, 5, 4, 8).transpose(1, 2)
    query = apply_rotary_pos_emb(query, query, *turn)[0][0]  # (heads, length, width)
    key, value = (
        p(prompt)[0].view(3, 2, 8).transpose(0, 1).repeat_interleave(2, 0) for p in (frozen.k_proj, frozen.v_proj)
    )
    more = (query @ key.transpose(1, 2) / 8**0.5).softmax(-1) @ value
    # The output projection without its bias: that is in the first term already.
    expected = start + gate * (more.transpose(0, 1).reshape(5, 32) @ frozen.o_proj.weight.T)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)  # eager attention is in float32


FAMILIES: dict[str, Any] = {
    "llama, biases": lambda: tiny.llama(attention_bias=True),
    "bert": tiny.bert,
    "t5": t5,
    "gpt2": gpt2,
    "gpt-neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**tiny.SIZES)),
    "bigcode": lambda: T.GPTBigCodeForCausalLM(T.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=50)),
    "bigcode, not grouped": lambda: T.GPTBigCodeForCausalLM(
        T.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=50, multi_query=False)
    ),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED)),
    "persimmon": lambda: T.PersimmonForCausalLM(T.PersimmonConfig(**tiny.SIZES, pad_token_id=0)),
    "modernbert": lambda: T.ModernBertModel(
        T.ModernBertConfig(**tiny.SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2)
    ),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=8)),
    "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**GROUPED)),
    "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**GROUPED, head_dim=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_goes_the_way_of_hidden_states(name: str) -> None:
    torch.manual_seed(0)
    base = FAMILIES[name]().double().eval()
    tiny.randomise(base)
    model = open_gates(veneer.get_peft_model(base, "llama_adapter:adapter_len=3"))
    places, seen, hidden = places_of(model, "default"), {}, {}
    for path, wrapper in places.items():
        wrapper.base_layer.register_forward_pre_hook(
            lambda m, args, kwargs, path=path: hidden.__setitem__(path, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    text = {"input_ids": tiny.tokens(1, 5)}
    more = {"decoder_input_ids": tiny.tokens(1, 4)} if base.config.is_encoder_decoder else {}
    with Run(model, places, ()).showing({path: _Recorder(path, seen.__setitem__) for path in places}), torch.no_grad():
        model(**text, **more, use_cache=False) if model.can_generate() else model(**text)
    with torch.no_grad():
        for path, wrapper in places.items():
            adapter: Any = wrapper.adapters["default"]
            keys, values = adapter.projected(hidden[path], wrapper.base_layer, torch.float64)
            torch.testing.assert_close(values, seen[path][1][0])
            torch.testing.assert_close(keys[:, :1], seen[path][0][0, :, :1])  # not turned at position 0
        assert not torch.equal(model(**text, **more)[0], _without(model, text, more))


def _without(model: veneer.PeftModel, text: Any, more: Any) -> Any:
    with model.disable_adapter():
        return model(**text, **more)[0]


def test_where_it_goes() -> None:
    model = veneer.get_peft_model(tiny.llama(), "llama_adapter")
    config: Any = model.peft_config["default"]
    assert (config.target_modules, config.adapter_len, config.adapter_layers) == ("self_attn", 10, 2)
    base = tiny.llama(num_hidden_layers=3)
    model = veneer.get_peft_model(base, "llama_adapter:adapter_layers=2,adapter_len=1")
    assert list(places_of(model, "default")) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    only = {"name": "llama_adapter", "target_modules": ["model.layers.0.self_attn"]}
    model = veneer.get_peft_model(tiny.llama(), only)
    assert model.peft_config["default"].target_modules == ["model.layers.0.self_attn"]  # not the upper ones
    found = attentions(t5(), dict(walk(t5())))
    assert list(places_of(veneer.get_peft_model(t5(), "llama_adapter"), "default")) == found["self"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"adapter_len": 0}, ConfigError, "adapter_len=0"),
        ({"adapter_layers": 3}, TargetError, "adapter_layers=3, but LlamaForCausalLM has 2"),
        ({"target_modules": "mlp"}, TargetError, "'mlp' is the name of no attention module"),
    ],
)
def test_settings_that_fit_nothing(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        veneer.get_peft_model(tiny.llama(), {"name": "llama_adapter", **settings})
