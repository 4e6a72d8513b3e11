"""Prefixes here and in peft: same outputs, files both ways, same generated text, same ten steps, in every task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import Tensor, nn

import tiny
import veneer
from parity.families import NO_DROPOUT, bart, gpt2, t5
from parity.oracle import SINGLE, TIGHT, peft_says
from parity.test_training import STEPS

N = 3


@dataclass(frozen=True)
class Task:
    """A task and a model for it."""

    type: str
    make: Callable[[], Any]
    labels: Callable[[], dict[str, Tensor]] | None = None

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval().double()

    def inputs(self) -> dict[str, Tensor]:
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[1, 5:] = 0
        more = {"decoder_input_ids": tiny.tokens(3, 4, seed=1)} if self.type == "SEQ_2_SEQ_LM" else {}
        return {"input_ids": tiny.tokens(), "attention_mask": mask, **more}


def _bert(kind: type[nn.Module], **more: Any) -> Callable[[], Any]:
    return lambda: kind(T.BertConfig(**tiny.SIZES, **NO_DROPOUT["bert"], **more))


def _tokens() -> dict[str, Tensor]:
    return {"labels": tiny.tokens()}


TASKS = {
    "llama": Task("CAUSAL_LM", tiny.llama, _tokens),
    "gpt2": Task("CAUSAL_LM", gpt2, _tokens),
    "t5": Task("SEQ_2_SEQ_LM", t5, lambda: {"labels": tiny.tokens(3, 4)}),
    "bart": Task("SEQ_2_SEQ_LM", bart, lambda: {"labels": tiny.tokens(3, 4)}),
    "classes": Task("SEQ_CLS", lambda: tiny.bert(**NO_DROPOUT["bert"]), lambda: {"labels": torch.tensor([0, 2, 1])}),
    "roberta": Task("SEQ_CLS", lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**tiny.SIZES, num_labels=3))),
    "tokens": Task("TOKEN_CLS", _bert(T.BertForTokenClassification, num_labels=4)),
    "answers": Task("QUESTION_ANS", _bert(T.BertForQuestionAnswering)),
    "features": Task("FEATURE_EXTRACTION", _bert(T.BertModel)),
}
METHODS: dict[str, tuple[type[peft.PeftConfig], dict[str, Any]]] = {
    "prefix_tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": N}),
    "projected": (
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": N, "prefix_projection": True, "encoder_hidden_size": 12},
    ),
    "cartridge": (peft.CartridgeConfig, {"num_virtual_tokens": N, "num_frozen_tokens": 2}),
    "llama_adapter": (peft.AdaptionPromptConfig, {"adapter_len": N, "adapter_layers": 1}),
}
CASES = [(task, "prefix_tuning") for task in TASKS]
CASES += [("llama", "projected"), ("llama", "cartridge"), ("llama", "llama_adapter"), ("t5", "cartridge")]


@pytest.fixture(autouse=True)
def _peft_may_talk() -> Iterator[None]:
    with peft_says("`task_type` is None", ".*deprecated", "Passing a tuple of `past_key_values`"):
        yield


def theirs(task: Task, method: str) -> peft.PeftModel:
    cls, settings = METHODS[method]
    torch.manual_seed(1)
    return peft.get_peft_model(task.model(), cls(task_type=task.type, **settings)).eval()


def ours(task: Task, method: str) -> veneer.PeftModel:
    name = "prefix_tuning" if method == "projected" else method
    model = veneer.get_peft_model(task.model(), {"name": name, "task_type": task.type, **METHODS[method][1]})
    tiny.randomise(model, scale=0.6)
    if method == "cartridge":  # peft keeps what it loads in float32
        rounded = {name: x.float() for name, x in veneer.get_peft_model_state_dict(model).items()}
        veneer.set_peft_model_state_dict(model, rounded)
    return model.eval()


def tolerance(method: str) -> dict[str, float]:
    return SINGLE if method in ("projected", "llama_adapter") else TIGHT  # peft keeps or computes it in float32


def results(model: nn.Module, task: Task) -> list[Tensor]:
    """What the model gives, without a cache that only holds what it has read."""
    with torch.no_grad():
        output = model(**task.inputs())
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    found = [output[name] for name in names if name in output]
    assert found
    return found


@pytest.mark.parametrize(("task", "method"), CASES)
def test_files_both_ways(task: str, method: str, tmp_path: Path) -> None:
    kind = TASKS[task]
    here, there = ours(kind, method), theirs(kind, method)
    here.save_pretrained(tmp_path / "here")
    there.save_pretrained(tmp_path / "there")
    loaded_there = peft.PeftModel.from_pretrained(kind.model(), str(tmp_path / "here"))
    torch.testing.assert_close(results(here, kind), results(loaded_there.eval(), kind), **tolerance(method))
    loaded_here = veneer.PeftModel.from_pretrained(kind.model(), tmp_path / "there")
    torch.testing.assert_close(results(loaded_here, kind), results(there, kind), **tolerance(method))
    if task in ("llama", "t5"):
        text = {"input_ids": tiny.tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        how = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
        assert torch.equal(loaded_here.generate(**text, **how), there.generate(**text, **how))


def _copy(here: veneer.PeftModel, there: peft.PeftModel, method: str) -> None:
    given = veneer.get_peft_model_state_dict(here)
    if method == "projected":
        own = {k.removeprefix("prefix_encoder."): v for k, v in given.items() if k != "prompt_embeddings"}
        own["embedding.weight"] = own.pop("embedding")
        there.prompt_encoder["default"].load_state_dict(own)
    else:
        peft.set_peft_model_state_dict(there, given)


@pytest.mark.parametrize(("task", "method"), [c for c in CASES if TASKS[c[0]].labels is not None])
def test_ten_steps(task: str, method: str) -> None:
    kind = TASKS[task]
    here, there = ours(kind, method), theirs(kind, method)
    if method != "llama_adapter":
        there.prompt_encoder.double()
    _copy(here, there, method)
    for model in (here, there):
        chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(chosen, lr=1e-2)
        inputs = {k: v for k, v in kind.inputs().items() if k != "decoder_input_ids"}
        assert kind.labels is not None
        for step in range(STEPS):
            order = torch.arange(3).roll(step)
            batch = {name: x[order] for name, x in {**inputs, **kind.labels()}.items()}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = peft.get_peft_model_state_dict(there)
    found = {key: x for key, x in veneer.get_peft_model_state_dict(here).items() if key in wanted}
    torch.testing.assert_close(found, wanted, **tolerance(method))


def test_the_bias_of_the_output_projection_counts_once() -> None:
    kind = Task("CAUSAL_LM", lambda: tiny.llama(attention_bias=True))
    base = kind.model()
    tiny.randomise(base)
    start = results(base, kind)
    settings = METHODS["llama_adapter"][1]
    there = peft.get_peft_model(copy.deepcopy(base), peft.AdaptionPromptConfig(task_type=kind.type, **settings))
    assert not torch.allclose(results(there, kind)[0], start[0])
    here = veneer.get_peft_model(base, {"name": "llama_adapter", **settings})
    torch.testing.assert_close(results(here, kind), start, **TIGHT)


def test_trained_tensors_are_the_same_number() -> None:
    for method in METHODS:
        kind = TASKS["llama"]
        here, there = ours(kind, method), theirs(kind, method)
        assert here.get_nb_trainable_parameters()[0] == there.get_nb_trainable_parameters()[0]


def test_composed_cartridges_are_the_same_file(tmp_path: Path) -> None:
    kind = TASKS["llama"]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        ours(kind, "cartridge").save_pretrained(folder)
    veneer.compose_cartridge_adapters(folders, output_path=tmp_path / "here")
    peft.compose_cartridge_adapters(folders, output_path=tmp_path / "there")
    for where in ("here", "there"):
        model = veneer.PeftModel.from_pretrained(kind.model(), tmp_path / where)
        assert model.peft_config["default"].num_virtual_tokens == 2 * N
        assert model.peft_config["default"].num_frozen_tokens == 2


def test_starts_from_a_cache_are_the_same() -> None:
    kind = TASKS["llama"]
    here, there = ours(kind, "cartridge"), theirs(kind, "cartridge")
    there.prompt_encoder.double()
    cache = kind.model()(tiny.tokens(1, 5), use_cache=True).past_key_values
    mine = veneer.initialize_kv_prefix_from_past_key_values(here, past_key_values=cache)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    torch.testing.assert_close(mine, peft.initialize_kv_prefix_from_past_key_values(there, past_key_values=pairs))
    torch.testing.assert_close(results(here, kind), results(there, kind), **TIGHT)
