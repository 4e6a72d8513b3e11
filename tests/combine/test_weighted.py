"""Weighted combinations of LoRA adapters, against their definition on small matrices."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import veneer
from tiny import bert, randomise
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.adapted import adapters_of
from veneer.combine import weighted
from veneer.errors import ConfigError, StateError, UnsupportedError

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Model(nn.Module):
    """Two linear layers, one stored transposed, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = Conv1D(4, 5)
        self.conv = nn.Conv1d(1, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.second(torch.tanh(self.first(x))).unsqueeze(1)).flatten(1)


ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "lora_alpha": 5},
    "b": {"r": 3, "lora_alpha": 4, "use_rslora": True, "lora_bias": True},
    "c": {"r": 1, "lora_alpha": 3, "target_modules": ["first"]},
    "d": {"r": 2, "lora_alpha": 7, "rank_pattern": {"second": 4}, "alpha_pattern": {"conv": 1}, "lora_bias": True},
}


def adapted(*names: str, model: nn.Module | None = None) -> PeftModel:
    """A float64 model with random adapters out of `ADAPTERS`."""
    torch.manual_seed(0)
    model = (model or Model()).double()
    result: PeftModel | None = None
    for seed, name in enumerate(names):
        config = LoraConfig(**{"target_modules": ["first", "second", "conv"], **ADAPTERS[name]})
        if result is None:
            result = get_peft_model(model, config, name)
        else:
            result.add_adapter(name, config)
        result.set_adapter(name)
        randomise(result, seed, scale=0.5)
    assert result is not None
    return result


def deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """By path: what the adapter adds to the weight, `(out, in)`."""
    return {w.path: a.scaling * (a.up @ a.down).detach() for w, a in adapters_of(model, name)}


def biases(model: PeftModel, name: str) -> dict[str, Tensor]:
    return {w.path: a.scaling * a.bias.detach() for w, a in adapters_of(model, name) if a.bias is not None}


def summed(model: PeftModel, weights: dict[str, float], of: Any = deltas) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in of(model, name).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for path in a:
        torch.testing.assert_close(a[path], b[path], **TIGHT)


X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


# Sums


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": -1.3}, {"a": 1, "b": 2.5, "c": 0.5, "d": -0.2}])
def test_cat_is_the_exact_sum(weights: dict[str, float]) -> None:
    model = adapted(*weights)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    close(deltas(model, "sum"), summed(model, weights))
    with_bias = summed(model, weights, biases)
    assert with_bias
    close(biases(model, "sum"), with_bias)
    config = model.peft_config["sum"]
    assert (config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern) == (
        config.r,
        False,
        {},
        {},
    )
    # The model computes with it what a merge of the sum by hand gives.
    model.set_adapter("sum")
    weight, bias = summed(model, weights)["first"], with_bias["first"]
    first = model.get_base_model().first.frozen_layer
    torch.testing.assert_close(
        model.get_base_model().first(X), X @ (first.weight + weight).t() + first.bias + bias, **TIGHT
    )


def test_cat_has_all_ranks_and_no_more() -> None:
    model = adapted("a", "b", "c")
    model.add_weighted_adapter(["a", "b", "c"], [1, 1, 1], "sum", combination_type="cat")
    assert model.peft_config["sum"].r == 6
    ranks = {w.path: int(torch.linalg.matrix_rank(a.up @ a.down)) for w, a in adapters_of(model, "sum")}
    assert ranks == {"first": 5, "second": 4, "conv": 2}


@pytest.mark.parametrize("kind", ["svd", "linear"])
@pytest.mark.parametrize("rank", [None, 1, 2, 9])
def test_the_sum_is_cut_to_the_best_of_its_rank(kind: str, rank: int | None) -> None:
    weights = {"d": 0.7, "b": -1.3, "c": 2.0}
    model = adapted(*weights)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=kind, svd_rank=rank)
    kept = 4 if rank is None else rank  # none: the largest that any of them has anywhere
    expected = {}
    for path, delta in summed(model, weights).items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        expected[path] = (u[:, :kept] * s[:kept]) @ vh[:kept]
    close(deltas(model, "sum"), expected)
    assert model.peft_config["sum"].r == kept
    assert all(a.down.shape[0] == kept for _, a in adapters_of(model, "sum"))


def test_there_are_no_terms_across_adapters() -> None:
    """Adding factors, (up1 + up2)(down1 + down2), would have some."""
    model = adapted("a", "c")
    model.add_weighted_adapter(["a", "c"], [1, 1], "sum", combination_type="linear", svd_rank=3)
    close(deltas(model, "sum"), summed(model, {"a": 1, "c": 1}))


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_one_adapter_at_weight_one_stays_what_it_is(name: str, kind: str) -> None:
    model = adapted(name)
    expected = model(X)
    model.add_weighted_adapter([name], [1.0], "twin", combination_type=kind)
    model.set_adapter("twin")
    torch.testing.assert_close(model(X), expected, **TIGHT)
    assert not torch.allclose(model.unload()(X), expected, rtol=1e-3)


def test_weights_may_be_negative_or_zero() -> None:
    model = adapted("a", "b")
    base = model.get_base_model()
    with model.disable_adapter():
        expected = base(X)
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["a", "a"], [1.5, -1.5], f"none_{kind}", combination_type=kind)
        model.set_adapter(f"none_{kind}")
        torch.testing.assert_close(model(X), expected, **TIGHT)
    model.add_weighted_adapter(["a", "b"], [-2, 0], "minus", combination_type="cat")
    close(deltas(model, "minus"), {path: -2 * delta for path, delta in deltas(model, "a").items()})


def test_an_adapter_may_be_named_twice() -> None:
    model = adapted("a")
    model.add_weighted_adapter(["a", "a"], [1, 2], "triple", combination_type="svd")
    close(deltas(model, "triple"), {path: 3 * delta for path, delta in deltas(model, "a").items()})


def test_adapters_on_different_places() -> None:
    model = adapted("c")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["conv"]))
    model.set_adapter("other")
    randomise(model, 5)
    model.add_weighted_adapter(["c", "other"], [1, 3], "both", combination_type="svd")
    close(deltas(model, "both"), summed(model, {"c": 1, "other": 3}))


class Nested(nn.Module):
    """The path of one layer is how that of another ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.inner = Model()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.inner.first(x)


def test_places_are_exactly_those_of_the_adapters(tmp_path: Path) -> None:
    model = get_peft_model(Nested().double(), LoraConfig(r=2, target_modules="first"), "a")
    randomise(model)
    expected = model(X)
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["a"], [1], kind, combination_type=kind)
        assert [w.path for w, _ in adapters_of(model, kind)] == ["first"]
        model.set_adapter(kind)
        torch.testing.assert_close(model(X), expected, **TIGHT)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "svd")
    torch.testing.assert_close(loaded(X), expected, **TIGHT)


def test_the_combination_is_an_adapter_like_others(tmp_path: Path) -> None:
    model = adapted("a", "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")
    assert model.active_adapters == ["b"]
    model.set_adapter("mean")
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected, **TIGHT)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "mean")
    assert torch.equal(loaded(X), expected)


def test_low_precision_adapters() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)).bfloat16(), "lora:r=2,target_modules=['0']", "a",
                           autocast_adapter_dtype=False)  # fmt: skip
    randomise(model)
    model.add_weighted_adapter(["a"], [2.0], "twice", combination_type="svd")
    expected = 2 * deltas(model, "a")["0"].float()
    torch.testing.assert_close(deltas(model, "twice")["0"].float(), expected, rtol=0.03, atol=0.02)


# Pruning, dropping and electing, by hand


D = torch.tensor([[[4.0, -1.0], [2.0, -3.0]], [[-1.0, -2.0], [6.0, 0.5]], [[-2.0, 0.0], [1.0, 5.0]]])


def test_magnitude_pruning_keeps_the_largest_of_each() -> None:
    expected = torch.tensor([[[4.0, 0], [0, -3]], [[0, -2], [6, 0]], [[-2, 0], [0, 5]]]).sum(0)
    assert torch.equal(weighted.magnitude_prune(D, 0.5, "total"), expected)
    assert torch.equal(weighted.magnitude_prune(D, 1.0, "total"), D.sum(0))
    # One entry is left however small the density.
    assert torch.equal(weighted.magnitude_prune(D, 0.01, "total"), torch.tensor([[4.0, 0], [6, 5]]))


def test_ties_averages_what_agrees_with_the_elected_sign() -> None:
    # By column of entries: (4, -1, -2) sums to +1: 4.  (-1, -2, 0): -3: their mean -1.5, zeros do not vote.
    # (2, 6, 1): their mean 3.  (-3, 0.5, 5): +2.5: mean of 0.5 and 5.
    assert torch.equal(weighted.ties(D, 1.0, "total"), torch.tensor([[4.0, -1.5], [3, 2.75]]))
    # Counting votes, two of three say minus at the first entry: mean of -1 and -2.
    assert torch.equal(weighted.ties(D, 1.0, "frequency"), torch.tensor([[-1.5, -1.5], [3, 2.75]]))
    # Trimmed to half first: (4, 0, -2), (0, -2, 0), (0, 6, 0), (-3, 0, 5).
    assert torch.equal(weighted.ties(D, 0.5, "total"), torch.tensor([[4.0, -2], [6, 5]]))


def test_ties_of_opposites_takes_the_positive_one() -> None:
    pair = torch.tensor([[[2.0]], [[-2.0]]])
    assert weighted.ties(pair, 1.0, "total").item() == 2
    assert weighted.ties(torch.zeros(2, 1, 1), 1.0, "total").item() == 0


def test_dare_keeps_the_mean() -> None:
    torch.manual_seed(0)
    draws = torch.stack([weighted.dare_linear(D, 0.4, "total") for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), D.sum(0), atol=0.25, rtol=0)
    one = torch.stack([weighted.dare_linear(D[:1], 0.4, "total") for _ in range(200)])
    kept = one != 0
    assert torch.equal(one[kept], (D[0] / 0.4).expand_as(one)[kept])  # an entry is gone, or scaled up
    assert 0.3 < kept.float().mean() < 0.5
    assert torch.equal(weighted.dare_linear(D, 1.0, "total"), D.sum(0))


def test_dare_ties_elects_among_what_was_not_dropped() -> None:
    assert torch.equal(weighted.dare_ties(D, 1.0, "total"), weighted.ties(D, 1.0, "total"))
    torch.manual_seed(0)
    kept = D * torch.bernoulli(torch.full_like(D, 0.5)) / 0.5
    torch.manual_seed(0)
    found = weighted.dare_ties(D, 0.5, "total")
    assert torch.equal(found, weighted.ties(kept, 1.0, "total"))


@pytest.mark.parametrize("kind", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("ending", ["", "_svd"])
def test_operations_act_on_the_weighted_changes(kind: str, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def every_third(probabilities: Tensor) -> Tensor:
        return (torch.arange(probabilities.numel()) % 3 == 0).to(probabilities).view_as(probabilities)

    monkeypatch.setattr(torch, "bernoulli", every_third)
    model = adapted("a", "b")
    a, b = deltas(model, "a"), deltas(model, "b")
    changes = {path: torch.stack([0.5 * a[path], -2 * b[path]]) for path in a}
    expected = {path: weighted.OPERATIONS[kind](change, 0.6, "frequency") for path, change in changes.items()}
    how: dict[str, Any] = {"combination_type": kind + ending, "density": 0.6, "majority_sign_method": "frequency"}
    model.add_weighted_adapter(["a", "b"], [0.5, -2], "new", svd_rank=5, **how)
    close(deltas(model, "new"), expected)
    assert all((change != 0).any() for change in expected.values())


# What is refused


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"adapters": []}, "0 adapters and 2 weights were given; one weight each"),
        ({"weights": [1.0]}, "2 adapters and 1 weights were given"),
        ({"combination_type": "sdv"}, r"Unknown combination_type 'sdv'\. Did you mean 'svd'.*Known: cat, linear, svd"),
        ({"combination_type": "cta"}, r"Unknown combination_type 'cta'\. Did you mean 'cat'"),
        ({"combination_type": "ties"}, r"'ties' needs a density in \(0, 1\]; None was given"),
        ({"combination_type": "dare_linear_svd", "density": 1.5}, r"needs a density in \(0, 1\]; 1\.5"),
        ({"combination_type": "magnitude_prune", "density": 0.0}, r"needs a density in \(0, 1\]; 0\.0"),
        ({"combination_type": "linear", "density": 0.5}, "'linear' prunes nothing; leave out density"),
        ({"combination_type": "cat", "density": 0.5}, "'cat' prunes nothing; leave out density"),
        ({"combination_type": "cat", "svd_rank": 4}, "'cat' keeps all ranks; leave out svd_rank"),
        ({"svd_rank": 0}, "svd_rank=0; a positive whole number was expected"),
        ({"svd_rank": -1}, "svd_rank=-1; a positive whole number"),
        ({"majority_sign_method": "most"}, "majority_sign_method='most'; 'total' or 'frequency' was expected"),
        ({"adapter_name": "a"}, "An adapter named 'a' is already there"),
        ({"adapter_name": "x.y"}, r"'x\.y' cannot name an adapter"),
    ],
)
def test_arguments_that_do_not_fit(how: dict[str, Any], message: str) -> None:
    model = adapted("a", "b")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(**{"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "new", **how})
    unchanged(model, state)


def unchanged(model: PeftModel, state: dict[str, Tensor]) -> None:
    assert list(model.peft_config) == ["a", "b"]
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[key], state[key]) for key in state)
    assert model.active_adapters == ["b"]
    assert all(p.requires_grad == (".adapters.b." in name) for name, p in model.named_parameters())


def test_names_and_states_that_do_not_fit() -> None:
    model = adapted("a", "b")
    with pytest.raises(StateError, match=r"no adapter 'aa'.*Did you mean 'a'"):
        model.add_weighted_adapter(["aa"], [1], "new")
    model.merge_adapter()
    with pytest.raises(StateError, match=r"Cannot combine adapters while \['b'\] are merged"):
        model.add_weighted_adapter(["a"], [1], "new")


def test_what_has_no_combination() -> None:
    model = adapted("a")
    model.add_adapter("bias", "bitfit:target_modules=[first]")
    with pytest.raises(
        UnsupportedError, match=r"Adapter 'bias' \(BitFit\) cannot be combined: only those of plain LoRA"
    ):
        model.add_weighted_adapter(["a", "bias"], [1, 1], "new")
    model.add_adapter("lengths", "dora:target_modules=[first]")
    with pytest.raises(UnsupportedError, match=r"Adapter 'lengths' \(Dora\) cannot be combined"):
        model.add_weighted_adapter(["a", "lengths"], [1, 1], "new")
    headed = get_peft_model(bert(), "lora:task_type=SEQ_CLS", "a")
    with pytest.raises(UnsupportedError, match=r"\(modules_to_save\).*Merge it into the model instead"):
        headed.add_weighted_adapter(["a"], [1], "new")
    assert list(model.peft_config) == ["a", "bias", "lengths"]


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("a", "b")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    svd, calls = torch.linalg.svd, 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(torch.linalg.LinAlgError, match="did not converge"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "new", combination_type="svd")
    unchanged(model, state)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["a", "b"], [1, 1], "new", combination_type="svd")
    assert veneer.get_layer_status(model)[0].available_adapters == ["a", "b", "new"]
