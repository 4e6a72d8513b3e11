"""Orders of examples that depend on seed and epoch alone, so that a resumed run sees the same ones."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices


class GroupedByLength(Sampler[int]):
    """Random order in which neighbours are of similar length, so that batches need little padding.

    transformers' own sampler draws from the global generator at the start of an epoch; after a resume within an
    epoch that is in another state, and other examples would be skipped than were seen.

    Args:
        lengths: Length of each example.
        batch_size: How many neighbours should be alike.
        seed: With the epoch's number, decides the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class EpochOrder(TrainerCallback):
    """Tells the sampler which epoch it is.

    transformers and accelerate do so too, but do not reach it where several processes share the batches and a resumed
    epoch skips some of them; the wrong examples would be skipped.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sampler = kwargs.get("train_dataloader")
        while sampler is not None:
            if isinstance(sampler, GroupedByLength | SeedableRandomSampler):
                sampler.set_epoch(int(state.epoch or 0))
                return
            inner = getattr(sampler, "batch_sampler", None)
            sampler = inner if inner is not None else getattr(sampler, "sampler", None)


class LongestFirst(Sampler[int]):
    """Fixed order for evaluation with little padding; what does not fit into memory fails in the first batch.

    Args:
        lengths: Length of each example.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)


def lengths(dataset: Any, column: str, fallback: str) -> list[int]:
    """The length of each example.

    Args:
        dataset: A data set with columns, or a sequence of dictionaries.
        column: A column that already holds lengths, used if it is there.
        fallback: The column whose values are measured otherwise.
    """
    names = getattr(dataset, "column_names", None)
    if names is None:
        return [len(dataset[i][fallback]) for i in range(len(dataset))]
    return list(dataset[column]) if column in names else [len(value) for value in dataset[fallback]]


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leaves all global random generators as they were, so that what runs inside does not change the training."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):  # the CPU's generator is always among them
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
