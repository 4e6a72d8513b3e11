import random
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments

from veneer.training import samplers

LENGTHS = random.Random(0).choices(range(1, 41), k=64)


def test_groups_are_of_similar_length_and_complete() -> None:
    order = list(samplers.GroupedByLength(LENGTHS, batch_size=4, seed=1))
    assert sorted(order) == list(range(64))
    spread = [max(group) - min(group) for group in np.array([LENGTHS[i] for i in order]).reshape(16, 4)]
    assert np.mean(spread) < 15 < np.mean([max(g) - min(g) for g in np.array(LENGTHS).reshape(16, 4)])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = samplers.GroupedByLength(LENGTHS, batch_size=4, seed=1)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    resumed = samplers.GroupedByLength(LENGTHS, batch_size=4, seed=1)
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_the_epoch_reaches_the_sampler_through_shards_and_skips() -> None:
    args = TrainingArguments(output_dir="unused", report_to="none")
    for sampler in (samplers.GroupedByLength(LENGTHS, 4, seed=1), SeedableRandomSampler(range(64), data_seed=1)):
        shard = BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), num_processes=2, process_index=1)
        skipping: Any = SkipBatchSampler(shard, skip_batches=2)
        loader = DataLoader(range(64), batch_sampler=skipping)  # type: ignore[arg-type]
        samplers.EpochOrder().on_epoch_begin(args, TrainerState(epoch=2.5), TrainerControl(), train_dataloader=loader)
        assert sampler.epoch == 2


def test_the_longest_come_first() -> None:
    assert [LENGTHS[i] for i in samplers.LongestFirst(LENGTHS)] == sorted(LENGTHS, reverse=True)


def test_lengths_are_read_or_measured() -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]
    assert samplers.lengths(rows, "length", "input_ids") == [3, 1]
    data = Dataset.from_list(rows)
    assert samplers.lengths(data, "length", "input_ids") == [3, 1]
    assert samplers.lengths(data.add_column("length", [7, 8]), "length", "input_ids") == [7, 8]


def test_generators_are_left_as_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    def seed() -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    wanted = draw()
    seed()
    with samplers.generators_kept():
        draw()
    assert draw() == wanted
