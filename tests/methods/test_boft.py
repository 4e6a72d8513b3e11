"""BOFT against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.places import Spot
from tiny import llama, randomise
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.boft import BOFTConfig, mixed, unmixed
from veneer.rotations import cayley
from veneer.sites import parameter_site, site_of

SETTINGS: list[dict[str, Any]] = [
    {"boft_block_size": 0, "boft_block_num": 1},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"boft_block_size": 8}),
    ("bert", {"boft_block_size": 0, "boft_block_num": 4}),
    ("t5", {"boft_block_size": 4}),
    ("perceptron", {"target_modules": ["lin0", "lin1"], "boft_block_size": 2}),
    ("resnet", {"target_modules": ["shortcut.convolution"], "boft_block_size": 4}),
]


def fits(settings: dict[str, Any], spot: Spot) -> bool:
    layer = spot.layer()
    site = parameter_site(layer, spot.parameter) if spot.parameter else site_of(layer)
    assert site is not None
    return "boft_block_num" in settings or site.shape[0 if site.kind == "embedding" else 1] % 4 == 0


def permutation(width: int, size: int, factor: int) -> Tensor:
    """P_i as the paper says it: row k has its one where the k-th number is taken from."""
    order: list[int] = []
    group = size * 2**factor
    for start in range(0, width, group):
        halves = [list(range(h, h + size // 2)) for h in range(start, start + group, size // 2)]
        order += [i for half in halves[0::2] + halves[1::2] for i in half]
    return torch.eye(width, dtype=torch.float64)[order]


@pytest.mark.parametrize("factor", [0, 1, 2])
def test_numbers_are_mixed_as_by_the_permutation(factor: int) -> None:
    rows, blocks = torch.randn(3, 16, dtype=torch.float64), torch.empty(8, 2, 2)
    p = permutation(16, 2, factor) if factor else torch.eye(16, dtype=torch.float64)
    assert torch.equal(mixed(rows, blocks, factor), rows @ p.t())
    assert torch.equal(unmixed(rows, blocks, factor), rows @ p)


def test_three_factors_by_hand() -> None:
    layer = nn.Linear(8, 2).double()
    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    randomise(model)
    ((_, adapter),) = adapters_of(model, "default")
    rotation = torch.eye(8, dtype=torch.float64)
    for i in range(3):
        blocks = cayley(0.5 * (adapter.rotation[i] - adapter.rotation[i].mT)).detach()
        p = permutation(8, 2, i) if i else torch.eye(8, dtype=torch.float64)
        rotation = p @ torch.block_diag(*blocks) @ p.t() @ rotation
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(8, dtype=torch.float64))
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = adapter.scale.detach() * (x @ rotation @ layer.weight.t()) + layer.bias
    torch.testing.assert_close(model(x), expected)


def test_three_factors_reach_every_number_from_every_other() -> None:
    # The paper's point: log2 d factors of blocks of two make a dense matrix, as one rotation of the whole would be.
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 2).double()),
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=["0"]),
    )
    randomise(model)
    ((_, adapter),) = adapters_of(model, "default")
    assert (adapter.turned(torch.eye(8, dtype=torch.float64)) != 0).all()


def test_as_many_parameters_as_the_paper_states() -> None:
    # m factors of d / b blocks of b^2 numbers, and one number for each row.
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["q_proj"])
    assert get_peft_model(llama(), config).get_nb_trainable_parameters()[0] == 2 * (2 * 8 * 4 * 4 + 32)


def test_what_does_not_divide_the_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"boft_block_size=3, boft_block_num=0 .* do not fit a layer of width 32"):
        get_peft_model(llama(), BOFTConfig(boft_block_size=3))
    with pytest.raises(ConfigError, match=r"boft_block_size=4 and boft_block_num=2"):
        BOFTConfig(boft_block_num=2)


def test_dropout_leaves_out_rotations_of_one_factor() -> None:
    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.5, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(256, 2)), config)
    randomise(model)
    ((_, adapter),) = adapters_of(model, "default")
    still = [(b == torch.eye(2)).all(-1).all(-1).double().mean().item() for b in adapter.train().blocks()]
    assert min(still) == 0
    assert 0.3 < max(still) < 0.7
    assert not any((b == torch.eye(2)).all(-1).all(-1).any() for b in adapter.eval().blocks())
