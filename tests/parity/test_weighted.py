"""`add_weighted_adapter`: what the combined adapter does to the weights, here and in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import veneer
from parity.families import FAMILIES, Family
from parity.oracle import BIASES, CONV1D, TIGHT, load_there, output, peft_says, settings, take, twins
from tiny import randomise

# Powers of two, since peft rounds them to float32.
WEIGHTS = [0.75, -1.5]


def pair(family: Family, second: dict[str, Any], **changes: Any) -> tuple[veneer.PeftModel, peft.PeftModel]:
    """Both models with two random adapters, `default` and `other`."""
    with peft_says(CONV1D):
        here, there = twins(family, settings(family, modules_to_save=None, task_type=None, **changes))
        values = settings(family, modules_to_save=None, task_type=None, **{**changes, **second})
        here.add_adapter("other", veneer.LoraConfig(**values))
        here.set_adapter("other")
        randomise(here, seed=5)
        there.add_adapter("other", peft.LoraConfig(**values))
    take(there, here, "other")
    return here.eval(), there.eval()


def weights_with(model: veneer.PeftModel | peft.PeftModel, name: str) -> dict[str, Tensor]:
    """The base model's weights with an adapter merged into them; afterwards they are the base model's again."""
    model.merge_adapter([name])
    state = {
        key.removeprefix("base_model.model.").replace("base_layer.", ""): tensor.clone()
        for key, tensor in model.state_dict().items()
        if "lora_" not in key and ".adapters." not in key and tensor.is_floating_point()
    }
    with peft_says("Already unmerged"):
        model.unmerge_adapter()
    return state


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


@pytest.mark.parametrize("combination", ["cat", "svd"])
@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("llama", {}),
        ("llama", {"r": 5, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj"]}),
        ("llama", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 1}}),
        ("gpt2", {"r": 2}),
        ("resnet", {"r": 2}),
        ("perceptron", {}),
    ],
)
def test_exact_sums(name: str, second: dict[str, Any], combination: str) -> None:
    family = FAMILIES[name]
    here, there = pair(family, second)
    rank = {"svd_rank": 6 if name == "perceptron" else 8} if combination == "svd" else {}
    with peft_says(CONV1D):
        for model in (here, there):
            model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type=combination, **rank)
    same_weights(weights_with(here, "sum"), weights_with(there, "sum"))
    base = family.model().state_dict()
    single = [weights_with(here, adapter) for adapter in ("default", "other")]
    if "rank_pattern" in second or combination == "cat":  # ranks add up to 8 at most, so nothing is cut
        for key, weight in weights_with(here, "sum").items():
            deltas = [w * (part[key] - base[key]) for w, part in zip(WEIGHTS, single, strict=True)]
            torch.testing.assert_close(weight, base[key] + sum(deltas), rtol=1e-9, atol=1e-9)


def test_the_sum_is_cut_to_the_largest_rank_as_in_peft() -> None:
    here, there = pair(FAMILIES["llama"], {"r": 2})
    for model in (here, there):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum")
    assert here.peft_config["sum"].r == there.peft_config["sum"].r == 3
    same_weights(weights_with(here, "sum"), weights_with(there, "sum"))


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("combination", ["ties_svd", "magnitude_prune_svd"])
def test_pruning(combination: str, sign: str) -> None:
    here, there = pair(FAMILIES["llama"], {"r": 2})
    how = {"density": 0.5, "majority_sign_method": sign, "svd_rank": 16}
    for model in (here, there):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type=combination, **how)
    same_weights(weights_with(here, "sum"), weights_with(there, "sum"))


def test_a_combined_adapter_goes_into_a_file_that_peft_reads(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    here, _ = pair(family, {"target_modules": ["o_proj"], "layers_to_transform": [1]})
    here.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="cat")
    here.save_pretrained(tmp_path, selected_adapters=["sum"])
    here.set_adapter("sum")
    x = family.inputs()
    torch.testing.assert_close(output(load_there(family, tmp_path / "sum"), x), output(here, x), **TIGHT)


# Where peft is not exact. Both sides are held to the sum of the changes, formed by hand.


def change(model: veneer.PeftModel | peft.PeftModel, name: str) -> Tensor:
    """What an adapter adds to the query projection of the first layer."""
    key = "model.layers.0.self_attn.q_proj.weight"
    return weights_with(model, name)[key] - FAMILIES["llama"].model().state_dict()[key]


def by_hand(model: veneer.PeftModel, name: str, scaling: float) -> Tensor:
    state = veneer.get_peft_model_state_dict(model, adapter_name=name)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    return scaling * (state[key.format("B")] @ state[key.format("A")])


@pytest.mark.parametrize("combination", ["linear", "svd", "cat"])
def test_linear_and_rslora(combination: str) -> None:
    """In peft `linear` adds products of one adapter's A with another's B, and rsLoRA's scaling is applied twice."""
    for rslora in (False, True):
        here, there = pair(FAMILIES["llama"], {}, use_rslora=rslora)
        rank = {} if combination == "cat" else {"svd_rank": 6}
        here.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type=combination, **rank)
        there.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type=combination)
        scaling = 7 / 3**0.5 if rslora else 7 / 3
        expected = sum(w * by_hand(here, n, scaling) for w, n in zip(WEIGHTS, ("default", "other"), strict=True))
        torch.testing.assert_close(change(here, "sum"), expected, rtol=1e-9, atol=1e-9)
        if rslora or combination == "linear":
            assert not torch.allclose(change(there, "sum"), expected, rtol=1e-2)


@pytest.mark.parametrize("combination", ["linear", "svd", "cat"])
def test_one_adapter_at_weight_one_is_itself(combination: str) -> None:
    family = FAMILIES["llama"]
    with peft_says(BIASES):
        here, there = twins(family, settings(family, lora_bias=True, use_rslora=True))
    for model in (here, there):
        model.add_weighted_adapter(["default"], [1.0], "same", combination_type=combination)
    x = family.inputs()
    before = output(here, x)
    for model in (here, there):
        model.set_adapter("same")
    torch.testing.assert_close(output(here, x), before, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(output(there, x), before, rtol=1e-2)


def test_weights_count_in_the_election_of_signs() -> None:
    """A weight scales its adapter's change before the election, so that a negative one counts; in peft after it."""
    here, there = pair(FAMILIES["llama"], {}, target_modules=["q_proj"])  # a square: peft's rank cannot exceed a side
    with peft_says("The density 1.0 is greater than or equal to 1"):
        for model in (here, there):
            model.add_weighted_adapter(
                ["default", "other"], WEIGHTS, "sum", combination_type="ties_svd", density=1.0, svd_rank=32
            )
    deltas = torch.stack([w * by_hand(here, n, 7 / 3) for w, n in zip(WEIGHTS, ("default", "other"), strict=True)])
    elected = deltas.sum(0).sign()
    agrees = deltas.sign() == elected
    expected = (deltas * agrees).sum(0) / agrees.sum(0)
    torch.testing.assert_close(change(here, "sum"), expected, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(change(there, "sum"), expected, rtol=1e-2)


def test_a_taken_name_is_an_error_here_and_nothing_in_peft() -> None:
    family = FAMILIES["llama"]
    here, there = pair(family, {})
    before = output(there, family.inputs())
    there.add_weighted_adapter(["default", "other"], WEIGHTS, "other")
    torch.testing.assert_close(output(there, family.inputs()), before, **TIGHT)
    with pytest.raises(ValueError, match="already there"):
        here.add_weighted_adapter(["default", "other"], WEIGHTS, "other")
