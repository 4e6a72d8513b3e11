"""Whether and where a training run keeps what its frozen part computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer import units
from veneer.errors import UnsupportedError
from veneer.stores import rounds_inputs
from veneer.training import samplers
from veneer.training.frozen_part import FrozenPart
from veneer.training.kept_rows import FileRows, MemoryRows, Rows, free_disk, free_memory

if TYPE_CHECKING:
    from veneer.training.trainer import Trainer

FOLDER = "frozen_part"
"""Within the output folder of a run."""
# Of what is free: the rest is for the run itself, and for others.
_SHARE = {"memory": 0.5, "disk": 0.8}
# Examples that are looked at for a short and a long one to try on.
_CANDIDATES = 64


class Reuse:
    """The frozen part of one run, tried, and a place for its rows.

    Args:
        trainer: Whose run it is.

    Raises:
        UnsupportedError: `training.frozen_part` says where, and nothing can be kept.
    """

    line: str
    """What is done and why, for people; empty where it is turned off."""

    def __init__(self, trainer: Trainer) -> None:
        args: Any = trainer.args
        self.model = trainer.model
        self._setting: str = getattr(args, "frozen_part", "auto")
        self._part: FrozenPart | None = None
        self._rows: Rows | None = None
        self._evaluates = False
        named = getattr(args, "frozen_part_folder", None)
        self._named = named is not None
        self._folder = Path(named).expanduser() if named else Path(str(args.output_dir)) / FOLDER
        self.line = ""
        if self._setting == "off":
            return
        try:
            with samplers.generators_kept(), trainer.accelerator.autocast():
                self._begin(trainer)
        except UnsupportedError as reason:
            self.close()
            if self._setting != "auto":
                raise UnsupportedError(
                    f"training.frozen_part is {self._setting!r}, but nothing can be kept: {reason}. Set it to 'auto' "
                    "or 'off'."
                ) from reason
            self.line = f"Frozen part: computed anew each time, for {reason}."

    def training(self) -> AbstractContextManager[None]:
        """For a training step."""
        return self._part(self._rows) if self._part is not None else nullcontext()

    def evaluating(self) -> AbstractContextManager[None]:
        """For an evaluation step."""
        return self._part(self._rows) if self._part is not None and self._evaluates else nullcontext()

    def close(self, *, finished: bool = True) -> None:
        """Gives memory back, and files of a finished run, unless they lie in a folder that was named for them."""
        if self._rows is not None:
            self._rows.close(remove=finished and not self._named)
        self._part = self._rows = None

    def _begin(self, trainer: Trainer) -> None:
        args: Any = trainer.args
        _check_run(trainer)
        batches: list[dict[str, Any]] = []

        def batch() -> dict[str, Any]:
            batches.append(_few_examples(trainer))
            return batches[0]

        model: Any = trainer.model
        part = FrozenPart(model, batch, dropout=self._setting != "auto")
        if part.keeps_nothing is not None and self._setting != "auto":
            raise UnsupportedError(part.keeps_nothing)
        rows, reason = self._place(trainer, part) if part.keeps_nothing is None else (None, part.keeps_nothing)
        done = f"Frozen part: {part.frozen} of {part.total} blocks"
        if rows is None:
            self.line = f"{done}, computed anew each time, for {reason}."
            # Segments that are computed again would otherwise reach down to the embedding.
            if _recomputes(model, args):
                self._part = part
            return
        self._part, self._rows = part, rows
        _compare(trainer, part, batches[0])
        without = " without their dropout" if part.without_dropout else ""
        self.line = f"{done} computed once{without}, kept {rows.where} ({reason})."

    def _place(self, trainer: Trainer, part: FrozenPart) -> tuple[Rows | None, str]:
        """Where rows are kept, with their size; or why they are not."""
        args: Any = trainer.args
        if _epochs(trainer) <= 1:
            return None, "every example is seen once"
        evaluates = args.eval_strategy != "no" and trainer.eval_dataset is not None
        train, held = _tokens(trainer, trainer.train_dataset), _tokens(trainer, trainer.eval_dataset)
        auto = self._setting == "auto"
        if train is None and auto:
            return None, "the number of tokens is not known (training.frozen_part=memory keeps what fits)"
        need = None if train is None else train * part.token_bytes
        whole = None if need is None or held is None else need + held * part.token_bytes
        tried = []
        for place in ("memory", "disk") if auto else (self._setting,):
            free = free_memory() if place == "memory" else free_disk(self._folder)
            given = getattr(args, "frozen_part_gb", None)
            limit = int(_SHARE[place] * free) if given is None else min(int(given * 1e9), free)
            fits = need is None or need <= limit
            if not fits and auto:
                tried.append(f"{units.size(limit)} of {place}")
                continue
            self._evaluates = evaluates and (whole is None or whole <= limit)
            size = whole if self._evaluates else need
            what = f"{'' if size is None else f'{units.size(size)} of '}{units.size(free)} available"
            if not fits:
                what += f", of which {units.size(limit)} may be used; what does not fit is computed anew each time"
            if place == "memory":
                return MemoryRows(limit), what
            rows = FileRows(self._folder, limit, part.identity(), part.width, part.dtype)
            return rows, f"{what}; {rows.remark}" if rows.remark else what
        return None, f"{units.size(need or 0)} do not fit into {' or '.join(tried)} (training.frozen_part_gb)"


def _check_run(trainer: Trainer) -> None:
    """Refuses runs in which one process does not see the same examples again, or the whole model.

    Raises:
        UnsupportedError: So.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UnsupportedError("the model is spread over processes")
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise UnsupportedError("each process is given other examples in each epoch")
    model: Any = trainer.model
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if compiled or trainer.args.torch_compile:
        raise UnsupportedError("compiled blocks cannot be passed over")
    if trainer.train_dataset is None:
        raise UnsupportedError("there is no training set")


def _epochs(trainer: Trainer) -> float:
    args = trainer.args
    try:
        examples = len(trainer.train_dataset)  # type: ignore[arg-type]
    except TypeError:
        return math.inf
    if args.max_steps <= 0:
        return args.num_train_epochs
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps / max(1, examples)


def _tokens(trainer: Trainer, dataset: Any) -> int | None:
    """Positions of a data set, or of several by name; none where that is not known."""
    if isinstance(dataset, Mapping) and not hasattr(dataset, "column_names"):
        counts = [_tokens(trainer, part) for part in dataset.values()]
        return None if None in counts else sum(counts)  # type: ignore[arg-type]
    try:
        return sum(trainer._lengths(dataset))
    except (TypeError, KeyError, IndexError):
        return None


def _few_examples(trainer: Trainer) -> dict[str, Any]:
    """A batch of the shortest and the longest of the first training examples, with two between them."""
    dataset: Any = trainer.train_dataset
    subset: Any
    try:
        candidates = [dataset[i] for i in range(min(len(dataset), _CANDIDATES))]
    except TypeError as error:
        raise UnsupportedError("the training set cannot be looked at before training") from error
    lengths = [len(example["input_ids"]) if "input_ids" in example else 0 for example in candidates]
    order = sorted(range(len(candidates)), key=lambda i: lengths[i])
    chosen = sorted({order[0], order[len(order) // 3], order[2 * len(order) // 3], order[-1]})
    subset = dataset.select(chosen) if hasattr(dataset, "select") else [candidates[i] for i in chosen]
    loader = trainer._get_dataloader(subset, "frozen part", len(chosen))
    batches = [trainer._prepare_inputs(batch) for _ in range(2) for batch in loader]
    if any(isinstance(x, Tensor) and not torch.equal(x, batches[1][name]) for name, x in batches[0].items()):
        raise UnsupportedError("the collator or the data set gives something else each time")
    return dict(batches[0])


def _recomputes(model: nn.Module, args: Any) -> bool:
    asked = any(getattr(args, name, False) for name in ("gradient_checkpointing", "activation_checkpointing"))
    return asked or any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _compare(trainer: Trainer, part: FrozenPart, batch: dict[str, Any]) -> None:
    """Compares the loss with and without: blocks above may look at more than is known here.

    Raises:
        UnsupportedError: It is another.
    """
    model: Any = trainer.model
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            usual = trainer.loss_as_in_training(batch)
            losses = []
            rows = MemoryRows(2**40)
            try:
                for _ in range(2):  # computed and kept, then read
                    with part(rows):
                        losses.append(trainer.loss_as_in_training(batch))
            except UnsupportedError:
                raise
            except Exception as error:  # whatever a model raises that cannot do without its lower blocks
                raise UnsupportedError(f"the model fails without its frozen blocks: {error!r}") from error
    finally:
        model.train(training)
    if not rows.bytes:
        raise UnsupportedError("the model is called in a way by which examples cannot be told apart")
    rtol = 1e-2 if part.dtype.itemsize < 4 or rounds_inputs(model) else 1e-4
    for loss in losses:
        if not _close(loss, usual, rtol):
            raise UnsupportedError(f"the loss is another without the frozen blocks ({loss:.6g} instead of {usual:.6g})")


def _close(one: Tensor, other: Tensor, rtol: float) -> bool:
    return bool((one.float() - other.float()).abs() <= rtol * other.float().abs() + 1e-6)
