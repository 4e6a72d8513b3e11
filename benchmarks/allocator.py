"""What glibc's allocator costs a training step.

Each step asks for the same large tensors again. By default glibc gives large blocks back to the system and takes them
anew, and the system clears them page by page; with its thresholds raised it keeps what it has. Each measurement is a
process of its own; those with and without are in turns.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from benchmarks.harness import Row, Times, apart, now
from benchmarks.records import ALLOCATOR

ORDER = 60
QUESTION = "What does `veneer.keep_freed_memory` bring?"
# Blocks that are mapped alone leave no gaps between them, and cost a fault a page each time.
MODES: dict[str, dict[str, str]] = {"plain": {}, "kept": {}, "alone": {"MALLOC_MMAP_THRESHOLD_": str(2**17)}}
# What the loss computes logits for, and so whether there are blocks beyond 32 MB, which glibc never learns to keep.
SIZES: dict[str, tuple[str, Any, int, int, bool]] = {
    "MiniLM, LoRA on query and value, 16 x 32 tokens": ("minilm", ["query", "value"], 16, 32, False),
    "SmolLM2-135M, LoRA on all linears, 8 x 128 tokens": ("smollm2", "all-linear", 8, 128, True),
    "the same with logits for all positions": ("smollm2", "all-linear", 8, 128, False),
}


def run(quick: bool) -> Iterator[Row]:
    pairs, count = (1, 1) if quick else (5, 3)
    for what, (model, targets, rows, length, labelled) in list(SIZES.items())[: 1 if quick else None]:
        times, memory, faults = Times({name: [] for name in MODES}), dict.fromkeys(MODES, 0), dict.fromkeys(MODES, 0)
        for _ in range(pairs):
            for name in times:
                job = {"model": model, "targets": targets, "rows": rows, "length": length, "labelled": labelled}
                variables = {**dict.fromkeys(ALLOCATOR), **MODES[name]}
                done = apart("allocator", "step", variables=variables, keep=name == "kept", count=count, **job)
                seconds, faults[name] = done.value
                times[name].append(seconds)
                memory[name] = max(memory[name], done.memory)
        for name, shown in (("kept", "freed memory kept"), ("alone", "large blocks mapped alone")):
            yield Row(
                f"a step of {what}, {shown}",
                "glibc's own thresholds",
                times.ratio("plain", name),
                seconds=times.seconds(**{name: name, "plain": "plain"}),
                memory={name: memory[name], "plain": memory["plain"]},
                score={which: f"{faults[which]:,} page faults a step" for which in (name, "plain")},
            )


def step(model: str, targets: Any, rows: int, length: int, labelled: bool, keep: bool, count: int) -> tuple[float, int]:
    """Median seconds and page faults of forward, backward and optimiser step of a LoRA, after two to warm up."""
    import veneer

    if keep:
        veneer.keep_freed_memory()
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from veneer.samples import model_folder
    from veneer.training.labelled import LabelledLoss

    classifier = model == "minilm"
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    base = kind.from_pretrained(model_folder(model), dtype=torch.float32)
    config = veneer.LoraConfig(target_modules=targets, task_type="SEQ_CLS" if classifier else "CAUSAL_LM")
    adapted = veneer.get_peft_model(base, config).train()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
    x = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(rows) % 2 if classifier else x

    def once() -> None:
        adapted(input_ids=x, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    # Built once: it checks itself with two forward passes.
    context: Callable[[], Any] = LabelledLoss(base) if labelled else nullcontext
    seconds, faults = [], []
    for _ in range(count + 2):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, now()
        with context():
            once()
        seconds.append(now() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(seconds[2:]), int(statistics.median(faults[2:]))
