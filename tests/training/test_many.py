"""Several methods on one base model: each is what it would be alone, and the base is what it was."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from veneer import LoraConfig, get_peft_model
from veneer.commands.merging import merge_folder
from veneer.errors import CheckpointError, ConfigError, VeneerError
from veneer.options import RunOptions
from veneer.training import basis, many
from veneer.training import folder as run_folder
from veneer.training.many import COMPARISON, train_many
from veneer.training.original import Original
from veneer.training.run import evaluate, predict, train

Options = Callable[..., RunOptions]
METHODS: list[Any] = [
    "lora:r=4,lora_dropout=0.1",
    {"name": "lora", "r": 2, "target_modules": ["query"], "training": {"learning_rate": 3e-3}},
    "bitfit",
    "houlsby",
    "dora:r=2,training.num_train_epochs=1",
]
NAMES = [
    "lora-r=4-lora_dropout=0.1",
    "lora-r=2-target_modules=query-learning_rate=0.003",
    "bitfit",
    "houlsby",
    "dora-r=2-num_train_epochs=1",
]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: str | Path, other: str | Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def states(folder: str | Path) -> dict[str, str]:
    found = json.loads((Path(folder) / COMPARISON).read_text())["configurations"]
    return {name: values["state"] for name, values in found.items()}


def alone(options: RunOptions, folder: Path, method: str, **training: Any) -> str:
    options = copy.deepcopy(options)
    options.method, options.output.folder = method, str(folder)
    options.training |= training
    return train(options, console=quiet()).folder


def test_each_ends_in_the_weights_of_a_run_of_its_own(
    classify: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, console, loads = classify(), quiet(), []
    original = basis.load_model
    monkeypatch.setattr(basis, "load_model", lambda *a, **k: loads.append(1) or original(*a, **k))
    done = train_many(options, METHODS, console=console)
    assert list(done.results) == NAMES
    assert not done.failures
    assert loads == [1]
    single = {
        NAMES[0]: alone(options, tmp_path / "0", "lora:r=4,lora_dropout=0.1"),
        NAMES[1]: alone(options, tmp_path / "1", "lora:r=2,target_modules=[query]", learning_rate=3e-3),
        NAMES[2]: alone(options, tmp_path / "2", "bitfit"),
        NAMES[4]: alone(options, tmp_path / "4", "dora:r=2", num_train_epochs=1),
    }
    for name, folder in single.items():
        assert same(folder, done.results[name].folder), name
        before, after = run_folder.read_result(folder), run_folder.read_result(done.results[name].folder)
        assert after.before == before.before
        assert after.after == before.after
        assert run_folder.read_options(done.results[name].folder).training == run_folder.read_options(folder).training
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("The first example") == 1
    assert "as above" in shown
    assert shown.count("the saved adapter gives the same answers") == 5
    assert states(done.folder) == dict.fromkeys(NAMES, "finished")

    # A folder is that of any run.
    folder = Path(done.results[NAMES[1]].folder)
    assert evaluate(folder)["loss"] == pytest.approx(done.results[NAMES[1]].after["loss"])
    assert predict(folder, ["warm story"]) == predict(single[NAMES[1]], ["warm story"])
    merge_folder(str(folder), str(tmp_path / "merged"))


def test_a_language_model_writes_the_same(write: Options, tmp_path: Path) -> None:
    options = write(num_train_epochs=1)
    methods = ["lora:r=4,target_modules=all-linear", "last_layers", "ia3"]
    done = train_many(options, methods, console=quiet())
    assert not done.failures
    assert [len(result.examples) for result in done.results.values()] == [3, 3, 3]
    for i, (method, result) in enumerate(zip(methods, done.results.values(), strict=True)):
        folder = alone(options, tmp_path / str(i), method)
        assert same(folder, result.folder), method
        assert run_folder.read_result(folder).examples == result.examples


def test_an_int8_base_serves_all(classify: Options, tmp_path: Path) -> None:
    options = classify(num_train_epochs=1)
    options.model.quantize = "int8"
    done = train_many(options, ["lora:r=2", "lora:r=4"], console=quiet())
    assert not done.failures
    folder = alone(options, tmp_path / "alone", "lora:r=4")
    assert same(folder, done.results["lora-r=4"].folder)
    assert evaluate(done.results["lora-r=4"].folder)["loss"] == evaluate(folder)["loss"]


def test_one_that_fails_does_not_stop_the_others(classify: Options, tmp_path: Path) -> None:
    options = classify(num_train_epochs=1)
    methods = ["lora:r=4,target_modules=[qeury]", "lora:r=4,training.learning_rate=1e30", "lora:r=4", "bitfit"]
    done = train_many(options, methods, console=quiet())
    wrong, infinite = list(done.failures)
    assert "Did you mean 'query'" in done.failures[wrong]
    assert "loss became" in done.failures[infinite]
    assert states(done.folder) == {wrong: "failed", infinite: "failed", "lora-r=4": "finished", "bitfit": "finished"}
    assert same(alone(options, tmp_path / "alone", "lora:r=4"), done.results["lora-r=4"].folder)


def test_what_has_not_finished_is_gone_on_with(
    classify: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = classify()
    methods = ["lora:r=2", "lora:r=4", "bitfit"]
    run_on, publish = many.run_on, run_folder.publish

    def stopped(basis: Any, run: RunOptions, folder: Path, **named: Any) -> Any:
        if folder.name == "lora-r=4":  # all of its checkpoints are there, and no result
            monkeypatch.setattr(run_folder, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        return run_on(basis, run, folder, **named)

    monkeypatch.setattr(many, "run_on", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_many(options, methods, console=quiet())
    monkeypatch.setattr(run_folder, "publish", publish)
    assert states(options.output.folder) == {
        "lora-r=2": "finished",
        "lora-r=4": "not finished",
        "bitfit": "not finished",
    }

    trained: list[tuple[str, bool]] = []

    def noted(basis: Any, run: RunOptions, folder: Path, **named: Any) -> Any:
        trained.append((folder.name, run.output.resume))
        return run_on(basis, run, folder, **named)

    monkeypatch.setattr(many, "run_on", noted)
    with pytest.raises(ConfigError, match="already holds a comparison"):
        train_many(options, methods, console=quiet())
    options.output.resume = True
    done = train_many(options, methods, console=quiet())
    assert trained == [("lora-r=4", True), ("bitfit", False)]
    assert list(done.results) == ["lora-r=2", "lora-r=4", "bitfit"]
    options.output.resume = False
    assert same(alone(options, tmp_path / "alone", "lora:r=4"), done.results["lora-r=4"].folder)

    options.output.resume = True
    other = dataclasses.replace(options, data=dataclasses.replace(options.data, max_length=32))
    with pytest.raises(ConfigError, match=r"holds another run: data\.max_length"):
        train_many(other, methods, console=quiet())
    options.output.resume, options.output.overwrite = False, True
    assert list(train_many(options, ["bitfit"], console=quiet()).results) == ["bitfit"]
    assert sorted(entry.name for entry in Path(options.output.folder).iterdir()) == ["bitfit", COMPARISON]


def test_a_base_is_made_what_it_was(encoder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder)
    x = torch.arange(4, 12)[None]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules, config, logits = dict(model.named_modules()), model.config.to_dict(), model(x).logits
    original = Original(model)
    for method in ("lora:r=2,target_modules=all-linear,bias=all", "houlsby", "full", "ia3"):
        adapted = get_peft_model(model, method)
        adapted.gradient_checkpointing_enable()
        adapted.train()
        model.config.use_cache = False
        adapted(x, labels=torch.tensor([1])).loss.backward()
        gone = weakref.ref(adapted)
        del adapted
        original.restore()
        gc.collect()
        assert gone() is None
        assert dict(model.named_modules()) == modules
        assert model.config.to_dict() == config
        assert not any(module.training for module in modules.values())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(x).logits, logits)


def test_a_base_that_was_changed_is_not_used_again(classify: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on = many.run_on

    def spoil(basis: Any, *rest: Any, **named: Any) -> Any:
        result = run_on(basis, *rest, **named)
        with torch.no_grad():
            next(basis.base.parameters()).add_(1e-3)
        return result

    monkeypatch.setattr(many, "run_on", spoil)
    options = classify(num_train_epochs=1)
    with pytest.raises(VeneerError, match=r"changed the base model itself: bert\.embeddings"):
        train_many(options, ["bitfit", "lora:r=2"], console=quiet())
    assert states(options.output.folder) == {"bitfit": "failed", "lora-r=2": "not finished"}
    assert not (Path(options.output.folder) / "bitfit" / run_folder.RESULTS).exists()


def test_a_head_that_is_not_saved_is_seen(classify: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is random in every load of the model, so the base in memory must not stand in for it.
    monkeypatch.setattr("veneer.training.run.method_of", lambda options: LoraConfig(r=2, target_modules=["query"]))
    monkeypatch.setattr("veneer.training.run.warn_untrained", lambda *args: None)
    done = train_many(classify(num_train_epochs=1), ["lora:r=2"], console=quiet())
    assert "does not give the answers of the trained one" in done.failures["lora-r=2"]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], "methods is empty"),
        (["lora:r=8", "lora"], "'lora' and 'lora:r=8' are the same configuration"),
        (["lora:training.seed=3"], r"sets training\.seed, which is the same for all"),
        (["lora:training.lerning_rate=3"], "Did you mean 'learning_rate'"),
        ([{"name": "lora", "training": 3}], "Expected a mapping of training settings"),
        (["lroa"], "Did you mean 'road' or 'lora'"),
    ],
)
def test_configurations_that_cannot_be(classify: Options, methods: list[Any], message: str) -> None:
    options = classify()
    with pytest.raises(ConfigError, match=message):
        train_many(options, methods, console=quiet())
    assert not Path(options.output.folder).exists()


def test_several_processes_are_refused(classify: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"training\.fsdp is set, but a model that is spread"):
        train_many(classify(fsdp="full_shard"), ["lora"], console=quiet())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="there are 2 processes, but a model that is spread"):
        train_many(classify(), ["lora"], console=quiet())


def test_a_folder_of_something_else_is_not_touched(classify: Options, tmp_path: Path) -> None:
    options = classify()
    with pytest.raises(CheckpointError, match="holds no comparison to go on with"):
        train_many(dataclasses.replace(options, output=dataclasses.replace(options.output, resume=True)), ["lora"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds no comparison \(mine\.txt\)"):
        train_many(options, ["lora"], console=quiet())


def test_names_are_unique_and_short(classify: Options) -> None:
    methods = ["lora:target_modules='a b'", "lora:target_modules='a:b'", f"lora:target_modules=[{'x' * 90}]"]
    names = list(many.configurations(classify(), methods))
    assert names[0] == "lora-target_modules=a_b"
    assert names[1].startswith("lora-target_modules=a_b-")
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 80
