"""Every method that `peft` has too: time and memory of a training step on layers of SmolLM2's shapes.

Same base, same configuration, same batch, forward, backward and optimiser step. Two decoder layers of SmolLM2-135M
stand for thirty: what a method costs, it costs in every layer. The vocabulary is cut to 2,000, so that the output head,
which no method touches, does not hide the difference.
"""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.harness import Row, Spread, apart, in_turns
from benchmarks.models import tokens

ORDER = 45
QUESTION = "What does a training step cost with each method, against `peft`?"

LAYERS, VOCABULARY = 2, 2000
ROWS, LENGTH = 8, 128
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
    memory = {key: run.result().memory for key, run in runs.items()}
    ratios: list[float] = []
    for name in names:
        times = in_turns({library: step(library, name) for library in LIBRARIES}, pairs)
        figure = times.ratio("veneer", "peft")
        ratios.append(figure.median)
        yield Row(
            f"`{name}`",
            "peft",
            figure,
            "times the time",
            1.0,
            True,
            times.seconds(Veneer="veneer", peft="peft"),
            {"Veneer": memory[name, "veneer"], "peft": memory[name, "peft"]},
        )
    yield Row("all of these, median", "peft", Spread.of(ratios), "times the time", 0.7, True)
    both = in_turns({name: step("veneer", name) for name in ("dora", "lora")}, pairs, warm_up=2)
    yield Row("`dora`", "Veneer's `lora`", both.ratio("dora", "lora"), "times the time", DORA_TO_LORA, True)


def compared() -> list[str]:
    """Methods that both libraries have and that change modules."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from veneer.config import ModuleConfig
    from veneer.registry import methods

    return [
        name
        for name, cls, _ in methods()
        if cls.peft_name in PEFT_TYPE_TO_CONFIG_MAPPING and issubclass(cls, ModuleConfig) and name not in LEFT_OUT
    ]


def step(library: str, name: str) -> Callable[[], None]:
    """Forward, backward and optimiser step of one adapted model."""
    import torch

    model = _adapted(library, name).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = tokens(ROWS, LENGTH, VOCABULARY)

    def job() -> None:
        model(input_ids=x, labels=x).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return job


def steps(library: str, name: str) -> float:
    """Two steps, in a process of its own: the second finds what the first has left."""
    return statistics.median(in_turns({"step": step(library, name)}, 1)["step"])


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
