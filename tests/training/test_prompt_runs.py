"""Runs with virtual tokens and prefixes: everything that a run does, on texts that are longer than they look."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import tiny
import veneer
from veneer.commands.merging import merge_folder
from veneer.errors import ConfigError, UnsupportedError
from veneer.evaluation.estimates import estimate
from veneer.model import PeftModel
from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
from veneer.training import labelled
from veneer.training.many import train_many
from veneer.training.packing import PackedRows
from veneer.training.run import evaluate, predict, train

Options = Callable[..., RunOptions]

METHODS = {
    "prompt": "prompt_tuning:num_virtual_tokens=4,prompt_tuning_init=SAMPLE_VOCAB",
    "p": "p_tuning:num_virtual_tokens=4,encoder_hidden_size=16",
    "prefix": "prefix_tuning:num_virtual_tokens=4",
    "projected": "prefix_tuning:num_virtual_tokens=4,prefix_projection=true,encoder_hidden_size=16",
}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: str | Path, other: str | Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def adapted(base: Any, method: str) -> PeftModel:
    torch.manual_seed(1)
    return veneer.get_peft_model(base, method).double()


def batch(all_tokens: bool = False) -> dict[str, torch.Tensor]:
    ids, mask = tiny.tokens(3, 7), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2])
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels if all_tokens else labels.clone()}


def gradients(model: PeftModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_packed_rows_and_the_loss_at_labels_are_the_usual_ones(method: str) -> None:
    model, inputs = adapted(tiny.llama(), method), batch()
    usual = gradients(model, inputs)
    with PackedRows(model)():
        packed = gradients(model, inputs)
    with labelled.LabelledLoss(model.get_base_model())():
        at_labels = gradients(model, inputs)
        with PackedRows(model)():
            both = gradients(model, inputs)
    for found in (packed, at_labels, both):
        for one, other in zip(found, usual, strict=True):
            # The loss itself is one of float32 in transformers.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_packed_rows_of_an_encoder_give_the_usual_loss(method: str) -> None:
    model = adapted(tiny.bert(), method)
    inputs = {**batch(), "labels": torch.tensor([0, 2, 1])}
    model.eval()
    usual = gradients(model, inputs)
    with PackedRows(model)():
        packed = gradients(model, inputs)
    for one, other in zip(packed, usual, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_classifier_learns_is_measured_resumed_and_asked(classify: Options, method: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"num_train_epochs": 2, "learning_rate": 3e-2, "save_steps": 4}
    result = train(classify(method, output={"folder": str(tmp_path / "whole")}, **how), console=quiet())
    assert result.after["loss"] < result.before["loss"]
    measured = evaluate(result.folder)
    assert {name: measured[name] for name in result.after} == pytest.approx(result.after)
    long = "dull film and a slow story " * 20
    cut = " ".join(long.split()[:60])  # what the model has room for
    assert predict(result.folder, [long])[0][1] == pytest.approx(predict(result.folder, [cut])[0][1], abs=1e-5)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                raise KeyboardInterrupt

    begun = classify(method, **how)
    with pytest.raises(KeyboardInterrupt):
        train(begun, callbacks=[Stop()], console=quiet())
    resumed = train(dataclasses.replace(begun, output=dataclasses.replace(begun.output, resume=True)), console=quiet())
    assert same(resumed.folder, result.folder)


def test_a_decoder_classifies(classify: Options, decoder: Path) -> None:
    options = classify("prompt_tuning:num_virtual_tokens=4", num_train_epochs=3, learning_rate=2e-2)
    options.model.name = str(decoder)
    result = train(options, console=quiet())
    assert result.after["loss"] < result.before["loss"]
    assert evaluate(result.folder)["loss"] == pytest.approx(result.after["loss"])


@pytest.mark.parametrize("method", [METHODS["prompt"], METHODS["prefix"]], ids=["prompt", "prefix"])
def test_a_decoder_writes(write: Options, method: str) -> None:
    result = train(write(method, num_train_epochs=3, learning_rate=5e-2), console=quiet())
    assert result.after["loss"] < result.before["loss"]
    assert evaluate(result.folder)["loss"] == pytest.approx(result.after["loss"])
    # What is written after each prompt is the new text alone, in a batch as by itself.
    prompts = ["the film was dull", "the film was warm and a story"]
    together = predict(result.folder, prompts, max_new_tokens=6)
    assert together == [predict(result.folder, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_small_batches_weigh_their_tokens_as_one_large_batch_does(write: Options, tmp_path: Path) -> None:
    """All tokens are learnt, the first of each row too, which has virtual tokens before it."""
    draw, lines = iter(range(1000)), ["text"]
    words = ["bright", "warm", "dull", "cold", "film", "story", "music", "plot"]
    lines += [" ".join(words[next(draw) % 8] for _ in range(1 + 3 * (i % 3))) for i in range(24)]
    (tmp_path / "texts.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = []
    for name, size in (("large", 12), ("small", 3)):
        options = write(
            METHODS["prompt"], output={"folder": str(tmp_path / name)}, max_steps=2, optim="sgd", max_grad_norm=0.0,
            learning_rate=1.0, warmup_steps=0, per_device_train_batch_size=size, gradient_accumulation_steps=12 // size,
            train_sampling_strategy="sequential", eval_strategy="no",
        )  # fmt: skip
        options.data = DataOptions(str(tmp_path / "texts.csv"), validation_share=0, format="text", train_on="all")
        found.append(tensors(train(options, console=quiet()).folder)["prompt_embeddings"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_labels_are_smoothed_behind_virtual_tokens(tmp_path: Path) -> None:
    model, inputs, share = adapted(tiny.llama(), METHODS["prompt"]).eval(), batch(), 0.1
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=share, report_to="none", use_cpu=True)
    found = veneer.Trainer(model, args).compute_loss(model, dict(inputs))
    with torch.no_grad():
        logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits[:, 4:-1]
    usual = torch.nn.CrossEntropyLoss(label_smoothing=share)
    torch.testing.assert_close(found, usual(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten()))


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_texts_without_room_for_virtual_tokens_are_refused(classify: Options, name: str, tmp_path: Path) -> None:
    options = classify(METHODS[name].replace("=4", "=60"))
    with pytest.raises(
        ConfigError, match=r"longest example has \d+ tokens, the method adds 60, and .* 64. Set data.max_length to 4"
    ):
        train(options, console=quiet())
    options.method = METHODS[name].replace("=4", "=64")
    with pytest.raises(ConfigError, match=r"has positions for 64. Set fewer num_virtual_tokens"):
        train(options, console=quiet())


def test_a_comparison_trains_each_as_it_would_alone(classify: Options, tmp_path: Path) -> None:
    methods = [METHODS["prompt"], METHODS["prefix"]]
    done = train_many(classify(output={"folder": str(tmp_path / "all")}, num_train_epochs=1), methods, console=quiet())
    assert not done.failures
    for i, (method, result) in enumerate(zip(methods, done.results.values(), strict=True)):
        alone = train(classify(method, output={"folder": str(tmp_path / f"{i}")}, num_train_epochs=1), console=quiet())
        assert same(alone.folder, result.folder)
        assert alone.before == result.before


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_an_estimate_counts_what_is_added(encoder: Path, decoder: Path, tmp_path: Path, task: Any) -> None:
    def ask(method: str, length: int) -> Any:
        name = str(encoder if task == "classification" else decoder)
        options = RunOptions(
            task=task, model=ModelOptions(name, dtype="float32"), data=DataOptions(""), method=method,
            training={"threads": 1}, output=OutputOptions(str(tmp_path)),
        )  # fmt: skip
        return estimate(options, length)

    plain, most = ask("prompt_tuning:num_virtual_tokens=1", 20), ask("prompt_tuning:num_virtual_tokens=40", 20)
    assert most.trained - plain.trained == 39 * 32
    assert most.peak > plain.peak
    assert most.flops > 2 * plain.flops
    one, many = ask("prefix_tuning:num_virtual_tokens=1", 20), ask("prefix_tuning:num_virtual_tokens=40", 20)
    assert many.trained > one.trained
    assert many.parts["activations"] > one.parts["activations"]
    with pytest.raises(ConfigError, match=r"20 tokens were asked for, .* takes 1 to 14 beside the 50 that the method"):
        ask("prefix_tuning:num_virtual_tokens=50", 20)


def test_finished_runs_answer_together_and_are_not_merged(classify: Options, tmp_path: Path) -> None:
    methods = [METHODS["prompt"], METHODS["prefix"], "lora:r=2"]
    folders = [
        train(classify(m, output={"folder": str(tmp_path / f"{i}")}, num_train_epochs=1), console=quiet()).folder
        for i, m in enumerate(methods)
    ]
    texts = ["dull film and a slow story", "warm story", "dull film"]
    each = [predict(folder, texts) for folder in folders]
    for combine in ("probabilities", "logits", "votes"):
        answers = predict(folders[0], texts, others=folders[1:], combine=combine)
        for i, (label, shares) in enumerate(answers):
            p = {name: torch.tensor([one[i][1][name] for one in each]) for name in shares}
            ways = {
                "probabilities": {name: x.mean() for name, x in p.items()},
                "logits": {name: x.log().mean().exp() for name, x in p.items()},
                "votes": {name: torch.tensor([one[i][0] == name for one in each]).double().mean() for name in p},
            }
            whole = sum(ways[combine].values())
            wanted = {name: float(x / whole) for name, x in ways[combine].items()}
            assert shares == pytest.approx(wanted, abs=1e-5)
            assert label == max(wanted, key=wanted.__getitem__)
    # A tie is decided by the mean probability.
    label, shares = predict(folders[0], texts[:1], others=folders[1:2], combine="votes")[0]
    means = predict(folders[0], texts[:1], others=folders[1:2])[0][1]
    assert label == max(means, key=lambda name: (shares[name], means[name]))
    # Members in one batch need room for the longest prompt and for what others are moved by.
    assert len(predict(folders[0], ["dull " * 70], others=folders[1:])) == 1
    for folder in folders[:2]:
        with pytest.raises(UnsupportedError, match="adapter 'default'"):
            merge_folder(folder, str(tmp_path / "merged"))
        assert not (tmp_path / "merged").exists()


def test_runs_that_cannot_answer_together_are_refused(classify: Options, write: Options, tmp_path: Path) -> None:
    first = train(classify(METHODS["prompt"], num_train_epochs=1), console=quiet()).folder
    other = classify("lora:r=2", output={"folder": str(tmp_path / "other")}, num_train_epochs=1)
    other.data.max_length = 32
    with pytest.raises(ConfigError, match=r"their data.max_length differ \(512 and 32\)"):
        predict(first, ["dull"], others=[train(other, console=quiet()).folder])
    with pytest.raises(ConfigError, match="combine='mean'; one of"):
        predict(first, ["dull"], others=[first], combine="mean")


def test_writers_write_together(write: Options, tmp_path: Path) -> None:
    folders = [
        train(write(m, output={"folder": str(tmp_path / f"{i}")}, num_train_epochs=1), console=quiet()).folder
        for i, m in enumerate([METHODS["prompt"], "lora:r=4,target_modules=all-linear"])
    ]
    prompts = ["the film was dull", "the film was warm and a story"]
    together = predict(folders[0], prompts, others=folders[1:], max_new_tokens=6)
    assert together == [predict(folders[0], [p], others=folders[1:], max_new_tokens=6)[0] for p in prompts]
    # One that is asked twice says what it says once.
    alone = predict(folders[1], prompts, max_new_tokens=6)
    assert predict(folders[1], prompts, others=folders[1:], max_new_tokens=6) == alone
