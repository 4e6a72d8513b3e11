"""OSF against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, VeneerWarning
from veneer.methods.osf import Osf, OSFConfig

SETTINGS: list[dict[str, Any]] = [{"effective_rank": 3}, {"effective_rank": 0.4, "init_weights": False}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"effective_rank": 5}),
    ("llama", {"effective_rank": 0.25, "rank_pattern": {"q_proj": 7, r"layers\.1.*v_proj": 0.75}}),
    ("bert", {}),
    ("perceptron", {"effective_rank": 3, "target_modules": ["lin0", "lin1"]}),
]
# The triplets are those of a decomposition in single precision, whose columns are orthonormal to about 1e-6.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-5}


def one_layer(**settings: Any) -> tuple[nn.Module, Osf, nn.Linear]:
    """W = diag(3, 2, 1)."""
    layer = nn.Linear(3, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    model = get_peft_model(nn.Sequential(layer), OSFConfig(target_modules=["0"], effective_rank=1, **settings))
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, Osf)
    return model, adapter, layer


def test_the_formula_by_hand() -> None:
    model, adapter, layer = one_layer()
    with torch.no_grad():
        adapter.u.copy_(torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 1.0]]))
        adapter.s.copy_(torch.tensor([10.0, 1.0]))
        adapter.v.copy_(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    # diag(3, 0, 0) + 10 (1, 1, 0)^T (0, 1, 0) + (0, 2, 1)^T (1, 0, 1)
    weight = torch.tensor([[3.0, 10.0, 0.0], [2.0, 10.0, 2.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    for tokens in (1, 50):  # by factors, and by the weight as a whole
        x = torch.randn(tokens, 3, dtype=torch.float64)
        torch.testing.assert_close(model(x), x @ weight.t() + layer.bias, rtol=1e-6, atol=1e-6)


def test_gradients_are_across_the_frozen_triplets() -> None:
    model, adapter, _ = one_layer()
    (model(torch.randn(5, 3, dtype=torch.float64)) ** 2).sum().backward()
    for gradient in (adapter.u.grad, adapter.v.grad.t()):
        assert gradient[0].abs().max() < 1e-6  # along the first axis, which the frozen triplet takes
        assert gradient[1:].abs().min() > 1e-6


def test_steps_leave_the_frozen_directions_alone() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4).double()), "osf:effective_rank=2,target_modules=['0']")
    ((_, adapter),) = adapters_of(model, "default")
    before = adapter.adapt(adapter.site.read()).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.randn(8, 6, dtype=torch.float64)) ** 2).sum().backward()
        optimizer.step()
    change = adapter.adapt(adapter.site.read()).detach() - before
    assert change.abs().max() > 1e-2
    assert (adapter.high_u.t() @ change).abs().max() < 1e-6
    assert (change @ adapter.high_v.t()).abs().max() < 1e-6


def test_conv1d_is_trained() -> None:  # peft passes it over
    model = get_peft_model(nn.Sequential(Conv1D(6, 4)), "osf:target_modules=['0']")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (6 + 4 + 1)


def test_ranks() -> None:
    settings = "rank_pattern={q_proj: 5, k_p: 0.25},target_modules=[q_proj,k_proj,o_proj]"
    model = get_peft_model(llama(), f"osf:{settings}")
    found = {wrapper.path: adapter.high_u.shape[-1] for wrapper, adapter in adapters_of(model, "default")}
    assert [found[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj", "o_proj")] == [5, 4, 16]
    overlapping = OSFConfig(effective_rank=1, rank_pattern={"v": 2, "a": 3})
    assert overlapping.at("a.v").effective_rank == 2
    with pytest.warns(VeneerWarning, match=r"rank_pattern: \['nothing'\] match none"):
        get_peft_model(llama(), "osf:rank_pattern={nothing: 5},target_modules=[q_proj]")


@pytest.mark.parametrize("rank", [99, 1.0, 0.01])
def test_ranks_that_leave_nothing_are_refused(rank: float) -> None:
    with pytest.raises(ConfigError, match="at least one has to be frozen and one trained"):
        get_peft_model(nn.Sequential(nn.Linear(6, 4)), OSFConfig(target_modules=["0"], effective_rank=rank))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="a rank of 0"):
        OSFConfig(effective_rank=0)
    with pytest.raises(ConfigError, match="that peft makes no use of"):
        OSFConfig(target_svd_config={"q_proj": 3})
