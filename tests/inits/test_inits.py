"""Starting values: their distributions, and that the product of the factors is zero where it should be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from veneer import LoraConfig, get_peft_model, inits
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.inits.loftq import LoftQConfig

IN, OUT, RANK = 400, 300, 16


def started(
    name: bool | str, kind: str = "linear", rank: int = RANK, batch: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """down and up with the named starting values; both held something else before."""
    torch.manual_seed(0)
    down, up = torch.full((*batch, rank, IN), 7.0), torch.full((*batch, OUT, rank), 7.0)
    torch.manual_seed(1)
    weight = torch.randn(*batch, OUT, IN)
    torch.manual_seed(0)
    inits.find(name).fill(inits.Start(down, up, kind, 0.5, lambda: weight, LoftQConfig()))
    return down, up


@pytest.mark.parametrize("name", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_the_product_is_zero_at_the_start(name: bool | str, kind: str) -> None:
    down, up = started(name, kind)
    assert (up @ down).abs().max() < 1e-5
    assert down.any() or up.any()


@pytest.mark.parametrize("batch", [(), (3,)])
def test_kaiming_is_that_of_a_linear_layer(batch: tuple[int, ...]) -> None:
    down, up = started(True, "parameter" if batch else "linear", batch=batch)
    assert not up.any()
    bound = 1 / math.sqrt(IN)
    assert 0.99 * bound < down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert down.mean().item() == pytest.approx(0, abs=0.02 * bound)
    torch.manual_seed(0)
    if not batch:
        assert torch.equal(nn.Linear(IN, RANK, bias=False).weight, down)


def test_on_embeddings_it_is_down_that_is_zero() -> None:
    for name in (True, "gaussian"):
        down, up = started(name, "embedding")
        assert not down.any()
        assert up.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("kind", ["linear", "embedding", "parameter"])
def test_without_a_start_both_factors_are_random(kind: str) -> None:
    down, up = started(False, kind, batch=(2,) if kind == "parameter" else ())
    assert (up @ down).abs().mean() > 1e-3
    if kind != "embedding":
        assert down.abs().max() <= 1 / math.sqrt(IN)
        assert up.abs().max() <= 1 / math.sqrt(RANK)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_gaussian_has_the_deviation_of_one_over_the_rank(rank: int) -> None:
    down, up = started("gaussian", rank=rank)
    assert not up.any()
    assert down.std().item() == pytest.approx(1 / rank, rel=0.05)
    assert down.mean().item() == pytest.approx(0, abs=0.1 / rank)


@pytest.mark.parametrize("rank", [2, 8, 64])
def test_orthogonal_starts_at_zero_with_both_factors_at_work(rank: int) -> None:
    down, up = started("orthogonal", rank=rank)
    assert torch.linalg.matrix_rank(down) == rank // 2
    assert torch.linalg.matrix_rank(up) == rank // 2
    assert (up @ down).abs().max() < 1e-5
    # A Q and Q^T B with rows of an orthogonal Q: entries have the size of sqrt(1/2) / 10.
    assert down.std().item() == pytest.approx(math.sqrt(0.5) / 10, rel=0.1)
    assert up.std().item() == pytest.approx(math.sqrt(0.5) / 10, rel=0.1)


@pytest.mark.parametrize(
    ("rank", "batch", "said"), [(3, (), "r is 3"), (1, (), "even rank"), (4, (2,), "a single matrix")]
)
def test_orthogonal_needs_an_even_rank_and_one_matrix(rank: int, batch: tuple[int, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"init_lora_weights='orthogonal' needs an even rank .*{said}|{said}"):
        started("orthogonal", rank=rank, batch=batch)


def test_a_start_that_is_refused_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="needs an even rank"):
        get_peft_model(model, LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights="orthogonal"))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(parameter.requires_grad for parameter in model.parameters())


NAMES = [*inits.INITIALISERS, "pissa_niter_4"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_start_on_a_model(name: bool | str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).to(dtype)
    model.requires_grad_(False)
    before, x = model[0].weight.clone(), torch.randn(5, 12, dtype=dtype)
    expected = model(x)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=name))
    ((wrapper, adapter),) = adapters_of(adapted, "default")
    assert adapter.down.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(wrapper.frozen_layer.weight, before)
    adapted.eval()  # those that need data have not seen any
    assert torch.allclose(adapted(x), expected, atol=1e-5) == (name not in (False, "loftq"))
    adapted(x).sum().backward()
    assert name == "mica" or adapter.up.grad.any()
    assert bool(adapter.down.grad.any()) == (
        name in (False, "orthogonal", "pissa", "pissa_niter_4", "olora", "mica", "loftq")
    )


def test_starts_follow_the_seed() -> None:
    for name in NAMES:
        first, second = started(name), started(name)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "said"),
    [("gausian", "Did you mean 'gaussian'"), ("pissa_niter_x", "it has True, False, gaussian, orthogonal"), ("", "''")],
)
def test_names_that_are_not_known(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"init_lora_weights={name!r} is not in this version.*|{said}") as caught:
        LoraConfig(init_lora_weights=name)
    assert caught.match(said)
