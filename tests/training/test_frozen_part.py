"""What is computed once is what would be computed each time: same losses, same weights, one pass for each example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from datasets import Dataset
from torch import Tensor, nn

import tiny
import veneer
from veneer.data import Collator
from veneer.errors import ConfigError, UnsupportedError, VeneerWarning
from veneer.model import PeftModel
from veneer.training import kept_rows, reuse
from veneer.training.arguments import TrainingArguments
from veneer.training.frozen_part import FrozenPart
from veneer.training.kept_rows import FileRows, MemoryRows
from veneer.training.packing import PackedRows
from veneer.training.trainer import Trainer

TOP = {
    "llama": "lora:r=2,lora_dropout=0.1,target_modules=[q_proj,v_proj],layers_to_transform=[3],task_type=CAUSAL_LM",
    "gpt2": "lora:r=2,target_modules=[c_attn],layers_to_transform=[3],task_type=CAUSAL_LM",
    "bert": "last_layers:layers=1,task_type=SEQ_CLS",
    "head": "head:task_type=SEQ_CLS",
    "bitfit": "bitfit:layers_to_transform=[3],task_type=SEQ_CLS",
}  # fmt: skip
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def base(name: str) -> nn.Module:
    if name == "llama":
        return tiny.llama(num_hidden_layers=4)
    if name == "gpt2":
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 50, "n_positions": 64}
        return T.GPT2LMHeadModel(T.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return tiny.bert(num_hidden_layers=4, **STILL)


def model_of(name: str, method: str | None = None) -> PeftModel:
    torch.manual_seed(0)
    model = veneer.get_peft_model(base(name).double(), method or TOP[name], autocast_adapter_dtype=False)
    tiny.randomise(model)
    return model


def examples(name: str, count: int = 13) -> Dataset:
    """Of unequal length. Language models are asked nothing by the first tokens, as with prompts."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 24, (4 + (5 * i) % 8,), generator=draw).tolist() for i in range(count)]
    if name in ("llama", "gpt2"):
        return Dataset.from_dict({"input_ids": rows, "labels": [[-100, -100, *row[2:]] for row in rows]})
    return Dataset.from_dict({"input_ids": rows, "labels": [i % 3 for i in range(count)]})


def batch_of(name: str, chosen: tuple[int, ...] = (0, 1, 2), side: str = "right") -> dict[str, Tensor]:
    data = examples(name)
    return Collator(0, side)([data[i] for i in chosen])


def trainer_of(model: nn.Module, folder: Path, data: Any, side: str = "right", **settings: Any) -> Trainer:
    named = {name: settings.pop(name) for name in ("eval_dataset", "data_collator") if name in settings}
    given: dict[str, Any] = {
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_strategy": "steps",
        "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "num_train_epochs": 3,
        "per_device_train_batch_size": 3, "frozen_part": "auto", **settings,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **given)
    named.setdefault("data_collator", Collator(0, side))
    return Trainer(model, arguments, train_dataset=data, **named)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Runs:
    """How many rows the attention of each block has really run on, those of computing again for gradients included."""

    def __init__(self, model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ("LlamaAttention", "BertAttention")
        modules = [module for module in model.modules() if type(module).__name__ in names]
        numbers = {id(module): i for i, module in enumerate(modules)}
        original = type(modules[0]).forward
        self.rows = [0] * len(modules)
        self.trained = [0] * len(modules)

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            rows = len(args[0] if args else kwargs["hidden_states"])
            self.rows[numbers[id(module)]] += rows
            self.trained[numbers[id(module)]] += rows * module.training
            return original(module, *args, **kwargs)

        monkeypatch.setattr(type(modules[0]), "forward", forward)


@pytest.mark.parametrize(
    ("name", "side", "place"),
    [*((name, "right", "memory") for name in TOP), ("llama", "left", "disk"), ("head", "right", "disk")],
)
def test_losses_and_weights_are_those_of_the_usual_run(name: str, side: str, place: str, tmp_path: Path) -> None:
    ends = []
    for setting in ("off", place):
        model = model_of(name)
        running = trainer_of(
            model, tmp_path, examples(name), side, frozen_part=setting, gradient_accumulation_steps=2,
            eval_strategy="epoch", eval_dataset=examples(name, 5),
        )  # fmt: skip
        if setting != "off":
            count = 4 if name == "head" else 3
            kept = "in memory" if place == "memory" else "on disk"
            assert f"Frozen part: {count} of 4 blocks computed once, kept {kept} (" in running.reuse.line
        running.train()
        evaluated = [entry["eval_loss"] for entry in running.state.log_history if "eval_loss" in entry]
        ends.append((losses(running), evaluated, trained(model)))
    assert [len(each) for each in ends[0][:2]] == [9, 3]
    for one, other in zip(ends[0][:2], ends[1][:2], strict=True):
        assert other == pytest.approx(one, rel=1e-6)  # transformers' loss is one of float32
    for key, value in ends[0][2].items():
        torch.testing.assert_close(ends[1][2][key], value, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.iterdir())


def test_gradients_are_equal_to_rounding_in_other_company() -> None:
    for name, side in (("llama", "left"), ("llama", "right"), ("gpt2", "right"), ("bert", "right")):
        model = model_of(name, TOP[name].replace("lora_dropout=0.1,", "")).train()
        part = FrozenPart(model, lambda name=name, side=side: batch_of(name, (0, 1), side))
        rows = MemoryRows(10**9)
        with part(rows):
            for chosen in ((0, 4, 2), (3, 1, 5)):
                model(**batch_of(name, chosen, side))
        for chosen in ((5, 0), (1, 2, 3, 4)):
            found = []
            for context in (part(None), part(rows)):
                with context:
                    loss = model(**batch_of(name, chosen, side)).loss
                    loss.backward()
                found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
                model.zero_grad()
            assert len(found[0]) > 2
            torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_frozen_blocks_run_once_for_each_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    data = examples(name, 18)
    running = trainer_of(
        model, tmp_path, data.select(range(13)), train_sampling_strategy="group_by_length", packing="off",
        eval_strategy="epoch", eval_dataset=data.select(range(13, 18)),
    )  # fmt: skip
    assert "computed once" in running.reuse.line
    runs = Runs(model, monkeypatch)
    running.train()
    assert runs.rows == [18, 18, 18, 3 * 18]


def test_a_model_that_counts_positions_from_the_edge_keeps_rows_by_column() -> None:
    for name, from_edge in (("llama", False), ("gpt2", True)):
        model = model_of(name).eval()
        part = FrozenPart(model, lambda name=name: batch_of(name, (0, 1), "left"))
        assert part._from_edge is from_edge
        rows = MemoryRows(10**9)
        with part(rows), torch.no_grad():
            usual = model(**batch_of(name, (0, 1), "left")).loss
            alone = batch_of(name, (0,), "left")
            model(**alone)
            sizes = rows.bytes
            torch.testing.assert_close(model(**batch_of(name, (0, 1), "left")).loss, usual)
        lengths = [len(examples(name)[i]["input_ids"]) for i in (0, 1, 0)]
        assert sizes == part.token_bytes * sum(lengths if from_edge else lengths[:2])


def test_everything_is_as_it_was_after_an_error() -> None:
    model = model_of("llama").train()
    part = FrozenPart(model, lambda: batch_of("llama"))
    block = model.get_base_model().model.layers[0]
    before, hooks = dict(vars(block)), len(model.get_base_model()._forward_pre_hooks)
    batch = batch_of("llama")
    batch["input_ids"] += 100  # more than there are
    with pytest.raises(IndexError), part(MemoryRows(10**9)):
        model(**batch)
    assert vars(block) == before
    assert len(model.get_base_model()._forward_pre_hooks) == hooks
    assert model.training


def test_no_graph_reaches_below_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for setting, epochs in (("off", 3), ("auto", 3), ("auto", 1)):
        model = model_of("llama")
        running = trainer_of(
            model, tmp_path, examples("llama"), frozen_part=setting, num_train_epochs=epochs,
            activation_checkpointing=True, packing="off",
        )  # fmt: skip
        if epochs == 1:
            assert "computed anew each time, for every example is seen once" in running.reuse.line
        _ = running.reuse  # what is tried before is not counted
        with monkeypatch.context() as patch:
            runs = Runs(model, patch)
            running.train()
        # With checkpointing, blocks in the graph run twice.
        assert runs.trained[0] == (2 * 39 if setting == "off" else 13)
        assert runs.trained[3] == 2 * 13 * epochs
        ends.append(trained(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)


def test_dropout_below_is_a_reason_not_to_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> PeftModel:
        return veneer.get_peft_model(tiny.bert(num_hidden_layers=4), TOP["bert"])

    running = trainer_of(made(), tmp_path, examples("bert"))
    assert "3 of 4 blocks, computed anew each time, for the frozen blocks use dropout" in running.reuse.line
    model = made()
    running = trainer_of(model, tmp_path, examples("bert"), frozen_part="memory", packing="off")
    assert "3 of 4 blocks computed once without their dropout, kept in memory" in running.reuse.line
    runs = Runs(model, monkeypatch)
    running.train()
    assert runs.rows == [13, 13, 13, 39]
    assert runs.trained == [0, 0, 0, 39]
    assert all(module.training for module in model.modules())


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def refused(model: nn.Module, name: str = "llama", **more: Any) -> str:
    try:
        part = FrozenPart(model, lambda: {**batch_of(name), **more})
    except UnsupportedError as error:
        return str(error)
    return str(part.keeps_nothing)


def test_what_cannot_be_kept_is_refused_with_the_reason() -> None:
    lora = "lora:r=2,target_modules=[q_proj],layers_to_transform="
    assert refused(model_of("llama", lora + "[0,3]")) == "the first of 4 blocks is trained"
    embedded = model_of("llama", "lora:r=2,target_modules=[embed_tokens]")
    assert refused(embedded) == "model.embed_tokens is trained, which runs before the blocks"
    soft = model_of("llama", lora + "[3]")
    soft.prompt = nn.Parameter(torch.zeros(3))
    assert refused(soft) == "PeftModel is trained, which runs before the blocks"
    t5 = T.T5ForConditionalGeneration(T.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=50))
    assert "an encoder-decoder has two stacks" in refused(t5.requires_grad_(False))
    assert "Linear has no blocks" in refused(nn.Linear(2, 2))
    noisy = model_of("llama", lora + "[3]")
    noisy.get_base_model().model.layers[1].mlp.act_fn = Noisy()
    assert refused(noisy) == "the frozen blocks compute something at random"
    asking = model_of("llama", lora + "[3]")
    asking.get_base_model().config.output_hidden_states = True
    assert "output_hidden_states" in refused(asking)
    assert "cannot be told apart" in refused(model_of("llama", lora + "[3]"), output_attentions=True)
    assert "lily" in refused(model_of("llama", "lily:r=2,target_modules=[q_proj],layers_to_transform=[3]")).lower()
    model = model_of("llama", lora + "[3]")
    left = batch_of("llama", side="left")
    left["labels"] = left["input_ids"].masked_fill(left["attention_mask"] == 0, -100)
    assert "the loss looks at padding" in refused(model, **left)


class Unmasked(nn.Module):
    """Attention of a model that does not heed its mask."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner(x, None, *args, **kwargs)


def test_blocks_that_look_at_padding_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bert")
    block = model.get_base_model().bert.encoder.layer[1]
    attention = block.attention
    monkeypatch.setattr(attention, "forward", Unmasked(attention.forward.__func__.__get__(attention)).inner)
    original = type(attention).forward
    monkeypatch.setattr(attention, "forward", lambda x, mask=None, *a, **k: original(attention, x, None, *a, **k))
    assert refused(model, "bert") == "the frozen blocks look at padding"


class Skipping(nn.Module):
    """A last block that also looks at what the first one gave."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        model.model.layers[0].register_forward_hook(lambda m, args, y: self.seen.append(y))
        model.model.layers[3].register_forward_hook(lambda m, args, y: y + self.seen.pop())


def test_a_model_whose_upper_blocks_look_lower_is_noticed(tmp_path: Path) -> None:
    model = model_of("llama")
    Skipping(model.get_base_model())
    running = trainer_of(model, tmp_path, examples("llama"))
    assert "the loss is another without the frozen blocks" in running.reuse.line
    running.train()


def test_blocks_that_run_several_times_are_noticed(tmp_path: Path) -> None:
    config = T.AlbertConfig(**{**tiny.SIZES, "embedding_size": 16, "num_labels": 3}, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    model = veneer.get_peft_model(T.AlbertForSequenceClassification(config), "head:target_modules=[classifier]")
    running = trainer_of(model, tmp_path, examples("bert"))
    assert "for the blocks do not run once each and in their order" in running.reuse.line


def test_reasons_of_the_run(tmp_path: Path) -> None:
    data = examples("llama")

    class Changing(Collator):
        def __call__(self, rows: Any) -> Any:
            batch = super().__call__(rows)
            batch["input_ids"] = torch.randint_like(batch["input_ids"], 3, 24)
            return batch

    def line(**settings: Any) -> str:
        found = trainer_of(model_of("llama"), tmp_path, data, **settings).reuse
        found.close()
        return found.line

    assert line(frozen_part="off") == ""
    assert "every example is seen once" in line(max_steps=4)
    assert "gives something else each time" in line(data_collator=Changing(0))
    assert "do not fit into 1 kB of memory or 1 kB of disk (training.frozen_part_gb)" in line(frozen_part_gb=1e-6)
    assert "kept on disk" in line(frozen_part="disk")
    with pytest.raises(UnsupportedError, match=r"is 'disk', but nothing can be kept: the collator or .*'off'"):
        line(frozen_part="disk", data_collator=Changing(0))
    compiled = model_of("llama")
    compiled.get_base_model().model.layers[0].compile()
    assert "compiled" in trainer_of(compiled, tmp_path, data).reuse.line


def test_memory_first_and_disk_where_that_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "free_memory", lambda: 1000)
    running = trainer_of(model_of("llama"), tmp_path, examples("llama"))
    assert "kept on disk (" in running.reuse.line
    running.train()
    assert not (tmp_path / "frozen_part").exists()


def test_what_does_not_fit_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = examples("llama")
    size = sum(map(len, data["input_ids"])) * 32 * 8
    ends = []
    for setting, limit in (("off", None), ("memory", 0.6 * size / 1e9)):
        model = model_of("llama")
        running = trainer_of(
            model,
            tmp_path,
            data,
            frozen_part=setting,
            frozen_part_gb=limit,
            packing="off",
            train_sampling_strategy="sequential",
        )
        if limit is not None:
            assert "what does not fit is computed anew each time" in running.reuse.line
            runs = Runs(model, monkeypatch)
        running.train()
        ends.append(trained(model))
    assert 13 < runs.rows[0] < 39
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)


def test_other_weights_below_forget_what_was_kept() -> None:
    model = model_of("llama").eval()
    batch = batch_of("llama")
    part = FrozenPart(model, lambda: batch)
    rows = MemoryRows(10**9)
    with torch.no_grad():
        with part(rows):
            model(**batch)
        model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(2)
        usual = model(**batch).loss
        with part(rows):
            torch.testing.assert_close(model(**batch).loss, usual)


def test_calls_that_ask_for_more_are_computed_as_usual() -> None:
    model = model_of("llama").eval()
    batch = batch_of("llama")
    part = FrozenPart(model, lambda: batch)
    rows = MemoryRows(10**9)
    with part(rows), torch.no_grad():
        assert len(model(**batch, output_hidden_states=True).hidden_states) == 5
        assert model(**batch, use_cache=True).past_key_values.get_seq_length() == batch["input_ids"].shape[1]
        assert rows.bytes == 0
        model(**batch)
        size = rows.bytes
        assert size > 0
        assert model(**batch).past_key_values is None
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["input_ids"] % 5)
        assert rows.bytes == 2 * size  # other positions, other rows
        embedded = model.get_input_embeddings()(batch["input_ids"])
    embedded.requires_grad_()
    with part(rows):
        model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits.sum().backward()
    assert embedded.grad is not None
    assert bool(embedded.grad.any())


@pytest.mark.parametrize("order", ["packed first", "packed last"])
@pytest.mark.parametrize("name", ["llama", "bert", "head"])
def test_together_with_packed_rows(name: str, order: str) -> None:
    model = model_of(name, TOP[name].replace("lora_dropout=0.1,", "")).train()
    part = FrozenPart(model, lambda: batch_of(name, (0, 1)))
    packed, rows = PackedRows(model), MemoryRows(10**9)

    def found() -> list[Tensor]:
        loss = model(**batch_of(name, (2, 0, 1))).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [loss.detach(), *gradients]

    usual = found()
    for _ in range(2):
        for outer, inner in [(packed(), part(rows)) if order == "packed first" else (part(rows), packed())]:
            with outer, inner:
                torch.testing.assert_close(found(), usual, rtol=1e-6, atol=1e-9, check_dtype=False)
    with part(rows):
        torch.testing.assert_close(found(), usual, rtol=1e-6, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_resuming_ends_in_the_same_weights(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "frozen_part": place, "save_strategy": "steps", "save_steps": 7, "train_sampling_strategy": "group_by_length",
        "frozen_part_folder": str(tmp_path / "kept"),
    }  # fmt: skip
    model = model_of("llama")
    trainer_of(model, tmp_path / "run", examples("llama"), **settings).train()
    again = model_of("llama")
    resumed = trainer_of(again, tmp_path / "run", examples("llama"), **settings)
    if place == "disk":
        assert "; 13 rows of an earlier run were there" in resumed.reuse.line
    with monkeypatch.context() as patch:
        _ = resumed.reuse
        runs = Runs(again, patch)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    if place == "disk":
        assert runs.rows[:3] == [0, 0, 0]
    for key, value in trained(model).items():
        torch.testing.assert_close(trained(again)[key], value, rtol=1e-9, atol=1e-12)
    assert (tmp_path / "kept").exists() == (place == "disk")


# ---- The file ----

ROWS = {bytes([i]) * 16: torch.arange(i * 4, dtype=torch.float32).view(i, 4) for i in (1, 2, 3)}
IDENTITY = {"weights": "one"}


def file_rows(
    folder: Path, limit: int = 10**6, identity: Any = IDENTITY, dtype: torch.dtype = torch.float32
) -> FileRows:
    return FileRows(folder / "rows", limit, identity, 4, dtype)


def test_a_file_is_reopened(tmp_path: Path) -> None:
    rows = file_rows(tmp_path)
    rows.put(list(ROWS), list(ROWS.values()))
    rows.put(list(ROWS), list(ROWS.values()))
    assert rows.bytes == 6 * 16
    rows.close(remove=False)
    rows = file_rows(tmp_path)
    assert rows.remark == "3 rows of an earlier run were there"
    assert all(key in rows for key in ROWS)
    torch.testing.assert_close(rows.get(list(ROWS)[::-1]), torch.cat(list(ROWS.values())[::-1]))
    rows.put([b"4" * 16], [torch.ones(2, 4)])
    torch.testing.assert_close(rows.get([b"4" * 16]), torch.ones(2, 4))
    rows.close()
    assert not (tmp_path / "rows").exists()


def test_sixteen_bit_rows_and_a_limit(tmp_path: Path) -> None:
    rows = file_rows(tmp_path, limit=24, dtype=torch.bfloat16)
    rows.put(list(ROWS), [row.bfloat16() for row in ROWS.values()])
    assert [key in rows for key in ROWS] == [True, True, False]
    assert rows.get(list(ROWS)[:2]).dtype == torch.bfloat16
    rows.close()


def test_damaged_and_unfinished_rows_are_not_there(tmp_path: Path) -> None:
    rows = file_rows(tmp_path)
    rows.put(list(ROWS), list(ROWS.values()))
    rows.close(remove=False)
    data, index = tmp_path / "rows" / kept_rows.DATA, tmp_path / "rows" / kept_rows.INDEX
    whole = data.read_bytes(), index.read_bytes()

    data.write_bytes(whole[0][:20] + b"?" + whole[0][21:])  # in the second row
    rows = file_rows(tmp_path)
    assert [key in rows for key in ROWS] == [True, False, True]
    rows.put(list(ROWS), list(ROWS.values()))
    torch.testing.assert_close(rows.get(list(ROWS)), torch.cat(list(ROWS.values())))
    rows.close(remove=False)

    data.write_bytes(whole[0][:-1])  # the last row was cut off
    index.write_bytes(whole[1])
    rows = file_rows(tmp_path)
    assert [key in rows for key in ROWS] == [True, True, False]
    rows.close(remove=False)

    data.write_bytes(whole[0])
    for cut in (whole[1][:-1], whole[1][:-30] + b"?" + whole[1][-29:]):
        index.write_bytes(cut)
        rows = file_rows(tmp_path)
        assert [key in rows for key in ROWS] == [True, True, False]
        rows.put(list(ROWS), list(ROWS.values()))
        rows.close(remove=False)
        rows = file_rows(tmp_path)
        torch.testing.assert_close(rows.get(list(ROWS)), torch.cat(list(ROWS.values())))
        rows.close(remove=False)


def test_rows_of_another_model_are_replaced_and_foreign_files_left_alone(tmp_path: Path) -> None:
    rows = file_rows(tmp_path)
    rows.put(list(ROWS), list(ROWS.values()))
    rows.close(remove=False)
    rows = file_rows(tmp_path, identity={"weights": "two"})
    assert "belong to another model or version and were replaced" in rows.remark
    assert not any(key in rows for key in ROWS)
    rows.close(remove=False)
    (tmp_path / "rows" / kept_rows.INDEX).write_text("shopping list")
    with pytest.raises(ConfigError, match="none of Veneer's"):
        file_rows(tmp_path)


def test_the_identity_is_that_of_the_frozen_weights() -> None:
    def identity(change: Callable[[Any], None] = lambda base: None) -> dict[str, Any]:
        model = model_of("llama")
        with torch.no_grad():
            change(model.get_base_model())
        return FrozenPart(model, lambda: batch_of("llama")).identity()

    assert identity() == identity(lambda base: base.model.layers[3].mlp.up_proj.weight.mul_(2))
    assert identity() == identity(lambda base: base.lm_head.weight.mul_(2))
    assert identity() != identity(lambda base: base.model.layers[2].mlp.up_proj.weight.mul_(2))
    assert identity() != identity(lambda base: base.model.embed_tokens.weight.mul_(2))

    def special(base: Any) -> None:
        class Packed(nn.Parameter):
            """As packages of quantised weights make them."""

        layer = base.model.layers[1].mlp.up_proj
        layer.weight = Packed(layer.weight.detach(), requires_grad=False)

    with pytest.raises(UnsupportedError, match=r"the bytes of .*\(Packed on cpu\) are not known"):
        identity(special)


def test_a_full_disk_ends_keeping_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = file_rows(tmp_path)

    def full(file: Any, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    rows.put([b"0" * 16], [torch.ones(1, 4)])
    monkeypatch.setattr(kept_rows, "_write", full)
    with pytest.warns(VeneerWarning, match="no more hidden states can be kept"):
        rows.put(list(ROWS), list(ROWS.values()))
    rows.put(list(ROWS), list(ROWS.values()))
    assert not any(key in rows for key in ROWS)
    torch.testing.assert_close(rows.get([b"0" * 16]), torch.ones(1, 4))
    rows.close()


def test_veneer_train_says_what_it_does(write: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    from veneer.training.run import train

    top = "lora:r=4,target_modules=[q_proj,v_proj],layers_to_transform=[1]"
    results = []
    for setting in (False, "disk"):  # `off` is false in YAML
        options = write(method=top, frozen_part=setting)
        options = dataclasses.replace(options, output=dataclasses.replace(options.output, overwrite=True))
        results.append(train(options))
    said = capsys.readouterr().out
    assert said.count("Frozen part: 1 of 2 blocks computed once, kept on disk (") == 1
    assert results[1].after == pytest.approx(results[0].after, rel=1e-4)
    assert not (Path(options.output.folder) / "frozen_part").exists()
