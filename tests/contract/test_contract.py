"""What every method promises on every place. A new method is held to all of it by being registered."""

from __future__ import annotations

import copy
import pickle
from collections import ChainMap
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from contract.places import SPOTS, Spot, cases, config, randomise, show_data, supported
from veneer.adapted import BASE, adapters_of
from veneer.adapter import Adapter, Base, WeightAdapter
from veneer.errors import ConfigError, TargetError, UnsupportedError

CASES = cases()
ALL = [
    pytest.param(name, settings, spot, id=f"{name}-{i}-{spot.name}".replace(" ", "_"))
    for i, (name, settings) in enumerate(CASES)
    for spot in SPOTS
]
CELLS = [cell for cell in ALL if supported(*cell.values)]
OTHERS = [cell for cell in ALL if not supported(*cell.values)]


def is_weight_method(name: str) -> bool:
    return issubclass(veneer.parse_method({"name": name}).method(), WeightAdapter)


def can_merge(name: str, spot: Spot) -> bool:
    """Which cells merge: those of weight methods, except where a bias has no place."""
    return is_weight_method(name) and not (name == "bitfit" and spot.name == "RMSNorm")


WEIGHT_CELLS = [cell for cell in CELLS if is_weight_method(cell.values[0])]
MERGING_CELLS = [cell for cell in CELLS if can_merge(cell.values[0], cell.values[2])]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def adapted(name: str, settings: dict[str, Any], spot: Spot, dtype: torch.dtype = torch.float64) -> veneer.PeftModel:
    """The spot's model with a random adapter on it."""
    torch.manual_seed(0)
    model = veneer.get_peft_model(spot.model(dtype), config(name, settings, spot))
    show_data(model, spot)
    randomise(model)
    return model


def the_adapter(model: veneer.PeftModel, name: str = "default") -> Adapter:
    ((_, adapter),) = adapters_of(model, name)
    return adapter


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("name", "settings", "spot"), OTHERS)
def test_a_place_that_makes_no_sense_is_refused(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model = spot.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((TargetError, ConfigError), match=r"layer|lora_bias|target_parameters|place .* was not found"):
        veneer.get_peft_model(model, config(name, settings, spot))
    assert same(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_it_starts_as_the_base_layer(name: str, settings: dict[str, Any], spot: Spot) -> None:
    base, x = spot.model(), spot.input()
    expected = base(x)
    model = veneer.get_peft_model(copy.deepcopy(base), config(name, settings, spot))
    show_data(model, spot)
    if the_adapter(model).starts_as_base:
        torch.testing.assert_close(model(x), expected, **TIGHT)
    else:
        assert not torch.equal(model(x), expected)


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_the_adapter_has_an_effect_that_disabling_removes(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    active = model(x)
    with model.disable_adapter():
        base = model(x)
    assert not torch.allclose(active, base, rtol=1e-3, atol=1e-3)
    assert torch.equal(base, model.unload()(x))


@pytest.mark.parametrize(("name", "settings", "spot"), WEIGHT_CELLS)
def test_fast_forward_is_the_definition(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model = adapted(name, settings, spot)
    adapter = the_adapter(model)
    assert isinstance(adapter, WeightAdapter)
    x = spot.input()
    x.requires_grad_(x.is_floating_point())
    wrt = [*adapter.parameters(), *([x] if x.requires_grad else [])]
    layer = model.get_base_model().layer.frozen_layer

    def run(forward: Any) -> list[Tensor]:
        y = forward(x, Base(layer, adapter.site))
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return [y, *torch.autograd.grad((y * weights).sum(), wrt)]

    fast = run(adapter)
    definition = run(lambda x, base: WeightAdapter.forward(adapter, x, base))
    for a, b in zip(fast, definition, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize(("name", "settings", "spot"), [cell for cell in CELLS if cell not in MERGING_CELLS])
def test_what_cannot_merge_says_why(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    with pytest.raises(UnsupportedError, match=r"layer, adapter 'default': .*(merged|bias)"):
        model.merge_adapter()
    assert same(model.state_dict(), before)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("name", "settings", "spot"), MERGING_CELLS)
def test_merging_is_forward_and_unmerging_is_bit_exact(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, **TIGHT)
    with model.disable_adapter():
        disabled = model(x)
    model.unmerge_adapter()
    assert same(model.state_dict(), before)
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), disabled)
    alone = model.merge_and_unload()
    torch.testing.assert_close(alone(x), expected, **TIGHT)
    assert type(alone.layer) is type(spot.layer())


@pytest.mark.parametrize(("name", "settings", "spot"), MERGING_CELLS)
def test_low_precision_layers_merge_to_rounding(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot, torch.bfloat16), spot.input(torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    expected = model(x)
    assert expected.dtype == torch.bfloat16
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.15)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_saved_and_loaded_is_the_same(name: str, settings: dict[str, Any], spot: Spot, tmp_path: Any) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    base = model.get_base_model()
    model.save_pretrained(tmp_path)
    expected = model(x)
    loaded = veneer.PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.load_adapter(tmp_path, "again", is_trainable=True)
    loaded.set_adapter("again")
    assert torch.equal(loaded(x), expected)
    assert base is model.get_base_model()


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_a_mixed_batch_is_each_row_alone(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    model.add_adapter("other", config(name, settings, spot))
    show_data(model, spot, "other")
    model.set_adapter("other")
    randomise(model, seed=1)
    rows = ["default", BASE, "other", "default"]
    mixed = model(x, adapter_names=rows)
    whole = list(range(len(rows)))
    for row, name_of_row in enumerate(rows):
        together = [i for i in whole if rows[i] == name_of_row] if the_adapter(model).mixes_rows else whole
        if name_of_row == BASE:
            with model.disable_adapter():
                alone = model(x[together])
        else:
            model.set_adapter(name_of_row)
            alone = model(x[together])
        torch.testing.assert_close(mixed[row], alone[together.index(row)], **TIGHT)
    assert model.switch.rows is None


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_stacking_is_composition(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    model.add_adapter("above", config(name, settings, spot))
    show_data(model, spot, "above")
    model.set_adapter("above")
    randomise(model, seed=1)
    model.set_adapter(["default", "above"])
    lower, upper = the_adapter(model), the_adapter(model, "above")
    layer = model.get_base_model().layer.frozen_layer
    together = model(x)
    notes = {name: type(the_adapter(model, name)).note({}, config) for name, config in model.peft_config.items()}
    by_hand = upper(x, Base(layer, upper.site, [lower], inputs=dict(ChainMap(*notes.values()))))
    torch.testing.assert_close(together, by_hand, **TIGHT)
    if isinstance(lower, WeightAdapter) and isinstance(upper, WeightAdapter):
        site = lower.site
        weight, bias = lower.adapt(site.read()), lower.adapt_bias(site.bias())
        definition = site.apply(x, upper.adapt(weight), upper.adapt_bias(bias))
        torch.testing.assert_close(together, definition, **TIGHT)
    if can_merge(name, spot):
        model.merge_adapter()
        torch.testing.assert_close(model(x), together, **TIGHT)


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_only_adapters_are_trained(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours = {key for key, p in model.named_parameters(remove_duplicate=False) if ".adapters." in key}
    assert ours
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ((model(x) - 1) ** 2).sum().backward()  # not the length alone, which rotations keep
    optimiser.step()
    after = model.state_dict()
    assert {key for key, value in before.items() if not torch.equal(after[key], value)} == ours


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_copies_and_pickles_are_independent(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        randomise(twin, seed=5)
        twin.disable_adapter_layers()
        assert torch.equal(model(x), expected)
        twin.enable_adapter_layers()
        assert not torch.equal(twin(x), expected)


@pytest.mark.parametrize(("name", "settings", "spot"), CELLS)
def test_a_second_adapter_leaves_the_first_alone(name: str, settings: dict[str, Any], spot: Spot) -> None:
    model, x = adapted(name, settings, spot), spot.input()
    expected = model(x)
    model.add_adapter("second", config(name, settings, spot))
    show_data(model, spot, "second")
    assert torch.equal(model(x), expected)
    model.set_adapter("second")
    randomise(model, seed=2)
    assert not torch.equal(model(x), expected)
    assert not any(p.requires_grad for p in the_adapter(model).parameters())
    model.set_adapter("default")
    assert torch.equal(model(x), expected)
    model.delete_adapter("second")
    assert torch.equal(model(x), expected)
    assert all(p.requires_grad for p in the_adapter(model).parameters())
