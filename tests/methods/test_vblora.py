"""VB-LoRA against the paper and peft."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer
from parity.families import FAMILIES
from parity.oracle import load_there, output
from tiny import llama, randomise
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, StateError
from veneer.methods.vblora import VBLoRAConfig

# A length that divides no side, so that the last vectors are cut short.
SETTINGS = [{"r": 2, "num_vectors": 5, "vector_length": 5}, {"r": 3, "num_vectors": 7, "vector_length": 1, "topk": 3}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "num_vectors": 9, "vector_length": 8}),
    ("gpt2", {"r": 3, "num_vectors": 9, "vector_length": 16, "topk": 3}),
    ("bert", {"r": 2, "num_vectors": 300, "vector_length": 4, "topk": 1}),
    ("perceptron", {"r": 2, "num_vectors": 5, "vector_length": 2, "target_modules": ["lin0", "lin1"]}),
]
SMALL: dict[str, Any] = {
    "r": 3,
    "num_vectors": 9,
    "vector_length": 8,
    "topk": 3,
    "target_modules": ["q_proj", "v_proj"],
}


def bank_of(model: nn.Module) -> Any:
    (bank,) = {id(a.shared): a.shared for _, a in adapters_of(model, "default")}.values()
    return bank.vblora_vector_bank


def test_the_formula() -> None:
    layer = nn.Linear(4, 2, bias=False).double()
    nn.init.zeros_(layer.weight)
    config = VBLoRAConfig(r=1, num_vectors=3, vector_length=2, topk=2, target_modules=["0"])
    model = veneer.get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    three = torch.tensor(3.0).log()
    with torch.no_grad():
        bank_of(model).copy_(torch.tensor([[4.0, 0.0], [0.0, 8.0], [100.0, 100.0]]))
        adapter.logits_down.copy_(torch.tensor([[[three, 0.0, -1.0], [0.0, three, -1.0]]]))
        adapter.logits_up.copy_(torch.tensor([[[0.0, 0.0, -5.0]]]))
    # weights 3/4 and 1/4: down = (3, 2 | 1, 6); up = (2, 4)
    expected = torch.tensor([[6.0, 4.0, 2.0, 12.0], [12.0, 8.0, 4.0, 24.0]]).double()
    torch.testing.assert_close(model(torch.eye(4).double()).T, expected)


def test_the_parameter_count_of_the_paper() -> None:
    # Li et al., section 3.4: h b for the bank, and r h (m + n) / b logits a matrix.
    model = veneer.get_peft_model(llama(num_key_value_heads=4), VBLoRAConfig(**SMALL))
    assert model.get_nb_trainable_parameters()[0] == 9 * 8 + 4 * 3 * 9 * (32 + 32) // 8


def test_the_bank_is_one_tensor_and_starts_uniform() -> None:
    model = veneer.get_peft_model(llama(), VBLoRAConfig(**{**SMALL, "init_vector_bank_bound": 0.5}))
    assert 0.3 < bank_of(model).abs().max() <= 0.5
    names = [name for name in veneer.get_peft_model_state_dict(model) if "bank" in name]
    assert names == ["base_model.vblora_vector_bank"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert bank_of(twin) is not bank_of(model)
        assert torch.equal(bank_of(twin), bank_of(model))


def test_the_bank_is_trained_with_the_active_adapter_only() -> None:
    model = veneer.get_peft_model(llama(), VBLoRAConfig(**SMALL))
    model.add_adapter("other", VBLoRAConfig(**SMALL))
    first = bank_of(model)
    assert first.requires_grad
    model.set_adapter("other")
    assert not first.requires_grad


def test_files_with_the_chosen_weights_only(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    model = veneer.get_peft_model(
        family.model(torch.float32), VBLoRAConfig(**SMALL, save_only_topk_weights=True)
    ).eval()
    randomise(model)
    expected = output(model, family.inputs(torch.float32))
    model.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"
    assert (written[f"{key}_topk_indices"].dtype, written[f"{key}_topk_indices"].shape) == (torch.uint8, (3, 4, 3))
    assert written[f"{key}_topk_weights"].shape == (3, 4, 2)
    assert key not in written
    loaded = veneer.PeftModel.from_pretrained(family.model(torch.float32), tmp_path / "ours").eval()
    torch.testing.assert_close(output(loaded, family.inputs(torch.float32)), expected)
    theirs = load_there(family, tmp_path / "ours", torch.float32).eval()
    torch.testing.assert_close(output(theirs, family.inputs(torch.float32)), expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = veneer.PeftModel.from_pretrained(family.model(torch.float32), tmp_path / "theirs", is_trainable=True).eval()
    torch.testing.assert_close(output(again, family.inputs(torch.float32)), expected)
    again.merge_adapter()
    torch.testing.assert_close(output(again, family.inputs(torch.float32)), expected)
    again.unmerge_adapter()
    again.train()
    with pytest.raises(StateError, match="save_only_topk_weights=True"):
        again(**family.inputs(torch.float32))


@pytest.mark.parametrize(("vectors", "dtype"), [(255, torch.uint8), (256, torch.int16), (40_000, torch.int32)])
def test_indices_are_kept_in_as_few_bytes_as_they_need(vectors: int, dtype: torch.dtype) -> None:
    config = VBLoRAConfig(r=1, num_vectors=vectors, vector_length=2, save_only_topk_weights=True, target_modules=["0"])
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    ((_, adapter),) = adapters_of(model, "default")
    assert adapter.to_file()["vblora_logits_A_topk_indices"].dtype == dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0; a positive whole number"),
        ({"topk": 0}, "topk=0; a positive whole number"),
        ({"topk": 3, "num_vectors": 2}, "topk=3 with num_vectors=2"),
        ({"vblora_dropout": 1.0}, "vblora_dropout=1.0; a share"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VBLoRAConfig(**settings)
