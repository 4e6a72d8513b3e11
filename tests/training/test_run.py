import dataclasses
import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertModel, TrainerCallback

from veneer import files
from veneer.errors import CheckpointError, ConfigError, DataError, VeneerError, VeneerWarning
from veneer.model import PeftModel
from veneer.options import RunOptions
from veneer.training import folder as run_folder
from veneer.training.run import evaluate, load_trained, predict, predictor, read_texts, train

Options = Callable[..., RunOptions]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def finished(classify_into: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch; not to be changed."""
    return Path(
        train(classify_into(tmp_path_factory.mktemp("done") / "run", num_train_epochs=1), console=quiet()).folder
    )


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_with_lora_fa_trains_and_reports_the_second_factors(classify: Options) -> None:
    console = quiet()
    options = classify("lora:r=8,target_modules=[query]", num_train_epochs=1, lora_optimizer="lorafa")
    result = train(options, console=console)
    saved = tensors(result.folder)
    counted = sum(tensor.numel() for name, tensor in saved.items() if "lora_A" not in name)
    assert result.trained_parameters == counted
    assert f"Trained: {counted:,} of" in console.file.getvalue()  # type: ignore[attr-defined]
    assert all(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    assert run_folder.read_options(result.folder).training["lora_optimizer"] == "lorafa"


def test_a_classification_run_from_options_to_answers(classify: Options, reviews: Path, tmp_path: Path) -> None:
    options = classify("lora:r=8,target_modules=all-linear", num_train_epochs=10, learning_rate=2e-2)
    console = quiet()
    result = train(options, console=console)
    folder = Path(result.folder)

    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for line in ("72 rows", "Trained: ", "⟦", "held out, before training", "after epoch 10", "gives the same answers"):
        assert line in shown
    assert result.method == "lora"
    assert result.labels == ["bad", "very_good"]
    assert result.majority == 0.5
    assert set(result.before) == set(result.after) == {"loss", "accuracy", "macro_f1"}
    assert result.after["accuracy"] > max(0.8, result.before["accuracy"])
    assert result.adapter_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert 0 < result.trained_parameters < result.total_parameters
    assert result.seconds > 0
    assert result.peak_memory_bytes > 50e6
    assert [entry["epoch"] for entry in result.history if "eval_loss" in entry] == [*range(1, 11)]
    assert any("loss" in entry for entry in result.history)
    assert json.loads((folder / "results.json").read_text()) == dataclasses.asdict(result)

    measured = evaluate(folder)
    assert {name: measured[name] for name in result.after} == pytest.approx(result.after)
    assert measured["examples"] == 18
    assert 0 <= measured["precision (bad)"] <= 1
    everything = evaluate(folder, str(reviews))
    assert everything["examples"] == 72

    texts = ["dull film and a slow story", "warm story", "dull"]
    answers = predict(folder, texts)
    model, tokenizer, _, labels = load_trained(folder)
    for text, (label, probabilities) in zip(texts, answers, strict=True):
        wanted = model(**tokenizer(text, return_tensors="pt")).logits.softmax(dim=-1)[0]
        assert [probabilities[name] for name in labels] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert label == labels[int(wanted.argmax())] == next(iter(probabilities))
    # In a batch, padding changes nothing.
    assert predict(folder, texts[1:2])[0][1] == pytest.approx(answers[1][1], abs=1e-5)
    assert predict(folder, []) == []
    with pytest.raises(DataError, match="texts are empty"):
        predict(folder, ["warm", "  "])


def test_what_is_written_repeats_the_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    again = run_folder.read_options(finished)
    assert again.training["learning_rate"] == 1e-2
    assert again.training["warmup_steps"] == 0.1
    assert again.method == {**again.method, "name": "lora", "r": 4, "lora_dropout": 0.1}  # type: ignore[dict-item]
    again.output.folder = str(tmp_path / "again")
    second = train(again, console=quiet())
    assert same(tensors(finished), tensors(second.folder))
    assert second.after == run_folder.read_result(finished).after


def test_the_folder_holds_the_run_and_nothing_else(finished: Path) -> None:
    assert sorted(entry.name for entry in finished.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint-7", "results.json", "run.yaml",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_language_run_from_options_to_answers(write: Options, tmp_path: Path) -> None:
    options = write(num_train_epochs=20)
    result = train(options, console=quiet())
    assert result.labels == []
    assert result.majority is None
    assert result.after["loss"] < result.before["loss"] / 4
    assert result.after["perplexity"] == pytest.approx(2.718281828 ** result.after["loss"], rel=1e-6)
    assert 1 <= len(result.examples) <= 3
    for example in result.examples:
        assert set(example) == {"prompt", "expected", "before", "after"}
        assert example["after"] == example["expected"] != example["before"]
    # Written as in training (the columns make the separator), and only the new text is given back.
    assert predict(result.folder, ["the film was dull", "the film was warm"]) == ["dull and dull", "warm and warm"]
    assert predict(result.folder, ["the film was dull"], max_new_tokens=1) == ["dull"]
    sampled = predictor(result.folder, temperature=5.0)(["the film was dull"])
    assert set(sampled[0]) == {"generated"}
    measured = evaluate(result.folder)
    assert measured["loss"] == pytest.approx(result.after["loss"])
    assert measured["examples"] == 8
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        predictor(result.folder, max_new_tokens=0)


def test_a_decoder_classifies_alike_alone_and_in_a_batch(classify: Options, decoder: Path) -> None:
    # It reads the class off the last token that is not padding, and its configuration names no padding.
    options = classify("lora:r=4", num_train_epochs=1)
    options.model.name = str(decoder)
    result = train(options, console=quiet())
    texts = ["dull film", "warm story with a plot and music"]
    together = predict(result.folder, texts)
    for text, answer in zip(texts, together, strict=True):
        assert predict(result.folder, [text])[0][1] == pytest.approx(answer[1], abs=1e-5)


def test_a_head_for_other_classes_gives_way(classify: Options, encoder: Path, tmp_path: Path) -> None:
    three = tmp_path / "three"
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3).save_pretrained(three)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (three / file).write_bytes((encoder / file).read_bytes())
    options = classify(num_train_epochs=1)
    options.model.name = str(three)
    assert train(options, console=quiet()).labels == ["bad", "very_good"]


def test_a_run_in_bf16_keeps_its_answers(classify: Options) -> None:
    options = classify(num_train_epochs=1)
    options.model.dtype = "bfloat16"
    result = train(options, console=quiet())
    model, *_ = load_trained(result.folder)
    assert model.dtype == torch.bfloat16
    assert {t.dtype for t in tensors(result.folder).values()} == {torch.float32}


def test_a_placed_model_trains(classify: Options) -> None:
    options = classify(num_train_epochs=1)
    options.model.device_map, options.model.max_memory = "auto", {"cpu": "8GiB"}
    train(options, console=quiet())


def test_early_stopping_ends_with_the_best_model(classify: Options) -> None:
    options = classify(
        num_train_epochs=30, learning_rate=0.3, output={"early_stopping_patience": 2}, metric_for_best_model="accuracy"
    )
    result = train(options, console=quiet())
    evaluations = [entry for entry in result.history if "eval_accuracy" in entry]
    assert len(evaluations) < 30
    assert result.after["accuracy"] == max(entry["eval_accuracy"] for entry in evaluations)
    assert result.after["accuracy"] == evaluations[-3]["eval_accuracy"]


def test_callbacks_are_called_and_a_terminal_shows_a_bar(classify: Options) -> None:
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps += 1

    count = Count()
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    train(classify(num_train_epochs=1), callbacks=[count], console=console)
    assert count.steps == 7
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "training" in shown
    assert "7/7" in shown


def test_a_saved_adapter_that_answers_otherwise_is_not_published(
    classify: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PeftModel.from_pretrained

    def wrong(*args: Any, **kwargs: Any) -> PeftModel:
        model = original(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if "lora" in name.lower() or "up" in name:
                parameter.data.add_(0.1)
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", wrong)
    options = classify(num_train_epochs=1)
    with pytest.raises(VeneerError, match="does not give the answers of the trained one"):
        train(options, console=quiet())
    assert sorted(entry.name for entry in Path(options.output.folder).iterdir()) == ["checkpoint-7", "run.yaml"]
    monkeypatch.undo()
    train(dataclasses.replace(options, output=dataclasses.replace(options.output, resume=True)), console=quiet())
    assert (Path(options.output.folder) / "results.json").exists()


def test_a_full_disk_at_the_end_leaves_a_run_that_can_go_on(classify: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == "results.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    options = classify(num_train_epochs=1)
    with pytest.raises(CheckpointError, match="the disk is full"):
        train(options, console=quiet())
    assert sorted(entry.name for entry in Path(options.output.folder).iterdir()) == ["checkpoint-7", "run.yaml"]
    with pytest.raises(CheckpointError, match=r"has not finished: it has no results.json. Go on with it"):
        predict(options.output.folder, ["warm"])


def test_nothing_is_written_before_the_options_are_known_to_work(classify: Options, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric_for_best_model is 'acuracy'.*Did you mean 'accuracy'"):
        train(classify(metric_for_best_model="acuracy", output={"folder": str(tmp_path / "metric")}), console=quiet())
    for options, message in (
        (classify(leanring_rate=1), "Did you mean 'learning_rate'"),
        (classify("lora:task_type=CAUSAL_LM"), "task_type is CAUSAL_LM, but the run's task is classification"),
        (classify("lora:target_modules=[qurey]"), "qurey"),
        (classify(eval_strategy="steps", eval_steps=3, load_best_model_at_end=True), "requires the save and eval"),
    ):
        with pytest.raises(VeneerError, match=message):
            train(options, console=quiet())
        assert not Path(options.output.folder).exists()


def test_a_folder_with_other_things_is_left_alone(classify: Options, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    for output in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=r"not empty and holds no run of Veneer's \(thesis.txt\)"):
            train(classify(output=output), console=quiet())
    with pytest.raises(CheckpointError, match="holds no run to go on with"):
        train(classify(output={"resume": True}), console=quiet())
    with pytest.raises(ConfigError, match="both set"):
        train(classify(output={"resume": True, "overwrite": True}), console=quiet())
    with pytest.raises(ConfigError, match=r"is a file. Name a folder"):
        train(classify(output={"folder": str(tmp_path / "run" / "thesis.txt")}), console=quiet())
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_a_run_is_replaced_only_if_asked(classify: Options, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoint-7").rename(folder / "checkpoint-99")
    (folder / "notes.txt").write_text("mine")
    before = tensors(folder)
    with pytest.raises(ConfigError, match=r"already holds a run. Name another folder, set output.resume"):
        train(classify(), console=quiet())
    # A mistake in the new run does not cost the old one.
    with pytest.raises(VeneerError, match="qurey"):
        train(classify("lora:target_modules=[qurey]", output={"overwrite": True}), console=quiet())
    assert same(tensors(folder), before)
    train(classify("bitfit", output={"overwrite": True}, num_train_epochs=1), console=quiet())
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "BITFIT"
    assert [entry.name for entry in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-7"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_resuming_another_run_is_refused_and_other_settings_are_said(
    classify: Options, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    resume = {"resume": True}
    with pytest.raises(ConfigError, match=r"holds another run: method was .* and is now 'bitfit'"):
        train(classify("bitfit", output=resume), console=quiet())
    other = classify(output=resume)
    other.data.validation_share = 0.5
    with pytest.raises(ConfigError, match=r"data.validation_share was 0.25 and is now 0.5"):
        train(other, console=quiet())
    with pytest.warns(VeneerWarning, match=r"training.num_train_epochs was 1.0 and is now 2"):
        result = train(classify(num_train_epochs=2, output=resume), console=quiet())
    assert result.history[-1]["step"] == 14


def test_a_run_without_checkpoints_cannot_be_resumed(classify: Options, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    options = classify(num_train_epochs=1, output={"resume": True})
    with pytest.raises(CheckpointError, match=r"no complete checkpoint to resume from .*Start the run anew"):
        train(options, console=quiet())


def test_what_the_model_cannot_take_is_said_before_the_run(classify: Options, encoder: Path, tmp_path: Path) -> None:
    options = classify()
    options.model.name = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"model.name: the tokenizer of .*nowhere' could not be loaded"):
        train(options, console=quiet())
    options = classify()
    options.model.max_memory = {"cpu": "1GiB"}
    with pytest.raises(ConfigError, match=r"max_memory only has a meaning with model.device_map"):
        train(options, console=quiet())

    short = tmp_path / "short"
    small = BertModel.from_pretrained(encoder)
    small.config.max_position_embeddings = 8
    small.embeddings.position_embeddings = torch.nn.Embedding(8, 32)
    small.save_pretrained(short)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (short / file).write_bytes((encoder / file).read_bytes())
    options = classify()
    options.model.name = str(short)
    with pytest.raises(ConfigError, match=r"has positions for 8. Set data.max_length to 8 or less"):
        train(options, console=quiet())


def test_weights_that_stay_random_are_warned_of(classify: Options, encoder: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(headless)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (headless / file).write_bytes((encoder / file).read_bytes())
    options = classify(num_train_epochs=1)
    options.model.name = str(headless)
    # The check at the end finds out as well: a fresh base has another random pooler.
    with pytest.warns(VeneerWarning, match=r"lack 2 weights that are not trained either: bert.pooler"):  # noqa: SIM117
        with pytest.raises(VeneerError, match="does not give the answers of the trained one"):
            train(options, console=quiet())


def test_damaged_files_are_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not the output folder of a run: it has no run.yaml"):
        load_trained(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    written = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(written.replace("classification", "clasification"))
    with pytest.raises(CheckpointError, match=r"run.yaml is not a run's configuration"):
        load_trained(folder)
    files.write_text(folder / "run.yaml", written)
    (folder / "results.json").write_text('{"method": ')
    with pytest.raises(CheckpointError, match=r"results.json cannot be read"):
        load_trained(folder)


def test_texts_are_read_from_files(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("warm film\n\ndull film\n", encoding="utf-8")
    (tmp_path / "new.csv").write_text("id,text\n1,warm film\n2,dull film\n", encoding="utf-8")
    (tmp_path / "bare.csv").write_text("id,number\n1,2\n", encoding="utf-8")
    assert read_texts(finished, str(tmp_path / "new.csv")) == ["warm film", "dull film"]
    assert [text for text in read_texts(finished, str(tmp_path / "new.txt")) if text] == ["warm film", "dull film"]
    with pytest.raises(DataError, match="no column looks like the text"):
        read_texts(finished, str(tmp_path / "bare.csv"))


def test_a_method_that_needs_data_sees_training_batches(classify: Options, tmp_path: Path) -> None:
    console = quiet()
    options = classify("lora:r=4,init_lora_weights=eva,eva_config={rho: 1.0}", num_train_epochs=1)
    options.data.preparation_batches = 5
    result = train(options, console=console)
    assert "Shown to the method before training: 5 batches of 8." in console.file.getvalue()  # type: ignore[attr-defined]
    assert result.config["eva_config"]["rho"] == 1.0
    other = train(classify("lora:r=4", output={"folder": str(tmp_path / "other")}, num_train_epochs=1), console=quiet())
    assert not same(tensors(result.folder), tensors(other.folder))
    options.data.preparation_batches = 0
    options.output.overwrite = True
    with pytest.raises(ConfigError, match="preparation_batches is 0"):
        train(options, console=quiet())


def test_ranks_chosen_from_data_come_back_in_a_resumed_run(classify: Options, tmp_path: Path) -> None:
    method = "lora:r=4,target_modules=all-linear,init_lora_weights=eva,eva_config={tau: 0.5}"
    whole = train(classify(method, output={"folder": str(tmp_path / "whole")}), console=quiet())
    assert set(whole.config["rank_pattern"].values()) != {4}

    class Stop(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.epoch > 0.9:
                raise KeyboardInterrupt

    cut = classify(method)
    with pytest.raises(KeyboardInterrupt):
        train(classify(method, save_steps=2), callbacks=[Stop()], console=quiet())
    resumed = dataclasses.replace(cut, output=dataclasses.replace(cut.output, resume=True))
    resumed.training["save_steps"] = 2
    result = train(resumed, console=quiet())
    assert result.config["rank_pattern"] == whole.config["rank_pattern"]
    ours, theirs = tensors(result.folder), tensors(whole.folder)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6)
