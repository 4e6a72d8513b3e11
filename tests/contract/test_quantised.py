"""What every method promises on every store: it acts on the weight that the quantised layer stands for.

Rounding is the only difference to a plain layer, and there is none but in a merge. Everything that does not touch the
weight is promised by `test_contract.py` for all places alike.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from contract.places import QUANTISED, Quantised, cases, config, supported
from contract.test_contract import adapted, is_weight_method, the_adapter
from veneer.adapted import BASE
from veneer.adapter import Base, WeightAdapter
from veneer.errors import ConfigError, TargetError, UnsupportedError, VeneerWarning
from veneer.quantised_bases import dequantise
from veneer.stores import store_of

NAMES = list(dict.fromkeys(name for name, _ in cases()))
FIRST = {name: next(settings for other, settings in cases() if other == name) for name in NAMES}
ALL = [
    pytest.param(name, FIRST[name], spot, id=f"{name}-{spot.name}".replace(" ", "_"))
    for name in NAMES
    for spot in QUANTISED
]
CELLS = [cell for cell in ALL if supported(*cell.values)]
OTHERS = [cell for cell in ALL if not supported(*cell.values)]


def close(spot: Quantised, like: Tensor) -> dict[str, float]:
    """How near values have to be: to float32's rounding, or to that of activations in int8."""
    part = 0.03 if spot.computes_in_int8 else 2e-5
    return {"rtol": 10 * part, "atol": part * float(like.detach().abs().max())}


def gradients(model: veneer.PeftModel, x: Tensor) -> list[Tensor | None]:
    """By the input and by all that is trained."""
    y = model(x := x.clone().requires_grad_())
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((y * weights).sum(), [x, *trained], allow_unused=True))


def held_by(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What the quantised layer stands for; some packages cannot compare their own tensors."""
    store = store_of(layer)
    return store.read(layer, "weight").clone(), store.read(layer, "bias").clone()


def unchanged(layer: nn.Module, before: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(held_by(layer), before, strict=True))


@pytest.mark.parametrize(("name", "settings", "spot"), OTHERS)
def test_a_place_that_makes_no_sense_is_refused(name: str, settings: dict[str, Any], spot: Quantised) -> None:
    with pytest.raises((TargetError, ConfigError), match="layer"):
        veneer.get_peft_model(spot.model(), config(name, settings, spot))


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_it_acts_on_the_dequantised_weight(
    name: str, settings: dict[str, Any], spot: Quantised, tmp_path: Path
) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    layer, adapter = model.get_base_model().layer.frozen_layer, the_adapter(model)
    before, expected = held_by(layer), model(x)

    # Forward and gradients are those of the same adapter on a plain layer with the same weight.
    plain = copy.deepcopy(model)
    dequantise(plain)
    near = close(spot, expected)
    torch.testing.assert_close(plain(x), expected, **near)
    for a, b in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert (a is None) == (b is None)
        if a is not None and isinstance(adapter, WeightAdapter):
            torch.testing.assert_close(a, b, **close(spot, b))
        elif a is not None:  # gates and couplings magnify what rounding does to single numbers
            assert torch.equal(a, b) or torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.95
    if isinstance(adapter, WeightAdapter):
        definition = WeightAdapter.forward(adapter, x, Base(layer, adapter.site))
        torch.testing.assert_close(definition, expected, **near)

    # Its file is the same adapter on either.
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(plain.unload(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, **near)

    # Disabling gives the layer itself, and a mixed batch each of the two.
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(base, layer(x))
    if not adapter.mixes_rows:
        mixed = model(x, adapter_names=["default", BASE, BASE, "default"])
        torch.testing.assert_close(
            mixed, torch.stack([expected[0], base[1], base[2], expected[3]]), **close(spot, expected)
        )
    assert unchanged(layer, before)


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_merging_rounds_and_unmerging_is_bit_exact(name: str, settings: dict[str, Any], spot: Quantised) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    layer, adapter = model.get_base_model().layer.frozen_layer, the_adapter(model)
    before, expected = held_by(layer), model(x)
    if not is_weight_method(name):
        with pytest.raises(UnsupportedError, match=r"layer, adapter 'default': .*merged"):
            model.merge_adapter()
        return
    assert isinstance(adapter, WeightAdapter)
    with torch.no_grad():
        wanted = adapter.adapt(adapter.site.read()).detach()
    with pytest.warns(VeneerWarning, match="Merging has quantised 1 layers again"):
        model.merge_adapter(safe_merge=True)
    merged = model.get_base_model().layer.base_layer
    assert type(merged) is type(layer)
    weight, bias = held_by(merged)
    lost = float((weight - wanted).norm() / wanted.norm())
    if spot.name not in ("GPTQ", "AWQ"):  # they keep the range that calibration has found
        assert lost < spot.rounding
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x, weight, bias), **close(spot, expected))
    model.unmerge_adapter()
    assert unchanged(layer, before)
    assert torch.equal(model(x), expected)
