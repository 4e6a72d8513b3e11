"""LoHa against the paper and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from parity.families import FAMILIES
from parity.oracle import output
from tiny import llama, randomise
from veneer import PeftModel, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.loha import LoHaConfig

SETTINGS = [
    {"r": 3, "alpha": 7},
    {"r": 1, "alpha": 2},  # thin enough to be run like LoRA
    {"r": 2, "alpha": 3, "use_effective_conv2d": True},
]
# alpha / r has to be exact in binary: peft rounds it to float32.
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "alpha": 7}),
    ("llama", {"r": 1, "alpha": 3, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"layers.0.mlp.down_proj": 2}}),
    ("bert", {"r": 4, "alpha": 7}),
    ("vit", {"r": 2, "alpha": 3}),
    ("resnet", {"r": 2, "alpha": 3}),
    ("perceptron", {"r": 2, "alpha": 3, "target_modules": ["lin0", "lin1"]}),
    ("convolutions", {"r": 2, "alpha": 3, "target_modules": ["line", "plane"]}),
]


def one_layer(layer: nn.Module, **settings: Any) -> tuple[Any, Any]:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    model = get_peft_model(nn.Sequential(layer), LoHaConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return model, adapter


def test_the_formula() -> None:
    model, adapter = one_layer(nn.Linear(2, 2, bias=False).double(), r=1, alpha=3)
    with torch.no_grad():
        adapter.up1.copy_(torch.tensor([[1.0], [2.0]]))
        adapter.down1.copy_(torch.tensor([[1.0, 3.0]]))
        adapter.up2.copy_(torch.tensor([[2.0], [1.0]]))
        adapter.down2.copy_(torch.tensor([[5.0, 1.0]]))
    # up1 down1 = [[1, 3], [2, 6]], up2 down2 = [[10, 2], [5, 1]]; elementwise, times 3: [[30, 18], [30, 18]]
    assert torch.equal(model(torch.eye(2).double()).T, torch.tensor([[30.0, 18.0], [30.0, 18.0]]).double())


def test_cores_span_the_kernel() -> None:
    model, adapter = one_layer(nn.Conv2d(3, 4, (2, 3)).double(), r=2, alpha=5, use_effective_conv2d=True)
    product = torch.ones(())
    for up, core, down in (
        (adapter.up1, adapter.core1, adapter.down1),
        (adapter.up2, adapter.core2, adapter.down2),
    ):
        product = product * torch.einsum("oi,ijkl,jc->ockl", up, core, down)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged[0].weight.detach(), 2.5 * product.detach())


def test_the_rank_may_be_the_square_of_r() -> None:
    _, adapter = one_layer(nn.Linear(9, 9, bias=False).double(), r=2, alpha=2)
    assert torch.linalg.matrix_rank(adapter.adapt(adapter.site.read())) == 4


def test_the_parameter_count_of_the_paper() -> None:
    # Hyeon-Woo et al., table 1: 2 R (m + n).
    model = get_peft_model(llama(num_key_value_heads=4), LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * (32 + 32) * 4


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_files_with_cores_are_those_of_peft(tmp_path: Path) -> None:
    # Not in PARITY: peft trains up1 and down1 by gradients that it takes from the second product's core.
    family = FAMILIES["convolutions"]
    settings = {"r": 2, "alpha": 3, "target_modules": ["line", "plane"], "use_effective_conv2d": True}
    ours = get_peft_model(family.model(), LoHaConfig(**settings)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(family.model(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(output(theirs, family.inputs()), output(ours, family.inputs()))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = PeftModel.from_pretrained(family.model(), tmp_path / "theirs").eval()
    assert torch.equal(output(again, family.inputs()), output(ours, family.inputs()))


@pytest.mark.parametrize("size", [4, 100])  # formed, and run like LoRA
def test_rows_are_dropped_and_the_others_scaled_up_in_training_only(size: int) -> None:
    torch.manual_seed(0)
    model, adapter = one_layer(nn.Linear(size, size, bias=False), r=2, alpha=2, rank_dropout=0.5)
    assert adapter.thin == (size == 100)
    x = torch.randn(size)
    full = model.eval()(x)
    model.train()
    ratio = model(x) / full
    kept = ratio[ratio.abs() > 1e-6]
    assert 0 < len(kept) < size
    torch.testing.assert_close(kept, torch.full_like(kept, size / len(kept)), rtol=1e-3, atol=0)
    torch.testing.assert_close(model.merge_and_unload()(x), full)


def test_all_rows_may_be_dropped() -> None:
    model, _ = one_layer(nn.Linear(2, 1, bias=False), r=2, alpha=2, rank_dropout=0.9)
    outputs = [model.train()(torch.ones(2)) for _ in range(20)]
    assert any(bool(y == 0) for y in outputs)
    assert all(bool(y.isfinite()) for y in outputs)


def test_whole_modules_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    model, _ = one_layer(nn.Linear(3, 3, bias=False), r=2, alpha=2, module_dropout=0.5)
    x = torch.randn(3)
    full = model.eval()(x)
    model.train()
    states = {(bool((y == 0).all()), bool(torch.allclose(y, full))) for y in (model(x) for _ in range(30))}
    assert states == {(True, False), (False, True)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0; a positive whole number"),
        ({"rank_dropout": 1.0}, "rank_dropout=1.0; a share"),
        ({"module_dropout": -0.1}, "module_dropout=-0.1; a share"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoHaConfig(**settings)
