"""Starts that are made from data: by hand, and as in peft."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import loraga as peft_loraga
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
import veneer
from parity.families import FAMILIES
from parity.oracle import SINGLE, output, peft_says, tensors
from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import CheckpointError, ConfigError, StateError, VeneerWarning
from veneer.inits.eva import Components
from veneer.preparation import awaits_data

RANK = {"r": 3, "lora_alpha": 7}


@pytest.fixture(autouse=True)
def _peft_may_talk() -> Any:
    with peft_says(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\..*")
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def batches(count: int = 4, rows: int = 4, padded: bool = True) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        ids = tiny.tokens(rows, 9, seed=seed)
        mask, labels = torch.ones_like(ids), ids.clone()
        if padded:
            mask[1, :2] = 0
            labels[1, :2] = -100
            labels[0, :3] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def model(family: str = "llama") -> nn.Module:
    return FAMILIES[family].model(torch.float32)


def config(name: str, library: Any = veneer, **more: Any) -> Any:
    return library.LoraConfig(
        **copy.deepcopy({**RANK, "target_modules": ["q_proj", "v_proj", "down_proj"], **more}), init_lora_weights=name
    )


def products(adapted: nn.Module) -> dict[str, Tensor]:
    """up down of every layer, which does not depend on the signs of singular vectors."""
    given = tensors(adapted)
    return {k: given[k.replace("_A", "_B")] @ given[k] for k in given if "lora_A" in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **tolerance)


def base_is_untouched(adapted: veneer.PeftModel, family: str = "llama") -> None:
    plain = model(family).state_dict()
    state = adapted.unload().state_dict()
    assert all(torch.equal(state[key], plain[key]) for key in plain)


# EVA


def test_components_that_come_in_batches_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 6) * torch.tensor([9.0, 6.0, 3.0, 1.0, 0.5, 0.2]) + 4
    part = Components(3)
    for batch in rows.split(40):
        part.update(batch)
    centred = (rows - rows.mean(0)).double()
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    assert part.directions is not None
    cosine = (part.directions.double() * vh[:3]).sum(1).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(part.values.double(), s[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(part.shares.double(), s[:3] ** 2 / (s**2).sum(), rtol=1e-3, atol=1e-3)
    before = part.seen
    part.update(rows[:2])
    assert part.seen == before


@pytest.mark.parametrize(
    "eva_config", [{}, {"rho": 1.0}, {"whiten": True, "adjust_scaling_factors": False}, {"use_label_mask": False}]
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_eva_is_that_of_peft(eva_config: dict[str, Any], use_rslora: bool) -> None:
    data = batches()
    more: dict[str, Any] = {"use_rslora": use_rslora, "rank_pattern": {"q_proj": 1, "down_proj": 5}}
    if eva_config.get("whiten"):  # peft divides twice where layers have the same input
        more["target_modules"] = ["q_proj", "down_proj"]
    here = get_peft_model(model(), config("eva", eva_config=eva_config, **more))
    there = peft.get_peft_model(model(), config("eva", peft, eva_config=peft.EvaConfig(**eva_config), **more))
    peft.initialize_lora_eva_weights(there, data, show_progress_bar=False)
    before = {path: adapter.config.r for path, adapter in places(here).items() if adapter.config.r != 3}
    veneer.prepare(here, data)
    assert not awaits_data(here)
    a, b = tensors(here), tensors(there)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key].abs(), b[key].abs(), rtol=1e-3, atol=1e-3)
    ours, theirs = here.peft_config["default"], there.peft_config["default"]
    assert ours.rank_pattern == theirs.rank_pattern
    assert ours.alpha_pattern == pytest.approx(theirs.alpha_pattern)
    if eva_config.get("rho") != 1.0:
        assert ours.rank_pattern != before
    x = FAMILIES["llama"].inputs(torch.float32)
    assert torch.equal(output(here.eval(), x), output(model(), x))
    base_is_untouched(here)


def test_eva_under_its_own_names(tmp_path: Path) -> None:
    data = batches()
    there = peft.get_peft_model(model(), config("eva", peft, eva_config=peft.EvaConfig()))
    expected = peft.get_eva_state_dict(there, data, show_progress_bar=False)
    here = get_peft_model(model(), config("eva"))
    found = veneer.get_eva_state_dict(here, data)
    assert {key: rows.shape for key, rows in found.items()} == {key: rows.shape for key, rows in expected.items()}
    plain = veneer.get_eva_state_dict(model(), data, config("eva"))
    assert {f"base_model.model.{key}" for key in plain} == set(found)
    assert all(torch.equal(plain[key.removeprefix("base_model.model.")], rows) for key, rows in found.items())
    veneer.initialize_lora_eva_weights(here, eva_state_dict=expected)
    veneer.initialize_lora_eva_weights(
        second := get_peft_model(model(), config("eva")),
        data,
        forward_fn=lambda m, batch: m(**batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    assert not awaits_data(second)
    # Files keep the ranks.
    tiny.randomise(here)
    here.save_pretrained(tmp_path)
    x = FAMILIES["llama"].inputs(torch.float32)
    expected_output = output(here.eval(), x)
    loaded = veneer.PeftModel.from_pretrained(model(), tmp_path)
    assert torch.equal(output(loaded, x), expected_output)
    in_peft = peft.PeftModel.from_pretrained(model(), str(tmp_path))
    torch.testing.assert_close(output(in_peft, x), expected_output, **SINGLE)


def test_layers_that_explain_nothing_lose_their_adapter() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rich = nn.Linear(8, 4)
            self.poor = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            # The variance of the second input is spread evenly over all directions, that of the first is not.
            return self.rich(x * torch.tensor([9.0, 8.0, 7.0, 6.0, 0.1, 0.1, 0.1, 0.1])) + self.poor(x)

    torch.manual_seed(0)
    data = [torch.randn(600, 8) for _ in range(3)]
    adapted = get_peft_model(
        Two(),
        LoraConfig(r=2, target_modules=["rich", "poor"], init_lora_weights="eva", eva_config={"rho": 2, "tau": 0}),
    )
    veneer.prepare(adapted, data)
    settled = adapted.peft_config["default"]
    assert settled.target_modules == ["rich"]
    assert settled.rank_pattern == {"rich": 4}
    assert settled.alpha_pattern == {"rich": 16}
    assert isinstance(adapted.get_base_model().poor, nn.Linear)
    adapted(data[0]).sum().backward()


def test_what_eva_refuses() -> None:
    with pytest.raises(StateError, match=r"no batch has the 6 positions.*larger batches"):
        veneer.prepare(get_peft_model(model(), config("eva")), [{"input_ids": tiny.tokens(1, 4)}])
    with pytest.raises(StateError, match="must say init_lora_weights='eva'"):
        veneer.initialize_lora_eva_weights(get_peft_model(model(), config(True)), batches())
    with pytest.raises(StateError, match="give a dataloader"):
        veneer.initialize_lora_eva_weights(get_peft_model(model(), config("eva")))
    with pytest.raises(ConfigError, match="needs a peft_config"):
        veneer.get_eva_state_dict(model(), batches())
    with pytest.raises(ConfigError, match="'nowhere' is no adapted linear layer"):
        veneer.get_eva_state_dict(model(), batches(), config("eva"), prepare_layer_inputs_fn={"nowhere": print})
    adapted = get_peft_model(model(), config("eva", target_modules=["q_proj", "embed_tokens"]))
    with pytest.warns(VeneerWarning, match="embed_tokens are no linear layers"):
        veneer.prepare(adapted, batches())
    assert not awaits_data(adapted)


# CorDA


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_corda_is_that_of_peft(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # All that peft takes from that package, which it does not declare.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    data = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches(rows=1, padded=False)]
    targets = FAMILIES[family].targets
    there = model(family)
    their_config = config("corda", peft, corda_config=peft_corda_config(method), target_modules=targets)
    preprocess_corda(there, their_config, run_model=lambda: [there(**batch) for batch in data])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        there = peft.get_peft_model(there, their_config)
    here = get_peft_model(model(family), config("corda", corda_config={"corda_method": method}, target_modules=targets))
    veneer.prepare(here, data)
    same(products(here), products(there), rtol=1e-3, atol=1e-4)
    other = model(family)
    asking = [p.requires_grad for p in other.parameters()]
    our_config = config("corda", corda_config={"corda_method": method}, target_modules=targets)
    veneer.preprocess_corda(other, our_config, run_model=lambda: [other(**batch) for batch in data])
    assert [p.requires_grad for p in other.parameters()] == asking
    adapted = get_peft_model(other, our_config)
    assert not awaits_data(adapted)
    same(products(adapted), products(here), rtol=1e-5, atol=1e-6)
    x = FAMILIES[family].inputs(torch.float32)
    torch.testing.assert_close(output(here.eval(), x), output(model(family), x), rtol=1e-4, atol=1e-4)
    tiny.randomise(here)
    weight = model(family).get_submodule(path := next(iter(places(here)))).weight.detach()
    adapter = places(here)[path]
    changed = adapter.scaling * (adapter.up @ adapter.down - adapter.start_up @ adapter.start_down)
    expected = (weight.T if family == "gpt2" else weight) + changed
    torch.testing.assert_close(adapter.adapt(adapter.site.read()), expected, rtol=1e-5, atol=1e-6)
    base_is_untouched(here, family)


def places(adapted: veneer.PeftModel) -> dict[str, Any]:
    return {wrapper.place: adapter for wrapper, adapter in adapters_of(adapted.get_base_model(), "default")}


def peft_corda_config(method: str) -> Any:
    from peft.tuners.lora.config import CordaConfig

    return CordaConfig(corda_method=method)


def test_corda_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    adapted = get_peft_model(nn.Sequential(layer), LoraConfig(r=1, target_modules=["0"], init_lora_weights="corda"))
    # X^T X = diag(1, 0.01) after scaling by the largest entry: W C = diag(1, 0.02), so the first direction leads.
    veneer.prepare(adapted, [torch.tensor([[10.0, 0.0], [0.0, 1.0]])])
    (adapter,) = places(adapted).values()
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close((adapter.scaling * adapter.up @ adapter.down).detach(), expected, rtol=1e-4, atol=1e-4)


def test_corda_files(tmp_path: Path) -> None:
    data = batches()
    files = {"cache_file": str(tmp_path / "cache"), "covariance_file": str(tmp_path / "covariances")}
    first = get_peft_model(model(), config("corda", corda_config=files))
    veneer.prepare(first, data)
    assert load_file(tmp_path / "covariances").keys() == places(first).keys()
    again = get_peft_model(model(), config("corda", corda_config=files))
    veneer.prepare(again, [])  # the cache is enough
    same(products(again), products(first), rtol=0, atol=0)
    (tmp_path / "cache").unlink()
    other = get_peft_model(model(), config("corda", corda_config=files, r=5))
    veneer.prepare(other, [])
    with pytest.raises(ConfigError, match="the decomposition has rank 5, the adapter 3"):
        veneer.prepare(get_peft_model(model(), config("corda", corda_config=files)), [])
    (tmp_path / "cache").write_bytes(b"\x80\x02pickle")
    with pytest.raises(CheckpointError, match=r"no safetensors file.*peft writes pickles"):
        veneer.prepare(get_peft_model(model(), config("corda", corda_config=files)), [])


def test_what_corda_refuses() -> None:
    adapted = get_peft_model(model(), config("corda", target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="embed_tokens is a embedding place"):
        veneer.prepare(adapted, batches())
    with pytest.raises(StateError, match="run_model is needed"):
        veneer.preprocess_corda(model(), config("corda"))
    with pytest.raises(ConfigError, match="must say init_lora_weights='corda'"):
        veneer.preprocess_corda(model(), config(True), run_model=print)


# LoRA-GA


def stepper(model: nn.Module, data: list[dict[str, Tensor]]) -> Callable[[], None]:
    def step() -> None:
        for batch in data:
            model(**batch).loss.backward()

    return step


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_that_of_peft(direction: str, scale: str) -> None:
    data = batches(2)
    settings = {"direction": direction, "scale": scale}
    # With 4 r = in the projection is of full rank, so that chance has no part in the result.
    there, their_config = model(), config("lora_ga", peft, lora_ga_config=peft.LoraGAConfig(**settings), r=8)
    peft_loraga.preprocess_loraga(there, their_config, stepper(there, data))
    there = peft.get_peft_model(there, their_config)
    here = get_peft_model(model(), config("lora_ga", lora_ga_config=settings, r=8))
    veneer.prepare(here, data)
    a, b = tensors(here), tensors(there)
    for key in b:
        torch.testing.assert_close(a[key].abs(), b[key].abs(), rtol=1e-2, atol=1e-3, msg=lambda m, k=key: k + m)
    other = model()
    our_config = config("lora_ga", lora_ga_config=settings, r=8)
    veneer.preprocess_loraga(other, our_config, stepper(other, data))
    adapted = get_peft_model(other, our_config)
    assert not awaits_data(adapted)
    same(tensors(adapted), a, rtol=1e-4, atol=1e-5)
    x = FAMILIES["llama"].inputs(torch.float32)
    torch.testing.assert_close(output(here.eval(), x), output(model(), x), rtol=1e-3, atol=1e-3)
    base_is_untouched(here)


def test_lora_ga_by_hand() -> None:
    layer = nn.Linear(4, 4, bias=False).double()
    x = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    settings = {"direction": "A2rBr", "scale": "unit"}
    adapted = get_peft_model(
        nn.Sequential(layer),
        LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=settings),
    )
    # The loss sum(y) has the gradient 1 x^T summed over the rows: every row is (4, 3, 2, 1), a matrix of rank one.
    veneer.prepare(adapted, [x], loss=lambda m, batch: (m(batch) * torch.eye(4)).sum())
    (adapter,) = places(adapted).values()
    # With the loss sum_i y_ii the gradient is diag(4, 3, 2, 1): up has the first two, down the others.
    torch.testing.assert_close(
        adapter.up.detach().abs(), torch.tensor([[4.0, 0], [0, 3], [0, 0], [0, 0]], dtype=torch.float64)
    )
    torch.testing.assert_close(
        adapter.down.detach().abs(), torch.tensor([[0, 0, 1.0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    )


def test_gradients_of_large_models_are_averaged_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(2)
    whole = get_peft_model(model(), config("lora_ga"))
    veneer.prepare(whole, data)
    monkeypatch.setattr("veneer.inits.lora_ga.HELD", 1)
    parts = get_peft_model(model(), config("lora_ga"))
    veneer.prepare(parts, data)
    same(tensors(parts), tensors(whole), rtol=1e-6, atol=1e-7)


def test_lora_ga_keeps_a_cache(tmp_path: Path) -> None:
    data, cache = batches(2), str(tmp_path / "gradients")
    first = model()
    veneer.preprocess_loraga(first, config("lora_ga"), stepper(first, data), cache)
    second = model()
    veneer.preprocess_loraga(second, config("lora_ga"), lambda: pytest.fail("was run again"), cache)
    same(
        tensors(get_peft_model(first, config("lora_ga"))),
        tensors(get_peft_model(second, config("lora_ga"))),
        rtol=0,
        atol=0,
    )


def test_what_lora_ga_refuses() -> None:
    with pytest.raises(ConfigError, match=r"r=17, but the layer is \(32, 32\); at most 16"):
        veneer.prepare(get_peft_model(model(), config("lora_ga", r=17)), batches(1))
    with pytest.raises(ConfigError, match="stable_gamma=0"):
        config("lora_ga", lora_ga_config={"stable_gamma": 0})
    both = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    adapted = get_peft_model(both, LoraConfig(r=1, target_modules=["used", "idle"], init_lora_weights="lora_ga"))
    with pytest.raises(StateError, match="idle takes no part in the loss"):
        veneer.prepare(adapted, [torch.ones(1, 4)], loss=lambda m, x: m.get_base_model()["used"](x).sum())


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_an_adapter_that_has_seen_no_data_is_not_trained(name: str) -> None:
    adapted = get_peft_model(model(), config(name))
    with pytest.raises(StateError, match=r"has to see data.*veneer\.prepare"):
        adapted.train()(**batches(1)[0])


def test_defaults_are_those_of_peft() -> None:
    from peft.tuners.lora import config as theirs

    for name in ("EvaConfig", "CordaConfig", "LoraGAConfig", "LoftQConfig"):
        assert dataclasses.asdict(getattr(veneer, name)()) == dataclasses.asdict(getattr(theirs, name)())
