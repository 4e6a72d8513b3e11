"""Which layers of a model become int8, and how it is said, kept and read again."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
import veneer
from veneer.errors import ConfigError, StateError
from veneer.quantization import LayerForm, Quantization, quantize
from veneer.samples import model_folder
from veneer.stores.int8 import Int8Linear


class Projections(nn.Module):
    """Three layers of one input, the third with one huge entry a row, and one that is not called."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.spiky, self.idle = (nn.Linear(width, width) for _ in range(4))
        with torch.no_grad():
            self.spiky.weight[:, 7] = 1000.0

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) + self.key(x) + self.spiky(x)


def inputs(outlier: int | None = None, width: int = 64) -> Tensor:
    x = torch.randn(4, 16, width, generator=torch.Generator().manual_seed(1))
    x[..., 7] = 0.0  # where the spiky weight is
    if outlier is not None:
        x[..., outlier] += 200  # nearly the same for all tokens, as in real models
    return x


def test_a_planted_outlier_column_is_kept_exact() -> None:
    model = Projections()
    found = quantize(model, batches=[inputs(outlier=20)], exact=["spiky"])
    assert found.layers["query"].columns == found.layers["key"].columns == (20,)
    assert isinstance(model.query, Int8Linear)
    assert model.query.outliers.tolist() == [20]
    error = found.layers["query"].error
    assert error is not None
    assert error < 0.02
    # Without looking it would have been lost.
    blind, exact = Projections(), Projections()
    quantize(blind, exact=["spiky"])
    x = inputs(outlier=20)[0]
    inside = x.clone()
    inside[:, 20] = 0  # what the large column does not drown
    sharp = (model.query(x) - exact.query(x)).norm()
    assert sharp < 0.05 * (blind.query(x) - exact.query(x)).norm()


def test_a_layer_without_outliers_has_no_exact_column() -> None:
    found = quantize(Projections(), batches=[inputs()], exact=["spiky"])
    assert found.layers["query"].exact is None
    assert found.layers["query"].columns == ()


def test_a_layer_that_does_not_bear_it_stays_exact_and_the_others_do_not_suffer() -> None:
    model = Projections()
    kept = model.spiky
    found = quantize(model, batches=[inputs()])
    assert found.layers["spiky"].exact == "error above 5% in int8"
    assert model.spiky is kept
    assert found.layers["query"].columns == ()
    assert found.layers["idle"].exact == "not reached by the batches that were shown"
    assert any(line.startswith("Kept exact, error above 5% in int8: spiky") for line in found.lines())


def test_heads_tied_weights_and_layers_that_are_read_without_a_call_stay() -> None:
    llama = tiny.llama(tie_word_embeddings=True)
    found = quantize(llama)
    assert found.layers["lm_head"].exact == "a head"
    assert len([form for form in found.layers.values() if form.exact is None]) == 14
    bert = tiny.bert()
    assert quantize(bert).layers["classifier"].exact == "a head"
    attention = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    forms = quantize(attention).layers
    assert forms["0.out_proj"].exact == "read by MultiheadAttention without a call"
    assert forms["1"].exact is None
    pair = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pair[1].weight = pair[0].weight
    assert {form.exact for form in quantize(pair).layers.values()} == {"its weight is that of another module too"}
    assert {form.exact for form in quantize(attention).layers.values()} == {
        "read by MultiheadAttention without a call", "quantised already",
    }  # fmt: skip


@pytest.mark.parametrize("bits", [7, 8])
def test_the_plan_gives_another_copy_the_same_form(bits: int) -> None:
    first, second = tiny.bert(), tiny.bert()
    batch = {"input_ids": tiny.tokens(), "attention_mask": torch.ones_like(tiny.tokens())}
    found = quantize(first, batches=[batch], bits=bits)
    plan = Quantization.from_dict(json.loads(json.dumps(found.to_dict())))
    assert plan == found
    again = quantize(second, plan=plan)
    assert again.layers == found.layers
    assert {each.bits for each in second.modules() if isinstance(each, Int8Linear)} == {again.bits} == {bits}
    assert again.bytes_after == found.bytes_after < found.bytes_before
    with torch.no_grad():
        assert torch.equal(second(**batch).logits, first(**batch).logits)
    with pytest.raises(ConfigError, match=r"plan: it was made for another model"):
        quantize(tiny.llama(), plan=plan)


def test_what_it_came_to_is_said() -> None:
    forms = {"a": LayerForm(error=0.01), "b": LayerForm(columns=(3,), error=0.03), "c": LayerForm(exact="a head")}
    lines = Quantization("int8", forms, 7, 4_000_000, 1_000_000, "by hand").lines()
    assert lines == [
        "int8: 2 of 3 linear layers, weights of 7 bits, 1 with exact columns; 4 MB before, 1 MB now. "
        "Largest error of a layer's output: 3.0% (b).",
        "Kept exact, a head: c.",
        "int8: by hand.",
    ]


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    model = Projections()
    with pytest.raises(ConfigError, match=r"no linear layer is named 'qeury'.* They are: query, key"):
        quantize(model, exact=["qeury"])
    with pytest.raises(ConfigError, match=r"kind is 'int3'\. Expected 'int8'"):
        quantize(model, "int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"bits is 4\. Expected 7, 8, or None"):
        quantize(model, bits=4)
    with pytest.raises(ConfigError, match=r"bits is 7, and the plan has 8"):
        quantize(model, bits=7, plan=Quantization("int8"))
    with pytest.raises(ConfigError, match=r"batches: there is none"):
        quantize(model, batches=[])
    assert type(model.query) is nn.Linear
    adapted = veneer.get_peft_model(tiny.bert(), veneer.parse_method("lora:target_modules=all-linear"))
    with pytest.raises(StateError, match="The model has adapters"):
        quantize(adapted)


def test_lora_learns_on_it_and_the_frozen_integers_stay() -> None:
    base = tiny.bert()
    batch = {"input_ids": tiny.tokens(), "attention_mask": torch.ones_like(tiny.tokens())}
    quantize(base, batches=[batch])
    model = veneer.get_peft_model(base, veneer.parse_method("lora:r=4,target_modules=all-linear"))
    before = {name: buffer.clone() for name, buffer in base.state_dict().items() if buffer.dtype == torch.int8}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=labels).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert before
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.real
def test_a_real_language_model_loses_next_to_nothing() -> None:
    folder = model_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (
        "The capital of France is Paris, and the capital of Italy is Rome. Water boils at a hundred degrees and "
        "freezes at zero. She opened the window, looked at the garden and said that spring had come early this year."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        exact = model(ids, labels=ids)
        found = quantize(model, batches=[tokenizer("Once upon a time there was a fox. " * 4, return_tensors="pt")])
        rounded = model(ids, labels=ids)
    assert sum(form.exact is None for form in found.layers.values()) > 200
    assert found.bytes_after < 0.45 * found.bytes_before  # the embeddings are a fifth of this model, and stay
    assert abs(float(rounded.loss - exact.loss)) < 0.03 * float(exact.loss)
    assert (rounded.logits.argmax(-1) == exact.logits.argmax(-1)).float().mean() > 0.9
