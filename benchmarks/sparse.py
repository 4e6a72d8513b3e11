"""SHiRA against `peft`'s: the memory that it takes on top of the frozen model, and the time of a step.

Same base, same rank, same batch; layers of SmolLM2-135M's shapes with random weights. For memory every arm has a
process of its own, whose peak is counted from where the base model stands. What the same step takes when nothing is
trained but a number added to the embeddings (activations, and their gradients) is taken off: what is left is the
method's. A dense copy of the adapted weights would be as large as the model, and is given as a row of its own. Time is
told three ways: as the libraries train (methods.py), of the layers and a head that is the same for both, and of that
what the method adds to the frozen model's step; the step without any method is below what `peft` takes by the ratio
that the last row gives, so no method can be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import methods
from benchmarks.harness import Row, Spread, apart, in_turns
from benchmarks.models import tokens

ORDER = 46
QUESTION = "What do sparse deltas cost, against `peft`'s SHiRA?"

LAYERS, VOCABULARY, RANK = 8, 2000, 32
SAME = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEMORY, TIME = 0.6, 0.7
# Every larger block is mapped alone and given back, so that the peak is that of what is in use.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": None}


def run(quick: bool) -> Iterator[Row]:
    layers, shape, pairs = (2, (2, 32), 2) if quick else (LAYERS, (8, 128), 5)
    named = {"layers": layers, "rows": shape[0], "length": shape[1]}
    peaks: dict[str, list[int]] = {"veneer": [], "peft": [], "nothing": []}
    for _ in range(1 if quick else 3):
        for arm, found in peaks.items():
            found.append(apart("sparse", "peak", variables=MAPPED, arm=arm, **named).value)
    extra = {arm: [a - b for a, b in zip(peaks[arm], peaks["nothing"], strict=True)] for arm in ("veneer", "peft")}
    what = f"SHiRA r={RANK}, {layers} layers, {shape[0]} x {shape[1]} tokens"
    memory = {name: sorted(extra[arm])[len(extra[arm]) // 2] for name, arm in (("Veneer", "veneer"), ("peft", "peft"))}
    yield Row(
        f"{what}: memory on top of the frozen model's step",
        "peft",
        Spread.of([a / b for a, b in zip(extra["veneer"], extra["peft"], strict=True)]),
        "of the memory",
        MEMORY,
        True,
        memory=memory,
    )
    dense = weights(layers)
    yield Row(
        f"{what}: the same",
        "a dense copy of the adapted weights",
        Spread.of([a / dense for a in extra["veneer"]]),
        "of the memory",
        memory={"Veneer": memory["Veneer"], "the copy": dense},
    )
    whole = in_turns({library: methods.step(library, "shira") for library in methods.LIBRARIES}, pairs)
    seconds = whole.seconds(Veneer="veneer", peft="peft")
    as_trained = whole.ratio("veneer", "peft")
    yield Row(f"SHiRA r={RANK}: a step as each trains", "peft", as_trained, "times the time", TIME, True, seconds)
    times = in_turns({arm: step(arm, 2, *shape) for arm in ("veneer", "peft", "nothing")}, pairs)
    what = f"SHiRA r={RANK}, 2 layers, {shape[0]} x {shape[1]} tokens"
    seconds = times.seconds(Veneer="veneer", peft="peft", nothing="nothing")
    yield Row(f"{what}: a step with the same head", "peft", times.ratio("veneer", "peft"), "times the time", None, True,
              seconds)  # fmt: skip
    added = [(a - c) / (b - c) for a, b, c in zip(times["veneer"], times["peft"], times["nothing"], strict=True)]
    yield Row(f"{what}: what the method adds to the frozen step", "peft", Spread.of(added), "times the time")
    yield Row(f"{what}: the frozen step alone", "peft", times.ratio("nothing", "peft"), "times the time")


def weights(layers: int) -> int:
    """Bytes of the adapted weights."""
    each = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576
    return 4 * each * layers


def peak(arm: str, layers: int, rows: int, length: int) -> int:
    """By how many bytes two steps raise the high-water mark above the base model."""
    import gc

    import psutil

    from benchmarks.harness import peak_memory

    step(arm, 1, 1, 8)()  # libraries that are imported on the way
    base = build(layers)
    gc.collect()
    start = psutil.Process().memory_info().rss
    job = step(arm, layers, rows, length, base)
    for _ in range(2):
        job()
    return peak_memory() - start


def step(arm: str, layers: int, rows: int, length: int, base: Any = None) -> Callable[[], None]:
    """Forward, backward and optimiser step."""
    import torch

    model, trained = _adapted(arm, build(layers) if base is None else base)
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    x = tokens(rows, length, VOCABULARY)

    def job() -> None:
        model(input_ids=x, labels=x).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return job


def build(layers: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=VOCABULARY,
        )
    )


def _adapted(arm: str, base: Any) -> tuple[Any, list[Any]]:
    """The model of an arm and what it trains."""
    import torch

    if arm == "nothing":
        base.requires_grad_(False)
        number = torch.nn.Parameter(torch.zeros(1))
        base.get_input_embeddings().register_forward_hook(lambda module, args, y: y + number)
        return base.train(), [number]
    if arm == "veneer":
        import veneer as library
    else:
        import peft as library
    model = library.get_peft_model(base, library.ShiraConfig(r=RANK, target_modules=SAME, task_type="CAUSAL_LM"))
    return model.train(), [parameter for parameter in model.parameters() if parameter.requires_grad]
