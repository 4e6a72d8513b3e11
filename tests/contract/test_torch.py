"""What every method promises to torch: compiling, autocast, checkpointing and export see nothing unusual in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contract.places import SPOTS, Spot, cases, supported
from contract.test_contract import MERGING_CELLS, TIGHT, adapted

# One layer of each of the kinds that are usual in models; what differs between others is not the method's doing.
USUAL = [spot for spot in SPOTS if spot.name in ("Linear", "Conv2d", "Embedding", "LayerNorm")]
NAMES = [name for name, _ in cases()]
CELLS = [
    pytest.param(name, settings, spot, id=f"{name}-{i}-{spot.name}")
    for i, (name, settings) in enumerate(cases())
    for spot in USUAL
    if supported(name, settings, spot) and (spot.name == "Linear" or NAMES.index(name) == i)
]
# The reentrant kind asks for an input with a gradient, which an index cannot have.
CHECKPOINTED = [pytest.param(*cell.values, False, id=f"{cell.id}-plain") for cell in CELLS] + [
    pytest.param(*cell.values, True, id=f"{cell.id}-reentrant") for cell in CELLS if cell.values[2].kind != "embedding"
]
FEW = [cell for cell in MERGING_CELLS if cell.values[2].name == "Linear"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    yield
    torch.compiler.reset()


# Said by torch of its own way to trace an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_it_compiles_to_one_graph(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, **TIGHT)


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_it_computes_under_autocast(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot, torch.float32), spot.input(torch.float32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.1, atol=0.1 * expected.abs().max().item())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "settings", "spot", "reentrant"), CHECKPOINTED)
def test_checkpointed_gradients_are_the_same(name: str, settings: dict[str, Any], spot: Spot, reentrant: bool) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    x.requires_grad_(x.is_floating_point())

    def gradients(y: Tensor) -> list[Tensor]:
        y.square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        return [p.grad.clone() for p in trained if p.grad is not None]

    plain = gradients(model(x))
    model.zero_grad()
    again = gradients(checkpoint(model, x, use_reentrant=reentrant))
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize(("name", "settings", "spot"), FEW)
def test_a_merged_model_is_exported(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    expected = model(x)
    merged: nn.Module = model.merge_and_unload()
    exported = torch.export.export(merged, (x,))
    torch.testing.assert_close(exported.module()(x), expected, **TIGHT)
