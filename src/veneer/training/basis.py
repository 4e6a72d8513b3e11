"""What runs have in common that differ in their method alone: the base model and the data, loaded once."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from veneer import machine
from veneer.data import TaskData, load_task
from veneer.errors import ConfigError
from veneer.model import PeftModel
from veneer.options import RunOptions
from veneer.quantization import Quantization, quantize
from veneer.training import folder as run_folder
from veneer.training.models import load_config, load_model, load_tokenizer
from veneer.training.original import Original
from veneer.training.trained import load_adapted, with_adapter

# Training examples by which it is seen what a base model bears to be quantised: a batch, and how many.
_SHOWN, _SHOWN_BATCHES = 8, 4


@dataclass
class Basis:
    """A frozen base model and the data to train on.

    Attributes:
        options: The run, with dtype and threads settled.
        tokenizer: The model's.
        data: Read, split and encoded.
        base: The model; none once a single run has given it up.
        new: Names of weights that were not in the model's files: a classifier's new head.
        quantization: Which layers are kept in 8 bits, if that was asked for.
        original: The base as it was loaded, where several runs share it.
        starts: What adapted models that answer alike before training had as figures and wrote, by their answers.
        shown: Whether the first example has been printed.
    """

    options: RunOptions
    tokenizer: PreTrainedTokenizerBase
    data: TaskData
    base: Any
    new: list[str]
    quantization: Quantization | None
    original: Original | None = None
    starts: dict[str, tuple[dict[str, float], list[dict[str, str]]]] = field(default_factory=dict)
    shown: bool = False

    @property
    def seed(self) -> int:
        return seed_of(self.options)

    def batches(self, size: int, count: int) -> list[dict[str, Tensor]]:
        """The first training batches of a random order, the same in every process and in a resumed run."""
        return _batches(self.data, size, count, self.seed)

    def reloaded(self, adapter: Path) -> PeftModel:
        """A saved adapter on a base that it has not been trained on.

        That is a fresh one, for which the present one gives way; or, where others need that, the present one as it was
        loaded, what its files lack being random, as it would be in a fresh one.
        """
        if self.original is None:
            self.base = None
            gc.collect()
            return load_adapted(adapter, self.options, self.tokenizer, self.data.labels)
        gc.collect()
        self.original.restore()
        self.original.forget(self.new)
        return with_adapter(self.base, adapter, self.options)


def load(options: RunOptions, console: Console) -> Basis:
    """Reads data and model.

    Args:
        options: The run; its method is not looked at.
        console: Where to report.

    Raises:
        ConfigError, DataError: They cannot be used.
    """
    seed = seed_of(options)
    tokenizer = load_tokenizer(options.model)
    data = load_task(options.data, options.task, tokenizer, seed)
    for line in data.report:
        console.print(line, markup=False, soft_wrap=True)
    options, line = _measured(options)
    console.print(line, markup=False, soft_wrap=True, end="\n" if line else "")
    set_seed(seed)  # of a new head and of the adapter
    base, new = load_model(options.model, options.task, tokenizer, data.labels)
    _check_lengths(data, base.config, options)
    return Basis(options, tokenizer, data, base, new, _quantised(base, data, options, seed, console))


def as_begun(options: RunOptions) -> RunOptions:
    """The run with what was measured when it began, if it goes on: another dtype would be another run."""
    if not (options.output.resume and (Path(options.output.folder).expanduser() / run_folder.RUN).is_file()):
        return options
    begun = run_folder.read_options(options.output.folder)
    if options.model.dtype == "measured":
        options = replace(options, model=replace(options.model, dtype=begun.model.dtype))
    if "threads" not in options.training and "threads" in begun.training:
        threads = {"threads": begun.training["threads"]}
        options = replace(options, training={**options.training, **threads})
    return options


def seed_of(options: RunOptions) -> int:
    """The seed of data, new weights and the adapter."""
    return int(options.training.get("seed", 42))


def _measured(options: RunOptions) -> tuple[RunOptions, str]:
    """The run with dtype and threads settled, torch set to the threads, and a line on what was measured, if it was."""
    threads = options.training.get("threads")
    line = ""
    if options.model.dtype == "measured" or threads is None:
        choice = machine.choose(load_config(options.model), use_cpu=bool(options.training.get("use_cpu")))
        line = choice.said
        threads = choice.threads if threads is None else threads
        if options.model.dtype == "measured":
            options = replace(options, model=replace(options.model, dtype=choice.dtype))
        else:
            line += f" model.dtype is {options.model.dtype}."
    torch.set_num_threads(int(threads))
    return replace(options, training={**options.training, "threads": int(threads)}), line


def _quantised(base: Any, data: TaskData, options: RunOptions, seed: int, console: Console) -> Quantization | None:
    """Quantises the base model, if the run asks for it, and says what became of it."""
    if options.model.quantize != "int8":  # others are made where the model is loaded
        return None
    begun = Path(options.output.folder).expanduser()
    if options.output.resume and (begun / run_folder.QUANTIZATION).is_file():
        quantization = quantize(base, options.model.quantize, plan=run_folder.read_quantization(begun))
    else:
        batches = [
            {name: tensor for name, tensor in batch.items() if name != "labels"}
            for batch in _batches(data, _SHOWN, _SHOWN_BATCHES, seed)
        ]
        quantization = quantize(base, options.model.quantize, batches=batches)
    for line in quantization.lines():
        console.print(line, markup=False, soft_wrap=True)
    return quantization


def _batches(data: TaskData, size: int, count: int, seed: int) -> list[dict[str, Tensor]]:
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[: size * count]
    return [data.collate([data.train[int(i)] for i in rows]) for rows in order.split(size)]


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
