"""Virtual tokens here and in peft: logits, files both ways, `generate` and ten steps, for every task type.

Rows are padded on the right where they are: peft puts its tokens before padding on the left (docs/differences.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

import tiny
import veneer
from parity.families import FAMILIES, NO_DROPOUT, Family, gpt2
from parity.oracle import TIGHT, peft_says, tensors
from tiny import randomise
from veneer.method_strings import parse_method

N = 3
CONTEXT = {
    "cpt_token_ids": [7, 8, 9, 10, 11, 12, 13, 14],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.7,
}
TASKS = torch.tensor([2, 0, 1])

METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": N},
    "p_tuning": {"num_virtual_tokens": N, "encoder_hidden_size": 10},
    "p_tuning LSTM": {
        "num_virtual_tokens": N,
        "encoder_reparameterization_type": "LSTM",
        "encoder_hidden_size": 6,
        "encoder_dropout": 0.5,
    },
    "multitask_prompt_tuning": {
        "num_virtual_tokens": N,
        "num_tasks": 3,
        "num_ranks": 2,
        "num_transformer_submodules": 1,
    },
    "cpt": CONTEXT,
}
SINGLE = {"rtol": 1e-5, "atol": 1e-6}  # peft keeps a context in float32


def _right(**more: Tensor) -> dict[str, Tensor]:
    """Three rows, one of them padded on the right."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": tiny.tokens(), "attention_mask": mask, **more}


def _bert(cls: type[nn.Module], **changes: Any) -> nn.Module:
    return cls(T.BertConfig(**{**tiny.SIZES, "num_labels": 3, **NO_DROPOUT["bert"], **changes}))


def _types() -> Tensor:
    return (torch.arange(7) > 3).long().expand(3, -1)


def _llama_classifier() -> nn.Module:
    return T.LlamaForSequenceClassification(tiny.llama(num_labels=3).config)


def _family(name: str, make: Callable[[], nn.Module], batch: Callable[[], dict[str, Tensor]], task: str) -> Family:
    return Family(name, make, batch, None, {"task_type": task})


def _pairs() -> dict[str, Tensor]:
    return _right(decoder_input_ids=tiny.tokens(3, 5, seed=1))


KINDS = {
    "llama": _family("llama", FAMILIES["llama"].make, _right, "CAUSAL_LM"),
    "gpt2": _family("gpt2", gpt2, _right, "CAUSAL_LM"),
    "bert SEQ_CLS": _family(
        "bert",
        functools.partial(_bert, T.BertForSequenceClassification),
        lambda: _right(token_type_ids=_types()),
        "SEQ_CLS",
    ),
    "llama SEQ_CLS": _family("llama", _llama_classifier, lambda: {"input_ids": tiny.tokens()}, "SEQ_CLS"),
    "bert TOKEN_CLS": _family("bert", functools.partial(_bert, T.BertForTokenClassification), _right, "TOKEN_CLS"),
    "bert QUESTION_ANS": _family(
        "bert", functools.partial(_bert, T.BertForQuestionAnswering, num_labels=2), _right, "QUESTION_ANS"
    ),
    "bert FEATURE_EXTRACTION": _family("bert", functools.partial(_bert, T.BertModel), _right, "FEATURE_EXTRACTION"),
    "t5": _family("t5", FAMILIES["t5"].make, _pairs, "SEQ_2_SEQ_LM"),
    "bart": _family("bart", FAMILIES["bart"].make, _pairs, "SEQ_2_SEQ_LM"),
}
NO_TASKS = ("bert QUESTION_ANS", "bert FEATURE_EXTRACTION")  # where peft takes no task_ids
CELLS = [
    pytest.param(method, kind, id=f"{method}-{kind}".replace(" ", "_"))
    for method in METHODS
    for kind in KINDS
    if (method != "cpt" or kind in ("llama", "gpt2")) and (method != "multitask_prompt_tuning" or kind not in NO_TASKS)
]


def _values(method: str, kind: str) -> tuple[str, dict[str, Any]]:
    return method.partition(" ")[0], {**METHODS[method], **KINDS[kind].settings}


def _inputs(method: str, kind: str, labels: bool = False) -> dict[str, Any]:
    x = KINDS[kind].inputs()
    if method == "multitask_prompt_tuning":
        x["task_ids"] = TASKS
        if "decoder_input_ids" in x and not labels:  # peft reads the decoder's text from labels alone
            x["labels"] = x.pop("decoder_input_ids")
    return x


def _tolerance(method: str) -> dict[str, float]:
    return SINGLE if method == "cpt" else TIGHT


def ours(method: str, kind: str) -> veneer.PeftModel:
    name, values = _values(method, kind)
    model = veneer.get_peft_model(KINDS[kind].model(), parse_method({"name": name, **values}))
    randomise(model)
    return model.eval()


def theirs(method: str, kind: str, like: veneer.PeftModel) -> peft.PeftModel:
    """peft's model with the same tensors, those that only training needs included."""
    name, values = _values(method, kind)
    with peft_says():
        there = peft.get_peft_model(
            KINDS[kind].model(), PEFT_TYPE_TO_CONFIG_MAPPING[parse_method(name).peft_type](**values)
        ).double()
    own, given = there.prompt_encoder["default"], tensors(like)
    if method.startswith("p_tuning"):
        network = {}
        for key, tensor in given.items():
            if key.startswith("prompt_encoder.network."):
                name = key.removeprefix("prompt_encoder.network.")
                part, _, rest = name.partition(".")
                network[{"lstm": f"lstm_head.{rest}", "top": f"mlp_head.{rest}"}.get(part, f"mlp_head.{name}")] = tensor
        own.load_state_dict({"embedding.weight": given["prompt_encoder.embedding"], **network})
    elif method == "multitask_prompt_tuning":
        names = ("prefix_task_cols", "prefix_task_rows")
        own.load_state_dict({"embedding.weight": given["prompt_embeddings"], **{n: given[n] for n in names}})
    elif method == "cpt":
        context, delta = given["prompt_encoder.context"], given["prompt_encoder.delta"]
        own.load_state_dict({"embedding.weight": context, "delta_embedding.weight": delta})
    else:
        own.load_state_dict({"embedding.weight": given["prompt_embeddings"]})
    heads = {key: tensor for key, tensor in given.items() if key.startswith("base_model.")}
    state = dict(there.named_parameters())
    for key, tensor in heads.items():
        path, _, leaf = key.rpartition(".")
        state[f"{path}.modules_to_save.default.{leaf}"].data.copy_(tensor)
    return there.eval()


@pytest.mark.parametrize(
    "name", ["PromptTuningInit", "MultitaskPromptTuningInit", "PromptEncoderReparameterizationType"]
)
def test_enumerations_are_those_of_peft(name: str) -> None:
    theirs = getattr(peft, name, None) or getattr(peft.tuners.multitask_prompt_tuning, name)
    assert {member.name: member.value for member in getattr(veneer, name)} == {m.name: m.value for m in theirs}


@pytest.mark.parametrize(("method", "kind"), CELLS)
def test_logits_and_files(method: str, kind: str, tmp_path: Path) -> None:
    here, x = ours(method, kind), _inputs(method, kind)
    there = theirs(method, kind, here)

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            given = model(**x)
        return given.logits if "logits" in given else given[0]

    expected = logits(there)
    torch.testing.assert_close(logits(here), expected, **_tolerance(method))
    with here.disable_adapter():
        assert not torch.allclose(logits(here)[:, -1], expected[:, -1], rtol=1e-3)
    here.save_pretrained(tmp_path / "ours")
    there.save_pretrained(str(tmp_path / "theirs"))
    again = veneer.PeftModel.from_pretrained(KINDS[kind].model(), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), expected, **_tolerance(method))
    with peft_says("Found missing", "Some weights"):
        loaded = peft.PeftModel.from_pretrained(KINDS[kind].model(), str(tmp_path / "ours")).double()
    torch.testing.assert_close(logits(loaded), expected, **SINGLE)


def _labels(kind: str) -> dict[str, Tensor]:
    if kind == "bert QUESTION_ANS":
        return {"start_positions": torch.tensor([1, 0, 4]), "end_positions": torch.tensor([3, 2, 4])}
    task = KINDS[kind].settings["task_type"]
    if task == "SEQ_CLS":
        return {"labels": torch.tensor([0, 2, 1])}
    if task == "SEQ_2_SEQ_LM":
        return {"labels": tiny.tokens(3, 5, seed=3)}
    return {"labels": tiny.tokens() % 3 if task == "TOKEN_CLS" else tiny.tokens()}


# peft neither lengthens the labels of tokens nor moves those of positions (docs/differences.md).
TRAINED = [cell for cell in CELLS if cell.values[1] in ("llama", "bert SEQ_CLS", "t5")]


@pytest.mark.parametrize(("method", "kind"), TRAINED)
def test_ten_steps(method: str, kind: str) -> None:
    here = ours(method, kind)
    there = theirs(method, kind, here)
    x = {name: value for name, value in _inputs(method, kind, labels=True).items() if name != "decoder_input_ids"}
    x |= _labels(kind)

    def train(model: Any) -> tuple[list[float], Tensor]:
        model.train()
        if method == "p_tuning LSTM":  # its dropout would draw other numbers
            (model.prompt_encoder["default"] if isinstance(model, peft.PeftModel) else _shared(model)).eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        losses = []
        for _ in range(10):
            loss = model(**x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, tensors(model)["prompt_embeddings"]

    (losses, prompt), (expected, wanted) = train(here), train(there)
    # `from_file` of a context begins with new bounds; peft's float32 shows there.
    tolerance = {"rtol": 2e-4, "atol": 2e-5} if method == "cpt" else {"rtol": 1e-6, "atol": 1e-8}
    assert losses == pytest.approx(expected, rel=tolerance["rtol"])
    torch.testing.assert_close(prompt.double(), wanted.double(), **tolerance)
    assert losses[-1] < losses[0]


def _shared(model: veneer.PeftModel) -> nn.Module:
    return next(iter(model._adapters("default").values())).shared


@pytest.mark.parametrize(
    ("method", "kind", "how"),
    [
        ("p_tuning", "llama", {}),
        ("p_tuning", "gpt2", {"num_beams": 3}),
        ("cpt", "llama", {"do_sample": True}),
        ("multitask_prompt_tuning", "t5", {"num_beams": 3}),
        ("prompt_tuning", "bart", {}),
    ],
)
def test_generate(method: str, kind: str, how: dict[str, Any]) -> None:
    here = ours(method, kind)
    there = theirs(method, kind, here)
    x = {name: value for name, value in _inputs(method, kind, labels=True).items() if name == "task_ids"}
    x |= {"input_ids": tiny.tokens(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}

    def run(model: Any) -> Tensor:
        torch.manual_seed(0)
        with peft_says("Position ids are not supported"):
            return model.generate(**x, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **how)

    assert torch.equal(run(here), run(there))
