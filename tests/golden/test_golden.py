"""Adapter files of every release still load, with the outputs that they had.

Files lie in `<version>/<adapter>/`, with the outputs in `logits.json`. Before a release, write those of its version:

    VENEER_WRITE_GOLDEN=1 python -m pytest tests/golden

Files of earlier versions are never written again. Nothing in them is random: written twice they say the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import veneer

HERE = Path(__file__).parent
LARGEST = 20_000

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {
        "name": "lora",
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["table", "conv", "grouped", "lin"],
        "rank_pattern": {"lin": 3},
        "alpha_pattern": {"conv": 1},
        "modules_to_save": ["head"],
    },
    "lora_bias": {
        "name": "lora",
        "r": 2,
        "lora_alpha": 5,
        "use_rslora": True,
        "lora_bias": True,
        "target_modules": r"conv|lin",
    },
    "lora_parameters": {
        "name": "lora",
        "r": 2,
        "lora_alpha": 5,
        "target_parameters": ["experts.second", "experts.first"],
        "rank_pattern": {"experts.first": 1},
    },
    "bitfit": {"name": "bitfit", "target_modules": ["conv", "norm", "lin"], "modules_to_save": ["head"]},
    "bottleneck": {
        "name": "bottleneck",
        "bottleneck_size": 2,
        "scaling": 1.5,
        "non_linearity": "tanh",
        "target_modules": ["lin"],
        "modules_to_save": ["norm", "head"],
    },
}


class Experts(nn.Module):
    """Two stacks of matrices, one matrix for each half of the width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(2, 4, 3))
        self.second = nn.Parameter(torch.empty(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack(x.chunk(2, -1))  # (2, rows, 3)
        return torch.cat(list(torch.tanh(halves @ self.first.mT) @ self.second.mT), -1)


class Model(nn.Module):
    """A lookup, a convolution with and one without groups, a norm, a linear layer, experts, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.norm = nn.LayerNorm(4)
        self.lin = nn.Linear(4, 6)
        self.experts = Experts()
        self.head = nn.Linear(6, 3)
        fill(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.grouped(torch.tanh(self.conv(self.table(ids).mT))).mT
        return self.head(self.experts(torch.tanh(self.lin(self.norm(x)).mean(1))))


def fill(model: nn.Module) -> None:
    """Gives every trainable parameter values that are neither random nor alike."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            steps = torch.arange(parameter.numel(), dtype=torch.float32) * (3 + 2 * number) + number
            parameter.copy_(((steps % 13 - 6) / 16).view_as(parameter))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(10).view(2, 5) % 7)


def make(adapter: str) -> veneer.PeftModel:
    model = veneer.get_peft_model(Model(), ADAPTERS[adapter])
    fill(model)
    return model


def stored() -> list[Path]:
    """Folders of adapters, all versions."""
    return sorted(path.parent for path in HERE.glob("[0-9]*/*/adapter_config.json"))


def write(folder: Path, adapter: str) -> None:
    model = make(adapter)
    model.save_pretrained(folder)
    (folder / "logits.json").write_text(json.dumps(logits(model).tolist()) + "\n")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_writing(adapter: str, tmp_path: Path) -> None:
    """Elsewhere, unless the files of this version are asked for."""
    folder = (HERE / veneer.__version__ if "VENEER_WRITE_GOLDEN" in os.environ else tmp_path) / adapter
    write(folder, adapter)
    assert sum(path.stat().st_size for path in folder.iterdir()) < LARGEST


def test_every_adapter_of_this_version_is_stored() -> None:
    kept = {path.name for path in stored() if path.parent.name == veneer.__version__}
    assert kept == set(ADAPTERS), "run: VENEER_WRITE_GOLDEN=1 python -m pytest tests/golden"


@pytest.mark.parametrize("folder", stored(), ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_load(folder: Path) -> None:
    expected = torch.tensor(json.loads((folder / "logits.json").read_text()))
    model = veneer.PeftModel.from_pretrained(Model(), folder)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, logits(Model()), rtol=1e-2)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def contents(folder: Path) -> dict[str, Any]:
    """All that the two files say; the order of a header's keys changes from run to run."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118  # not a dictionary
        return {"config": (folder / "adapter_config.json").read_text(), "header": file.metadata(), "tensors": tensors}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_format_does_not_change_unnoticed(adapter: str, tmp_path: Path) -> None:
    """A change of it is a decision: write the files again, and say so in the CHANGELOG."""
    make(adapter).save_pretrained(tmp_path)
    assert contents(tmp_path) == contents(HERE / veneer.__version__ / adapter)
