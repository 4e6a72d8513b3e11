"""Chat tuning of a causal language model with LoRA: what each technique adds, and what all give together.

Ragged real conversations, LoRA r=8 on all linears, eight conversations a step. Every arm does the same steps over the
same examples. Each rung has all techniques of the rungs before it; peers are peft with transformers' `Trainer`, with
TRL's `SFTTrainer`, and on bitsandbytes' NF4. Two widths: SmolLM2-135M (30 layers of 576), and two layers of 2,048 with
random weights, at which matrices have a larger share of the time.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

from benchmarks.harness import Job, Row, Spread, apart, in_turns
from benchmarks.records import RAISED
from veneer.allocation import keep_freed_memory

ORDER = 80
QUESTION = "What does each technique add to the speed of chat tuning, and what do all give together?"

DATA, LENGTH, BATCH, RATE = "chitchat", 512, 8, 5e-4
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TARGETS = {"exact": (2.5, 0.5), "int8": (5.0, 0.33)}


@dataclass(frozen=True)
class Rung:
    """One way to train.

    Args:
        what: What it adds to the rung before.
        arithmetic: Products of layers and adapters written by hand, layers of one input run as one.
        labelled: Loss at labelled positions only.
        grouped: Batches of neighbours in length.
        packed: Rows without padding.
        recomputed: What follows cheaply from other activations is not kept.
        quantize: How the base is kept; none exactly.
    """

    what: str
    arithmetic: bool = True
    labelled: bool = True
    grouped: bool = True
    packed: bool = True
    recomputed: bool = True
    quantize: str | None = None


RUNGS = {
    "plain": Rung("the engine alone, all under autograd", False, False, False, False, False),
    "arithmetic": Rung("+ adapter arithmetic", True, False, False, False, False),
    "labelled": Rung("+ loss at labels only", True, True, False, False, False),
    "grouped": Rung("+ batches by length", True, True, True, False, False),
    "packed": Rung("+ packed rows", True, True, True, True, False),
    "exact": Rung("+ cheap activations made again: all that is exact"),
    "int8": Rung("+ int8 base", quantize="int8"),
}
PEERS = {"peft": "peft + Trainer", "trl": "peft + SFTTrainer", "nf4": "peft + bitsandbytes NF4"}


def run(quick: bool) -> Iterator[Row]:
    yield from of_width("two random layers of width 2,048" if quick else "SmolLM2, width 576", not quick, quick)


def of_width(shown: str, smollm2: bool, quick: bool) -> Iterator[Row]:
    """All arms at one width.

    Args:
        shown: What the rows say of it.
        smollm2: Whether it is SmolLM2, or two wide layers.
        quick: Whether it is only tried.
    """
    width, examples = ("smollm2", 2 * BATCH) if smollm2 else ("wide", BATCH)
    arms = ["peft", *RUNGS] if quick else [*PEERS, *RUNGS]
    job = {"width": width, "examples": examples}
    own = dict.fromkeys(RAISED)  # each arm sets glibc's thresholds itself
    alone = {arm: apart("ladder", "steps", variables=own, arm=arm, **job) for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        times = in_turns({arm: _job(arm, width, examples, folder) for arm in arms}, 1 if quick else 5)
    for arm in arms[1:]:
        speed, memory = TARGETS.get(arm, (None, None)) if smollm2 else (None, None)
        what = f"{shown}: {RUNGS[arm].what if arm in RUNGS else PEERS[arm]}"
        score = {"Veneer": f"loss {alone[arm].value:.3f}", "peft": f"loss {alone['peft'].value:.3f}"}
        ours, theirs = alone[arm].memory, alone["peft"].memory
        sizes = {"Veneer": ours, "peft": theirs}
        seconds = times.seconds(Veneer=arm, peft="peft")
        figure = times.ratio("peft", arm)
        yield Row(what, PEERS["peft"], figure, target=speed, seconds=seconds, memory=sizes, score=score)
        if memory is not None:
            yield Row(what, PEERS["peft"], Spread.of([ours / theirs]), "of the memory", memory, True, memory=sizes)
    yield from _of_the_limit(shown, width, examples, times)


def _of_the_limit(shown: str, width: str, examples: int, times: Any) -> Iterator[Row]:
    """How much of what the machine multiplies at best is reached: 4 FLOP a weight and token, padding not counted."""
    import torch

    from veneer.machine import matmul_limit

    model = base_model(width)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    tokens = sum(map(len, conversations(examples).train["input_ids"]))
    labels = sum(label != -100 for row in conversations(examples).train["labels"] for label in row)
    work = 4 * (tokens * sum(layer.weight.numel() for layer in linears) + labels * head.weight.numel())
    inner, outer = max((layer.weight.shape[::-1] for layer in linears), key=lambda shape: shape[0] * shape[1])
    limit = matmul_limit(torch.float32, (512, inner, outer))
    for arm in ("peft", "exact", "int8"):
        figure = Spread.of([work / seconds / limit for seconds in times[arm]])
        what = f"{shown}: {RUNGS[arm].what if arm in RUNGS else PEERS[arm]}"
        yield Row(what, "matrix products in float32 alone", figure, "of the limit")


def steps(arm: str, width: str, examples: int) -> float:
    """One pass over the examples, in a process of its own; its mean loss."""
    with tempfile.TemporaryDirectory() as folder:
        loss: float = _job(arm, width, examples, folder).run().training_loss
        return loss


def _job(arm: str, width: str, examples: int, folder: str) -> Job:
    trainer = (_ours(RUNGS[arm], width, examples, folder)) if arm in RUNGS else _peer(arm, width, examples, folder)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    def run() -> Any:
        with _as(RUNGS.get(arm)):
            return trainer.train()

    def restart(result: Any) -> None:
        trainer.model.load_state_dict(start, strict=False)
        trainer.optimizer = trainer.lr_scheduler = None

    return Job(run, restart)


@contextmanager
def _as(rung: Rung | None) -> Iterator[None]:
    """Turns off what a rung does not have and what has no setting."""
    import veneer.products
    from veneer.training.trainer import Trainer

    with ExitStack() as stack:
        if rung is not None and not rung.arithmetic:
            stack.enter_context(mock.patch.object(veneer.products, "allowed_by_hand", return_value=False))
        if rung is not None and not rung.labelled:
            stack.enter_context(mock.patch.object(Trainer, "_loss_at_labels", return_value=nullcontext()))
        # As `veneer train` does; peers run with what glibc does by itself.
        stack.enter_context(_memory_kept(rung is not None and rung.quantize is None))
        yield


@contextmanager
def _memory_kept(keep: bool) -> Iterator[None]:
    """Has glibc keep freed memory, or give it back as it does by itself."""
    _give_back()
    with mock.patch.dict(os.environ):
        for name in RAISED:  # of the benchmarks, which would be taken for the user's wish
            os.environ.pop(name, None)
        if keep:
            keep_freed_memory()
    try:
        yield
    finally:
        _give_back()


def _give_back() -> None:
    """Sets glibc's thresholds to what they are when a process starts."""
    libc = ctypes.CDLL(None)
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
        libc.mallopt(parameter, 128 * 1024)
    libc.malloc_trim(0)


@cache
def conversations(examples: int) -> Any:
    """The first conversations, cut at `LENGTH` tokens."""
    from transformers import AutoTokenizer

    from veneer.data import load_task
    from veneer.options import DataOptions
    from veneer.samples import model_folder

    options = DataOptions(DATA, max_length=LENGTH, limit=examples, validation_limit=8)
    return load_task(options, "causal-lm", AutoTokenizer.from_pretrained(model_folder("smollm2")), 0)


def base_model(width: str) -> Any:
    """SmolLM2 or two wide layers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from veneer.samples import model_folder

    if width == "smollm2":
        return AutoModelForCausalLM.from_pretrained(model_folder("smollm2"), dtype=torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _ours(rung: Rung, width: str, examples: int, folder: str) -> Any:
    from transformers import PrinterCallback

    import veneer
    from veneer.quantization import quantize
    from veneer.training import arguments

    data, base = conversations(examples), base_model(width)
    if rung.quantize:
        rows = [dict(data.train[i]) for i in range(min(BATCH, len(data.train)))]
        shown = data.collate(rows)
        shown.pop("labels")
        quantize(base, rung.quantize, batches=[shown])
    model = veneer.get_peft_model(base, veneer.LoraConfig(**LORA))
    how = arguments.build({**settings(), **_of(rung)}, folder)
    trainer = veneer.Trainer(model, how, train_dataset=data.train, data_collator=data.collate)
    trainer.remove_callback(PrinterCallback)
    if not rung.recomputed:
        trainer._activations = nullcontext
    return trainer


def _of(rung: Rung) -> Mapping[str, Any]:
    return {
        "packing": "on" if rung.packed else "off",
        "train_sampling_strategy": "group_by_length" if rung.grouped else "random",
    }


def settings() -> dict[str, Any]:
    """Of both libraries' training."""
    return {
        "learning_rate": RATE,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def _peer(arm: str, width: str, examples: int, folder: str) -> Any:
    import peft
    import transformers
    from transformers import PrinterCallback

    data, base = conversations(examples), base_model(width)
    make: Callable[..., Any] = partial(transformers.Trainer, data_collator=data.collate)
    arguments: Callable[..., Any] = transformers.TrainingArguments
    if arm == "nf4":
        base = _in_nf4(base, folder)
    if arm == "trl":
        import trl
        from transformers import AutoTokenizer

        from veneer.samples import model_folder

        make = partial(trl.SFTTrainer, processing_class=AutoTokenizer.from_pretrained(model_folder("smollm2")))
        arguments = partial(trl.SFTConfig, max_length=LENGTH, gradient_checkpointing=False, bf16=False)
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
    trainer = make(model=model, args=arguments(output_dir=folder, **settings()), train_dataset=data.train)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _in_nf4(base: Any, folder: str) -> Any:
    """The model loaded as QLoRA does."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base.save_pretrained(f"{folder}/plain")
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/plain", quantization_config=how, dtype=torch.float32)
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
