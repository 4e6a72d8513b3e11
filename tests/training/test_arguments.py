from typing import Any

import pytest
from transformers import SchedulerType

from veneer.errors import ConfigError
from veneer.method_strings import parse_method
from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions, Task
from veneer.training import arguments


def resolve(
    task: Task = "classification", method: str = "lora", evaluates: bool = True, patience: int | None = None,
    **training: Any,
) -> dict[str, Any]:  # fmt: skip
    output = OutputOptions("out", early_stopping_patience=patience)
    options = RunOptions(task, ModelOptions("m"), DataOptions("d"), output, method, training)
    return arguments.resolve(options, parse_method(method).learning_rates[task], evaluates)


def test_defaults_suit_adapters_and_give_way() -> None:
    assert resolve()["learning_rate"] == 1e-3
    assert resolve("causal-lm")["learning_rate"] == 5e-4
    assert resolve(method="bitfit")["learning_rate"] == 2e-3
    assert resolve()["eval_strategy"] == resolve()["save_strategy"] == "epoch"
    assert "eval_strategy" not in resolve(evaluates=False)
    assert resolve(learning_rate=3e-5, seed=7)["learning_rate"] == 3e-5


def test_optimisers_of_the_lora_family() -> None:
    args = arguments.build(resolve(lora_optimizer="loraplus", loraplus_lr_ratio="8", optim="sgd"), "out")
    assert (args.lora_optimizer, args.loraplus_lr_ratio, args.riemannian_reg, args.optim) == (
        "loraplus",
        8,
        0.01,
        "sgd",
    )
    assert arguments.build(resolve(), "out").lora_optimizer is None
    assert resolve(method="dora", lora_optimizer="lorafa")["lora_optimizer"] == "lorafa"


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lora_optimizer": "lorapuls"}, r"training: .*lora_optimizer"),
        (
            {"lora_optimizer": "loraplus", "method": "bitfit"},
            r"'loraplus', which is made for .* the method is 'bitfit'",
        ),
        ({"loraplus_lr_ratio": 4.0}, r"loraplus_lr_ratio is 4\.0, but training\.lora_optimizer is None\. .*'loraplus'"),
        ({"riemannian_reg": 0.1, "lora_optimizer": "lorafa"}, r"riemannian_reg is 0\.1, but .* is 'lorafa'"),
        ({"optim": "sgd", "lora_optimizer": "lorafa"}, r"optim is 'sgd', but LoRA-FA is an Adam of its own"),
    ],
)
def test_optimisers_that_do_not_fit_are_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**training)


def test_what_is_resolved_builds_the_arguments() -> None:
    args = arguments.build(resolve(max_steps=5, disable_tqdm=False), "out")
    assert (args.output_dir, args.max_steps, args.report_to, args.disable_tqdm) == ("out", 5, [], True)


def test_values_are_read_by_the_types_of_their_fields() -> None:
    checked = arguments.check(
        {"learning_rate": "1e-3", "max_steps": "5", "lr_scheduler_type": SchedulerType.COSINE, "deepspeed": None,
         "accelerator_config": {"split_batches": False}},
        OutputOptions("out"),
    )  # fmt: skip
    assert checked["learning_rate"] == 1e-3
    assert checked["max_steps"] == 5
    assert checked["lr_scheduler_type"] == "cosine"
    assert arguments.check({"eval_strategy": False}, OutputOptions("out")) == {"eval_strategy": "no"}
    assert arguments.check({"gradient_checkpointing": True}, OutputOptions("out")) == {"activation_checkpointing": True}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"leanring_rate": 1e-3},
            r"training.leanring_rate: .* has no field 'leanring_rate'. Did you mean 'learning_rate'",
        ),
        ({"learning_rate": "fast"}, r"training: .*learning_rate"),
        ({"lr_scheduler_type": "cosin"}, r"training: cosin is not a valid SchedulerType"),
        ({"output_dir": "elsewhere"}, r"training.output_dir is 'elsewhere', but output.folder decides that"),
        ({"resume_from_checkpoint": "x"}, r"output.resume decides that"),
        ({"logging_steps": 0}, r"training: logging strategy"),
    ],
)
def test_what_cannot_be_is_named(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments.build(resolve(**training), "out")


def test_the_folder_may_be_said_twice() -> None:
    assert "output_dir" not in resolve(output_dir="out")


def test_how_often_is_enough_to_say() -> None:
    resolved = resolve(save_steps=50)
    assert (resolved["save_strategy"], resolved["eval_strategy"], resolved["eval_steps"]) == ("steps", "steps", 50)
    resolved = resolve(eval_steps=10)
    assert (resolved["save_strategy"], resolved["eval_strategy"]) == ("epoch", "steps")


def test_early_stopping_turns_on_what_it_needs() -> None:
    resolved = resolve(patience=2)
    assert resolved["load_best_model_at_end"] is True
    assert resolved["metric_for_best_model"] == "loss"
    assert resolve(patience=2, metric_for_best_model="accuracy")["metric_for_best_model"] == "accuracy"
    arguments.build(resolve(patience=2, save_steps=50), "out")
    assert resolve(patience=2, metric_for_best_model="eval_perplexity")["greater_is_better"] is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 0}, "at least 1 is needed"),
        ({"patience": 2, "evaluates": False}, "nothing is held out to judge improvement by"),
        ({"patience": 2, "eval_strategy": "no"}, "training.eval_strategy is 'no'. Remove one of the two"),
        ({"patience": 2, "load_best_model_at_end": False}, "training.load_best_model_at_end is False"),
        ({"eval_strategy": "epoch", "evaluates": False}, "nothing is held out to evaluate on"),
    ],
)
def test_contradictions_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**settings)


def test_transformers_refusals_are_passed_on_as_settings() -> None:
    with pytest.raises(ConfigError, match="training: --load_best_model_at_end requires the save and eval strategy"):
        arguments.build(resolve(patience=2, eval_strategy="epoch", save_strategy="steps"), "out")
