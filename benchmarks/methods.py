"""Every method that `peft` has too: time and memory of a training step on layers of SmolLM2's shapes.

Same base, same configuration, same batch, forward, backward and optimiser step. Two decoder layers of SmolLM2-135M
stand for thirty: what a method costs, it costs in every layer. The vocabulary is cut likewise, to two thirtieths, so
that the output head has the share of a step that it has in SmolLM2. Lengths and labels are those of real conversations,
eight a step. Each library trains as it does: `peft` under transformers' `Trainer`, which calls
`model(input_ids, attention_mask, labels).loss` on padded rows, and Veneer under its own, which computes nothing for
padding and runs the head on labelled positions only. Both losses are the same number where the method starts as the
base model; they are recorded. What is owed to the padding, the median over rows of one length tells, half of them
labelled; what to the head, a row of LoRA on the layers alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import Any

from benchmarks.harness import Row, Spread, apart, in_turns
from benchmarks.models import tokens

ORDER = 45
QUESTION = "What does a training step cost with each method, against `peft`?"

LAYERS, VOCABULARY = 2, 49152 * 2 // 30
ROWS, LENGTH, PROMPT = 8, 128, 64  # where all rows are of one length
SAME = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
# What a method needs to run on these shapes, or what makes its work comparable; all else is the default of both.
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 1000, "tinit": 10, "tfinal": 10},
    "adamss": {"r": 64},
    "bdlora": {
        "use_bdlora": {
            "target_modules_bd_a": SAME["target_modules"][:3],
            "target_modules_bd_b": SAME["target_modules"][3:],
        }
    },
    "boft": {"boft_block_size": 8, "boft_block_num": 0},
    "c3a": {"block_size": 64},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "psoft": {"r": 32},
    "qalora": {"qalora_group_size": 16},
    "randlora": {"r": 32},
    "trainable_tokens": {"target_modules": ["embed_tokens"], "token_indices": list(range(16))},
    "unilora": {"theta_d_length": 4096},
    "vblora": {"vector_length": 64},
    "vera": {"r": 64},
}
LEFT_OUT = {
    "alora": "needs invocation tokens",
    "arrow": "routes between trained adapters",
    "loftq": "starts from a quantised base",
    "shadow": "runs a second network beside the model",
    "xlora": "routes between trained adapters",
}
DORA_TO_LORA = 1.3
LIBRARIES = ("veneer", "peft")


def run(quick: bool) -> Iterator[Row]:
    names = ["lora", "dora"] if quick else compared()
    pairs = 2 if quick else 5
    # What memory a process takes does not depend on what else runs: two at a time, before anything is timed.
    with ThreadPoolExecutor(2) as pool:
        runs = {
            (n, lib): pool.submit(apart, "methods", "steps", library=lib, name=n) for n in names for lib in LIBRARIES
        }
    tried = {key: run.result() for key, run in runs.items()}
    ratios: list[float] = []
    full: list[float] = []
    for name in names:
        times = in_turns({library: step(library, name) for library in LIBRARIES}, pairs)
        figure = times.ratio("veneer", "peft")
        ratios.append(figure.median)
        even = in_turns({library: step(library, name, ragged=False) for library in LIBRARIES}, pairs)
        full.append(even.ratio("veneer", "peft").median)
        yield Row(
            f"`{name}`",
            "peft",
            figure,
            "times the time",
            1.0,
            True,
            times.seconds(Veneer="veneer", peft="peft"),
            {"Veneer": tried[name, "veneer"].memory, "peft": tried[name, "peft"].memory},
            {"Veneer": f"loss {tried[name, 'veneer'].value:.5f}", "peft": f"{tried[name, 'peft'].value:.5f}"},
        )
    yield Row("all of these, median", "peft", Spread.of(ratios), "times the time", 0.7, True)
    yield Row(f"the same on {ROWS} x {LENGTH} tokens, none of them padding", "peft", Spread.of(full), "times the time")
    without = {library: step(library, "lora", head=False, ragged=False) for library in LIBRARIES}
    alone = in_turns(without, pairs, warm_up=2)
    yield Row("`lora`, the layers alone, without the head", "peft", alone.ratio("veneer", "peft"), "times the time")
    both = in_turns({name: step("veneer", name) for name in ("dora", "lora")}, pairs, warm_up=2)
    yield Row("`dora`", "Veneer's `lora`", both.ratio("dora", "lora"), "times the time", DORA_TO_LORA, True)


def compared() -> list[str]:
    """Methods that both libraries have and that change modules."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from veneer.config import ModuleConfig
    from veneer.prompting.prompts import PromptLearningConfig
    from veneer.registry import methods

    return [
        name
        for name, cls, _ in methods()
        if cls.peft_name in PEFT_TYPE_TO_CONFIG_MAPPING
        and issubclass(cls, ModuleConfig)
        and not issubclass(cls, PromptLearningConfig)
        and name not in LEFT_OUT
    ]


def step(library: str, name: str, head: bool = True, ragged: bool = True) -> Callable[[], float]:
    """Forward, backward and optimiser step of one adapted model; gives the loss.

    Args:
        library: Whose adapters, and whose way of training.
        name: The method.
        head: Whether the output head and the loss take part; otherwise a gradient is handed to the layers.
        ragged: Whether rows have the lengths of real conversations.
    """
    import torch

    from veneer.training.labelled import LabelledLoss
    from veneer.training.packing import PackedRows

    model = _adapted(library, name).train()
    base = model.get_base_model()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = tokens(ROWS, LENGTH, VOCABULARY)
    labels = x.clone()
    labels[:, :PROMPT] = -100
    batch = conversations() if ragged else {"input_ids": x, "labels": labels}
    loss_of_library = LabelledLoss(base) if library == "veneer" else nullcontext
    rows_of_library = PackedRows(model) if library == "veneer" and ragged else nullcontext

    def job() -> float:
        with loss_of_library(), rows_of_library():
            loss = model(**batch).loss if head else base.model(input_ids=x).last_hidden_state.mean()
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return job


@cache
def conversations() -> dict[str, Any]:
    """The first batch of the ladder's, within the vocabulary."""
    from benchmarks import ladder

    rows = ladder.conversations(ROWS)
    batch = rows.collate([dict(rows.train[i]) for i in range(ROWS)])
    labels = batch["labels"]
    return {
        **batch,
        "input_ids": batch["input_ids"] % VOCABULARY,
        "labels": labels.where(labels < 0, labels % VOCABULARY),
    }


def steps(library: str, name: str) -> float:
    """The loss of the first of two steps, in a process of its own: the second finds what the first has left."""
    job = step(library, name)
    first = job()
    job()
    return first


def _adapted(library: str, name: str) -> Any:
    import torch
    from peft import get_peft_model as in_peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import LlamaConfig, LlamaForCausalLM

    from veneer import get_peft_model, parse_method
    from veneer.registry import methods

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=LAYERS,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=VOCABULARY,
        )
    )
    preset = next(preset for other, _, preset in methods() if other == name)
    settings = {**SAME, **preset, **SETTINGS.get(name, {}), "task_type": "CAUSAL_LM"}
    if library == "veneer":
        return get_peft_model(base, parse_method({"name": name, **settings}))
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[parse_method({"name": name}).peft_type]
    known = {entry.name for entry in dataclasses.fields(cls)}
    plain = {
        key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for key, value in settings.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about its own defaults
        return in_peft(base, cls(**{key: value for key, value in plain.items() if key in known}))
