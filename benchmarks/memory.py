"""Peak memory of a training step by the form that the base model is kept in, against what cannot be done without.

Every model has a process of its own, which does the same with a narrow model first: what it holds after that
(libraries, compiled kernels) is taken off.
The floor is what has to be there at the same time: weights, adapter, its gradients and Adam's two averages, and what
the backward pass is given: the input of every block, which is all that gradient checkpointing keeps, and the parts of
one block on top, counted by hooks on what autograd saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.harness import Row, Spread, apart

ORDER = 90
QUESTION = "How much memory does a LoRA step take, by the form of the base model, and how near is that to the floor?"
FORMS = ("float32", "bfloat16", "int8", "nf4", "nf4-int8")
ROWS, LENGTH = 2, 256
# As LlamaConfig names them. The second is of a thousand million parameters.
MODELS: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "Llama of 1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip
QUICK = {"a narrow Llama": {**MODELS["SmolLM2-135M"], "hidden_size": 192, "num_hidden_layers": 2, "vocab_size": 512,
                            "num_attention_heads": 3}}  # fmt: skip
# Every larger block is mapped alone and given back: the heap's gaps between blocks are up to twice a quantised model.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": None}


def run(quick: bool) -> Iterator[Row]:
    for name, sizes in (QUICK if quick else MODELS).items():
        whole: float | None = None
        for form in FORMS:
            if form == "bfloat16" and sizes["hidden_size"] > 1024:
                continue  # half an hour a step where the processor has no units for it
            length = 32 if quick else LENGTH
            done = apart("memory", "step", variables=MAPPED, sizes=sizes, form=form, rows=ROWS, length=length)
            measured, floor = done.value["peak"], done.value["floor"]
            whole = measured if whole is None else whole
            yield Row(
                f"{name}, {form}, {ROWS} x {done.value['length']} tokens",
                "the floor",
                Spread.of([measured / floor]),
                "times the memory",
                memory={"measured": measured, "floor": floor, **done.value["parts"]},
                score={"of float32": f"{measured / whole:.0%}"},
            )


def step(sizes: dict[str, int], form: str, rows: int, length: int) -> dict[str, Any]:
    """Two steps of LoRA on all linear layers of a Llama with random weights.

    Args:
        sizes: Those of the model.
        form: A dtype, or a form of `veneer.quantised_bases`.
        rows: Rows of a batch.
        length: Tokens of a row.

    Returns:
        `peak`, `floor` and its `parts`, in bytes, and `length`.
    """
    import gc

    import psutil

    from benchmarks.harness import peak_memory

    _steps(QUICK["a narrow Llama"], form, 2, 16)
    gc.collect()
    start = psutil.Process().memory_info().rss
    parts = _steps(sizes, form, rows, length)
    return {"peak": peak_memory() - start, "floor": sum(parts.values()), "parts": parts, "length": length}


def _steps(sizes: dict[str, int], form: str, rows: int, length: int) -> dict[str, int]:
    """The bytes that two steps cannot do without."""
    import torch

    import veneer

    torch.manual_seed(0)
    model = build(sizes, form)
    base = held(model)
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.activation_checkpointing_enable()
    adapted.train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adapter = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, sizes["vocab_size"], (rows, length))
    saved = Saved()
    for _ in range(2):
        # The body alone: the head's logits are a question of their own (`labelled.py` makes them in pieces).
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            loss = adapted.get_base_model().model(ids).last_hidden_state.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        saved.close({id(tensor) for tensor in [*adapted.parameters(), *adapted.buffers()]})
    return {"weights": base, "adapter": adapter, "gradients and averages": 3 * adapter, "activations": saved.largest}


class Saved:
    """Counts what autograd keeps, each memory once."""

    def __init__(self) -> None:
        self.largest = 0
        self.seen: dict[int, tuple[int, int]] = {}

    def pack(self, tensor: Any) -> Any:
        owner = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage()
        self.seen[storage.data_ptr()] = (id(owner), storage.nbytes())
        return tensor

    def close(self, weights: set[int]) -> None:
        """Ends a step: what is no weight counts."""
        self.largest = max(self.largest, sum(size for owner, size in self.seen.values() if owner not in weights))
        self.seen.clear()


def build(sizes: dict[str, int], form: str) -> Any:
    """A Llama with random weights, made layer by layer in its form, so that it is never whole in float32."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    config = LlamaConfig(**sizes, tie_word_embeddings=True, dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    layer = {"int8": _int8, "nf4": _nf4, "nf4-int8": _nf4_int8}.get(form, lambda linear: linear)
    for path, module in list(model.named_modules()):
        if path == "lm_head":  # has its weight from the embedding
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = torch.ones(parameter.shape, dtype=dtype) if parameter.dim() == 1 else _random(parameter, dtype)
                module._parameters[name] = nn.Parameter(fresh, requires_grad=False)
        if type(module) is nn.Linear and (made := layer(module)) is not module:
            parent, _, leaf = path.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = made
            module._parameters.clear()
    model.tie_weights()
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config)
    return model


def held(model: Any) -> int:
    """Bytes of a model's weights, with what quantising needs beside the codes."""
    import torch

    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)
        for value in () if state is None else state.as_dict(packed=False).values():
            if isinstance(value, torch.Tensor):
                seen[value.data_ptr()] = value.numel() * value.element_size()
    return sum(seen.values())


def _random(like: Any, dtype: Any) -> Any:
    import torch

    return torch.empty(like.shape, dtype=dtype).normal_(std=0.02)


def _int8(linear: Any) -> Any:
    from veneer.stores.int8 import Int8Linear

    return Int8Linear.from_linear(linear)


def _nf4(linear: Any) -> Any:
    import bitsandbytes as bnb

    inputs, outputs = linear.in_features, linear.out_features
    layer = bnb.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    return layer


def _nf4_int8(linear: Any) -> Any:
    from veneer.stores.nf4_int8 import Nf4Int8Linear

    return Nf4Int8Linear.from_linear4bit(_nf4(linear))
