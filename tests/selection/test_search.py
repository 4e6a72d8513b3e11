"""`veneer search`: what it tries, prunes, goes on with, shares, writes and refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from rich.console import Console

from veneer import get_peft_model
from veneer.cli import main
from veneer.errors import ConfigError, VeneerError
from veneer.options import RunOptions, RunResult, SearchOptions
from veneer.selection import search as module
from veneer.selection import trials
from veneer.selection.search import OWN_TARGETS, done, open_study, search, suggest

Options = Callable[..., RunOptions]


def searched(options: RunOptions, methods: list[Any], **what: Any) -> trials.Found:
    console = Console(file=io.StringIO(), width=200)
    options.training.pop("learning_rate", None)
    options.model.dtype, options.training["threads"] = "float32", 1  # nothing is measured
    return search(options, SearchOptions(methods, **what), console=console)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials that are over at once: those tests are of the study, not of training. Lists the folders."""
    seen: list[str] = []

    def run_on(basis: Any, run: RunOptions, folder: Path, **named: Any) -> RunResult:
        model = get_peft_model(basis.base, run.method)
        seen.append(folder.name)
        trained, total = model.get_nb_trainable_parameters()
        good = {"accuracy": 1 / len(seen), "loss": 1.0}
        return RunResult("m", {}, {}, good, None, [], trained, total, 0, 0.1, 0, [], [], str(folder))

    monkeypatch.setattr(module, "run_on", run_on)
    return seen


def finished(found: trials.Found) -> list[Any]:
    return [trial for trial in found.study.trials if trial.state.name == "COMPLETE"]


def test_the_best_is_written_and_trains(classify: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = searched(classify(num_train_epochs=1), ["lora", "snip:density=0.05"], trials=2, prune=False)
    tried = finished(found)
    assert len(tried) == 2
    best = max(tried, key=lambda trial: (trial.value, -trial.number))
    written = yaml.safe_load(Path(found.config).read_text())
    assert written["method"] == best.user_attrs["method"]
    assert written["training"]["learning_rate"] > 0
    report = Path(found.report).read_text()
    assert "Score against size" in report
    assert "learning_rate" in report
    console = Console(file=io.StringIO(), width=100)
    console.print(trials.table(found))
    assert "held-out accuracy" in console.file.getvalue()  # type: ignore[attr-defined]
    assert main(["train", "--config", found.config, "--output", str(tmp_path / "trained")]) == 0
    after = json.loads((tmp_path / "trained" / "results.json").read_text())["after"]
    assert after["accuracy"] == found.study.best_value  # the same run, alone
    capsys.readouterr()


def test_an_interrupted_study_goes_on(classify: Options, monkeypatch: pytest.MonkeyPatch, quick: list[str]) -> None:
    options, run_on = classify(), module.run_on

    def stopped(basis: Any, run: RunOptions, folder: Path, **named: Any) -> Any:
        if folder.name == "0001":
            raise KeyboardInterrupt
        return run_on(basis, run, folder, **named)

    monkeypatch.setattr(module, "run_on", stopped)
    with pytest.raises(KeyboardInterrupt):
        searched(options, ["lora:r=2"], trials=2)
    monkeypatch.setattr(module, "run_on", run_on)
    found = searched(options, ["lora:r=2"], trials=2)
    assert [trial.state.name for trial in found.study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert done(found.study) == 2
    assert quick == ["0000", "0002"]
    assert found.study.best_trial.number == 0
    # What is done is not done again.
    assert done(searched(options, ["lora:r=2"], trials=2).study) == 2
    assert quick == ["0000", "0002"]


@pytest.mark.parametrize("storage", ["shared.journal", "sqlite:///{}/shared.db"])
def test_processes_with_folders_of_their_own_share_a_study(
    classify_into: Options, tmp_path: Path, storage: str
) -> None:
    where = storage.format(tmp_path) if "://" in storage else str(tmp_path / storage)
    for i, count in enumerate((1, 2)):
        options = classify_into(tmp_path / f"machine-{i}", num_train_epochs=1)
        found = searched(options, ["bitfit"], trials=count, storage=where)
    assert [trial.number for trial in finished(found)] == [0, 1]
    assert [Path(trial.user_attrs["folder"]).parts[-3] for trial in finished(found)] == ["machine-0", "machine-1"]
    options = classify_into(tmp_path / "machine-2", num_train_epochs=2)
    options.model.dtype = "measured"
    with pytest.raises(ConfigError, match=r"is of another question: model, training differ"):
        open_study(options, SearchOptions(["bitfit"], storage=where), tmp_path)
    options.output.overwrite = True
    assert not open_study(options, SearchOptions(["bitfit"], storage=where), tmp_path).trials


def test_trials_that_fall_behind_are_stopped(classify: Options) -> None:
    options = classify(num_train_epochs=3)
    del options.training["learning_rate"]
    options.model.dtype = "float32"
    study = open_study(options, SearchOptions(["bitfit"]), _made(options))
    # Five that were good from the start: what is worse than their median in the middle gives way.
    for _ in range(5):
        known = {"method": {"name": "ideal"}, "training": {}, "parameters": 1, "seconds": 1.0, "folder": "nowhere"}
        over = optuna.trial.TrialState.COMPLETE
        at = {7: 1.0, 14: 1.0}
        study.add_trial(optuna.trial.create_trial(value=1.0, intermediate_values=at, state=over, user_attrs=known))
    found = searched(options, ["bitfit:training.learning_rate=1e-9"], trials=6)
    last = found.study.trials[-1]
    assert last.state.name == "PRUNED"
    assert list(last.intermediate_values) == [7]
    assert not (Path(options.output.folder) / "trials" / "0005" / "results.json").exists()
    assert done(found.study) == 6


def _made(options: RunOptions) -> Path:
    folder = Path(options.output.folder)
    folder.mkdir(parents=True)
    return folder


@pytest.mark.usefixtures("quick")
def test_a_trial_that_fails_is_told_and_the_others_go_on(classify: Options) -> None:
    found = searched(classify(num_train_epochs=1), ["lora:r=4,target_modules=[qeury]", "bitfit"], trials=4, prune=False)
    failed = [trial for trial in found.study.trials if trial.state.name == "FAIL"]
    assert failed
    assert all("Did you mean 'query'" in trial.user_attrs["error"] for trial in failed)
    assert "Did you mean" in Path(found.report).read_text()
    options = classify(num_train_epochs=1, output={"overwrite": True})
    with pytest.raises(VeneerError, match=r"No trial could be trained.*qeury"):
        searched(options, ["lora:r=4,target_modules=[qeury]"], trials=2)


def test_a_language_model_is_judged_by_its_loss(write: Options) -> None:
    found = searched(write(num_train_epochs=1), ["ia3"], trials=1)
    assert found.score_name == "loss"
    assert found.study.best_value == min(trial.value for trial in finished(found))


def test_what_is_given_is_kept_and_the_rest_is_searched(classify: Options) -> None:
    options = classify()
    options.training = {}
    what = SearchOptions(
        ["lora", "lora:r=3,target_modules=[query]", "fish_mask", "gps", "houlsby",
         {"name": "dora", "training": {"learning_rate": 0.5}}], targets=["all-linear", "query,key"],
    )  # fmt: skip
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for _ in range(150):
        trial = study.ask()
        seen.setdefault(trial.suggest_categorical("method", [module._spec(m) for m in what.methods]), []).append(
            suggest(trial, options, what)
        )
    assert {method["r"] for method, _ in seen["lora"]} == set(what.ranks)
    targets = {str(method.get("target_modules")) for method, _ in seen["lora"]}
    assert targets == {"None", "all-linear", "['query', 'key']"}
    assert all(2.5e-4 <= training["learning_rate"] <= 4e-3 for _, training in seen["lora"])
    assert all(method == {"name": "lora", "r": 3, "target_modules": ["query"]} for method, _ in seen[what.methods[1]])
    assert {method["density"] for method, _ in seen["fish_mask"]} == set(what.densities)
    assert all("density" not in method for method, _ in seen["gps"])
    assert {method["reduction"] for method, _ in seen["houlsby"]} == set(what.reductions)
    assert all("target_modules" not in method for method, _ in seen["houlsby"])
    assert all(training == {"learning_rate": 0.5} for _, training in seen[module._spec(what.methods[-1])])
    assert OWN_TARGETS not in what.targets


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"trials": 0}, "trials is 0"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["bitfit", "bitfit"]}, "bitfit is given twice"),
        ({"ranks": [0, 2]}, r"ranks is \[0, 2\]"),
        ({"densities": [0.1, 1.5]}, "up to 1"),
        ({"reductions": []}, "reductions is"),
        ({"rates": [1e-2, 1e-3]}, "lowest and the highest"),
        ({"methods": ["bitfti"]}, "Did you mean 'bitfit'"),
        ({"storage": "nodatabase://x/y"}, "storage: nodatabase://x/y cannot be"),
    ],
)
def test_what_cannot_be_searched_says_why(classify: Options, what: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        search(classify(), SearchOptions(**{"methods": ["bitfit"], **what}), console=Console(quiet=True))


def test_something_has_to_be_held_out_and_the_folder_free(classify: Options, tmp_path: Path) -> None:
    options = classify()
    options.data.validation_share = 0.0
    with pytest.raises(ConfigError, match="Nothing is held out"):
        searched(options, ["bitfit"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    options.output.folder = str(tmp_path / "full")
    with pytest.raises(ConfigError, match=r"holds no search \(thesis\.txt\)"):
        searched(options, ["bitfit"])


def test_the_command(classify: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = classify()
    arguments = [
        "search", "--task", "classification", "--model", options.model.name, "--data", options.data.train,
        "--output", str(tmp_path / "found"), "--methods", "bitfit", "lora", "--ranks", "2", "4",
        "--rates", "1e-4", "1e-2",
        "--trials", "1", "--training.num_train_epochs", "1", "--training.per_device_train_batch_size", "8",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "best.yaml" in shown.out
    assert "trial 0 (1 of 1)" in shown.err
    assert main([*arguments, "--methods", "btifit"]) == 2
    assert "Did you mean 'bitfit'" in capsys.readouterr().err
