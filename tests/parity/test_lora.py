"""LoRA here and in peft: the same outputs and the same trained tensors, and files that go both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parity.families import FAMILIES
from parity.oracle import (
    BIASES,
    CONV1D,
    EMBEDDINGS,
    PARAMETER_PATTERN,
    TIGHT,
    load_here,
    load_there,
    output,
    peft_says,
    same_tensors,
    settings,
    tensors,
    trained,
    twins,
)

BOTH_STACKS = ["experts.down_proj", "experts.gate_up_proj"]

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    ("llama", {"use_rslora": True}),
    ("convolutions", {"use_rslora": True}),
    ("llama", {"lora_bias": True}),
    ("gpt2", {"lora_bias": True}),
    ("llama", {"lora_dropout": 0.3}),
    ("perceptron", {"lora_dropout": 0.3, "init_lora_weights": "gaussian"}),
    ("llama", {"init_lora_weights": False}),
    ("llama", {"rank_pattern": {"q_proj": 5, r"layers\.1\..*v_proj": 2}, "alpha_pattern": {"down_proj": 1}}),
    ("convnext", {"rank_pattern": {"^convnext.embeddings.patch_embeddings": 1}, "use_rslora": True}),
    ("bert", {"alpha_pattern": {"0.output.dense": 2, "output.dense": 11}}),
    ("llama", {"layers_to_transform": [1]}),
    ("llama", {"layers_to_transform": 1, "layers_pattern": "layers"}),
    ("t5", {"layers_to_transform": [1]}),
    ("bert", {"layers_to_transform": [0], "layers_pattern": ["layer"]}),
    ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj", "down_proj"]}),
    ("llama", {"exclude_modules": r".*layers\.0\..*"}),
    ("llama", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": None}),
    ("t5", {"target_modules": "all-linear"}),
    ("vit", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": r".*layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)"}),
    ("llama", {"target_modules": ["model.layers.0.mlp.up_proj", "1.self_attn.o_proj"]}),
    ("llama", {"target_modules": None}),
    ("gpt2", {"target_modules": None}),
    ("bert", {"target_modules": None}),
    ("t5", {"target_modules": None}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"modules_to_save": ["norm", "embed_tokens"]}),  # peft means every module whose path ends so
    ("bert", {"modules_to_save": ["pooler"]}),
    ("bert", {"task_type": "TOKEN_CLS"}),
    ("bert", {"task_type": "FEATURE_EXTRACTION"}),
    ("mixtral", {"target_parameters": BOTH_STACKS}),
    ("mixtral", {"target_parameters": BOTH_STACKS, "target_modules": []}),
    ("mixtral", {"target_parameters": ["gate_up_proj"], "use_rslora": True}),
    ("mixtral", {"target_parameters": ["mlp.gate.weight", "down_proj"]}),
    ("mixtral", {"rank_pattern": {"gate_up_proj": 5, "q_proj": 2}, "alpha_pattern": {"experts.down_proj": 1}}),
]


def said(family: str, changes: dict[str, Any]) -> list[str]:
    """What peft is expected to say of these settings."""
    return [
        *([CONV1D] if family == "gpt2" else []),
        *([BIASES] if "lora_bias" in changes else []),
        *([PARAMETER_PATTERN] if family == "mixtral" and "rank_pattern" in changes else []),
        *([EMBEDDINGS] if "embed_tokens" in (changes.get("target_modules") or []) else []),
    ]


def name_of(value: Any) -> str | None:
    return ",".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else None


@pytest.mark.parametrize(("family", "changes"), SETTINGS, ids=name_of)
def test_outputs_and_trained_tensors(family: str, changes: dict[str, Any]) -> None:
    kind = FAMILIES[family]
    with peft_says(*said(family, changes)):
        here, there = twins(kind, settings(kind, **changes))
        same_tensors(tensors(here), tensors(there))
        assert trained(here) == trained(there) == set(tensors(here))
    x = kind.inputs()
    torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
    assert not torch.allclose(output(here, x), output(kind.model(), x), rtol=1e-3)
    assert here.get_nb_trainable_parameters() == there.get_nb_trainable_parameters()


@pytest.mark.parametrize(("family", "changes"), SETTINGS, ids=name_of)
def test_files(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    kind, x = FAMILIES[family], FAMILIES[family].inputs()
    with peft_says(*said(family, changes)):
        here, there = twins(kind, settings(kind, **changes))
        there.save_pretrained(str(tmp_path / "theirs"))
        loaded_here = load_here(kind, tmp_path / "theirs")
        same_tensors(tensors(loaded_here), tensors(there))
        here.save_pretrained(tmp_path / "ours")
        loaded_there = load_there(kind, tmp_path / "ours")
        same_tensors(tensors(loaded_there), tensors(here))
        trainable = load_here(kind, tmp_path / "theirs", is_trainable=True)
        assert trained(trainable) == trained(load_there(kind, tmp_path / "ours", is_trainable=True))
    torch.testing.assert_close(output(loaded_here, x), output(there, x), **TIGHT)
    torch.testing.assert_close(output(loaded_there, x), output(here, x), **TIGHT)
    assert not trained(loaded_here)
