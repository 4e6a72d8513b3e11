"""`adapter_config.json`: what either writes the other reads, field by field."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest

import veneer
from parity.oracle import peft_says
from veneer.errors import ConfigError

WRITTEN: dict[str, Any] = {
    "base_model_name_or_path": "some/base",
    "revision": "main",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "r": 5,
    "lora_alpha": 11,
    "lora_dropout": 0.25,
    "layer_replication": [[0, 4], [2, 5]],
    "bias": "all",
    "fan_in_fan_out": True,
    "use_rslora": True,
    "lora_bias": True,
    "init_lora_weights": False,
    "target_modules": ["k_proj", "q_proj"],
    "exclude_modules": ["a", "b"],
    "layers_to_transform": [0, 3],
    "layers_pattern": ["h", "layers"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"^model.k_proj": 3},
    "modules_to_save": ["classifier"],
    "target_parameters": ["experts.down_proj"],
    "ensure_weight_tying": True,
    "qalora_group_size": 8,
    "megatron_core": "my.core",
    "trainable_token_indices": {"embed_tokens": [3, 4]},
}

UNORDERED = ("target_modules", "exclude_modules")  # sets in peft

# Of these a file can only have one.
VARIANTS: dict[str, Any] = {
    "use_dora": True,
    "use_qalora": True,
    "monteclora_config": {"num_samples": 4, "use_entropy": True},
    "use_bdlora": {"target_modules_bd_b": ["q"], "nblocks": 4},
    "velora_config": {"num_groups": 8, "init_type": "random"},
    "alora_invocation_tokens": [3, 4],
    "kasa_config": {"beta": 0.5, "gamma": 0.0},
    "arrow_config": {"top_k": 2, "use_gks": True},
}

# Settings of starting values, by the one that they belong to.
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eva": ("eva_config", {"rho": 1.5, "tau": 0.9, "whiten": True}),
    "corda": ("corda_config", {"corda_method": "kpm", "cache_file": "cache"}),
    "lora_ga": ("lora_ga_config", {"direction": "A2rBr", "scale": "unit"}),
    "loftq": ("loftq_config", {"loftq_bits": 8, "loftq_iter": 2}),
}

NOT_YET: dict[str, Any] = {
    "megatron_config": {"tensor_model_parallel_size": 2},
}


def written(config: veneer.PeftConfig | peft.PeftConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(str(folder))
    return json.loads((folder / "adapter_config.json").read_text())


def plain(value: Any) -> Any:
    """Without the differences that a file does not have."""
    return sorted(value) if isinstance(value, set | tuple) else value


def test_every_field_is_known_with_the_same_default(tmp_path: Path) -> None:
    theirs, ours = written(peft.LoraConfig(), tmp_path / "theirs"), written(veneer.LoraConfig(), tmp_path / "ours")
    assert theirs == ours


def test_values_written_by_peft_are_read(tmp_path: Path) -> None:
    theirs = written(peft.LoraConfig(**WRITTEN), tmp_path)
    assert {key for key, value in theirs.items() if value == written(peft.LoraConfig(), tmp_path / "plain")[key]} == {
        *("peft_type", "peft_version", "auto_mapping"),
        *(field.name for field in fields(veneer.LoraConfig) if field.metadata.keys() & {"planned", "variant"}),
        *(field for field, _ in STARTS.values()),
    }, "every field that is carried out here should have another value than the default"
    config = veneer.PeftConfig.from_pretrained(tmp_path)
    assert type(config) is veneer.LoraConfig
    read = {key: getattr(config, key) for key in WRITTEN}
    for name in UNORDERED:
        read[name] = sorted(read[name])
    assert read == WRITTEN


def test_values_written_here_are_read_by_peft(tmp_path: Path) -> None:
    ours = written(veneer.LoraConfig(**WRITTEN), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an unknown key is a warning of peft
        config = peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert type(config) is peft.LoraConfig
    assert {key: plain(getattr(config, key)) for key in WRITTEN} == WRITTEN
    again = written(config, tmp_path / "again")
    for name in UNORDERED:
        again[name] = sorted(again[name])
    assert again == ours


@pytest.mark.parametrize(("key", "value"), VARIANTS.items())
def test_settings_of_variants_are_written_alike(key: str, value: Any, tmp_path: Path) -> None:
    with peft_says("aLoRA is currently only supported for CAUSAL_LM"):
        theirs = written(peft.LoraConfig(**{key: value}), tmp_path)
    read = veneer.PeftConfig.from_pretrained(tmp_path)
    assert read == veneer.LoraConfig(**{key: value})
    assert read.method() is not veneer.LoraConfig.adapter
    ours = written(read, tmp_path / "ours")
    assert ours == theirs
    assert value if isinstance(value, bool | list) else ours[key].items() >= value.items()


@pytest.mark.parametrize("name", STARTS)
def test_settings_of_starting_values_are_written_alike(name: str, tmp_path: Path) -> None:
    field, value = STARTS[name]
    config = {"init_lora_weights": name, field: value}
    settings = getattr(
        veneer, {"eva": "EvaConfig", "corda": "CordaConfig", "lora_ga": "LoraGAConfig"}.get(name, ""), None
    )
    written(veneer.LoraConfig(**config), tmp_path / "ours")
    if name == "loftq":  # peft's asks for a package that is not declared
        return
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))
    theirs = written(read, tmp_path / "theirs")
    assert theirs[field].items() >= value.items()
    again = veneer.PeftConfig.from_pretrained(tmp_path / "theirs")
    assert again == veneer.LoraConfig(**config)
    assert getattr(again, field) == settings(**value)
    assert written(again, tmp_path / "again") == theirs


def test_every_variant_is_tried() -> None:
    assert VARIANTS.keys() == {field.name for field in fields(veneer.LoraConfig) if "variant" in field.metadata}


@pytest.mark.parametrize(("key", "value"), NOT_YET.items())
def test_what_is_not_carried_out_here_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    with peft_says("aLoRA is currently only supported for CAUSAL_LM"):
        written(peft.LoraConfig(**{key: value}), tmp_path)
    with pytest.raises(ConfigError, match=key):
        veneer.PeftConfig.from_pretrained(tmp_path)


def test_auto_mapping_of_a_model_without_task_is_kept(tmp_path: Path) -> None:
    mapping = {"base_model_class": "Net", "parent_library": "mine"}
    peft.LoraConfig(target_modules=["a"]).save_pretrained(str(tmp_path), auto_mapping_dict=mapping)
    config = veneer.PeftConfig.from_pretrained(tmp_path)
    assert config.auto_mapping == mapping
    assert written(config, tmp_path / "again")["auto_mapping"] == mapping


@pytest.mark.parametrize("name", ["LoraConfig", "PeftConfig", "TaskType", "PeftModel", "get_peft_model", "PeftType"])
def test_names_are_where_they_are_in_peft(name: str) -> None:
    assert getattr(veneer, name).__name__ == getattr(peft, name).__name__


def test_task_types_are_those_of_peft() -> None:
    assert {str(task) for task in veneer.TaskType} == {task.value for task in peft.TaskType}
    assert peft.PeftType.LORA.value == veneer.PeftType.LORA
