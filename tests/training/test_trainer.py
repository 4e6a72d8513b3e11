import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    TrainerCallback,
)

from veneer.data import Collator
from veneer.errors import CheckpointError, DataError, UnsupportedError, VeneerError, VeneerWarning
from veneer.evaluation import metrics
from veneer.model import PeftModel, get_peft_model
from veneer.training import checkpoints
from veneer.training.arguments import TrainingArguments
from veneer.training.trainer import Trainer, load_adapters

QUIET: dict[str, Any] = {
    "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_strategy": "no",
    "save_strategy": "no", "learning_rate": 1e-2,
}  # fmt: skip
COLLATE = Collator(pad_token_id=0)


def rows(count: int, seed: int = 0) -> Dataset:
    """Examples of unequal length for a classifier."""
    draw = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(4, 24, (int(torch.randint(2, 14, (1,), generator=draw)),), generator=draw).tolist()
        for _ in range(count)
    ]
    return Dataset.from_dict({"input_ids": ids, "labels": [sum(row) % 2 for row in ids]})


def texts(count: int) -> Dataset:
    """Examples for a language model, of which a part carries labels."""
    ids = rows(count)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] if len(row) > 6 else row for row in ids]})


@pytest.fixture
def classifier(encoder: Path) -> Callable[..., PeftModel]:
    def make(method: str = "lora:r=4,lora_dropout=0.1,task_type=SEQ_CLS", **config: Any) -> PeftModel:
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, **config)
        return get_peft_model(base, method)

    return make


@pytest.fixture
def writer(decoder: Path) -> Callable[..., PeftModel]:
    def make(method: str = "lora:r=4,target_modules=all-linear,task_type=CAUSAL_LM") -> PeftModel:
        torch.manual_seed(1)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), method)

    return make


def trainer(model: nn.Module, folder: Path, data: Dataset, callbacks: Any = None, **settings: Any) -> Trainer:
    named = {name: settings.pop(name) for name in ("eval_dataset", "compute_metrics") if name in settings}
    args = TrainingArguments(output_dir=str(folder), **{**QUIET, **settings})
    return Trainer(model, args, data_collator=COLLATE, train_dataset=data, callbacks=callbacks, **named)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


RESUMED: dict[str, Any] = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_strategy": "steps",
    "save_steps": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_resuming_ends_in_the_same_weights(classifier: Callable[..., PeftModel], tmp_path: Path, order: str) -> None:
    settings = {**RESUMED, "train_sampling_strategy": order}
    model = classifier()
    whole = trainer(model, tmp_path, rows(17), **settings)
    whole.train()
    assert whole.state.global_step == 9
    for step in (2, 3, 5, 9):  # within the first epoch, at its end, within the second, at the very end
        again = classifier()
        resumed = trainer(again, tmp_path / "again", rows(17), **{**settings, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == 9
        assert_same(trained(again), trained(model))


@pytest.mark.parametrize("name", ["loraplus", "lorafa", "riemannian"])
def test_resuming_with_an_optimiser_of_the_lora_family(
    classifier: Callable[..., PeftModel], tmp_path: Path, name: str
) -> None:
    plain, model, again = classifier(), classifier(), classifier()
    start = trained(model)
    trainer(plain, tmp_path / "plain", rows(17), **RESUMED).train()
    settings = {**RESUMED, "lora_optimizer": name}
    trainer(model, tmp_path, rows(17), **settings).train()
    resumed = trainer(again, tmp_path / "again", rows(17), **{**settings, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(trained(again), trained(model))
    after = trained(model)
    assert any(not torch.equal(after[key], tensor) for key, tensor in trained(plain).items() if key in after)
    assert all(not torch.equal(after[key], start[key]) for key in after)
    assert any(key.endswith(".down") for key in after) == (name != "lorafa")


def test_what_an_optimiser_of_the_lora_family_does_not_go_with(
    classifier: Callable[..., PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier("bitfit:task_type=SEQ_CLS")
    with pytest.raises(UnsupportedError, match=r"LoRA\+ is made for LoRA's two factors"):
        trainer(model, tmp_path, rows(17), lora_optimizer="loraplus").train()
    # As for GaLore and LOMO, whose packages are not there.
    chosen = staticmethod(lambda args, model: (torch.optim.SGD, {"params": []}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", chosen)
    with pytest.raises(UnsupportedError, match="chooses its own parameters"):
        trainer(classifier(), tmp_path, rows(17), lora_optimizer="loraplus").train()


SCHEDULED = [
    "adalora:init_r=4,target_r=2,tinit=1,tfinal=3,deltaT=2,task_type=SEQ_CLS",
    "adamss:r=8,num_subspaces=3,use_asa=true,asa_target_subspaces=5,init_warmup=1,final_warmup=6,mask_interval=2,"
    "task_type=SEQ_CLS",
]


@pytest.mark.parametrize("method", SCHEDULED)
def test_resuming_goes_on_with_a_schedule(classifier: Callable[..., PeftModel], tmp_path: Path, method: str) -> None:
    model = classifier(method)
    trainer(model, tmp_path, rows(17), **RESUMED).train()
    config = model.peft_config["default"]
    for step in (2, 5, 7, 9):  # before, between and after choices, and at the very end
        again = classifier(method)
        resumed = trainer(again, tmp_path / "again", rows(17), **{**RESUMED, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(trained(again), trained(model))
        assert again.peft_config["default"] == config
        again.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(classifier(method).unload(), tmp_path / "saved")
        batch = COLLATE([rows(1)[0]])
        torch.testing.assert_close(loaded(**batch).logits, again.eval()(**batch).logits, rtol=1e-5, atol=1e-6)


def test_a_schedule_takes_the_length_of_the_training(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    model = classifier(SCHEDULED[0])
    trainer(model, tmp_path, rows(17), max_steps=7).train()
    assert model.peft_config["default"].total_step == 7
    kept = [sum(mask) for mask in model.peft_config["default"].rank_pattern.values()]
    assert sum(kept) == 2 * len(kept)


def test_rows_bring_what_is_meant_for_the_adapter(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**COLLATE(examples), "task_ids": [example["task_ids"] for example in examples]}

    model = classifier("mtl_lora:num_tasks=3,task_type=SEQ_CLS")
    before = trained(model)
    data = rows(8).add_column("task_ids", [0, 2] * 4)
    args = TrainingArguments(output_dir=str(tmp_path), **QUIET, max_steps=3)
    Trainer(model, args, data_collator=collate, train_dataset=data).train()
    moved = [(model.get_parameter(name) != start).flatten(1).any(1) for name, start in before.items() if "mix" in name]
    assert all(each.tolist() == [True, False, True] for each in moved)


def test_a_finished_run_does_no_further_step_when_resumed(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    # Three steps are an epoch: transformers would go on to the end of the second.
    settings = {**RESUMED, "max_steps": 5, "lr_scheduler_type": "constant", "num_train_epochs": 1}
    model = classifier()
    trainer(model, tmp_path, rows(17), **settings).train()
    again = classifier()
    resumed = trainer(again, tmp_path, rows(17), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert_same(trained(again), trained(model))


def test_evaluating_does_not_change_the_training(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    ends = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows(5, seed=3)}):
        model = classifier()
        trainer(model, tmp_path, rows(17), num_train_epochs=2, **settings).train()
        ends.append(trained(model))
    assert_same(*ends)


def test_checkpoints_hold_the_adapter_only_and_safe_pickles(
    classifier: Callable[..., PeftModel], tmp_path: Path
) -> None:
    trainer(classifier(), tmp_path, rows(8), max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
        "trainer_state.json", "veneer_checkpoint.json",
    ]  # fmt: skip
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / name, weights_only=True)
    assert checkpoints.defect(folder) is None


def test_a_damaged_checkpoint_is_not_resumed_from(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    model = classifier()
    trainer(model, tmp_path, rows(17), **RESUMED).train()
    newest = tmp_path / "checkpoint-9" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot be resumed from: optimizer.pt has 100 bytes"):
        trainer(classifier(), tmp_path, rows(17), **RESUMED).train(resume_from_checkpoint=str(newest.parent))
    again = classifier()
    resumed = trainer(again, tmp_path, rows(17), **RESUMED)
    with pytest.warns(VeneerWarning, match="checkpoint-9 is skipped"):
        resumed.train(resume_from_checkpoint=True)
    assert_same(trained(again), trained(model))
    assert checkpoints.defect(newest.parent) is None  # replaced by a whole one


def test_resuming_without_a_checkpoint_is_an_error(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from"):
        trainer(classifier(), tmp_path, rows(8)).train(resume_from_checkpoint=True)


def test_a_full_disk_stops_the_run_and_leaves_earlier_checkpoints(
    classifier: Callable[..., PeftModel], tmp_path: Path
) -> None:
    class Fill(TrainerCallback):
        """No file may grow beyond some kilobytes after the second step: what a full disk does to each writer."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The adapter has about 6 kB and does not fit; or it does, and the state of the optimiser does not.
    for size in (4_000, 10_000):
        Fill.size = size
        folder = tmp_path / str(size)
        running = trainer(classifier(), folder, rows(17), [Fill()], **RESUMED)
        try:
            with pytest.raises(
                CheckpointError, match=r"checkpoint-3 could not be saved.*earlier checkpoints are intact"
            ):
                running.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(entry.name for entry in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]
        assert checkpoints.last_complete(folder).name == "checkpoint-2"


def test_early_stopping_and_the_best_model(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    class Losses:
        """The figure that training is judged by, best at the second evaluation."""

        values = iter([0.5, 0.4, 0.6, 0.7, 0.1, 0.1])

        def __call__(self, prediction: Any) -> dict[str, float]:
            return {"loss": next(self.values)}

    settings = {
        **RESUMED, "num_train_epochs": 9, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3,
        "load_best_model_at_end": True, "eval_dataset": rows(5, seed=3), "compute_metrics": Losses(),
        "restore_callback_states_from_checkpoint": True, "save_total_limit": 2,
    }  # fmt: skip
    model = classifier()
    running = trainer(model, tmp_path, rows(17), [EarlyStoppingCallback(2)], **settings)
    running.train()
    assert running.state.global_step == 12  # two evaluations after the best one, at step 6
    assert running.state.best_metric == 0.4
    best = classifier()
    load_adapters(best, tmp_path / "checkpoint-6")
    assert_same(trained(best), trained(model))

    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    again = classifier()
    resumed = trainer(again, moved, rows(17), [EarlyStoppingCallback(2)], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert resumed.state.best_model_checkpoint == str(moved / "checkpoint-6")
    assert_same(trained(again), trained(model))


def test_a_stopped_run_stays_stopped_when_resumed(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_training_stop or state.global_step == 4

    model = classifier()
    trainer(model, tmp_path, rows(17), [Stop()], **RESUMED).train()
    resumed = trainer(classifier(), tmp_path, rows(17), **RESUMED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same(trained(resumed.model), trained(model))


@pytest.mark.parametrize("kind", ["classifier", "writer"])
def test_accumulated_batches_count_as_one(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    make, data = request.getfixturevalue(kind), rows(8) if kind == "classifier" else texts(8)
    ends = []
    for size, accumulated in ((8, 1), (2, 4), (3, 3)):
        model = make("lora:r=4,task_type=" + ("SEQ_CLS" if kind == "classifier" else "CAUSAL_LM"))
        for module in model.modules():  # the base model's
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        running = trainer(
            model, tmp_path, data, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
            max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0, train_sampling_strategy="sequential",
            lr_scheduler_type="constant", logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        running.train()
        ends.append((trained(model), running.state.log_history[0]["loss"]))
    for weights, loss in ends[1:]:
        assert loss == pytest.approx(ends[0][1], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, ends[0][0][name], rtol=1e-4, atol=1e-6)


def test_label_smoothing_predicts_the_next_token(writer: Callable[..., PeftModel], tmp_path: Path) -> None:
    model = writer()
    data = texts(2)
    running = trainer(model, tmp_path, data, label_smoothing_factor=0.1)
    batch = COLLATE([data[0], data[1]])
    loss = running.compute_loss(model, dict(batch))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, wanted)


def test_activation_checkpointing_gives_the_same_weights(writer: Callable[..., PeftModel], tmp_path: Path) -> None:
    ends = []
    for settings in ({}, {"activation_checkpointing": True}):
        model = writer()
        trainer(model, tmp_path, texts(8), max_steps=2, **settings).train()
        ends.append(trained(model))
    for name, value in ends[1].items():
        torch.testing.assert_close(value, ends[0][name])


def test_columns_that_the_base_model_does_not_take_are_removed(
    classifier: Callable[..., PeftModel], tmp_path: Path
) -> None:
    data = rows(6).add_column("text", ["x"] * 6)
    running = trainer(classifier(), tmp_path, data)
    batch = next(iter(running.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert running.label_names == ["labels"]
    assert running.can_return_loss is False


def test_predictions_come_in_the_order_of_the_rows(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    data = rows(9)
    model = classifier()
    running = trainer(
        model, tmp_path, data, train_sampling_strategy="group_by_length", per_device_eval_batch_size=4,
        eval_dataset=data, compute_metrics=metrics.classification,
    )  # fmt: skip
    found = running.predict(data)
    assert found.label_ids.tolist() == data["labels"][:]
    alone = model.eval()(**{k: v for k, v in COLLATE([data[4]]).items() if k != "labels"}).logits[0]
    torch.testing.assert_close(torch.tensor(found.predictions[4]), alone.detach(), rtol=1e-4, atol=1e-5)
    lengths = [len(ids) for ids in data["input_ids"]]
    first = next(iter(running.get_eval_dataloader()))
    assert first["attention_mask"].sum(dim=1).tolist() == sorted(lengths, reverse=True)[:4]
    assert running.evaluate()["eval_loss"] == pytest.approx(found.metrics["test_loss"], rel=1e-5)


def test_the_clock_counts_training_without_evaluations(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    running = trainer(
        classifier(), tmp_path, rows(17), **RESUMED, eval_strategy="steps", eval_steps=1, eval_dataset=rows(5)
    )
    result = running.train()
    evaluated = sum(entry.get("eval_runtime", 0.0) for entry in running.state.log_history)
    assert 0 < running.clock.seconds <= result.metrics["train_runtime"] - evaluated + 0.05
    seconds = running.clock.seconds
    again = trainer(classifier(), tmp_path, rows(17), **{**RESUMED, "restore_callback_states_from_checkpoint": True})
    again.train(resume_from_checkpoint=True)
    assert again.clock.seconds >= 0.9 * seconds  # goes on from what the checkpoint had


def test_a_loss_that_is_not_a_number_stops_the_run(classifier: Callable[..., PeftModel], tmp_path: Path) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)

    running = trainer(classifier(), tmp_path, rows(17), [Break()], **RESUMED)
    with pytest.raises(VeneerError, match=r"The loss became nan at step 3 .*Lower training.learning_rate"):
        running.train()
    assert checkpoints.last_complete(tmp_path).name == "checkpoint-2"


def test_a_batch_without_labels_stops_the_run(writer: Callable[..., PeftModel], tmp_path: Path) -> None:
    # The first label of a row is never predicted, so the last of these has nothing either.
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[-100, -100, -100], [5, -100, -100]]})
    with pytest.raises(DataError, match=r"batch after step 0 every label is -100.*raise data.max_length"):
        trainer(writer(), tmp_path, data).train()


class Spare(nn.Module):
    """A model with a layer that its output does not depend on, and one that it is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.muted = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.used(x) + 0.0 * self.muted(x)
        return {"loss": ((y.sum(dim=-1) - labels) ** 2).mean(), "logits": y}


def spare_trainer(folder: Path, targets: str, steps: int) -> Trainer:
    torch.manual_seed(0)
    data = [{"x": torch.randn(3), "labels": torch.tensor(1.0)} for _ in range(8)]
    model = get_peft_model(Spare(), f"lora:r=2,target_modules=[{targets}]")
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, warmup_steps=2, label_names=["labels"], **QUIET)
    return Trainer(model, args, train_dataset=data)


@pytest.mark.parametrize(
    ("targets", "steps", "message"),
    [
        ("used,spare", 8, r"2 trained parameters got no gradient.*spare.*never called"),
        ("used,spare", 1, r"2 trained parameters got no gradient.*spare.*never called"),
        ("used,muted", 8, r"2 trained parameters got no gradient.*muted.*exactly zero"),
    ],
)
def test_parameters_without_gradient_are_named(tmp_path: Path, targets: str, steps: int, message: str) -> None:
    with pytest.warns(VeneerWarning, match=message):
        spare_trainer(tmp_path, targets, steps).train()


@pytest.mark.parametrize("steps", [1, 8])
def test_a_factor_that_starts_at_zero_is_no_reason_to_warn(tmp_path: Path, steps: int) -> None:
    # Warnings are errors here: LoRA's `down` has no gradient before `up` has moved.
    spare_trainer(tmp_path, "used", steps).train()


def test_models_without_adapters_are_trained_as_by_transformers(encoder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    running = trainer(base, tmp_path, rows(8), max_steps=2, save_strategy="steps", save_steps=1)
    running.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    again = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    resumed = trainer(again, tmp_path, rows(8), max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained(again), trained(base))
