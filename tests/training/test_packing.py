"""Packed rows give the results of the padded run, example by example, in every family of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import tiny
import veneer
from veneer import attention
from veneer.errors import UnsupportedError
from veneer.training.labelled import LabelledLoss
from veneer.training.packing import PackedRows, packed_rows

SIZES: dict[str, Any] = {**tiny.SIZES, "max_position_embeddings": 32}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
WINDOWED: dict[str, Any] = {**GROUPED, "head_dim": 8, "sliding_window": 3}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BART: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "dropout": 0.0,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 50, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip

GPT2: dict[str, Any] = {
    "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
    "dropout": 0.0, "word_embed_proj_dim": 32,
}  # fmt: skip
DISTILBERT: dict[str, Any] = {
    "vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0,
    "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": 3,
}  # fmt: skip


def _gemma2(**changes: Any) -> nn.Module:
    caps = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "attn_implementation": "eager"}
    return T.Gemma2ForCausalLM(T.Gemma2Config(**{**WINDOWED, **caps, **changes}))


def _modernbert() -> nn.Module:
    settings = {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = T.ModernBertConfig(**SIZES, **settings, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=3)
    return T.ModernBertForSequenceClassification(config)


def _gpt_oss() -> nn.Module:  # learnt sinks
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
    return T.GptOssForCausalLM(T.GptOssConfig(**WINDOWED, **settings, rope_parameters={"rope_type": "default"}))


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny.llama,
    "llama, eager": lambda: tiny.llama(attn_implementation="eager"),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**{k: v for k, v in WINDOWED.items() if k != "head_dim"})),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma2": _gemma2,
    "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**WINDOWED)),
    "gpt-oss": _gpt_oss,
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(**OPT)),
}
READERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tiny.bert(**NO_DROPOUT),
    "roberta": lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**SIZES, **NO_DROPOUT, num_labels=3)),
    "albert": lambda: T.AlbertForSequenceClassification(
        T.AlbertConfig(**SIZES, **NO_DROPOUT, embedding_size=8, num_labels=3, classifier_dropout_prob=0.0)
    ),
    "distilbert": lambda: T.DistilBertForSequenceClassification(T.DistilBertConfig(**DISTILBERT)),
    "modernbert": _modernbert,
    "llama": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**GROUPED, num_labels=3)),
}
LENGTHS = (4, 9, 7, 1, 7)
LIKE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
# Parts of models compute in float32 whatever their weights are.
FLOAT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
SINGLE_PRECISION: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}


def adapted(make: Callable[[], nn.Module], method: str = "lora:r=3,target_modules=all-linear") -> veneer.PeftModel:
    torch.manual_seed(0)
    model = veneer.get_peft_model(make().double(), method)
    tiny.randomise(model)
    return model.eval()


def batch(side: str, *, labels: int | None = None, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Rows of the lengths, padded; labels of a language model, or a class of so many for each row."""
    columns = torch.arange(max(lengths))
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    tokens = tiny.tokens(len(lengths), max(lengths)) * mask
    told = tokens.masked_fill(mask == 0, -100).masked_fill(columns == 0, -100)
    if side == "left":  # each row rolled to the right edge
        at = (columns - (max(lengths) - torch.tensor(lengths))[:, None]) % max(lengths)
        mask, tokens, told = (x.gather(1, at) for x in (mask, tokens, told))
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": told if labels is None else torch.arange(len(lengths)) % labels,
    }


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row, without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {name: x[row][real][None] if x.dim() == 2 else x[row : row + 1] for name, x in inputs.items()}


def loss_of_rows(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits where tokens are, and a loss for each row, in the type of the model."""
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    logits, labels = output.logits, inputs["labels"]
    if labels.dim() == 1:
        return logits, nn.functional.cross_entropy(logits, labels, reduction="none")
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return logits[inputs["attention_mask"].bool()], losses.sum(1)


def gradients(model: nn.Module, losses: Tensor) -> list[Tensor]:
    """The gradient of each row's loss by what is trained, flat."""
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = []
    for loss in losses:
        parts = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
        flat.append(torch.cat([part.flatten() for part in parts]))
    return flat


def assert_packs(
    model: nn.Module, inputs: dict[str, Tensor], like: dict[str, Any] = LIKE, like_alone: dict[str, Any] | None = None
) -> None:
    """Logits, losses and gradients of each row are those of the padded run, and of the row by itself."""
    like_alone = like_alone or like
    usual = loss_of_rows(model, inputs)
    expected = gradients(model, usual[1])
    rows = PackedRows(model)
    calls = rows._packed
    with rows():
        packed = loss_of_rows(model, inputs)
        got = gradients(model, packed[1])
    assert rows._packed > calls
    torch.testing.assert_close(packed, usual, **like)
    torch.testing.assert_close(got, expected, **like)
    assert max(float(g.abs().max()) for g in got) > 1e-3
    for row in range(0, len(got), 2):
        single = loss_of_rows(model, alone(inputs, row))[1]
        torch.testing.assert_close(packed[1][row], single[0], **like_alone)
        torch.testing.assert_close(got[row], gradients(model, single)[0], **like_alone)


# Of these the padded run in float64 is not a number at padding; the others compute a part in float32 all the same.
SINGLE = {"gemma2", "gpt-oss"}
IN_PART = {"gemma3", "llama, eager"}


@pytest.mark.parametrize("name", WRITERS)
def test_language_models_padded_on_the_right(name: str) -> None:
    model = adapted(WRITERS[name])
    if name in SINGLE:
        return assert_packs(model.float(), batch("right"), SINGLE_PRECISION)
    return assert_packs(model, batch("right"), FLOAT if name in IN_PART else LIKE)


@pytest.mark.parametrize("name", READERS)
def test_classifiers_padded_on_the_right(name: str) -> None:
    assert_packs(adapted(READERS[name]), batch("right", labels=3))


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_rows_padded_on_the_left(name: str) -> None:
    # By itself, a row stands at other positions: rotations are computed in float32.
    assert_packs(adapted(WRITERS[name]), batch("left"), like_alone=FLOAT)


def test_all_rows_in_one_call_as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_by_length", attention._padded)
    assert_packs(adapted(WRITERS["mistral"]), batch("left"), like_alone=FLOAT)
    assert_packs(adapted(WRITERS["llama, eager"]).float(), batch("left"), SINGLE_PRECISION)
    assert_packs(adapted(READERS["bert"]), batch("right", labels=3))


def test_padding_within_rows() -> None:
    inputs = batch("right")
    inputs["attention_mask"][1, 3] = 0
    inputs["labels"][1, 3:5] = -100
    model, where = adapted(WRITERS["gemma2"]).float(), inputs["attention_mask"].bool()
    usual = model(**inputs)
    with packed_rows(model):
        packed = model(**inputs)
    torch.testing.assert_close(packed.loss, usual.loss)
    torch.testing.assert_close(packed.logits[where], usual.logits[where])


def test_a_row_without_any_token_is_left_out() -> None:
    inputs = batch("right")
    inputs["attention_mask"][2] = 0
    inputs["labels"][2] = -100
    model, where = adapted(tiny.llama), inputs["attention_mask"].bool()
    usual = model(**inputs)
    with packed_rows(model):
        packed = model(**inputs)
    torch.testing.assert_close(packed.loss, usual.loss)
    torch.testing.assert_close(packed.logits[where], usual.logits[where], **LIKE)


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_are_computed_again(reentrant: bool) -> None:
    model = adapted(WRITERS["mistral"]).train()
    usual = model(**batch("right")).loss
    (expected,) = gradients(model, usual[None])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with packed_rows(model):
        model(**batch("right")).loss.backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
    torch.testing.assert_close(got, expected, **FLOAT)


def test_the_encoder_of_an_encoder_decoder() -> None:
    model = adapted(lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)))
    inputs = batch("right")
    usual = model(**inputs)
    (expected,) = gradients(model, usual.loss[None])
    rows = PackedRows(model)
    with rows():
        packed = model(**inputs)
        (got,) = gradients(model, packed.loss[None])
    assert rows._packed == 3  # two tries and this call
    torch.testing.assert_close(packed.logits, usual.logits, **LIKE)
    torch.testing.assert_close(got, expected, **FLOAT)


@pytest.mark.parametrize("method", ["bottleneck:reduction=4", "ia3", "vera:r=4", "dora:target_modules=all-linear"])
def test_other_methods(method: str) -> None:
    assert_packs(adapted(tiny.llama, method), batch("right"))


def test_with_the_loss_at_labelled_positions() -> None:
    model = adapted(tiny.llama)
    usual = model(**batch("right")).loss
    with packed_rows(model), LabelledLoss(model.get_base_model())():
        torch.testing.assert_close(model(**batch("right")).loss, usual, check_dtype=False, **FLOAT)


def test_blocks_see_tokens_only() -> None:
    model = adapted(tiny.llama)
    shapes: list[tuple[int, ...]] = []
    layers = model.get_base_model().model.layers
    layers[1].mlp.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    rows = PackedRows(model)
    shapes.clear()
    with rows():
        assert model(**batch("right")).past_key_values is None
    model(**batch("right"))
    assert shapes == [(1, sum(LENGTHS), 32), (5, 9, 32)]


@pytest.mark.parametrize(
    "asked", [{"output_hidden_states": True}, {"use_cache": True}, {"past_key_values": T.DynamicCache()}]
)
def test_calls_that_are_computed_as_usual(asked: dict[str, Any]) -> None:
    model = adapted(tiny.llama)
    usual = model(**batch("right"), **asked)
    asked = {**asked, **({"past_key_values": T.DynamicCache()} if "past_key_values" in asked else {})}
    rows = PackedRows(model)
    before = rows._packed
    with rows():
        output = model(**batch("right"), **asked)
    assert rows._packed == before
    assert torch.equal(output.logits, usual.logits)


def test_what_the_loss_or_the_head_reads_at_padding_is_there() -> None:
    """Rows that are padded on the left: a classifier reads their first position, a loss what precedes the first."""
    readers = adapted(READERS["bert"])
    writers = adapted(tiny.llama)
    inputs = batch("left")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for model, given in ((readers, batch("left", labels=3)), (writers, inputs)):
        rows = PackedRows(model)
        before = rows._packed
        with rows():
            packed = model(**given)
        assert rows._packed == before
        assert torch.equal(packed.loss, model(**given).loss)


def test_mixed_batches_are_computed_as_usual() -> None:
    model = adapted(tiny.llama)
    names = ["default", "__base__", "default", "__base__", "default"]
    usual = model(**batch("right"), adapter_names=names).logits
    rows = PackedRows(model)
    before = rows._packed
    with rows():
        assert torch.equal(model(**batch("right"), adapter_names=names).logits, usual)
    assert rows._packed == before


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(tiny.llama)
    base: Any = model.get_base_model()
    base.model.layers[1].train()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()]
    with packed_rows(model), pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    assert attention.Packing.current.get() is None
    assert base.config._attn_implementation == "sdpa"
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()] == hooks
    assert [layer.training for layer in base.model.layers] == [False, True]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "t5": (
        lambda: T.T5ForConditionalGeneration(T.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)),
        "T5ForConditionalGeneration adds a bias for each pair of positions",
    ),
    "deberta": (lambda: T.DebertaV2Model(T.DebertaV2Config(**SIZES)), "does not make its attention masks where"),
    "falcon": (
        lambda: T.FalconForCausalLM(
            T.FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        ),
        "FalconForCausalLM computes with its attention mask itself",
    ),
    "mamba": (
        lambda: T.MambaForCausalLM(T.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50)),
        "MambaForCausalLM has 0 stacks of transformer blocks",
    ),
    "convbert": (lambda: T.ConvBertModel(T.ConvBertConfig(**SIZES)), "has convolutions in its blocks"),
    "layer drop": (
        lambda: T.OPTModel(T.OPTConfig(hidden_size=8, ffn_dim=8, num_attention_heads=2, layerdrop=0.1)),
        "OPTModel leaves out blocks at random",
    ),
    "no text": (
        lambda: T.ViTModel(T.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)),
        "ViTModel is no transformers model of text",
    ),
    "flex": (lambda: tiny.llama(attn_implementation="flex_attention"), "'flex_attention' cannot be wrapped"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_packed_are_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UnsupportedError, match=reason), packed_rows(make()):
        pass


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("lily:r=4", r"adapter 'default' \(Lily\) mixes the rows"),
        ("alora:r=4,alora_invocation_tokens=[5]", r"\(Alora\) looks at the rows"),
    ],
)
def test_adapters_to_which_rows_matter_are_refused(method: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        PackedRows(veneer.get_peft_model(tiny.llama(), method))


def test_a_model_that_does_more_with_its_rows_is_noticed() -> None:
    model = tiny.llama()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, y: y + y.roll(1, 1))
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM gives other results when rows are packed"):
        PackedRows(model)


def test_a_base_that_rounds_its_inputs_is_packed_too() -> None:
    """In int8 the last bits of a number decide about more of the output than in floating point."""
    model = tiny.llama(num_hidden_layers=6)
    batch = {"input_ids": tiny.tokens(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    veneer.quantize(model, "int8", batches=[batch])
    batch["attention_mask"][1, 4:] = 0
    usual = model(**batch).logits.detach()
    with veneer.packed_rows(model):
        packed = model(**batch).logits.detach()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(packed[real], usual[real], rtol=0, atol=5e-2 * float(usual.abs().max()))
