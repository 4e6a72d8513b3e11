"""The same adapter in Veneer and in `peft`, and what the two are compared by."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import veneer
from parity.families import Family
from tiny import randomise

TIGHT = {"rtol": 1e-9, "atol": 1e-10}  # of float64
SINGLE = {"rtol": 1e-5, "atol": 1e-6}  # of float32

RANK = {"r": 3, "lora_alpha": 7}

# What peft says while it does what is asked. Each is let pass where it is expected, and nowhere else.
OLD_NAME = "`is_gradient_checkpointing` is deprecated"  # at every start: of its own call to transformers
CONV1D = "fan_in_fan_out is set to False but the target module is `Conv1D`"
EMBEDDINGS = "Setting `save_embedding_layers` to `True`"
TIED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
# Both are mistaken: a bias is no damaged matrix, and the pattern is made use of.
BIASES = r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape: \S+lora_B\.bias"
PARAMETER_PATTERN = "The following (rank|alpha)_pattern keys did not match any targeted module"


@contextmanager
def peft_says(*messages: str) -> Iterator[None]:
    """Lets these warnings of peft pass."""
    with warnings.catch_warnings():
        for message in (OLD_NAME, *messages):
            warnings.filterwarnings("ignore", message=message)
        yield


def output(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        result = model(**inputs, **kwargs)
    return result if isinstance(result, Tensor) else result[0]


def settings(family: Family, **changes: Any) -> dict[str, Any]:
    """LoRA on the family's modules, alpha unlike r."""
    return {**RANK, "target_modules": family.targets, **copy.deepcopy(family.settings), **changes}


def ours(
    family: Family, values: dict[str, Any], dtype: torch.dtype = torch.float64, name: str = "default", seed: int = 0
) -> veneer.PeftModel:
    """The adapted model here, all adapter tensors random."""
    model = veneer.get_peft_model(family.model(dtype), veneer.LoraConfig(**copy.deepcopy(values)), name)
    randomise(model, seed)
    return model.eval()


def theirs(
    family: Family, values: dict[str, Any], dtype: torch.dtype = torch.float64, name: str = "default", seed: int = 0
) -> peft.PeftModel:
    """The adapted model in peft, all adapter tensors random."""
    with peft_says():
        model = peft.get_peft_model(family.model(dtype), peft.LoraConfig(**copy.deepcopy(values)), name)
    randomise(model, seed)
    return model.eval()


def twins(
    family: Family, values: dict[str, Any], dtype: torch.dtype = torch.float64, name: str = "default", seed: int = 0
) -> tuple[veneer.PeftModel, peft.PeftModel]:
    """Both, with the same tensors."""
    here, there = ours(family, values, dtype, name, seed), theirs(family, values, dtype, name, seed)
    take(there, here, name)
    return here, there


def take(there: peft.PeftModel, here: veneer.PeftModel, name: str = "default") -> None:
    """Copies an adapter of ours into peft's model."""
    result = peft.set_peft_model_state_dict(there, veneer.get_peft_model_state_dict(here, adapter_name=name), name)
    assert not result.unexpected_keys


def tensors(model: veneer.PeftModel | peft.PeftModel, name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors by their names in files."""
    if isinstance(model, veneer.PeftModel):
        return veneer.get_peft_model_state_dict(model, adapter_name=name)
    return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert set(a) == set(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, k=key: k + m)


def trained(model: veneer.PeftModel | peft.PeftModel, name: str = "default") -> set[str]:
    """Names in files of the tensors that training would change."""
    before = {key: tensor.clone() for key, tensor in tensors(model, name).items()}
    with torch.no_grad():
        for parameter in (chosen := [p for p in model.parameters() if p.requires_grad]):
            parameter += 1
        changed = {key for key, tensor in tensors(model, name).items() if not torch.equal(tensor, before[key])}
        for parameter in chosen:
            parameter -= 1
    return changed


def load_here(family: Family, folder: Path, dtype: torch.dtype = torch.float64, **how: Any) -> veneer.PeftModel:
    return veneer.PeftModel.from_pretrained(family.model(dtype), folder, **how)


def load_there(family: Family, folder: Path, dtype: torch.dtype = torch.float64, **how: Any) -> peft.PeftModel:
    with peft_says():
        return peft.PeftModel.from_pretrained(family.model(dtype), str(folder), **how)
