"""Which modules are adapted, and which are trained whole, on the families that peft knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import nn

import tiny
import veneer
from parity.families import FAMILIES, Family, text
from parity.oracle import (
    PARAMETER_PATTERN,
    TIGHT,
    load_here,
    load_there,
    ours,
    output,
    peft_says,
    same_tensors,
    settings,
    tensors,
    theirs,
    trained,
    twins,
)
from veneer.targets import match

H = tiny.SIZES
GROUPED = {**H, "num_key_value_heads": 2, "head_dim": 8}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 32}

KNOWN: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)),
    "bert": lambda: T.BertModel(T.BertConfig(**H)),
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)),
    "codegen": lambda: T.CodeGenForCausalLM(T.CodeGenConfig(**OLD, rotary_dim=4)),
    "deberta": lambda: T.DebertaModel(T.DebertaConfig(**H)),
    "deberta-v2": lambda: T.DebertaV2Model(T.DebertaV2Config(**H)),
    "electra": lambda: T.ElectraModel(T.ElectraConfig(**H, embedding_size=16)),
    "falcon": lambda: T.FalconForCausalLM(T.FalconConfig(**{k: v for k, v in H.items() if k != "intermediate_size"})),
    "gemma": lambda: T.GemmaForCausalLM(T.GemmaConfig(**GROUPED)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**GROUPED)),
    "gemma3_text": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**GROUPED)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**OLD)),
    "gpt_bigcode": lambda: T.GPTBigCodeForCausalLM(T.GPTBigCodeConfig(**OLD)),
    "gpt_neo": lambda: T.GPTNeoForCausalLM(
        T.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    ),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**H)),
    "gptj": lambda: T.GPTJForCausalLM(T.GPTJConfig(**OLD, rotary_dim=4)),
    "layoutlm": lambda: T.LayoutLMModel(T.LayoutLMConfig(**H)),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**H)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**H, num_key_value_heads=2)),
    "mpt": lambda: T.MptForCausalLM(T.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=50)),
    "mt5": lambda: T.MT5ForConditionalGeneration(T.MT5Config(**T5)),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    ),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**H, num_key_value_heads=2)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED)),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**H)),
    "stablelm": lambda: T.StableLmForCausalLM(T.StableLmConfig(**H)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "xlm-roberta": lambda: T.XLMRobertaModel(T.XLMRobertaConfig(**H)),
}

# peft adapts more here; named in docs/differences.md.
MORE: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "phi": (lambda: T.PhiForCausalLM(T.PhiConfig(**H)), {"fc1", "fc2"}),
    "nemotron_h": (
        lambda: T.NemotronHForCausalLM(
            T.NemotronHConfig(**GROUPED, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=1)
        ),
        {"k_proj", "o_proj"},
    ),
}


def bare(make: Callable[[], nn.Module]) -> nn.Module:
    """The model without memory: only its modules matter."""
    with torch.device("meta"):
        return make()


def chosen_by_peft(model: nn.Module, **settings: Any) -> set[str]:
    with peft_says("fan_in_fan_out is set to False"), torch.device("meta"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings), low_cpu_mem_usage=True)
    return set(adapted.base_model.targeted_module_names)


@pytest.mark.parametrize("name", KNOWN)
def test_default_targets(name: str) -> None:
    model = bare(KNOWN[name])
    assert model.config.model_type == name
    assert set(match(model, veneer.LoraConfig())) == chosen_by_peft(model)


@pytest.mark.parametrize("name", MORE)
def test_default_targets_of_fewer_modules(name: str) -> None:
    make, more = MORE[name]
    model = bare(make)
    ours, theirs = set(match(model, veneer.LoraConfig())), chosen_by_peft(model)
    assert ours < theirs
    assert {path.rpartition(".")[2] for path in theirs - ours} == more


@pytest.mark.parametrize("name", ["bart", "bert", "bloom", "deberta", "gemma2", "gpt2", "gptj", "mpt", "opt", "t5"])
def test_all_linear(name: str) -> None:
    model = bare(KNOWN[name])
    here = set(match(model, veneer.LoraConfig(target_modules="all-linear")))
    assert here == chosen_by_peft(model, target_modules="all-linear")


def _distilbert() -> nn.Module:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50}
    return T.DistilBertForSequenceClassification(T.DistilBertConfig(**sizes, num_labels=3))


def _score() -> nn.Module:
    return T.LlamaForSequenceClassification(T.LlamaConfig(**H, num_labels=3, pad_token_id=0))


HEADS = [
    Family("distilbert", _distilbert, text, ["q_lin", "v_lin"], {"task_type": "SEQ_CLS"}),
    Family("score", _score, text, None, {"task_type": "SEQ_CLS"}),
    Family(
        "roberta",
        lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**H, num_labels=3)),
        text,
        "all-linear",
        {"task_type": "SEQ_CLS"},
    ),
    Family(
        "tokens",
        lambda: T.BertForTokenClassification(T.BertConfig(**H, num_labels=3)),
        text,
        ["query"],
        {"task_type": "TOKEN_CLS"},
    ),
    Family("answers", lambda: T.BertForQuestionAnswering(T.BertConfig(**H)), text, None, {"task_type": "QUESTION_ANS"}),
]


@pytest.mark.parametrize("family", HEADS, ids=lambda family: family.name)
def test_heads_of_tasks(family: Family, tmp_path: Path) -> None:
    here, there = twins(family, settings(family))
    x = family.inputs()
    same_tensors(tensors(here), tensors(there))
    assert trained(here) == trained(there)
    assert any("lora_" not in key for key in trained(here))
    torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
    there.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(output(load_here(family, tmp_path / "theirs"), x), output(there, x), **TIGHT)
    here.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(output(load_there(family, tmp_path / "ours"), x), output(here, x), **TIGHT)


def test_all_linear_of_a_head_that_peft_cannot_make_can_be_read_by_it(tmp_path: Path) -> None:
    family = next(family for family in HEADS if family.name == "answers")
    values = settings(family, target_modules="all-linear")
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        theirs(family, values)
    here = ours(family, values)
    here.save_pretrained(tmp_path)
    x = family.inputs()
    torch.testing.assert_close(output(load_there(family, tmp_path), x), output(here, x), **TIGHT)


def test_all_linear_with_experts(tmp_path: Path) -> None:
    """There it adapts the experts and the router too; files say what was meant."""
    family = FAMILIES["mixtral"]
    values = settings(family, target_modules="all-linear", target_parameters=None)
    with peft_says(PARAMETER_PATTERN):
        here, there, x = ours(family, values), theirs(family, values), family.inputs()
    assert set(tensors(here)) < set(tensors(there))
    assert any("mlp.experts" in key for key in set(tensors(there)) - set(tensors(here)))
    there.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(output(load_here(family, tmp_path / "theirs"), x), output(there, x), **TIGHT)
    here.save_pretrained(tmp_path / "ours")
    loaded = load_there(family, tmp_path / "ours")
    same_tensors(tensors(loaded), tensors(here))
    torch.testing.assert_close(output(loaded, x), output(here, x), **TIGHT)


@pytest.mark.parametrize("targets", ["attention-output", ["ffn-output", "q_proj"], lambda path, _: "1.mlp" in path])
def test_targets_that_peft_does_not_know_are_written_as_names(targets: Any, tmp_path: Path) -> None:
    if callable(targets):
        chosen = targets
        targets = lambda path, module: chosen(path, module) and isinstance(module, nn.Linear)  # noqa: E731
    family = FAMILIES["llama"]
    here = ours(family, settings(family, target_modules=targets))
    here.save_pretrained(tmp_path)
    loaded, x = load_there(family, tmp_path), family.inputs()
    same_tensors(tensors(loaded), tensors(here))
    torch.testing.assert_close(output(loaded, x), output(here, x), **TIGHT)


def test_layers_with_all_linear_can_be_read_by_peft(tmp_path: Path) -> None:
    """peft takes layers only with a list of names, so a list is what is written."""
    family = FAMILIES["llama"]
    here = ours(family, settings(family, target_modules="all-linear", layers_to_transform=[1]))
    here.save_pretrained(tmp_path)
    loaded, x = load_there(family, tmp_path), family.inputs()
    same_tensors(tensors(loaded), tensors(here))
    torch.testing.assert_close(output(loaded, x), output(here, x), **TIGHT)


def test_layers_of_a_model_without_a_head() -> None:
    """The list of layers stands at the top, where peft does not look for it unless it is named."""
    family = replace(FAMILIES["llama"], make=lambda: tiny.llama(attention_bias=True).model, settings={})
    values = settings(family, layers_to_transform=[1])
    with pytest.raises(ValueError, match="not found in the base model"):
        theirs(family, values)
    here, there = twins(family, {**values, "layers_pattern": "layers"})
    same_tensors(tensors(here), tensors(there))
    assert set(tensors(ours(family, values))) == set(tensors(here))
