"""What glibc's allocator costs a training step.

Each step asks for the same large tensors again. By default glibc takes such memory from the system and gives it back
each time, and the system clears it page by page; with its thresholds raised it keeps what it has. The thresholds are
read when a process starts, so each measurement is a process of its own; those with and without are in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.harness import Row, Times, apart, now
from benchmarks.records import ALLOCATOR

ORDER = 60
QUESTION = "What do raised allocator thresholds bring, as `make` sets them?"
RAISED = dict.fromkeys(ALLOCATOR, str(2**30))
SIZES = {
    "MiniLM, LoRA on query and value, 16 x 32 tokens": ("minilm", ["query", "value"], 16, 32),
    "MiniLM, LoRA on query and value, 16 x 128 tokens": ("minilm", ["query", "value"], 16, 128),
    "SmolLM2-135M, LoRA on all linears, 4 x 128 tokens": ("smollm2", "all-linear", 4, 128),
}


def run(quick: bool) -> Iterator[Row]:
    pairs, count = (1, 1) if quick else (5, 3)
    for what, (model, targets, rows, length) in list(SIZES.items())[: 1 if quick else None]:
        times, memory = Times(plain=[], raised=[]), {"plain": 0, "raised": 0}
        for _ in range(pairs):
            for name, variables in (("plain", dict.fromkeys(ALLOCATOR)), ("raised", RAISED)):
                job = {"model": model, "targets": targets, "rows": rows, "length": length, "count": count}
                done = apart("allocator", "step", variables=variables, **job)
                times[name].append(done.value)
                memory[name] = max(memory[name], done.memory)
        yield Row(
            f"a step of {what}, thresholds raised",
            "the same with glibc's own",
            times.ratio("plain", "raised"),
            seconds=times.seconds(raised="raised", plain="plain"),
            memory={"raised": memory["raised"], "plain": memory["plain"]},
        )


def step(model: str, targets: Any, rows: int, length: int, count: int) -> float:
    """Median seconds of forward, backward and optimiser step of a LoRA with Veneer, after one to warm up."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    import veneer
    from veneer.samples import model_folder

    classifier = model == "minilm"
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    base = kind.from_pretrained(model_folder(model), dtype=torch.float32)
    config = veneer.LoraConfig(target_modules=targets, task_type="SEQ_CLS" if classifier else "CAUSAL_LM")
    adapted = veneer.get_peft_model(base, config).train()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
    x = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(rows) % 2 if classifier else x
    seconds = []
    for _ in range(count + 1):
        start = now()
        adapted(input_ids=x, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(now() - start)
    return statistics.median(seconds[1:])
