"""LoKr against the papers and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.lokr import LoKrConfig, kronecker, split

SETTINGS = [
    {"r": 1, "alpha": 3},
    {"r": 8, "alpha": 3, "init_weights": "lycoris"},  # right is full
    {"r": 1, "alpha": 2, "decompose_both": True, "use_effective_conv2d": True, "init_weights": "lycoris"},
    {"r": 1, "alpha": 2, "decompose_factor": 1, "use_effective_conv2d": True},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 2, "alpha": 7}),
    ("llama", {"r": 9, "alpha": 7, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"layers.0.mlp.down_proj": 2}}),
    ("bert", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4, "init_weights": "lycoris"}),
    ("vit", {"r": 2, "alpha": 3, "decompose_factor": 3}),
    ("resnet", {"r": 1, "alpha": 3, "use_effective_conv2d": True}),
    ("resnet", {"r": 1, "alpha": 3}),
    ("resnet", {"r": 9, "alpha": 3}),
    ("perceptron", {"r": 1, "alpha": 3, "target_modules": ["lin0", "lin1"]}),
    ("convolutions", {"r": 1, "alpha": 3, "decompose_factor": 1, "target_modules": ["line", "plane"]}),
    (
        "convolutions",
        {"r": 1, "alpha": 3, "decompose_factor": 1, "target_modules": ["line", "plane"], "use_effective_conv2d": True},
    ),
]


def one_layer(layer: nn.Module, **settings: Any) -> tuple[Any, Any]:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    model = get_peft_model(nn.Sequential(layer), LoKrConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return model, adapter


def test_the_formula() -> None:
    model, adapter = one_layer(nn.Linear(4, 4, bias=False).double(), r=2, alpha=3)
    left = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    right = torch.tensor([[1.0, 0.0], [5.0, 1.0]]).double()
    with torch.no_grad():
        adapter.left.copy_(left)
        adapter.right.copy_(right)
    expected = torch.tensor([[1, 0, 2, 0], [5, 1, 10, 2], [3, 0, 4, 0], [15, 3, 20, 4]]).double()
    assert torch.equal(kronecker(left, right), expected)
    assert torch.equal(model(torch.eye(4).double()).T, 1.5 * expected)


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Conv1d(4, 6, 3), {"r": 8}),
        (nn.Conv1d(4, 6, 3), {"r": 1}),
        (nn.Conv2d(4, 6, (2, 3)), {"r": 8}),
        (nn.Conv3d(4, 8, 2), {"r": 1, "use_effective_conv2d": True}),
    ],
)
def test_a_convolution_has_the_product_for_every_element_of_the_kernel(layer: nn.Module, settings: Any) -> None:
    model, adapter = one_layer(layer.double(), alpha=settings["r"], **settings)
    left = adapter.left
    if adapter.right is not None:
        right = adapter.right
    elif adapter.core is not None:
        right = torch.einsum("ki,ij...,jn->kn...", adapter.right_up, adapter.core, adapter.right_down)
    else:
        right = adapter.right_up @ adapter.right_down
    right = right.reshape(adapter.right_shape)
    weight = model.merge_and_unload()[0].weight
    for i in range(right[0, 0].numel()):
        torch.testing.assert_close(weight.flatten(2)[..., i], torch.kron(left, right.flatten(2)[..., i]))


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (12, -1, (3, 4)),
        (36, -1, (6, 6)),
        (7, -1, (1, 7)),
        (128, 8, (8, 16)),
        (8, 16, (2, 4)),
        (30, 4, (3, 10)),
        (512, -1, (16, 32)),
        (6, 6, (6, 1)),
    ],
)
def test_sides_are_split(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert split(size, factor) == expected


def test_sides_are_split_as_in_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 130):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 100):
            assert split(size, factor) == factorization(size, factor), (size, factor)


def test_the_parameter_count() -> None:
    # Sides of 32 = 4 x 8: left 4 x 4, right of rank 2, 8 x 8.
    model = get_peft_model(llama(num_key_value_heads=4), LoKrConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 4 * (4 * 4 + 2 * (8 + 8))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("factor", [1, -1])  # formed, and by its factors
def test_rows_are_dropped_in_training_only(factor: int, rescale: bool) -> None:
    torch.manual_seed(0)
    settings = {"rank_dropout": 0.5, "rank_dropout_scale": rescale, "decompose_factor": factor}
    model, adapter = one_layer(nn.Linear(64, 64, bias=False), r=2, alpha=2, **settings)
    assert adapter.thin == (factor == -1)
    x = torch.randn(64)
    full = model.eval()(x)
    ratio = model.train()(x) / full
    kept = ratio[ratio.abs() > 1e-6]
    assert 0 < len(kept) < 64
    torch.testing.assert_close(kept, torch.full_like(kept, 64 / len(kept) if rescale else 1), rtol=1e-3, atol=0)
    torch.testing.assert_close(model.merge_and_unload()(x), full)


def test_whole_modules_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    model, _ = one_layer(nn.Linear(4, 4, bias=False), r=2, alpha=2, module_dropout=0.5)
    x = torch.randn(4)
    full = model.eval()(x)
    model.train()
    states = {(bool((y == 0).all()), bool(torch.allclose(y, full))) for y in (model(x) for _ in range(30))}
    assert states == {(True, False), (False, True)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0; a positive whole number"),
        ({"decompose_factor": 0}, "decompose_factor=0; a positive whole number, or -1"),
        ({"rank_dropout": 1.0}, "rank_dropout=1.0; a share"),
        ({"init_weights": "lycorice"}, "init_weights='lycorice'; .*lycoris"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoKrConfig(**settings)
