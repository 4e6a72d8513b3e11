"""Any method as LoRA: what is exact, what is lost, and files that peft reads."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from parity.families import FAMILIES
from parity.oracle import TIGHT, output, peft_says
from tiny import randomise
from veneer import LoraConfig, convert_to_lora, get_peft_model, save_as_lora
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, UnsupportedError

SINGLE = {"rtol": 1e-4, "atol": 1e-5}


def adapted(method: str, family: str = "llama", **settings: Any) -> veneer.PeftModel:
    kind = FAMILIES[family]
    config = {"name": method, "target_modules": kind.targets, **copy.deepcopy(kind.settings), **settings}
    model = get_peft_model(kind.model(), veneer.parse_method(config))
    randomise(model)
    return model.eval()


def loaded(converted: Any, family: str = "llama") -> veneer.PeftModel:
    config, tensors = converted
    model = get_peft_model(FAMILIES[family].model(), config)
    veneer.set_peft_model_state_dict(model, tensors)
    return model.eval()


def changes(model: veneer.PeftModel) -> dict[str, Tensor]:
    """What the adapter adds to each weight."""
    found = {}
    for wrapper, adapter in adapters_of(model.get_base_model(), "default"):
        if wrapper.site is not None and hasattr(adapter, "adapt"):
            weight = wrapper.site.read()
            found[wrapper.place] = (adapter.adapt(weight) - weight).detach()
    return found


EXACT = [
    ("llama", {"r": 3, "lora_alpha": 7}),
    ("gpt2", {"r": 3, "lora_alpha": 7, "use_rslora": True}),
    ("bert", {"r": 2, "lora_alpha": 5, "lora_bias": True, "rank_pattern": {"query": 4}, "alpha_pattern": {"value": 1}}),
    ("llama", {"r": 2, "lora_alpha": 5, "init_lora_weights": "pissa"}),
    ("convolutions", {"r": 2, "lora_alpha": 5}),
    ("perceptron", {"r": 2, "lora_alpha": 5}),
    ("mixtral", {"r": 2, "lora_alpha": 5}),
    ("bert", {"r": 2, "lora_alpha": 5, "bias": "all"}),
]


@pytest.mark.parametrize(("family", "settings"), EXACT)
def test_what_is_low_rank_loses_nothing(family: str, settings: dict[str, Any]) -> None:
    model, x = adapted("lora", family, **settings), FAMILIES[family].inputs()
    converted = convert_to_lora(model, 8)
    assert converted.error == 0
    assert set(converted.errors.values()) == {0.0}
    assert max(converted.ranks.values()) <= 8
    other = loaded(converted, family)
    torch.testing.assert_close(output(other, x), output(model, x), **TIGHT)


@pytest.mark.parametrize(
    ("method", "family", "settings"),
    [
        ("dora", "llama", {"r": 3, "lora_alpha": 7}),
        ("dora", "gpt2", {"r": 3, "lora_alpha": 7}),
        ("mica", "bert", {"r": 3, "lora_alpha": 7}),
        ("loha", "llama", {"r": 2, "alpha": 5}),
        ("vera", "llama", {"r": 4}),
        ("ia3", "bert", {"feedforward_modules": []}),
        ("kasa", "bert", {"r": 2}),
        ("oft", "llama", {"oft_block_size": 4}),
        ("miss", "llama", {"r": 4}),
        ("shira", "bert", {"r": 2}),
        ("full", "bert", {}),
        ("loftq", "bert", {"r": 2}),
    ],
)
def test_at_full_rank_any_method_is_the_same(method: str, family: str, settings: dict[str, Any]) -> None:
    model, x = adapted(method, family, **settings), FAMILIES[family].inputs()
    converted = convert_to_lora(model, 1000)
    assert converted.error < 1e-7
    torch.testing.assert_close(output(loaded(converted, family), x), output(model, x), **SINGLE)


@pytest.mark.parametrize("rank", [1, 4, 0.3, 0.9, 1.0])
def test_what_is_lost_is_what_the_rank_cuts_off(rank: float) -> None:
    model = adapted("dora", r=3, lora_alpha=7)
    converted = convert_to_lora(model, rank)
    lost = total = 0.0
    after = changes(loaded(converted))
    for place, delta in changes(model).items():
        s = torch.linalg.svdvals(delta)
        kept = converted.ranks[place]
        energy = (s[:kept].square().sum() / s.square().sum()).item()
        if isinstance(rank, int):
            assert kept == rank
        else:
            less = (s[: kept - 1].square().sum() / s.square().sum()).item()
            assert less < rank <= energy + 1e-9
        assert converted.errors[place] == pytest.approx(math.sqrt(max(0.0, 1 - energy)), abs=1e-6)
        error = (after[place] - delta).norm().item()
        assert error == pytest.approx(converted.errors[place] * delta.norm().item(), rel=1e-5, abs=1e-5)
        lost, total = lost + error**2, total + delta.norm().item() ** 2
    assert converted.error == pytest.approx(math.sqrt(lost / total), rel=1e-5, abs=1e-5)


def test_ranks_by_place_and_the_highest_rank() -> None:
    model = adapted("dora", r=3, lora_alpha=7)
    converted = convert_to_lora(model, {"down_proj": 5, r".*layers\.1.*q_proj": 0.9, "": 2})
    assert {p: r for p, r in converted.ranks.items() if r != 2 and "q_proj" not in p} == {
        "model.layers.0.mlp.down_proj": 5,
        "model.layers.1.mlp.down_proj": 5,
    }
    assert converted.ranks["model.layers.1.self_attn.q_proj"] > 2
    torch.testing.assert_close(
        output(loaded(converted), x := FAMILIES["llama"].inputs()), output(loaded(converted), x), **TIGHT
    )
    assert set(convert_to_lora(model, 0.99, max_rank=3).ranks.values()) == {3}
    with pytest.raises(ConfigError, match=r'nothing is said for .*Give one for all others under ""'):
        convert_to_lora(model, {"down_proj": 5})
    with pytest.raises(ConfigError, match="match none of the adapted modules"):
        convert_to_lora(model, {"gate_proj": 5, "": 2})


def test_biases_become_those_of_lora() -> None:
    model = adapted("bitfit", "bert")
    with pytest.raises(UnsupportedError, match=r"LayerNorm is a norm layer, which LoRA cannot adapt"):
        convert_to_lora(adapted("bitfit", "bert", target_modules=["query", "LayerNorm"]), 2)
    converted = convert_to_lora(model, 2)
    assert converted.config.lora_bias
    assert set(converted.ranks.values()) == {1}
    x = FAMILIES["bert"].inputs()
    torch.testing.assert_close(output(loaded(converted, "bert"), x), output(model, x), **TIGHT)


def test_the_model_and_its_adapter_stay_as_they_are() -> None:
    model = adapted("dora", r=3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    convert_to_lora(model, 2, progressbar=False, compile_kwargs={"backend": "eager"})
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    for method, settings in (("dora", {"r": 3}), ("lora", {"r": 3, "init_lora_weights": "pissa"})):
        model, folder = adapted(method, **settings), tmp_path / method
        converted = save_as_lora(folder, model, 0.95)
        x = FAMILIES["llama"].inputs()
        here = veneer.PeftModel.from_pretrained(FAMILIES["llama"].model(), folder)
        torch.testing.assert_close(output(here, x), output(loaded(converted), x), **SINGLE)
        with peft_says():
            there = peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), str(folder))
        torch.testing.assert_close(output(there, x), output(here, x), **SINGLE)


@pytest.mark.parametrize("rank", [3, 0.8])
def test_it_is_what_peft_converts_to(rank: float) -> None:
    settings = {"r": 2, "alpha": 5, "target_modules": FAMILIES["llama"].targets}
    here = adapted("loha", **settings)
    with peft_says(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.get_peft_model(FAMILIES["llama"].model(), peft.LoHaConfig(**copy.deepcopy(settings))).eval()
        peft.set_peft_model_state_dict(there, veneer.get_peft_model_state_dict(here))
        theirs_config, theirs = peft.convert_to_lora(there, rank)
    config, ours = convert_to_lora(here, rank)
    assert isinstance(config, LoraConfig)
    for key in [key for key in theirs if "lora_A" in key]:
        a = ours[key.replace("_A", "_B")] @ ours[key]
        b = theirs[key.replace("_A", "_B")] @ theirs[key]
        torch.testing.assert_close(a.to(b), b, **SINGLE)
    assert {key for key in ours if "lora_" in key} == {key for key in theirs if "lora_" in key}
    assert sorted(theirs_config.rank_pattern.values()) is not None


def test_what_cannot_be_converted_says_why() -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be merged: they change the layer's output"):
        convert_to_lora(get_peft_model(FAMILIES["bert"].model(), "bottleneck"), 2)
    model = adapted("lora", r=2)
    for wrong in (0, -1, 1.5, 0.0, True):
        with pytest.raises(ConfigError, match=r"rank=.*; a positive whole number or a share"):
            convert_to_lora(model, wrong)
    with pytest.raises(ConfigError, match="max_rank=0"):
        convert_to_lora(model, 0.5, max_rank=0)


# Adapters that started as part of the weight, as plain ones of twice the rank


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_saved_as_plain_lora(name: str, use_rslora: bool, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    model = adapted("lora", r=3, lora_alpha=7, init_lora_weights=name, use_rslora=use_rslora, **patterns)
    x = FAMILIES["llama"].inputs()
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="initial")
    plain = veneer.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path)
    config: Any = plain.peft_config["default"]
    assert (config.r, config.init_lora_weights, config.rank_pattern) == (6, True, {"v_proj": 4})
    torch.testing.assert_close(output(plain, x), output(model, x), **TIGHT)
    with peft_says():
        there = peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), str(tmp_path))
    torch.testing.assert_close(output(there, x), output(model, x), **TIGHT)
    assert model.peft_config["default"].init_lora_weights == name  # type: ignore[attr-defined]


def test_dora_keeps_its_lengths_when_saved_so(tmp_path: Path) -> None:
    model = adapted("dora", r=3, lora_alpha=7, init_lora_weights="pissa")
    x = FAMILIES["llama"].inputs()
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="initial")
    plain = veneer.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path)
    torch.testing.assert_close(output(plain, x), output(model, x), **TIGHT)


def test_peft_saves_the_same(tmp_path: Path) -> None:
    kind = FAMILIES["llama"]
    settings = {"r": 3, "lora_alpha": 7, "target_modules": kind.targets, "init_lora_weights": "pissa"}
    here = get_peft_model(kind.model(torch.float32), LoraConfig(**copy.deepcopy(settings))).eval()
    with peft_says():
        there = peft.get_peft_model(kind.model(torch.float32), peft.LoraConfig(**copy.deepcopy(settings))).eval()
    there.peft_config["default"].init_lora_weights = True
    there.save_pretrained(str(tmp_path / "initial"))
    randomise(here)
    given = veneer.get_peft_model_state_dict(here)
    peft.set_peft_model_state_dict(there, {key: tensor for key, tensor in given.items() if "start" not in key})
    there.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = veneer.PeftModel.from_pretrained(kind.model(torch.float32), tmp_path / "theirs")
    x = kind.inputs(torch.float32)
    torch.testing.assert_close(output(loaded, x), output(here, x), rtol=1e-3, atol=1e-3)


def test_combining_sees_the_whole_change() -> None:
    model = adapted("lora", r=2, lora_alpha=5, init_lora_weights="pissa")
    x = FAMILIES["llama"].inputs()
    expected = output(model, x)
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["default"], [1.0], kind, kind)
        model.set_adapter(kind)
        torch.testing.assert_close(output(model, x), expected, **SINGLE)


def test_a_model_without_a_configuration_is_refused() -> None:
    model = veneer.inject_adapter_in_model(LoraConfig(target_modules=["a"]), nn.ModuleDict({"a": nn.Linear(2, 2)}))
    with pytest.raises(UnsupportedError, match="takes a PeftModel, not a ModuleDict"):
        convert_to_lora(model, 1)  # type: ignore[arg-type]


def test_nothing_but_copies_is_no_lora() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(veneer.errors.StateError, match="no adapter 'x'"):
        convert_to_lora(get_peft_model(model, LoraConfig(target_modules=["a"])), 1, "x")
