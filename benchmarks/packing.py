"""Padded batches against packed rows: MiniLM on movie snippets, SmolLM2 on conversations, forward and backward.

The same model steps over the same batches of real examples, once as they come and once without their padding. In
random order, a batch is padded to the longest of unlike rows; sorted by length, as `veneer train` makes them, little is
left to save, and packing must then cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

from benchmarks.harness import Row, Spread, in_turns

ORDER = 82
QUESTION = "What does it save to compute nothing for padding?"

Task = tuple[Any, Callable[[list[int]], dict[str, Any]], list[int]]


def run(quick: bool) -> Iterator[Row]:
    tasks = {"MiniLM, movie snippets": (_reviews, 16), "SmolLM2, conversations": (_conversations, 4)}
    for name, (make, size) in tasks.items():
        yield from measure(name, *make(), size, *((2, 1) if quick else (4, 5)))


def measure(
    name: str,
    model: Any,
    collate: Callable[[list[int]], dict[str, Any]],
    lengths: list[int],
    size: int,
    count: int,
    pairs: int,
) -> Iterator[Row]:
    """Steps over some batches in both orders, padded and packed in turns.

    Args:
        name: Of model and data.
        model: Adapted, in training.
        collate: Makes a batch of examples by their numbers.
        lengths: Tokens of each example.
        size: Examples of a batch.
        count: Batches of a job.
        pairs: How often each job is timed.
    """
    import torch

    from veneer.errors import UnsupportedError
    from veneer.training.labelled import LabelledLoss
    from veneer.training.packing import PackedRows

    at_labels: Callable[[], Any] = nullcontext
    with suppress(UnsupportedError):  # of a classifier, whose loss is another
        at_labels = LabelledLoss(getattr(model, "get_base_model", lambda: model)())
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))[: size * count].tolist()
    for order, chosen in (("random", shuffled), ("by length", sorted(shuffled, key=lambda i: lengths[i]))):
        groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        batches = [collate(group) for group in groups]

        def job(context: Callable[[], Any], batches: list[dict[str, Any]] = batches) -> Callable[[], None]:
            def steps() -> None:
                for batch in batches:
                    with context(), at_labels():
                        model(**batch).loss.backward()
                    model.zero_grad()

            return steps

        times = in_turns({"padded": job(nullcontext), "packed": job(PackedRows(model))}, pairs)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        what = f"{name}: {count} x {size} rows, {order}"
        yield Row(
            what,
            "the same batches, padded",
            times.ratio("padded", "packed"),
            seconds=times.seconds(packed="packed", padded="padded"),
        )
        positions = sum(batch["attention_mask"].numel() for batch in batches)
        yield Row(f"{what}: positions", "those with a token", Spread.of([positions / real]), "times as many")


def _reviews() -> Task:
    import veneer
    from benchmarks import classification

    model = veneer.get_peft_model(classification._base(0), veneer.LoraConfig(**classification.LORA))
    return _task(model, classification.MODEL, classification.DATA, "classification")


def _conversations() -> Task:
    from transformers import AutoModelForCausalLM

    import veneer
    from veneer.samples import model_folder

    base = AutoModelForCausalLM.from_pretrained(model_folder("smollm2"))
    lora = veneer.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return _task(veneer.get_peft_model(base, lora), "smollm2", "chitchat", "causal-lm")


def _task(model: Any, name: str, data: str, task: Any) -> Task:
    from transformers import AutoTokenizer

    from veneer.data import load_task
    from veneer.options import DataOptions
    from veneer.samples import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder(name))
    rows = load_task(DataOptions(data, max_length=128, limit=200), task, tokenizer, 0)

    def collate(numbers: list[int]) -> dict[str, Any]:
        return rows.collate([rows.train[i] for i in numbers])

    return model.train(), collate, [len(ids) for ids in rows.train["input_ids"]]
