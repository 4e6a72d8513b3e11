"""How far `veneer estimate` is from what a run then needs.

Six configurations, each trained for a few steps by `veneer.Trainer` in a process of its own, and each estimated in
another: peak memory and time of a step. An estimate of 1.0 is exact.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.harness import Row, Spread, apart, now
from benchmarks.records import ALLOCATOR

ORDER = 65
QUESTION = "How near is `veneer estimate` to the memory and the time of a run?"
ALONE = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
ALL = "lora:r=8,target_modules=all-linear"
# Settings of training, and the form of the base model.
CASES: dict[str, tuple[str, str, int, int, dict[str, Any]]] = {
    "MiniLM, LoRA, 16 x 32": ("minilm", "lora:r=8,target_modules=[query,value]", 16, 32, {}),
    "MiniLM, all parameters, 16 x 32": ("minilm", "full", 16, 32, {}),
    "SmolLM2, LoRA on all linears, 8 x 128": ("smollm2", ALL, 8, 128, {}),
    "the same in NF4, gradient checkpointing": (
        "smollm2", ALL, 8, 128, {"quantize": "nf4", "activation_checkpointing": True},
    ),
    "SmolLM2 in int8, IA3, 8 x 128": ("smollm2", "ia3", 8, 128, {"quantize": "int8"}),
    "SmolLM2, LoRA in the upper 8 of 30 layers, 8 x 128": (
        "smollm2", "lora:r=8,target_modules=all-linear,layers_to_transform=[22,23,24,25,26,27,28,29]", 8, 128, {},
    ),
}  # fmt: skip


def run(quick: bool) -> Iterator[Row]:
    for what, (model, method, rows, length, training) in list(CASES.items())[: 1 if quick else None]:
        job = {"model": model, "method": method, "rows": rows, "length": length, "training": training}
        usual = apart("estimate", "train", steps=2 if quick else 4, **job)
        tight = apart("estimate", "train", variables={**dict.fromkeys(ALLOCATOR), **ALONE}, steps=2, **job)
        predicted = apart("estimate", "predict", **job).value
        for peer, memory in (("measured, large blocks mapped alone", tight.memory), ("measured", usual.memory)):
            yield Row(
                f"memory: {what}",
                peer,
                Spread.of([predicted["peak"] / memory]),
                "of what was measured",
                memory={"estimate": predicted["peak"], "measured": memory},
            )
        yield Row(
            f"time of a step: {what}",
            "measured",
            Spread.of([predicted["seconds"] / usual.value]),
            "of what was measured",
            seconds={"estimate": predicted["seconds"], "measured": usual.value},
        )


def _options(model: str, method: str, rows: int, training: dict[str, Any]) -> Any:
    import torch

    from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions

    training = dict(training)
    form = training.pop("quantize", None)
    return RunOptions(
        task="classification" if model == "minilm" else "causal-lm",
        model=ModelOptions(model, dtype="float32", quantize=form),
        method=method,
        data=DataOptions(""),
        training={"per_device_train_batch_size": rows, "threads": torch.get_num_threads(), **training},
        output=OutputOptions("."),
    )


def predict(model: str, method: str, rows: int, length: int, training: dict[str, Any]) -> dict[str, float]:
    """The estimate's peak memory and seconds of a step."""
    from veneer import machine
    from veneer.evaluation.estimates import estimate

    machine.clock = now  # both by the same clock
    found = estimate(_options(model, method, rows, training), length)
    return {"peak": found.peak, "seconds": found.seconds, **found.parts}


def train(model: str, method: str, rows: int, length: int, training: dict[str, Any], steps: int) -> float:
    """Median seconds of a trainer's step, the first one left out."""
    import torch
    from transformers import TrainerCallback

    from veneer import get_peft_model, parse_method
    from veneer.data import Collator
    from veneer.data.batches import to_dataset
    from veneer.quantization import quantize
    from veneer.training import arguments
    from veneer.training.models import load_model, load_tokenizer
    from veneer.training.run import TASK_TYPES
    from veneer.training.trainer import Trainer

    options = _options(
        model, method, rows, {**training, "max_steps": steps, "save_strategy": "no", "frozen_part": "off"}
    )
    config = parse_method(method)
    config.task_type = TASK_TYPES[options.task]
    classifier = options.task == "classification"
    tokenizer = load_tokenizer(options.model)
    base, _ = load_model(options.model, options.task, tokenizer, ["no", "yes"] if classifier else [])
    if options.model.quantize == "int8":  # all layers unseen, as the estimate has it
        quantize(base)
    ids = torch.randint(1000, 20000, (rows * steps, length), generator=torch.Generator().manual_seed(0)).tolist()
    moments: list[float] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **named: Any) -> None:
            moments.append(now())

        def on_step_end(self, *args: Any, **named: Any) -> None:
            moments.append(now())

    with tempfile.TemporaryDirectory() as folder:
        args = arguments.build(arguments.resolve(options, 1e-4, evaluates=False), folder)
        data = to_dataset(ids, [row % 2 for row in range(len(ids))] if classifier else ids)
        trainer = Trainer(
            get_peft_model(base, config), args, data_collator=Collator.of(tokenizer), train_dataset=data,
            callbacks=[Steps()],
        )  # fmt: skip
        trainer.train()
    pairs = [end - start for start, end in zip(moments[::2], moments[1::2], strict=True)]
    return statistics.median(pairs[1:])
