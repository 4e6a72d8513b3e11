"""The classification walkthrough: MiniLM, LoRA r=8 on query and value, two epochs of movie snippets.

Veneer as its users get it (its data path, its `Trainer`, the defaults of `veneer train`) against peft with
transformers' `Trainer`, once padded to 128 as walkthroughs do it, once to the longest of the batch. Examples, steps,
batch size, rate and schedule are the same. A whole run of the slowest takes minutes (walkthrough.py), so the ratio is
measured on a few steps over the same examples, in turns. A step on one batch without any trainer tells the engine's
share from that of batching.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.harness import Job, Row, Spread, Times, in_turns

ORDER = 50
QUESTION = "How fast is a classifier trained?"

MODEL, DATA, LENGTH = "minilm", "movie-sentiment", 128
TRAIN, HELD_OUT = 2000, 1000
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
RATE, BATCH, EPOCHS = 1e-3, 16, 2
ARMS = {"veneer": "Veneer", "padded": "peft, padded to 128", "longest": "peft, padded to the longest of the batch"}
SPEED = {"padded": 10.0, "longest": 3.0}


def run(quick: bool) -> Iterator[Row]:
    examples, pairs = (32, 2) if quick else (160, 5)
    with tempfile.TemporaryDirectory() as folder:
        times, positions = segments(examples, pairs, folder)
    for arm, target in SPEED.items():
        what = f"{examples // BATCH} steps over {examples} examples"
        seconds = times.seconds(Veneer="veneer", peft=arm)
        yield Row(what, ARMS[arm], times.ratio(arm, "veneer"), target=target, seconds=seconds)
        yield Row(
            "positions computed in these steps, padding included",
            ARMS[arm],
            Spread.of([positions[arm] / positions["veneer"]]),
            "times as many",
        )
    for length in (32, LENGTH):
        steps = in_turns(one_batch(length), 2 if quick else 9, warm_up=2)
        yield Row(f"one step without a trainer, {BATCH} x {length} tokens", "peft", steps.ratio("peft", "veneer"))


def segments(examples: int, pairs: int, folder: str) -> tuple[Times, dict[str, int]]:
    """Trains on the same few examples with each arm, in turns.

    Returns:
        The times, and how many positions (batch x longest, summed) each arm's batches have.
    """
    positions: dict[str, int] = {}

    def job(arm: str) -> Job:
        trainer = trainer_of(arm, 0, folder, examples, epochs=1)
        # Kept before the first step, so that every turn starts from the same place and does the same steps.
        start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        positions[arm] = sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())

        def restart(result: Any) -> None:
            trainer.model.load_state_dict(start)
            trainer.optimizer = trainer.lr_scheduler = None

        return Job(trainer.train, restart)

    return in_turns({arm: job(arm) for arm in ARMS}, pairs), positions


def one_batch(length: int) -> dict[str, Callable[[], None]]:
    """Forward, backward and optimiser step of both engines on one batch without padding, three times."""
    import peft
    import torch

    import veneer

    jobs: dict[str, Callable[[], None]] = {}
    x = torch.randint(1000, 20000, (BATCH, length), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(x), torch.arange(BATCH) % 2
    for name, library in (("veneer", veneer), ("peft", peft)):
        model = library.get_peft_model(_base(0), library.LoraConfig(**LORA)).train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

        def step(model: Any = model, optimiser: Any = optimiser) -> None:
            for _ in range(3):
                model(input_ids=x, attention_mask=mask, labels=labels).loss.backward()
                optimiser.step()
                optimiser.zero_grad()

        jobs[name] = step
    return jobs


def options_of(seed: int, folder: str, limit: int = TRAIN) -> Any:
    from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions

    return RunOptions(
        task="classification",
        model=ModelOptions(MODEL),
        data=DataOptions(DATA, max_length=LENGTH, limit=limit, validation_limit=HELD_OUT),
        method={"name": "lora", **LORA},
        training={"learning_rate": RATE, "num_train_epochs": EPOCHS, "seed": seed},
        output=OutputOptions(folder, overwrite=True),
    )


def _base(seed: int) -> Any:
    from transformers import AutoModelForSequenceClassification, set_seed

    from veneer.samples import model_folder

    set_seed(seed)  # of the new head and the adapter
    return AutoModelForSequenceClassification.from_pretrained(model_folder(MODEL), num_labels=2)


def trainer_of(
    arm: str, seed: int, folder: str, limit: int = TRAIN, *, epochs: int, every: str = "no", **named: Any
) -> Any:
    """The trainer of an arm; Veneer's is put together as `veneer train` does it.

    Args:
        arm: One of `ARMS`.
        seed: Of head, adapter and order.
        folder: For what the trainer writes.
        limit: Number of training examples.
        epochs: Number of epochs.
        every: When the peer evaluates and saves.
        named: Passed to transformers' `Trainer`.
    """
    import transformers
    from transformers import AutoTokenizer, PrinterCallback

    import veneer
    from veneer.data import load_task
    from veneer.samples import model_folder
    from veneer.training import arguments

    options = options_of(seed, folder, limit)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(MODEL))
    data = load_task(options.data, options.task, tokenizer, 0)
    base = _base(seed)
    options.training |= {"num_train_epochs": epochs, "save_strategy": "no"}
    resolved = arguments.resolve(options, RATE, evaluates=False)
    if arm == "veneer":
        model = veneer.get_peft_model(base, veneer.LoraConfig(**LORA))
        settings = arguments.build(resolved, folder)
        rows: dict[str, Any] = {"data_collator": data.collate, "train_dataset": data.train}
        trainer = veneer.Trainer(model, settings, processing_class=tokenizer, **rows)
    else:
        model, settings, rows = _walkthrough(arm, base, tokenizer, data, resolved, folder, every)
        trainer = transformers.Trainer(model, settings, **rows, **named)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _walkthrough(
    arm: str, base: Any, tokenizer: Any, data: Any, resolved: Mapping[str, Any], folder: str, every: str
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, arguments and data of the usual walkthrough, for the same examples, batch size and learning rates."""
    import peft
    from transformers import DataCollatorWithPadding, TrainingArguments, default_data_collator

    same = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "seed", "logging_steps")
    settings = TrainingArguments(
        output_dir=folder,
        **{name: resolved[name] for name in same},
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=resolved["per_device_eval_batch_size"],
        eval_strategy=every,
        save_strategy=every,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    padding = {"padding": "max_length", "max_length": LENGTH} if arm == "padded" else {}
    rows = {
        "data_collator": default_data_collator if padding else DataCollatorWithPadding(tokenizer),
        "train_dataset": _tokenized(data.train, tokenizer, padding),
        "eval_dataset": _tokenized(data.evaluation, tokenizer, padding),
    }
    return peft.get_peft_model(base, peft.LoraConfig(**LORA)), settings, rows


def _tokenized(rows: Any, tokenizer: Any, padding: dict[str, Any]) -> Any:
    """The same examples as a tokenizer called on the texts gives them."""

    def columns(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = {"input_ids": batch["input_ids"], "attention_mask": [[1] * len(row) for row in batch["input_ids"]]}
        return dict(tokenizer.pad(encoded, **padding)) if padding else encoded

    return rows.map(columns, batched=True)
