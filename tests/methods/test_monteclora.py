"""MonteCLoRA against the paper and peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import nn

import veneer
from contract.evaluating import hold
from contract.places import SPOTS, Spot
from tiny import bert, randomise, tokens
from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.monteclora import Monteclora

SETTINGS: list[dict[str, Any]] = []  # random in training: see `test_promises_outside_of_training`
HERE = {"r": 3, "lora_alpha": 7, "lora_bias": True, "monteclora_config": {"num_samples": 4}}


def on(layer: nn.Module, **settings: Any) -> tuple[veneer.PeftModel, Monteclora]:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0"], monteclora_config=settings)
    model = get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, Monteclora)
    nn.init.normal_(adapter.up)
    return model, adapter


@pytest.mark.parametrize("spot", [s for s in SPOTS if s.kind in Monteclora.kinds], ids=lambda spot: spot.name)
def test_promises_outside_of_training(spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    further = ("test_a_mixed_batch_is_each_row_alone", "test_stacking_is_composition")
    hold("monteclora", HERE, spot, tmp_path, monkeypatch, further)


@pytest.mark.parametrize("spot", [s for s in SPOTS if s.kind in Monteclora.kinds], ids=lambda spot: spot.name)
def test_promises_in_training(spot: Spot) -> None:
    from contract import test_contract

    test_contract.test_it_starts_as_the_base_layer("monteclora", HERE, spot)
    test_contract.test_only_adapters_are_trained("monteclora", HERE, spot)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    model, _ = on(nn.Linear(5, 4).double(), sample_scaler=0.3)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(1)
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_it_compiles_in_training() -> None:
    model, _ = on(nn.Linear(5, 4).double(), sample_scaler=0.3)
    x = torch.randn(2, 5, dtype=torch.float64)
    y = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert not torch.equal(y, model.eval()(x))
    torch.compiler.reset()


def test_the_factor_is_that_of_peft() -> None:
    _, adapter = on(nn.Linear(5, 4).double(), num_samples=6, sample_scaler=0.3)
    theirs = MontecloraSampler(5, 3, 6, sample_scaler=0.3, buffer_size=1, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        adapter.log_std.copy_(torch.tensor([-4.0, 0.2, 1.0]))  # the first variance falls below the floor
        theirs.std_prior.copy_(adapter.log_std)
        theirs.expert_weights_prior.copy_(adapter.log_weights)
    drawn = theirs.sampler.buffer[0]
    noise, weights = theirs()
    # They decompose in float32.
    torch.testing.assert_close(adapter.weights(drawn["z_dirichlet"]), weights, rtol=1e-5, atol=1e-6)
    mean = torch.einsum("n,nir->ri", weights, drawn["z_mvn"]) / weights.norm()
    ours = adapter.noise(drawn["z_wishart"].diag(), weights, mean)
    torch.testing.assert_close(ours, torch.einsum("n,nir->ri", weights, noise), rtol=1e-5, atol=1e-6)


def test_outputs_in_training_spread_as_the_formula_says() -> None:
    torch.manual_seed(0)
    model, adapter = on(nn.Linear(1, 1, bias=False), num_samples=4, sample_scaler=1.0)
    with torch.no_grad():
        adapter.log_std.copy_(torch.tensor([0.0, 0.5, -0.5]))
        adapter.log_weights.fill_(20.0)  # all but certain: w = 1/4
    x = torch.ones(1, 1)
    with torch.no_grad():
        center = model.eval()(x)
        drawn = torch.stack([model.train()(x) - center for _ in range(4000)])
    # Var(s up noise) = s^2 |w|^2 sum_j up_j^2 exp(2 log_std_j) E chi^2_3
    expected = (7 / 3) ** 2 / 4 * (adapter.up[0].square() * (2 * adapter.log_std).exp() * 3).sum()
    assert drawn.mean().abs() < 0.1 * expected.sqrt()
    assert drawn.var().item() == pytest.approx(expected.item(), rel=0.15)


def test_the_divergence_by_hand() -> None:
    _, adapter = on(nn.Linear(5, 4).double(), num_samples=4, dirichlet_prior=0.3)
    theirs = MontecloraSampler(5, 3, 4, dirichlet_prior=0.3, buffer_size=1, device="cpu", dtype=torch.float64)
    a, std = adapter.log_weights.detach().exp(), adapter.log_std.detach().exp()
    dirichlet = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(a), torch.distributions.Dirichlet(torch.full_like(a, 0.3))
    )
    # The mean over draws of S, with E S_jj = 3 and E log S_jj = digamma(3 / 2) + log 2
    logs = std.square().log() + torch.digamma(torch.tensor(1.5)) + torch.tensor(2.0).log()
    normal = 4 / 2 * (3 * std.square() - logs - 1).sum()
    expected = dirichlet + theirs.wishart_kl(std.diag()) + normal
    torch.testing.assert_close(adapter.divergence(), expected, rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    draws = [torch.randn(3, 3, dtype=torch.float64).square().sum(1) * std.square() for _ in range(3000)]
    mean = torch.stack([theirs.multivariate_kl(v.diag()) for v in draws]).mean()
    assert mean.item() == pytest.approx(normal.item(), rel=0.05)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_term_of_the_loss(entropy: bool) -> None:
    _, adapter = on(nn.Linear(5, 4).double(), num_samples=4, kl_loss_weight=0.5, use_entropy=entropy)
    with torch.no_grad():
        adapter.log_weights.fill_(30.0)  # w = 1/4, whatever is drawn
    term = Monteclora.penalty([adapter, adapter], adapter.config)
    assert term is not None
    torch.testing.assert_close(term, 0.5 * adapter.divergence() + (0.25 if entropy else 0))
    term.backward()
    assert adapter.log_std.grad is not None
    assert adapter.log_std.grad.abs().min() > 0


def test_files_and_outputs_are_those_of_peft(tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    nested = {"buffer_size": 2, "num_samples": 4}
    here = get_peft_model(bert(), LoraConfig(**settings, monteclora_config=nested)).eval()
    randomise(here)
    x = {"input_ids": tokens()}
    here.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "ours"))
        torch.testing.assert_close(there(**x).logits, here(**x).logits)
        new = peft.get_peft_model(
            bert(), peft.LoraConfig(**settings, monteclora_config=peft.MontecloraConfig(**nested))
        ).eval()
        randomise(new)
        new.save_pretrained(str(tmp_path / "theirs"))
    loaded = veneer.PeftModel.from_pretrained(bert(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(**x).logits, new(**x).logits)
    trained = {name.rpartition(".")[2] for name, p in new.named_parameters() if p.requires_grad}
    assert {"std_prior", "expert_weights_prior"} <= trained
    assert veneer.get_peft_model_state_dict(loaded).keys() == peft.get_peft_model_state_dict(new).keys()


@pytest.mark.parametrize("name", ["num_samples", "dirichlet_prior", "buffer_size"])
def test_settings_that_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"MontecloraConfig: {name}=0; a positive"):
        LoraConfig(monteclora_config={name: 0})


def test_parameters_are_counted_as_in_the_docstring() -> None:
    _, adapter = on(nn.Linear(5, 4), num_samples=6)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (5 + 4 + 1) + 6
