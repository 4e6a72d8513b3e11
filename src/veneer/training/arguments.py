"""`TrainingArguments` of a run: what the user set, checked, over defaults that suit adapters."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
import transformers
from jsonargparse import ArgumentError, ArgumentParser

from veneer.errors import ConfigError, nearest
from veneer.method_strings import parse_method
from veneer.methods.lora import Lora
from veneer.options import OutputOptions, RunOptions

# Fields that another section decides, with the setting that does.
_DECIDED_ELSEWHERE = {
    "output_dir": "output.folder",
    "resume_from_checkpoint": "output.resume",
    "do_train": "the command",
    "do_eval": "the command",
    "do_predict": "the command",
}
# Names that transformers gives up in version 6, with what they are called by then.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


# Settings of one `lora_optimizer` only.
_OF_OPTIMIZERS = {
    "loraplus_lr_ratio": "loraplus",
    "loraplus_lr_embedding": "loraplus",
    "riemannian_reg": "riemannian",
}


# Settings of batches by a number of examples, with what they are where nobody sets them.
_BY_EXAMPLES: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "auto_find_batch_size": False,
    "dataloader_drop_last": False,
}


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Those of transformers, and which optimiser of the LoRA family is used.

    Args:
        lora_optimizer: `loraplus` moves LoRA's second factor faster, `riemannian` preconditions both; either with the
            optimiser that `optim` names. `lorafa` freezes the first factor, and is an Adam of its own.
        loraplus_lr_ratio: Learning rate of the second factor over that of the first.
        loraplus_lr_embedding: Learning rate of adapters on embeddings with `loraplus`.
        riemannian_reg: What is added to the diagonals of the matrices that are inverted.
        packing: Whether nothing is computed for padding: `on`, `off`, or `auto` for where the results are the same.
        tokens_per_batch: How many tokens a training batch may have at most, padding not counted, in place of a number
            of examples (`per_device_train_batch_size`).
        threads: Of torch; measured if none, unless `OMP_NUM_THREADS` is set.
        compile_blocks: Whether `torch.compile` compiles each repeated block of the model.
        offload_activations: Whether what is kept for the gradient waits in the processor's memory; accelerators only.
        frozen_part: Where only upper layers are trained, whether what lies below is computed once for each example and
            kept over the epochs: `memory`, `disk`, `off`, or `auto` for where it fits and gives the same results.
        frozen_part_gb: The most that may be kept; half of the free memory, or 80% of the free disk, if none.
        frozen_part_folder: Where it is kept on disk. A folder that is named here outlives the run and serves the next;
            none is one in the output folder, removed when the run has finished.
    """

    lora_optimizer: Literal["loraplus", "lorafa", "riemannian"] | None = None
    loraplus_lr_ratio: float = 16.0
    loraplus_lr_embedding: float = 1e-6
    riemannian_reg: float = 1e-2
    packing: Literal["auto", "on", "off"] = "auto"
    tokens_per_batch: int | None = None
    threads: int | None = None
    compile_blocks: bool = False
    offload_activations: bool = False
    frozen_part: Literal["auto", "off", "memory", "disk"] = "auto"
    frozen_part_gb: float | None = None
    frozen_part_folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing not in ("auto", "on", "off"):
            raise ConfigError(f"training.packing is {self.packing!r}. Expected 'auto', 'on' or 'off'.")
        if (budget := self.tokens_per_batch) is None:
            return
        if budget < 1:
            raise ConfigError(f"training.tokens_per_batch is {budget}. Expected a number of tokens from 1 on, or none.")
        for name, plain in _BY_EXAMPLES.items():
            if (value := getattr(self, name)) != plain:
                raise ConfigError(
                    f"training.{name} is {value!r}, but training.tokens_per_batch decides what is in a batch. Remove "
                    "one of the two."
                )


def check(training: Mapping[str, Any], output: OutputOptions) -> dict[str, Any]:
    """The training section with every value of its field's type.

    Args:
        training: The section as given.
        output: The output section, which some fields must not contradict.

    Raises:
        ConfigError: A field is unknown, of the wrong type, or decided by another section.
    """
    fields = [entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init]
    values = {}
    for name, value in training.items():
        if name not in fields:
            raise ConfigError(
                f"training.{name}: transformers.TrainingArguments has no field {name!r}.{nearest(name, fields)}"
            )
        if name == "output_dir" and value in (None, output.folder):
            continue
        if name in _DECIDED_ELSEWHERE and value is not None:
            raise ConfigError(
                f"training.{name} is {value!r}, but {_DECIDED_ELSEWHERE[name]} decides that. Remove training.{name}."
            )
        new = _RENAMED.get(name, name)
        values[new if new in fields else name] = value.value if isinstance(value, Enum) else value
    if (threads := values.get("threads")) is not None and not (str(threads).isdigit() and int(threads) > 0):
        raise ConfigError(f"training.threads is {threads!r}. Expected a number from 1 on, or none to measure.")
    _check_optimizer(values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainingArguments)
    values = {name: _as_meant(name, value) for name, value in values.items()}
    try:
        parsed = parser.parse_object(values, defaults=False)
    except ArgumentError as error:
        raise ConfigError(f"training: {error}. See transformers.TrainingArguments for the types.") from error
    return {name: parsed[name] for name in values}


def resolve(options: RunOptions, learning_rate: float, evaluates: bool) -> dict[str, Any]:
    """The training section with the defaults filled in that Veneer sets otherwise than transformers.

    Args:
        options: The run.
        learning_rate: The method's own for this task, where the user gives none.
        evaluates: Whether there is a held-out set.

    Raises:
        ConfigError: Settings contradict each other or the data.
    """
    given = check(options.training, options.output)
    if (optimizer := given.get("lora_optimizer")) and not issubclass(parse_method(options.method).method(), Lora):
        raise ConfigError(
            f"training.lora_optimizer is {optimizer!r}, which is made for LoRA's two factors, and the method is "
            f"{options.method!r}. Remove the setting, or choose LoRA or one of its variants."
        )
    classification = options.task == "classification"
    # Who says how often must mean that often.
    if "save_steps" in given:
        given.setdefault("save_strategy", "steps")
    if "eval_steps" in given:
        given.setdefault("eval_strategy", "steps")
    if given.get("eval_strategy", "no") != "no" and not evaluates:
        raise ConfigError(
            f"training.eval_strategy is {given['eval_strategy']!r}, but nothing is held out to evaluate on. "
            "Give data.validation, or raise data.validation_share above 0."
        )
    defaults: dict[str, Any] = {
        "learning_rate": learning_rate,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 16 if classification else 8,
        "per_device_eval_batch_size": 32 if classification else 8,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 0.02,
        "report_to": "none",
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": torch.accelerator.is_available(),
        # A loss that is not a number stops the run, so there is nothing to filter from the logs.
        "logging_nan_inf_filter": False,
        # Counts towards early stopping go on where they were.
        "restore_callback_states_from_checkpoint": True,
        "seed": 42,
    }
    if given.get("tokens_per_batch") is not None:
        if (size := given.get("per_device_train_batch_size")) is not None:
            raise ConfigError(
                f"training.per_device_train_batch_size is {size}, but training.tokens_per_batch decides how many "
                "examples are in a batch. Remove one of the two."
            )
        del defaults["per_device_train_batch_size"]
    if "save_steps" not in given and given.get("save_strategy") == "steps":
        defaults["save_steps"] = 0.1
    if evaluates:
        defaults |= _evaluation_defaults(given)
    resolved = {**defaults, **given}
    if str(resolved.get("metric_for_best_model")).endswith("perplexity"):
        resolved.setdefault("greater_is_better", False)  # transformers knows this of losses only
    if options.output.early_stopping_patience is not None:
        _require_early_stopping(resolved, options.output.early_stopping_patience, evaluates)
    return resolved


def build(resolved: Mapping[str, Any], folder: str) -> TrainingArguments:
    """transformers' own object.

    Raises:
        ConfigError: transformers refuses a value or a combination.
    """
    try:
        # The bar is drawn by `ProgressDisplay`.
        return TrainingArguments(output_dir=folder, **{**resolved, "disable_tqdm": True})
    except ConfigError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"training: {error}") from error


def _check_optimizer(given: Mapping[str, Any]) -> None:
    """Refuses settings that have no effect with the optimiser.

    Raises:
        ConfigError: So.
    """
    chosen = given.get("lora_optimizer")
    for name, optimizer in _OF_OPTIMIZERS.items():
        if given.get(name) is not None and chosen != optimizer:
            raise ConfigError(
                f"training.{name} is {given[name]!r}, but training.lora_optimizer is {chosen!r}. Set that to "
                f"{optimizer!r}, or remove training.{name}."
            )
    if chosen == "lorafa" and (named := given.get("optim")):
        raise ConfigError(
            f"training.optim is {named!r}, but LoRA-FA is an Adam of its own. Remove training.optim, or choose another "
            "training.lora_optimizer."
        )


def _evaluation_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """As often as is saved, which finding the best checkpoint needs; else once an epoch."""
    if given.get("save_strategy") != "steps":
        return {"eval_strategy": "epoch"}
    return {"eval_strategy": "steps", "eval_steps": given.get("save_steps", 0.1)}


def _require_early_stopping(resolved: dict[str, Any], patience: int, evaluates: bool) -> None:
    """Turns on what early stopping rests on, unless the user has turned it off."""
    what = f"output.early_stopping_patience is {patience}"
    if patience < 1:
        raise ConfigError(f"{what}, but at least 1 is needed: the number of evaluations without improvement.")
    if not evaluates:
        raise ConfigError(
            f"{what}, but nothing is held out to judge improvement by. Give data.validation, or raise "
            "data.validation_share above 0."
        )
    for name in ("eval_strategy", "save_strategy", "load_best_model_at_end"):
        if resolved.get(name) in (False, "no"):
            raise ConfigError(
                f"{what}, which needs evaluations, checkpoints and the best of them, but training.{name} is "
                f"{resolved[name]!r}. Remove one of the two."
            )
    resolved["load_best_model_at_end"] = True
    resolved.setdefault("metric_for_best_model", "loss")


def _as_meant(name: str, value: Any) -> Any:
    """Undoes readings of YAML: `1e-3` is text to it, and `no` and `off` are false, `on` is true."""
    if value is False and name.endswith("_strategy"):
        return "no"
    if value is False and name in ("frozen_part", "packing"):
        return "off"
    if value is True and name == "packing":
        return "on"
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
