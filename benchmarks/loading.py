"""Loading an adapter: LoRA on all linears of a narrow Llama, so that nothing but the work a module counts.

Each library loads the file it has written itself, for that is what its users do; Veneer's carries a checksum and a
fingerprint of the base model, which are checked. The same file, written by peft, is a row of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.harness import Job, Row, in_turns
from benchmarks.models import narrow_llama, tokens
from benchmarks.records import Record

ORDER = 20
QUESTION = "How long does `PeftModel.from_pretrained` take, and how does that grow with the model?"
LAYERS = (12, 24, 48)
LORA: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}


def run(quick: bool) -> Iterator[Row]:
    import peft
    from safetensors.torch import load_file

    import veneer

    layers, pairs = ((2, 4), 2) if quick else (LAYERS, 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs: dict[str, Job] = {}
        counts = {}
        for n in layers:
            model = narrow_llama(n)
            written, peers = folder / f"veneer{n}", folder / f"peft{n}"
            counts[n] = _write(model, written, peers)
            ours, theirs = (
                partial(veneer.PeftModel.from_pretrained, model),
                partial(peft.PeftModel.from_pretrained, model),
            )
            _check_same(ours, theirs, peers)
            jobs |= {
                f"veneer {n}": Job(partial(ours, written), _unload),
                f"veneer, peft's file {n}": Job(partial(ours, peers), _unload),
                f"peft {n}": Job(partial(theirs, peers), _unload),
                f"peft, low memory {n}": Job(partial(theirs, peers, low_cpu_mem_usage=True), _unload),
                f"raw {n}": Job(partial(load_file, peers / "adapter_model.safetensors")),
            }
        times = in_turns(jobs, pairs)
    for n in layers:
        what = f"{n} layers, {counts[n]} tensors"
        seconds = times.seconds(Veneer=f"veneer {n}", peft=f"peft {n}", low=f"peft, low memory {n}", raw=f"raw {n}")
        yield Row(what, "peft", times.ratio(f"peft {n}", f"veneer {n}"), target=10, seconds=seconds)
        yield Row(
            what, "peft, `low_cpu_mem_usage=True`", times.ratio(f"peft, low memory {n}", f"veneer {n}"), target=10
        )
        yield Row(
            f"{what}, peft's file for both", "peft", times.ratio(f"peft {n}", f"veneer, peft's file {n}"), target=10
        )
        yield Row(what, "`safetensors.torch.load_file`", times.ratio(f"veneer {n}", f"raw {n}"), "times the time")
    few, many = layers[0], layers[-1]
    for side, target in (("veneer", many / few), ("peft", None)):
        # A tenth for noise: what is asked is whether the growth is linear.
        yield Row(
            f"{'Veneer' if side == 'veneer' else side}, {many} layers",
            f"itself, {few} layers ({many / few:g} if linear)",
            times.ratio(f"{side} {many}", f"{side} {few}"),
            "times the time",
            target=None if target is None else 1.1 * target,
            at_most=True,
        )


def draw(record: Record) -> None:
    """Milliseconds over layers."""
    rows = [row for row in record.rows if row.seconds]
    series = {
        shown: [(float(row.what.split()[0]), 1000 * row.seconds[key]) for row in rows]
        for shown, key in (("peft", "peft"), ("Veneer", "Veneer"), ("reading the file", "raw"))
    }
    pages.lines_plot(pages.FIGURES / "loading.svg", series, "layers", "milliseconds", "Loading an adapter")


def _write(model: Any, ours: Path, theirs: Path) -> int:
    """Writes an adapter with each library; returns its number of tensors."""
    import peft

    import veneer

    adapted = veneer.get_peft_model(model, veneer.LoraConfig(**LORA))
    adapted.save_pretrained(ours)
    adapted.unload()
    peer = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    peer.save_pretrained(str(theirs))
    peer.unload()
    return len(veneer.load_peft_weights(theirs))


def _check_same(ours: Any, theirs: Any, folder: Path) -> None:
    """Both must have loaded the same: their logits agree, and differ from the base model's."""
    import torch

    x = tokens(2, 8)
    logits = []
    for load in (ours, theirs):
        with torch.no_grad():
            adapted = load(folder)
            logits.append(adapted(x).logits)
        base = adapted.unload()
    with torch.no_grad():
        assert not torch.allclose(logits[0], base(x).logits, atol=1e-3)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def _unload(model: Any) -> None:
    model.unload()
