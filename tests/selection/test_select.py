"""`veneer select`: what it writes is what `veneer train` trains; ranks, layers, rounds; and what it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from veneer import get_peft_model, parse_method
from veneer.adapted import adapters_of
from veneer.cli import main
from veneer.errors import ConfigError
from veneer.options import RunOptions, SelectOptions
from veneer.selection.score_file import Scores
from veneer.selection.select import Selection, select, table

Options = Callable[..., RunOptions]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def selected(options: RunOptions, **how: Any) -> Selection:
    options.model.dtype, options.training["threads"] = "float32", 1  # nothing is measured
    return select(options, SelectOptions(**{"examples": 16, **how}), console=quiet())


def train(found: Selection, folder: Path) -> dict[str, Any]:
    """Trains what was written, by the command line; the results."""
    assert main(["train", "--config", found.config, "--output", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


def test_entries_that_are_chosen_are_those_that_are_trained(classify: Options, tmp_path: Path) -> None:
    found = selected(classify("fish_mask:density=0.02", num_train_epochs=1))
    results = train(found, tmp_path / "trained")
    tensors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    chosen = {
        name.removeprefix("base_model.model.").removesuffix(".sparse_indices"): tensor
        for name, tensor in tensors.items()
        if name.endswith("sparse_indices")
    }
    assert chosen.keys() == found.chosen.positions.keys()
    assert all(torch.equal(chosen[path].long(), found.chosen.positions[path]) for path in chosen)
    head = 32 * 2 + 2
    assert results["trained_parameters"] == sum(found.chosen.counts.values()) + head
    folder = Path(found.folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "scores.safetensors", "scores.svg", "selection.json", "train.yaml",
    ]  # fmt: skip
    assert Scores.load(folder / "scores.safetensors").criterion == "fisher"
    assert "intermediate.dense" in (folder / "scores.svg").read_text()
    console = quiet()
    console.print(table(found))
    assert "intermediate.dense" in console.file.getvalue()  # type: ignore[attr-defined]
    told = json.loads((folder / "selection.json").read_text())
    assert sum(entry["entries"] for entry in told["modules"].values()) == sum(found.chosen.counts.values())


def test_ranks_by_score_cost_no_more_and_scale_alike(classify: Options, tmp_path: Path) -> None:
    options = classify("lora:r=4,lora_alpha=8,target_modules=all-linear", num_train_epochs=1)
    found = selected(options, criterion="fisher", min_rank=0)
    config = parse_method(found.chosen.method)
    ranks = found.chosen.counts
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 16
    for path, rank in ranks.items():
        at = config.at(path)
        assert (at.r, at.lora_alpha / at.r) == (rank, 2.0)
    results = train(found, tmp_path / "trained")
    uniform = 4 * sum(32 + size for size in (32, 32, 32, 32, 64, 64)) * 2 + 4 * (32 + 32)  # layers and pooler
    head = 32 * 2 + 2
    assert uniform - 96 < results["trained_parameters"] - head <= uniform
    # Scores can be used again, to choose something else.
    file = Path(found.folder) / "scores.safetensors"
    options.output.folder = str(tmp_path / "again")
    options.method = "dora:r=2,target_modules=all-linear"
    again = selected(options, scores=str(file))
    assert again.scores.modules() == pytest.approx(found.scores.modules())
    assert again.chosen.unit == "rank"
    scale = [parse_method(again.chosen.method).at(path) for path in again.chosen.counts]
    assert {config.lora_alpha / config.r for config in scale} == {4.0}


@pytest.mark.parametrize(
    ("method", "how", "kept"),
    [
        ("houlsby:reduction=4", {"keep_layers": 1}, 2),
        ("ia3", {"keep_modules": 3}, 3),
        ("lora:r=2", {"keep_layers": 1, "criterion": "magnitude"}, 2),
        ("snip:density=0.1", {"keep_modules": 2}, 2),
    ],
)
def test_the_best_layers_or_modules_are_kept(
    classify: Options, tmp_path: Path, method: str, how: dict[str, Any], kept: int
) -> None:
    options = classify(method, num_train_epochs=1)
    found = selected(options, **how)
    best = sorted(found.scores.modules(), key=lambda path: -found.scores.modules()[path])
    if "keep_modules" in how:
        assert set(found.chosen.counts) <= set(best[:kept])
    assert len(found.chosen.counts) == kept
    if method.startswith("houlsby"):
        train(found, tmp_path / "trained")
        tensors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
        adapted = {name.partition(".adapter_")[0] for name in tensors if ".adapter_" in name}
        assert adapted == {f"base_model.model.{path}" for path in found.chosen.counts}
    else:
        base = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(options.model.name), found.chosen.method
        )
        places = {wrapper.path for wrapper, _ in adapters_of(base, "default")}
        assert places == set(found.chosen.counts)


def test_rounds_score_what_the_last_one_has_trained(classify: Options) -> None:
    found = selected(classify("fish_mask:density=0.05", learning_rate=1e-2), refine=2)
    folder = Path(found.folder)
    first, second = found.rounds
    assert (first.kept, first.number, second.number) == (None, 1, 2)
    assert second.kept is not None
    assert 0 < second.kept < 1
    assert first.result.after["loss"] < first.result.before["loss"]
    one, two = (Scores.load(folder / f"round-{number}.safetensors") for number in (1, 2))
    assert one.base == two.base  # of the frozen model both times
    assert one.modules() != two.modules()
    best = max(found.rounds, key=lambda each: each.score[1])
    assert found.chosen.counts == best.chosen.counts
    assert "Rounds" in (folder / "report.html").read_text()
    method = yaml.safe_load((folder / "train.yaml").read_text())["method"]
    assert method["scores"] == str(folder / "scores.safetensors")
    assert yaml.safe_load((folder / "train.yaml").read_text())["training"]["num_train_epochs"] == 2  # not the rounds'


def test_a_language_model_can_be_selected_for(write: Options) -> None:
    found = selected(write("gps", num_train_epochs=1), criterion="movement")
    assert found.chosen.method["criterion"] == "movement"
    rows = 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    assert sum(found.chosen.counts.values()) == rows


def test_a_folder_is_replaced_only_if_that_is_asked_for(classify: Options) -> None:
    selected(classify("snip"))
    with pytest.raises(ConfigError, match="already holds a selection"):
        selected(classify("snip"))
    selected(classify("snip", output={"overwrite": True}))
    with pytest.raises(ConfigError, match=r"output\.resume has no meaning"):
        selected(classify("snip", output={"resume": True}))


@pytest.mark.parametrize(
    ("method", "how", "says"),
    [
        ("fish_mask", {"criterion": "fischer"}, "Unknown criterion 'fischer'. Did you mean 'fisher'"),
        ("lt_sft", {}, "LT_SFT chooses what it trains in a way of its own"),
        ("houlsby", {}, "keep_layers or keep_modules"),
        ("fish_mask", {"examples": 0}, "examples is 0"),
        ("fish_mask", {"level": "neuron"}, "each needs a score"),
        ("lora", {"keep_layers": 3}, "keep_layers is 3, but the method adapts 2 layers"),
        ("lora", {"keep_modules": 30}, "keep_modules is 30, but the method adapts 4 modules"),
        ("lora", {"keep_layers": 1, "keep_modules": 1}, "both say"),
        ("lora", {"keep_layers": 1, "max_rank": 4}, "max_rank are for ranks by score"),
        ("lora", {"max_rank": 2}, "the budget is"),
        ("lora", {"criterion": "movement"}, "has no signs"),
        ("fish_mask:count=100000", {}, "more than 100%"),
        ("lora", {"scores": "none.safetensors"}, "there is no file"),
        ("lora", {"scores": "none.safetensors", "refine": 2}, "scores and refine are both given"),
    ],
)
def test_what_cannot_be_selected_says_why(classify: Options, method: str, how: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, RuntimeError), match=says):
        selected(classify(method), **how)


def test_refining_needs_something_held_out(classify: Options) -> None:
    options = classify("snip")
    options.data.validation_share = 0.0
    with pytest.raises(ConfigError, match="refine needs held-out data"):
        selected(options, refine=1)


def test_the_command_prints_what_it_chose(
    classify: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = classify()
    arguments = [
        "select", "--task", "classification", "--model", options.model.name, "--data", options.data.train,
        "--output", str(tmp_path / "selected"), "--method", "lora:r=4", "--criterion", "snip", "--examples", "16",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "attention.self.query" in shown.out
    assert f"veneer train --config {tmp_path / 'selected' / 'train.yaml'}" in shown.out
    assert "scored" in shown.err
    assert "peak memory" in shown.err
    assert main([*arguments, "--criterion", "fischer"]) == 1
    assert "Did you mean 'fisher'" in capsys.readouterr().err
