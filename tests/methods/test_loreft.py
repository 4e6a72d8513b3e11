"""LoReFT against its formula, and the count of the paper; positions are in `test_outputs.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as T
from torch import nn

from tiny import llama, randomise
from veneer import PeftModel, get_peft_model, parse_method
from veneer.adapted import adapters_of
from veneer.errors import ConfigError

SETTINGS = [
    {"r": 2, "prefix_positions": 1, "suffix_positions": 2},
    {"r": 3, "prefix_positions": 0, "tied_weights": False},
]


def test_the_formulas() -> None:
    """h + R^T (W h + b - R h); without the constraint; and without what is subtracted."""
    x = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for method in ("loreft", "noreft", "direft"):
        layer = nn.Linear(5, 5).double()
        spec = f"{method}:r=2,prefix_positions=1,suffix_positions=0,target_modules=['0']"
        model = get_peft_model(nn.Sequential(layer), spec)
        randomise(model)
        ((_, adapter),) = adapters_of(model, "default")
        (edit,) = adapter.edits
        rows = edit.rows()
        h = layer(x)
        inner = h @ edit.source.weight.T + edit.source.bias - (0 if method == "direft" else h @ rows.T)
        expected = torch.cat([(h + inner @ rows)[:, :1], h[:, 1:]], 1)
        torch.testing.assert_close(model(x), expected)
        if method == "loreft":
            torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64))
            torch.testing.assert_close(torch.linalg.qr(edit.basis)[0].abs(), rows.T.abs())  # the same space
        else:
            assert torch.equal(rows, edit.basis.T)


def test_the_rows_do_not_jump_where_a_number_changes_its_sign() -> None:
    layer = nn.Linear(3, 3).double()
    model = get_peft_model(nn.Sequential(layer), "loreft:r=1,target_modules=['0']")
    ((_, adapter),) = adapters_of(model, "default")
    found = []
    for first in (1e-6, -1e-6):
        with torch.no_grad():
            adapter.edits[0].basis.copy_(torch.tensor([[first], [1.0], [2.0]]))
        found.append(adapter.edits[0].rows())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["loreft", "noreft", "direft"])
def test_the_kind_is_saved_and_loads_as_itself(method: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), f"{method}:r=2,tied_weights=false")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == method.upper()
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    kinds = {type(adapter).__name__.lower() for _, adapter in adapters_of(loaded, "default")}
    assert kinds == {method}
    assert loaded.peft_config["default"].ends_at_labels


def test_the_share_of_the_paper() -> None:
    """0.031% of LLaMA-7B: rank 8 in all layers, tied."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    with torch.device("meta"):
        base = T.LlamaForCausalLM(T.LlamaConfig(**sizes, vocab_size=32000))
        total = sum(p.numel() for p in base.parameters())
        model = get_peft_model(base, "loreft:r=8", low_cpu_mem_usage=True)
    trained = model.get_nb_trainable_parameters()[0]
    assert trained == 32 * (2 * 8 * 4096 + 8)
    assert f"{100 * trained / total:.3f}" == "0.031"


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prefix_positions=0, suffix_positions=0; counts"):
        parse_method("loreft:prefix_positions=0,suffix_positions=0")
    with pytest.raises(ConfigError, match=r"layers\.0: r=64 is more than the width of the hidden states, 32"):
        get_peft_model(llama(), "loreft:r=64")
