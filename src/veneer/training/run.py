"""A whole training run: from its options to a checked adapter in a folder.

Also the place to import everything from that works on a run's folder.
"""

import dataclasses
import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from veneer import units
from veneer.config import PeftConfig, TaskType
from veneer.data import TaskData, load_task, preview
from veneer.errors import ConfigError, DataError, VeneerError, nearest
from veneer.evaluation import metrics
from veneer.method_strings import parse_method
from veneer.model import PeftModel, get_peft_model
from veneer.optimizers.lorafa import freeze_down
from veneer.options import RunOptions, RunResult, Task
from veneer.preparation import awaits_data, prepare
from veneer.training import arguments
from veneer.training import folder as run_folder
from veneer.training.clock import peak_memory
from veneer.training.models import load_model, load_tokenizer, warn_untrained
from veneer.training.progress import ProgressDisplay, figures_of
from veneer.training.trained import (
    evaluate,
    generate,
    load_adapted,
    load_trained,
    logits_of,
    predict,
    predictor,
    read_texts,
)
from veneer.training.trainer import Trainer

__all__ = ["evaluate", "load_trained", "predict", "predictor", "read_texts", "train"]

TASK_TYPES: dict[Task, TaskType] = {"classification": TaskType.SEQ_CLS, "causal-lm": TaskType.CAUSAL_LM}
# Generated before and after training, to be looked at.
_EXAMPLES, _EXAMPLE_TOKENS = 3, 48
# A reloaded adapter must give the logits of the trained one up to this, relative to the largest of them.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_COMPARED = 8


def train(
    options: RunOptions, *, callbacks: Sequence[TrainerCallback] = (), console: Console | None = None
) -> RunResult:
    """Trains an adapter, saves it, and checks that the saved one gives the same answers.

    Args:
        options: The run.
        callbacks: Further callbacks for the trainer.
        console: Where to report; standard output if none.

    Returns:
        What the run came to; also in the output folder's `results.json`.

    Raises:
        ConfigError, DataError, TargetError: An option or the data cannot be used; nothing was written.
        CheckpointError: There is nothing to resume from, or the disk is full; saved checkpoints are intact.
        VeneerError: The loss is not a number, or the saved adapter does not give the same answers.
    """
    # With several processes, the first one reports and owns the folder.
    main = int(os.environ.get("RANK", "0")) == 0
    console = (console or Console(highlight=False)) if main else Console(quiet=True)
    arguments.check(options.training, options.output)
    config = _method(options)
    folder = run_folder.claim(options) if main else Path(options.output.folder).expanduser()

    seed = int(options.training.get("seed", 42))
    tokenizer = load_tokenizer(options.model)
    data = load_task(options.data, options.task, tokenizer, seed)
    for line in data.report:
        console.print(line, markup=False, soft_wrap=True)
    set_seed(seed)  # of a new head and of the adapter
    base, new = load_model(options.model, options.task, tokenizer, data.labels)
    _check_lengths(data, base.config, options)
    model = get_peft_model(base, config)
    warn_untrained(new, model, options.model.name)

    resolved = arguments.resolve(options, config.learning_rates[options.task], evaluates=data.evaluation is not None)
    args = arguments.build(resolved, str(folder))
    if main:
        settled = dataclasses.replace(options, training=resolved, method=run_folder.method_settings(options.method))
        run_folder.begin(folder, run_folder.located(settled), resume=options.output.resume)
    if resolved.get("lora_optimizer") == "lorafa":
        freeze_down(model)  # the optimiser does so too; what is said to be trained should be
    if awaits_data(model):
        if not getattr(base, "hf_device_map", None):
            model.to(args.device)
        batches = _batches(data, args.train_batch_size, options.data.preparation_batches, seed)
        console.print(f"Shown to the method before training: {len(batches)} batches of {args.train_batch_size}.")
        prepare(model, batches)
    _show(console, model, data, tokenizer)

    with ProgressDisplay(console, bar=False if resolved.get("disable_tqdm") else None) as progress:
        trainer = _trainer(model, args, data, tokenizer, options, [progress, *callbacks])
        before = figures_of(trainer.evaluate()) if data.evaluation is not None else {}
        _check_metric(args.metric_for_best_model, before)
        examples = _generate(model, tokenizer, data, "before")
        trainer.train(resume_from_checkpoint=options.output.resume or None)
        history = list(trainer.state.log_history)
        progress.moment = "after training"
        after = _after(trainer) if data.evaluation is not None else {}
    for example, finished in zip(examples, _generate(model, tokenizer, data, "after"), strict=True):
        example |= finished

    trained, total = model.get_nb_trainable_parameters()
    result = RunResult(
        method=str(run_folder.method_settings(options.method)["name"]),
        config=model.peft_config["default"].to_dict(),
        before=before,
        after=after,
        majority=metrics.majority(np.array(data.evaluation["labels"])) if data.evaluation and data.labels else None,
        labels=data.labels,
        trained_parameters=trained,
        total_parameters=total,
        adapter_bytes=0,
        seconds=trainer.clock.seconds,
        peak_memory_bytes=peak_memory(),
        history=history,
        examples=examples,
        folder=str(folder),
    )
    if not trainer.is_world_process_zero():
        return result

    probes = _probes(data)
    expected = [logits_of(model.eval(), probe) for probe in probes]
    # Where nothing is held out there is no prompt to see it by; a model with a template is then asked in it.
    template = any(prompt.messages is not None for prompt in data.prompts) or not data.prompts
    prompting = {} if data.labels else {"separator": data.separator, "template": template}
    held: list[Any] = [model, trainer, base]
    del model, trainer, base

    def fill(partial: Path) -> RunResult:
        adapted: PeftModel = held[0]
        adapted.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # The check loads the base model once more: the trained one gives way first.
        del adapted
        held.clear()
        gc.collect()
        _check_reloaded(partial, options, tokenizer, data, probes, expected)
        size = sum(path.stat().st_size for path in partial.glob("adapter_model*"))
        return dataclasses.replace(result, adapter_bytes=size)

    result = run_folder.publish(folder, fill, prompting)
    console.print(
        f"Saved to {folder} ({units.size(result.adapter_bytes)}); the saved adapter gives the same answers.",
        markup=False,
        soft_wrap=True,
    )
    return result


def _batches(data: TaskData, size: int, count: int, seed: int) -> list[dict[str, Tensor]]:
    """The first training batches of a random order, the same in every process and in a resumed run."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[: size * count]
    return [data.collate([data.train[int(i)] for i in rows]) for rows in order.split(size)]


def _method(options: RunOptions) -> PeftConfig:
    """The method's configuration, for the run's task."""
    config = parse_method(options.method)
    wanted = TASK_TYPES[options.task]
    if config.task_type not in (None, wanted):
        raise ConfigError(
            f"method: task_type is {config.task_type}, but the run's task is {options.task} ({wanted}). "
            "Remove task_type from the method."
        )
    config.task_type = wanted
    return config


def _check_lengths(data: TaskData, config: Any, options: RunOptions) -> None:
    """Refuses sequences for which the model has no positions: it would fail in the middle of the run."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    parts = [part for part in (data.train, data.evaluation) if part is not None]
    longest = max((len(ids) for part in parts for ids in part["input_ids"]), default=0)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_length is {options.data.max_length} and the longest example has {longest} tokens, but "
            f"{options.model.name!r} has positions for {limit}. Set data.max_length to {limit} or less."
        )


def _check_metric(name: str | None, figures: Mapping[str, float]) -> None:
    """Refuses to look for the best model by a figure that no evaluation will give."""
    if name is not None and name.removeprefix("eval_") not in figures:
        raise ConfigError(
            f"training.metric_for_best_model is {name!r}, which is not among the figures of an evaluation."
            f"{nearest(name, figures)} They are: {', '.join(figures) or 'none, for nothing is held out'}."
        )


def _trainer(
    model: PeftModel,
    args: Any,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    options: RunOptions,
    callbacks: list[TrainerCallback],
) -> Trainer:
    if len(data.train) == 0:
        raise DataError("data.train: there is no example to train on.")
    if options.output.early_stopping_patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(options.output.early_stopping_patience)]
    trainer = Trainer(
        model,
        args,
        data_collator=data.collate,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        callbacks=callbacks,
        **metrics.functions(options.task),
    )
    trainer.remove_callback(PrinterCallback)  # `ProgressDisplay` does that
    return trainer


def _show(console: Console, model: PeftModel, data: TaskData, tokenizer: PreTrainedTokenizerBase) -> None:
    """What there is to be looked at before the first step."""
    trained, total = model.get_nb_trainable_parameters()
    console.print(
        f"Trained: {units.count(trained)} of {units.count(total)} parameters ({units.share(trained, total)})."
    )
    console.print("The first example, what is learnt marked:")
    console.print(preview(data.train[0], tokenizer, data.labels or None), soft_wrap=True)


def _generate(model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: TaskData, when: str) -> list[dict[str, str]]:
    """What the model writes after some held-out prompts."""
    prompts = list({prompt.text: prompt for prompt in data.prompts}.values())[:_EXAMPLES]
    if not prompts:
        return []
    written = generate(model, tokenizer, [prompt.input_ids for prompt in prompts], _EXAMPLE_TOKENS)
    return [
        {"prompt": prompt.text, "expected": prompt.expected, when: text}
        for prompt, text in zip(prompts, written, strict=True)
    ]


def _after(trainer: Trainer) -> dict[str, float]:
    """Held-out figures of the model as it is now; those of the last step, if the trainer has just got them."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return figures_of({key: value for key, value in last.items() if key.startswith("eval_")})
    return figures_of(trainer.evaluate())


def _probes(data: TaskData) -> list[dict[str, Tensor]]:
    """Some examples to compare answers on, one at a time: padding must not matter to the comparison."""
    rows = data.evaluation if data.evaluation is not None else data.train
    return [data.collate([rows[i]]) for i in range(min(_COMPARED, len(rows)))]


def _check_reloaded(
    folder: Path,
    options: RunOptions,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    probes: Sequence[dict[str, Tensor]],
    expected: Sequence[Tensor],
) -> None:
    """Compares the saved adapter, on a fresh base model, with the trained one.

    Raises:
        VeneerError: It gives other answers.
    """
    model = load_adapted(folder, options, tokenizer, data.labels)
    allowed = _TOLERANCE.get(getattr(model, "dtype", torch.float32), 3e-2)
    for probe, before in zip(probes, expected, strict=True):
        after = logits_of(model, probe)
        scale = float(before.abs().max().clamp_min(1e-6))
        difference = float((after - before).abs().max()) / scale
        top = before.topk(2, dim=-1).values
        clear = top[..., 0] - top[..., 1] > 2 * allowed * scale
        switched = bool(((before.argmax(-1) != after.argmax(-1)) & clear).any())
        if not difference <= allowed or switched:  # also true where it is not a number
            raise VeneerError(
                f"The saved adapter does not give the answers of the trained one: logits differ by {difference:.1e} of "
                f"the largest, {allowed:.0e} is allowed. The base model {options.model.name!r} may load with other "
                "weights each time (see the warnings above), or computes something at random. Nothing was published; "
                f"the checkpoints in {options.output.folder} hold the trained adapter."
            )
