"""A whole training run: from its options to a checked adapter in a folder.

Also the place to import everything from that works on a run's folder.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from veneer import units
from veneer.config import PeftConfig, TaskType
from veneer.data import TaskData, preview
from veneer.errors import ConfigError, DataError, VeneerError, nearest
from veneer.evaluation import metrics
from veneer.method_strings import parse_method
from veneer.model import PeftModel, get_peft_model
from veneer.optimizers.lorafa import freeze_down
from veneer.options import RunOptions, RunResult, Task
from veneer.preparation import awaits_data, prepare
from veneer.training import arguments, samplers
from veneer.training import folder as run_folder
from veneer.training.basis import Basis, as_begun, load
from veneer.training.clock import peak_memory
from veneer.training.models import check_room, warn_untrained
from veneer.training.progress import ProgressDisplay, describe, figures_of
from veneer.training.trained import (
    MEASURING,
    evaluate,
    generate,
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
    options = as_begun(options)
    method_of(options)
    folder = run_folder.claim(options) if main else Path(options.output.folder).expanduser()
    basis = load(options, console)
    return run_on(basis, basis.options, folder, callbacks=callbacks, console=console, main=main)


def run_on(
    basis: Basis,
    options: RunOptions,
    folder: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console,
    main: bool = True,
) -> RunResult:
    """Trains one method on a base model that is loaded already; the rest is as for `train`.

    Args:
        basis: Model and data.
        options: The run, with the settings of the basis.
        folder: The output folder, claimed.
        callbacks: Further callbacks for the trainer.
        console: Where to report.
        main: Whether this process owns the folder.
    """
    data, tokenizer, config = basis.data, basis.tokenizer, method_of(options)
    model = get_peft_model(basis.base, config)
    warn_untrained(basis.new, model, options.model.name)
    check_room(model, data.train, data.evaluation)

    resolved = arguments.resolve(options, config.learning_rates[options.task], evaluates=data.evaluation is not None)
    args = arguments.build(resolved, str(folder))
    if main:
        settled = dataclasses.replace(options, training=resolved, method=run_folder.method_settings(options.method))
        run_folder.begin(folder, run_folder.located(settled), resume=options.output.resume)
        if basis.quantization is not None:
            run_folder.write_quantization(folder, basis.quantization)
    if resolved.get("lora_optimizer") == "lorafa":
        freeze_down(model)  # the optimiser does so too; what is said to be trained should be
    if awaits_data(model):
        if not getattr(basis.base, "hf_device_map", None):
            model.to(args.device)
        if source := getattr(config, "scores", None):  # what the data said has been kept
            console.print(f"What is trained is chosen by {source}.", markup=False, soft_wrap=True)
            prepare(model)
        elif getattr(config, "init_text", None):
            console.print("What is trained starts from the keys and values of init_text.")
            prepare(model)
        else:
            batches = basis.batches(args.train_batch_size, options.data.preparation_batches)
            console.print(f"Shown to the method before training: {len(batches)} batches of {args.train_batch_size}.")
            prepare(model, batches)
    _show(console, model, basis)

    with ProgressDisplay(console, bar=False if resolved.get("disable_tqdm") else None) as progress:
        trainer = _trainer(model, args, data, tokenizer, options, [progress, *callbacks])
        for line in filter(None, (trainer.packing.line, trainer.reuse.line)):
            console.print(line, markup=False, soft_wrap=True)
        before, examples = _start(basis, trainer, resolved, console)
        _check_metric(args.metric_for_best_model, before)
        trainer.train(resume_from_checkpoint=options.output.resume or None)
        history = list(trainer.state.log_history)
        progress.moment = "after training"
        after = _after(trainer) if data.evaluation is not None else {}
    written = _generate(model, tokenizer, data, "after")
    examples = [example | finished for example, finished in zip(examples, written, strict=True)]

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
    held: list[Any] = [model, trainer]
    del model, trainer

    def fill(partial: Path) -> RunResult:
        adapted: PeftModel = held[0]
        adapted.save_pretrained(partial)
        if basis.quantization is not None:
            run_folder.write_quantization(partial, basis.quantization)
        tokenizer.save_pretrained(partial)
        del adapted
        held.clear()  # what was trained gives way first
        _check_reloaded(basis.reloaded(partial), options, probes, expected)
        size = sum(path.stat().st_size for path in partial.glob("adapter_model*"))
        return dataclasses.replace(result, adapter_bytes=size)

    result = run_folder.publish(folder, fill, prompting)
    console.print(
        f"Saved to {folder} ({units.size(result.adapter_bytes)}); the saved adapter gives the same answers.",
        markup=False,
        soft_wrap=True,
    )
    return result


def method_of(options: RunOptions) -> PeftConfig:
    """The method's configuration, for the run's task.

    Raises:
        ConfigError: There is no such method, or it is for another task.
    """
    config = parse_method(options.method)
    wanted = TASK_TYPES[options.task]
    if config.task_type not in (None, wanted):
        raise ConfigError(
            f"method: task_type is {config.task_type}, but the run's task is {options.task} ({wanted}). "
            "Remove task_type from the method."
        )
    config.task_type = wanted
    return config


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


def _show(console: Console, model: PeftModel, basis: Basis) -> None:
    """What there is to be looked at before the first step; the example once for all runs."""
    trained, total = model.get_nb_trainable_parameters()
    console.print(
        f"Trained: {units.count(trained)} of {units.count(total)} parameters ({units.share(trained, total)})."
    )
    if not basis.shown:
        console.print("The first example, what is learnt marked:")
        console.print(preview(basis.data.train[0], basis.tokenizer, basis.data.labels or None), soft_wrap=True)
        basis.shown = True


def _start(
    basis: Basis, trainer: Trainer, resolved: Mapping[str, Any], console: Console
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Held-out figures of the model before training, and what it writes.

    Most adapters change nothing at the start: where several runs share the base, what one had holds for the next.
    """
    model: Any = trainer.model

    def found() -> tuple[dict[str, float], list[dict[str, str]]]:
        figures = figures_of(trainer.evaluate()) if basis.data.evaluation is not None else {}
        return figures, _generate(model, basis.tokenizer, basis.data, "before")

    if basis.original is None:
        return found()
    # Both use no gradients; the generators are kept, so that it does not matter whether they were needed.
    with samplers.generators_kept():
        settings = {name: value for name, value in resolved.items() if name in MEASURING}
        key = hashlib.blake2b(repr(sorted(settings.items())).encode())
        mode = model.training
        for probe in _probes(basis.data):
            key.update(logits_of(model.eval(), probe).numpy().tobytes())
        model.train(mode)
        if key.hexdigest() not in basis.starts:
            basis.starts[key.hexdigest()] = found()
        elif figures := basis.starts[key.hexdigest()][0]:
            console.print(f"held out, before training: {describe(figures)}, as above", highlight=False)
        return basis.starts[key.hexdigest()]


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
    model: PeftModel, options: RunOptions, probes: Sequence[dict[str, Tensor]], expected: Sequence[Tensor]
) -> None:
    """Compares a saved adapter, loaded again, with the trained one.

    Raises:
        VeneerError: It gives other answers.
    """
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
