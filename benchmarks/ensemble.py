"""Five prompts of one task on one frozen model: all in one batch against one run for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import Row, in_turns

ORDER = 69
QUESTION = "What does an ensemble of five cost, against five runs?"

MEMBERS, TOKENS, LENGTH = 5, 16, 32
METHODS = {
    "prompts": f"prompt_tuning:num_virtual_tokens={TOKENS}",
    "LoRA": "lora:r=8,target_modules=[query,value]",
}
# Of MiniLM, and narrower for a quick try.
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
QUICK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def run(quick: bool) -> Iterator[Row]:
    for method, string in METHODS.items():
        model, names = members(string, QUICK if quick else SIZES)
        for rows in (1, 8):
            jobs = answering(model, names, rows)
            times = in_turns(jobs, pairs=2 if quick else 9)
            what = f"{MEMBERS} {method}, {rows} x {LENGTH} tokens, one batch"
            for peer in list(jobs)[1:]:
                top, bottom = ("one batch", peer) if peer == "one member" else (peer, "one batch")
                unit = "times the time" if peer == "one member" else "times as fast"
                yield Row(what, peer, times.ratio(top, bottom), unit)


def members(method: str, sizes: dict[str, int]) -> tuple[Any, list[str]]:
    """A classifier of these sizes with five adapters."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import veneer

    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes))  # type: ignore[arg-type]
    config = veneer.parse_method(method)
    config.task_type = "SEQ_CLS"
    names = [f"member_{i}" for i in range(MEMBERS)]
    model = veneer.get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval(), names


def answering(model: Any, names: list[str], rows: int) -> dict[str, Callable[[], Any]]:
    """The ensemble, its members one after the other, and one of them, on the same rows."""
    import torch

    import veneer
    from benchmarks.models import tokens

    ids = tokens(rows, LENGTH)

    def alone(name: str) -> Any:
        model.set_adapter(name, inference_mode=True)
        with torch.inference_mode():
            return model(input_ids=ids).logits.softmax(-1)

    def one_batch() -> Any:
        with torch.inference_mode():
            return veneer.ensemble(model, names, input_ids=ids)

    def by_turns() -> Any:
        return torch.stack([alone(name) for name in names]).mean(0)

    if not torch.allclose(one_batch(), by_turns(), atol=1e-5):
        raise RuntimeError("The ensemble does not say what its members say.")
    return {"one batch": one_batch, f"{MEMBERS} runs": by_turns, "one member": lambda: alone(names[0])}
