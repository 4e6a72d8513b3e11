"""An int8 base: layers alone at several widths, and a whole LoRA step of SmolLM2.

The limit is the faster of this machine's two products for the same shapes (float32, or 8-bit integers by
`torch._int_mm`) with nothing around them: no quantising, no rescaling, no bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import Row, Spread, apart, in_turns

ORDER = 66
QUESTION = "How fast and how small is training on an int8 base?"

# Tokens, in, out: SmolLM2, a model of width 2048, MiniLM.
SHAPES = [
    (512, 576, 576), (512, 576, 1536), (512, 1536, 576), (512, 2048, 2048), (512, 2048, 8192), (1000, 384, 384),
    (300, 384, 1536),
]  # fmt: skip
ROWS, LENGTH = 8, 128
ARMS = {"float32": None, "int8": "int8"}


def run(quick: bool) -> Iterator[Row]:
    from veneer.stores.int8_kernels import compile_steps, weight_bits

    compile_steps(weight_bits())
    for tokens, inputs, outputs in SHAPES[:1] if quick else SHAPES:
        times = in_turns(layer(tokens, inputs, outputs), 2 if quick else 9, warm_up=2)
        what = f"{tokens} tokens, {inputs} to {outputs}, forward and gradient"
        seconds = times.seconds(int8="int8", float32="float32")
        yield Row(what, "the layer in float32", times.ratio("float32", "int8"), seconds=seconds)
        limit = min(("float32 alone", "integers alone"), key=lambda name: sum(times[name]))
        yield Row(what, f"the products, {limit}", times.ratio(limit, "int8"), "of the limit")
    rows = 1 if quick else ROWS
    steps = in_turns({arm: step_of(arm, rows) for arm in ARMS}, 1 if quick else 5)
    memory = {arm: apart("int8", "peak", arm=arm, rows=rows).memory for arm in ARMS}
    yield Row(
        f"SmolLM2, LoRA on all linears, one step of {rows} x {LENGTH} tokens",
        "the same in float32",
        steps.ratio("float32", "int8"),
        seconds=steps.seconds(int8="int8", float32="float32"),
    )
    ratio = Spread.of([memory["int8"] / memory["float32"]])
    yield Row("the same, peak memory", "the same in float32", ratio, "of the memory", memory=memory)


def layer(tokens: int, inputs: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """Output and gradient by the input, in each arithmetic; and the two products alone."""
    import torch

    from veneer.stores.int8 import Int8Linear
    from veneer.stores.int8_kernels import weight_bits

    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    quantised = Int8Linear.from_linear(linear, bits=weight_bits())
    x, g = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)
    rows, back = (torch.randint(-127, 128, (tokens, size), dtype=torch.int8) for size in (inputs, outputs))

    def both(of: torch.nn.Module) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(of(x * 1), x, g)  # another tensor each time: nothing is remembered

    def alone() -> None:
        with torch.no_grad():
            torch.mm(x, linear.weight.t())
            torch.mm(g, linear.weight)

    def integers() -> None:
        torch._int_mm(rows, quantised.weight.t())
        torch._int_mm(back, quantised.weight)

    return {"float32": both(linear), "int8": both(quantised), "float32 alone": alone, "integers alone": integers}


def step_of(arm: str, rows: int) -> Callable[[], None]:
    """Forward, backward and optimiser step of SmolLM2; half of the labels count."""
    import torch
    from transformers import AutoModelForCausalLM

    import veneer
    from veneer.samples import model_folder

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder("smollm2"), dtype=torch.float32)
    ids = torch.randint(1000, 40000, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    if arm == "int8":
        veneer.quantize(base, "int8", batches=[{"input_ids": ids[:2]}])
    model = veneer.get_peft_model(base, veneer.parse_method("lora:r=8,target_modules=all-linear")).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def peak(arm: str, rows: int) -> None:
    """Two steps, in a process of their own."""
    step = step_of(arm, rows)
    step()
    step()
