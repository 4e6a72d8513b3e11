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

from veneer.errors import ConfigError


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


class TokenBatches(Sampler[list[int]]):
    """Batches of as many examples as hold a number of tokens, in an order that seed and epoch decide.

    Each epoch has the same number of batches, as trainers count on: that of the epoch that needs most. In the others,
    the largest batches are halved until there are as many.

    Args:
        lengths: Tokens of each example.
        budget: How many tokens a batch may have at most, padding not counted.
        seed: With the epoch's number, decides the order.
        epochs: How many there will be.
        alike: Whether neighbours are to be of similar length.

    Raises:
        ConfigError: An example alone is longer than the budget.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int, epochs: int, *, alike: bool = False) -> None:
        self.lengths = list(lengths)
        self.budget = budget
        self.seed = seed
        self.epoch = 0
        longest = max(self.lengths, default=0)
        if longest > budget:
            raise ConfigError(
                f"training.tokens_per_batch is {budget}, but example {self.lengths.index(longest)} alone has {longest} "
                f"tokens. Set it to {longest} or more, or data.max_length to {budget} or less."
            )
        self._alike = round(budget * len(self.lengths) / max(1, sum(self.lengths))) if alike else None
        self._count = max(len(self._filled(epoch)) for epoch in range(max(1, epochs)))

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._filled(self.epoch)
        while len(batches) < self._count:
            at = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[at]
            batches[at : at + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        return iter(batches)

    def _filled(self, epoch: int) -> list[list[int]]:
        """Batches that are filled one after the other, each until the next example does not fit."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self._alike is None:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        else:
            order = get_length_grouped_indices(self.lengths, self._alike, generator=generator)
        batches: list[list[int]] = []
        room = 0
        for index in order:
            if self.lengths[index] > room or not batches:
                batches.append([])
                room = self.budget
            batches[-1].append(index)
            room -= self.lengths[index]
        return batches


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
            if isinstance(sampler, GroupedByLength | TokenBatches | SeedableRandomSampler):
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
