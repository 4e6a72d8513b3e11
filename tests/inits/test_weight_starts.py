"""Starts that are part of the weight: by hand, as in peft, and files both ways."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from parity.families import FAMILIES
from parity.oracle import SINGLE, output, peft_says, same_tensors, tensors, trained
from parity.test_training import train
from tiny import randomise
from veneer import LoraConfig, get_peft_model, inits
from veneer.adapted import adapters_of
from veneer.errors import CheckpointError, ConfigError, VeneerWarning

MOVING = ["pissa", "pissa_niter_16", "olora"]


def layer(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 9).double())


def on(model: nn.Module, name: Any, **settings: Any) -> tuple[veneer.PeftModel, Any]:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["0"], **settings}
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=name, **settings))
    ((_, adapter),) = adapters_of(adapted, "default")
    return adapted, adapter


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_is_the_principal_part(use_rslora: bool) -> None:
    model = layer()
    weight = model[0].weight.detach().clone()
    _, adapter = on(model, "pissa", use_rslora=use_rslora)
    u, s, vh = torch.linalg.svd(weight)
    principal = u[:, :3] @ s[:3].diag() @ vh[:3]
    torch.testing.assert_close(adapter.scaling * (adapter.up @ adapter.down).detach(), principal)
    gram = adapter.scaling * adapter.down @ adapter.down.T  # both factors have the root of every singular value
    torch.testing.assert_close(gram.detach(), s[:3].diag())
    torch.testing.assert_close(adapter.scaling * (adapter.up.T @ adapter.up).detach(), s[:3].diag())
    assert torch.equal(model[0].frozen_layer.weight, weight)


def test_fast_pissa_comes_near_to_it() -> None:
    (_, exact), (_, near), (_, again) = (on(layer(), name) for name in ("pissa", "pissa_niter_16", "pissa_niter_16"))
    torch.testing.assert_close(near.up @ near.down, exact.up @ exact.down, rtol=1e-3, atol=1e-3)
    assert torch.equal(near.up, again.up)


def test_olora_is_part_of_the_qr_decomposition() -> None:
    _, adapter = on(layer(), "olora")
    q, r = torch.linalg.qr(layer()[0].weight.detach())
    torch.testing.assert_close(adapter.up.detach(), q[:, :3])
    torch.testing.assert_close(adapter.down.detach(), r[:3])


def test_what_is_trained_is_the_difference_from_the_start() -> None:
    model = layer()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    adapted, adapter = on(model, "pissa")
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(adapted(x), x @ weight.T + bias)
    start = (adapter.up @ adapter.down).detach()
    randomise(adapted)
    expected = weight + 7 / 3 * (adapter.up @ adapter.down - start)
    torch.testing.assert_close(adapted(x), x @ expected.T + bias)
    torch.testing.assert_close(adapted.merge_and_unload()(x), x @ expected.T + bias)


def test_the_first_step_is_not_that_of_lora() -> None:
    adapted, adapter = on(layer(), "pissa")
    adapted(torch.randn(5, 12, dtype=torch.float64)).square().sum().backward()
    assert adapter.down.grad.any()
    assert adapter.up.grad.any()
    assert not adapter.start_down.requires_grad


def test_half_precision_subtracts_what_it_started_from() -> None:
    model = layer().bfloat16()
    x = torch.randn(5, 12).bfloat16()
    expected = model(x)
    for autocast in (True, False):
        adapted = get_peft_model(
            copy.deepcopy(model),
            LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa"),
            autocast_adapter_dtype=autocast,
        )
        torch.testing.assert_close(adapted(x), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "mica", "loftq"])
def test_a_rank_above_that_of_the_weight_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"r=10, but the layer is \(9, 12\); at most 9"):
        on(layer(), name, r=10)


def test_stacks_and_convolutions_are_matrices_too() -> None:
    for module, target in ((nn.Conv2d(4, 9, 3), {}), (nn.Embedding(20, 9), {})):
        torch.manual_seed(0)
        model = nn.Sequential(module)
        x = torch.randn(2, 4, 5, 5) if isinstance(module, nn.Conv2d) else torch.arange(20)
        expected = model(x)
        adapted, adapter = on(model, "pissa", **target)
        torch.testing.assert_close(adapted(x), expected, **SINGLE)
        assert (adapter.up @ adapter.down).norm() > 0.5 * adapter.site.read().norm() * 3 / 7


# peft. It decomposes in float32.

FAMILY_NAMES = ["llama", "gpt2", "bert"]


def pair(family: str, name: str, **more: Any) -> tuple[veneer.PeftModel, peft.PeftModel]:
    kind = FAMILIES[family]
    settings = {"r": 3, "lora_alpha": 7, "target_modules": kind.targets, **kind.settings, **more}
    torch.manual_seed(0)
    here = get_peft_model(
        kind.model(torch.float32), LoraConfig(**copy.deepcopy(settings), init_lora_weights=name)
    ).eval()
    torch.manual_seed(0)
    with peft_says(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        there = peft.get_peft_model(
            kind.model(torch.float32), peft.LoraConfig(**copy.deepcopy(settings), init_lora_weights=name)
        ).eval()
    return here, there


def theirs_in(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in given.items() if "start_" not in key}


# peft decomposes the stored tensor of GPT-2's transposed layers for OLoRA, and cannot load what it then saves.
CASES = [
    (name, family)
    for name in ("pissa", "olora", "mica")
    for family in FAMILY_NAMES
    if (name, family) != ("olora", "gpt2")
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_start_is_that_of_peft(name: str, family: str) -> None:
    here, there = pair(family, name)
    same_tensors(theirs_in(tensors(here)), tensors(there), rtol=1e-4, atol=1e-5)
    x = FAMILIES[family].inputs(torch.float32)
    torch.testing.assert_close(output(here, x), output(FAMILIES[family].model(torch.float32), x), **SINGLE)
    randomise(here)
    result = peft.set_peft_model_state_dict(there, theirs_in(tensors(here)))
    assert not result.unexpected_keys
    torch.testing.assert_close(output(here, x), output(there, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_files_both_ways(name: str, family: str, tmp_path: Path) -> None:
    here, there = pair(family, name)
    randomise(here)
    peft.set_peft_model_state_dict(there, theirs_in(tensors(here)))
    kind, x = FAMILIES[family], FAMILIES[family].inputs(torch.float32)
    expected = output(here, x)
    here.save_pretrained(tmp_path / "ours")
    again = veneer.PeftModel.from_pretrained(kind.model(torch.float32), tmp_path / "ours")
    assert torch.equal(output(again, x), expected)
    with peft_says(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        loaded = peft.PeftModel.from_pretrained(kind.model(torch.float32), str(tmp_path / "ours"))
        there.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(output(loaded, x), expected, rtol=1e-4, atol=1e-4)
    loaded_here = veneer.PeftModel.from_pretrained(kind.model(torch.float32), tmp_path / "theirs")
    torch.testing.assert_close(output(loaded_here, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "more"), [("pissa", {}), ("olora", {}), ("mica", {}), ("pissa", {"use_dora": True})])
def test_training_goes_as_in_peft(name: str, more: dict[str, Any]) -> None:
    here, there = pair("llama", name, **more)
    result = peft.set_peft_model_state_dict(there, theirs_in(tensors(here)))
    assert not result.unexpected_keys
    with peft_says():
        losses = train(here, FAMILIES["llama"]), train(there, FAMILIES["llama"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.97 * losses[0][0]
    assert trained(here) == trained(there)


def without_start(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(theirs_in(load_file(path)), path)


@pytest.mark.parametrize("name", MOVING)
def test_a_file_without_the_starting_factors(name: str, tmp_path: Path) -> None:
    adapted, _ = on(layer(), name)
    randomise(adapted)
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = adapted(x)
    adapted.save_pretrained(tmp_path)
    without_start(tmp_path)
    if name.startswith("pissa_niter"):
        with pytest.warns(VeneerWarning, match="pissa_niter_16.*drawn at random"):
            loaded = veneer.PeftModel.from_pretrained(layer(), tmp_path)
    else:
        loaded = veneer.PeftModel.from_pretrained(layer(), tmp_path)
    torch.testing.assert_close(loaded(x), expected)


@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_what_cannot_be_made_again_is_refused(name: str, tmp_path: Path) -> None:
    adapted, _ = on(layer(), name)
    adapted.save_pretrained(tmp_path)
    without_start(tmp_path)
    model = layer()
    with pytest.raises(CheckpointError, match=r"cannot be made again without the data.*path_initial_model"):
        veneer.PeftModel.from_pretrained(model, tmp_path)
    assert isinstance(model[0], nn.Linear)


def test_settings_without_effect_are_named() -> None:
    with pytest.warns(VeneerWarning, match="eva_config has no effect: init_lora_weights is 'corda', not 'eva'"):
        config = LoraConfig(init_lora_weights="corda", eva_config={"rho": 1.0})
    assert config.eva_config is None
    assert config.corda_config == inits.corda.CordaConfig()
    with pytest.raises(ConfigError, match="CordaConfig has no setting 'metod'"):
        LoraConfig(init_lora_weights="corda", corda_config={"metod": "kpm"})


def test_variants_that_do_not_make_it_good_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"use_qalora cannot be combined with init_lora_weights='pissa'"):
        on(layer(), "pissa", use_qalora=True, qalora_group_size=4)
    adapted, adapter = on(layer(), "pissa", use_dora=True)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(adapted(x), layer()(x))
    torch.testing.assert_close(adapter.magnitude, layer()[0].weight.norm(dim=1))
