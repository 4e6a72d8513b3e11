"""OFT against the paper and peft."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.oft.layer import OFTLayer
from torch import nn

from contract.places import Spot
from parity.families import FAMILIES
from parity.oracle import TIGHT, output, peft_says, tensors
from tiny import llama, randomise
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, VeneerWarning
from veneer.methods.oft import OFTConfig
from veneer.rotations import cayley, cayley_neumann, nearest_divisor

SETTINGS = [
    {"oft_block_size": 2},
    {"r": 1, "oft_block_size": 0},
    {"r": 1, "oft_block_size": 0, "use_cayley_neumann": False, "coft": True, "eps": 2.0},
    {"oft_block_size": 2, "block_share": True, "num_cayley_neumann_terms": 6},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"oft_block_size": 8}),
    ("llama", {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}),
    ("bert", {"oft_block_size": 8, "block_share": True, "num_cayley_neumann_terms": 3}),
    ("t5", {"oft_block_size": 4, "num_cayley_neumann_terms": 4}),
    ("perceptron", {"oft_block_size": 2, "num_cayley_neumann_terms": 7}),
    ("llama", {"oft_block_size": 8, "num_cayley_neumann_terms": 2}),
    ("resnet", {"target_modules": ["shortcut.convolution"], "oft_block_size": 4}),
]


def fits(settings: dict[str, Any], spot: Spot) -> bool:
    return spot.name != "Conv2d, depthwise" or "r" in settings  # nine numbers a filter


def linear(width: int, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(width, 2).double()), OFTConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    return model, adapter


def test_a_quarter_turn_by_hand() -> None:
    model, adapter = linear(2, r=1, oft_block_size=0, use_cayley_neumann=False)
    with torch.no_grad():
        model.get_base_model()[0].base_layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model.get_base_model()[0].base_layer.bias.zero_()
        adapter.rotation.fill_(1.0)
    # Q = [[0, 1], [-1, 0]]: (I - Q)(I + Q)^-1 = [[0, -1], [1, 0]], so (x1, x2) R = (x2, -x1).
    x = torch.tensor([[5.0, 7.0]], dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.tensor([[7.0 - 10.0, 21.0 - 20.0]], dtype=torch.float64))


def test_angles_and_lengths_of_neurons_are_kept() -> None:
    # The paper's hyperspherical energy is a function of the angles between neurons.
    layer = nn.Conv2d(3, 4, (3, 2)).double()
    before = layer.weight.flatten(1) @ layer.weight.flatten(1).t()
    model = get_peft_model(
        nn.Sequential(layer),
        OFTConfig(r=1, oft_block_size=0, use_cayley_neumann=False, target_modules=["0"]),
    )
    randomise(model)
    merged = model.merge_and_unload()[0].weight.flatten(1)
    torch.testing.assert_close(merged @ merged.t(), before, rtol=1e-10, atol=1e-12)


def test_convolutions_start_as_the_base_and_merge_to_forward() -> None:
    # In peft 0.21.2 neither holds for kernels larger than one.
    layer = nn.Conv2d(2, 4, 3).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), OFTConfig(oft_block_size=3, target_modules=["0"]))
    torch.testing.assert_close(model(x), layer(x))
    randomise(model)
    ((_, adapter),) = adapters_of(model, "default")
    q = torch.zeros(6, 3, 3, dtype=torch.float64)
    q[:, 0, 1], q[:, 0, 2], q[:, 1, 2] = adapter.rotation.detach().unbind(-1)
    q = q - q.mT
    turned = layer.weight.flatten(1) @ torch.block_diag(*cayley_neumann(q, 5)).t()
    by_hand = nn.functional.conv2d(x, turned.view_as(layer.weight), layer.bias)
    torch.testing.assert_close(model(x), by_hand)


@pytest.mark.parametrize("terms", range(1, 9))
def test_the_series_is_that_of_the_definition(terms: int) -> None:
    q = torch.randn(2, 4, 4, dtype=torch.float64) * 0.1
    q = q - q.mT
    power, total = torch.eye(4, dtype=torch.float64).expand(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.float64)
    exponent = (0, 1, 3, 3, 4, 5, 6, 7)[terms - 1]
    for i in range(exponent + 1):
        weight = 1 if i == 0 or (i == exponent and terms > 2) else 2
        total = total + weight * power
        power = power @ q
    torch.testing.assert_close(cayley_neumann(q, terms), total)
    if terms == 8:
        torch.testing.assert_close(total, cayley(-q), rtol=0, atol=0.02)


def test_the_nearest_divisor_is_taken_as_in_peft() -> None:
    for width in range(2, 60):
        for wanted in range(2, 64):
            expected = OFTLayer.adjust_oft_parameters(None, width, wanted)  # type: ignore[arg-type]
            if expected > 1:
                assert nearest_divisor(width, wanted, "r") == expected
    with pytest.warns(VeneerWarning, match=r"oft_block_size=3, r=0 does not divide the width of 8: 4 blocks of 2"):
        linear(8, oft_block_size=3)
    with pytest.warns(VeneerWarning, match=r"oft_block_size=0, r=3 does not divide the width of 8: 2 blocks of 4"):
        linear(8, oft_block_size=0, r=3)


def test_a_width_without_divisors_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0: oft_block_size=3 does not divide .* 11; these do: \[1, 11\]"):
        linear(11, oft_block_size=3)
    with pytest.raises(ConfigError, match=r"r=0 and oft_block_size=0"):
        OFTConfig(oft_block_size=0)
    with pytest.raises(ConfigError, match=r"r=2 and oft_block_size=32"):
        OFTConfig(r=2)


def test_as_many_parameters_as_the_paper_states() -> None:
    # b (b - 1) / 2 a block, of which there are r = d / b; one if they are shared.
    for shared, blocks in ((False, 4), (True, 1)):
        model = get_peft_model(llama(), OFTConfig(oft_block_size=8, block_share=shared, target_modules=["q_proj"]))
        assert model.get_nb_trainable_parameters()[0] == 2 * blocks * 8 * 7 // 2


@pytest.mark.parametrize("shared", [False, True])
def test_constrained_outputs_are_those_of_peft(shared: bool) -> None:
    # peft projects its parameters in place, in every forward pass; here they are left alone until the optimiser's step.
    family = FAMILIES["llama"]
    settings = {"oft_block_size": 8, "coft": True, "eps": 0.25, "block_share": shared, "target_modules": ["q_proj"]}
    here = get_peft_model(family.model(), OFTConfig(**settings))
    with peft_says():
        there = peft.get_peft_model(family.model(), peft.OFTConfig(**settings))
    randomise(here)
    raw = {name: p.detach().clone() for name, p in here.named_parameters() if p.requires_grad}
    peft.set_peft_model_state_dict(there, tensors(here))
    x = family.inputs()
    torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
    assert all(torch.equal(p, raw[name]) for name, p in here.named_parameters() if p.requires_grad)
    for _, adapter in adapters_of(here.get_base_model(), "default"):
        type(adapter).allocate({"": adapter}, here.peft_config["default"], 0)
        length = 2**0.5 * adapter.rotation.norm(dim=-1)
        assert (length <= 0.25 / len(length) ** 0.5 + 1e-12).all()


def test_dropout_leaves_blocks_unturned_in_training() -> None:
    _, adapter = linear(400, oft_block_size=2, module_dropout=0.25)
    nn.init.normal_(adapter.rotation)
    eye = torch.eye(2, dtype=torch.float64)
    still = (adapter.train().blocks() == eye).all(-1).all(-1).double().mean()
    assert 0.1 < still < 0.4
    assert not (adapter.eval().blocks() == eye).all(-1).all(-1).any()
