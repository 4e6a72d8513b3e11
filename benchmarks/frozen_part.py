"""Chat tuning of the top quarter of the layers, three epochs: what lies below is computed once.

SmolLM2 with LoRA on the linears of its upper 7 of 30 blocks, over ragged real conversations, all in float32. Every arm
does the same number of steps over the same examples. A model is as fast as its work allows: beside the times stands how
many multiplications each way needs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import ladder
from benchmarks.harness import Apart, Job, Row, Spread, apart, in_turns

ORDER = 85
QUESTION = "How fast is it to train upper layers alone, where the frozen part is computed once?"

EPOCHS, BLOCKS, TRAINED, TARGET = 3, 30, 7, 8.0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {
    **ladder.LORA,
    "target_modules": LINEARS,
    "layers_to_transform": list(range(BLOCKS - TRAINED, BLOCKS)),
}
ARMS = {
    "peft": "peft + Trainer",
    "off": "all blocks in every epoch",
    "memory": "frozen part once, in memory",
    "disk": "frozen part once, on disk",
}


def run(quick: bool) -> Iterator[Row]:
    arms, examples, pairs = (("peft", "memory"), 8, 1) if quick else (tuple(ARMS), 64, 5)
    alone = {arm: apart("frozen_part", "whole", arm=arm, examples=examples) for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        times = in_turns({arm: _job(arm, examples, folder) for arm in arms}, pairs, warm_up=0 if quick else 1)
    for arm in arms[1:]:
        for peer in ("peft", "off"):
            if arm == peer or peer not in arms:
                continue
            shown = {"Veneer": arm, "peft" if peer == "peft" else "without": peer}
            yield Row(
                f"{EPOCHS} epochs of {examples} conversations, {TRAINED} of {BLOCKS} blocks: {ARMS[arm]}",
                ARMS[peer],
                times.ratio(peer, arm),
                target=TARGET if (arm, peer) == ("memory", "peft") else None,
                seconds=times.seconds(**shown),
                memory={name: alone[key].memory for name, key in shown.items()},
                score={name: _score(alone[key]) for name, key in shown.items()},
            )
    needed = _work("peft", examples) / _work("memory", examples)
    yield Row("multiplications that are needed, padding included", ARMS["peft"], Spread.of([needed]), "times as many")


def whole(arm: str, examples: int) -> float:
    """The whole run, in a process of its own; its mean loss."""
    with tempfile.TemporaryDirectory() as folder:
        loss: float = _job(arm, examples, folder).run().training_loss
        return loss


def _score(run: Apart) -> str:
    return f"loss {run.value:.3f}"


def _work(arm: str, examples: int) -> float:
    """Multiplications: one a weight and position forward, one for the gradient of the input."""
    import torch

    rows = ladder.conversations(examples).train
    positions = sum(map(len, rows["input_ids"]))
    labels = sum(label != -100 for row in rows["labels"] for label in row)
    model = ladder.base_model("smollm2")
    block, head = model.model.layers[0], model.get_output_embeddings()
    size = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, torch.nn.Linear))
    below, above = (BLOCKS - TRAINED) * size, 2 * TRAINED * size
    if arm == "peft":
        with tempfile.TemporaryDirectory() as folder:
            padded = sum(batch["input_ids"].numel() for batch in _trainer(arm, examples, folder).get_train_dataloader())
        return EPOCHS * padded * (below + above + 2 * head.weight.numel())
    once = EPOCHS if arm == "off" else 1
    return positions * (once * below + EPOCHS * above) + EPOCHS * labels * 2 * head.weight.numel()


def _job(arm: str, examples: int, folder: str) -> Job:
    trainer = _trainer(arm, examples, folder)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    def restart(result: Any) -> None:
        trainer.model.load_state_dict(start, strict=False)
        trainer.optimizer = trainer.lr_scheduler = None

    return Job(trainer.train, restart)


def _trainer(arm: str, examples: int, folder: str) -> Any:
    import peft
    import transformers

    import veneer
    from veneer.training import arguments

    data, base = ladder.conversations(examples), ladder.base_model("smollm2")
    settings = {**ladder.settings(), "num_train_epochs": EPOCHS, "seed": 0}
    rows: dict[str, Any] = {"train_dataset": data.train, "data_collator": data.collate}
    if arm == "peft":
        model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
        trainer: Any = transformers.Trainer(model, transformers.TrainingArguments(folder, **settings), **rows)
    else:
        settings |= {"frozen_part": arm, "train_sampling_strategy": "group_by_length"}
        model = veneer.get_peft_model(base, veneer.LoraConfig(**LORA))
        trainer = veneer.Trainer(model, arguments.build(settings, folder), **rows)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
