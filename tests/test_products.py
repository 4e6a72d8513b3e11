"""Products written by hand against the same lines under autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.products import LowRank, add_low_rank, run_layers, runs_by_hand
from veneer.sites import LinearSite, site_of

ROWS, IN, RANK = (2, 5), 6, 3


def linear(out: int, bias: bool = True) -> nn.Module:
    return nn.Linear(IN, out, bias=bias, dtype=torch.float64).requires_grad_(False)


def transposed(out: int) -> nn.Module:
    layer = Conv1D(out, IN).double().requires_grad_(False)
    nn.init.normal_(layer.bias)
    return layer


def site(layer: nn.Module) -> LinearSite:
    found = site_of(layer)
    assert isinstance(found, LinearSite)
    return found


def matrix(out: int, rank: int = RANK, scale: float = 0.7) -> LowRank:
    return LowRank(
        torch.randn(rank, IN, dtype=torch.float64, requires_grad=True),
        torch.randn(out, rank, dtype=torch.float64, requires_grad=True),
        scale,
    )


def by_autograd(x: Tensor, layers: list[nn.Module], matrices: list[LowRank]) -> list[Tensor]:
    pairs = zip(layers, matrices, strict=True)
    return [layer(x) + m.scale * F.linear(F.linear(x, m.down), m.up) for layer, m in pairs]


def gradients(x: Tensor, matrices: list[LowRank], outputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([(y.sin() * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()
    return list(torch.autograd.grad(loss, [x, *(t for m in matrices for t in (m.down, m.up))], allow_unused=True))


@pytest.mark.parametrize("make", [linear, lambda out: linear(out, bias=False), transposed])
@pytest.mark.parametrize("outs", [[4], [4, 4], [7, 2, 4]])
def test_values_and_gradients_are_those_of_autograd(make: Callable[[int], nn.Module], outs: list[int]) -> None:
    layers = [make(out) for out in outs]
    matrices = [matrix(out, RANK + n, 0.5 + n) for n, out in enumerate(outs)]
    x = torch.randn(*ROWS, IN, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(*ROWS, out, dtype=torch.float64) for out in outs]
    mine, expected = list(run_layers(x, [site(layer) for layer in layers], matrices)), by_autograd(x, layers, matrices)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(gradients(x, matrices, mine, weights), gradients(x, matrices, expected, weights))


def test_an_output_that_is_not_used_takes_no_part() -> None:
    layers, matrices = [linear(4), linear(5)], [matrix(4), matrix(5)]
    x = torch.randn(*ROWS, IN, dtype=torch.float64, requires_grad=True)
    wanted = [x, matrices[1].down, matrices[1].up]
    mine = run_layers(x, [site(layer) for layer in layers], matrices)[1]
    expected = by_autograd(x, layers, matrices)[1]
    torch.testing.assert_close(
        torch.autograd.grad(mine.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )


@pytest.mark.parametrize("needed", ["x", "down", "up"])
def test_only_what_is_asked_for_gets_a_gradient(needed: str) -> None:
    layer, m = linear(4), matrix(4)
    x = torch.randn(*ROWS, IN, dtype=torch.float64, requires_grad=True)
    tensors = {"x": x, "down": m.down, "up": m.up}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == needed)
    run_layers(x, [site(layer)], [m])[0].square().sum().backward()
    mine = tensors[needed].grad
    tensors[needed].grad = None
    by_autograd(x, [layer], [m])[0].square().sum().backward()
    torch.testing.assert_close(mine, tensors[needed].grad)
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [needed]


def test_gradients_of_gradients() -> None:
    layers, m = [linear(4), linear(3)], [matrix(4), matrix(3)]
    x = torch.randn(*ROWS, IN, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*ROWS, 4, dtype=torch.float64, requires_grad=True)

    def layers_of(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        pairs = [LowRank(*factors[:2], 0.7), LowRank(*factors[2:], 0.7)]
        return run_layers(x, [site(layer) for layer in layers], pairs)

    inputs = (x, m[0].down, m[0].up, m[1].down, m[1].up)
    assert torch.autograd.gradcheck(layers_of, inputs)
    assert torch.autograd.gradgradcheck(layers_of, inputs)
    assert torch.autograd.gradgradcheck(
        lambda x, y, down, up: add_low_rank(x, y, LowRank(down, up, 0.7)), (x, y, m[0].down, m[0].up)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adding_onto_another_output(dtype: torch.dtype) -> None:
    """The sum is in the type of y, whatever that of the thin matrices is."""
    m = matrix(4)
    x = torch.randn(*ROWS, IN, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*ROWS, 4, dtype=dtype, requires_grad=True)
    kept = y.detach().clone()
    mine = add_low_rank(x, y, m)
    expected = y + (m.scale * F.linear(F.linear(x, m.down), m.up)).to(dtype)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, expected)
    assert y.detach().equal(kept)
    wanted = [x, y, m.down, m.up]
    torch.testing.assert_close(
        torch.autograd.grad(mine.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )


def test_low_precision_inputs_are_kept_as_they_are() -> None:
    """A bfloat16 layer with float32 matrices keeps its input in bfloat16 for the backward pass."""
    layer = nn.Linear(IN, 4, dtype=torch.bfloat16).requires_grad_(False)
    m = LowRank(torch.randn(RANK, IN, requires_grad=True), torch.randn(4, RANK, requires_grad=True), 0.7)
    x = torch.randn(*ROWS, IN, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (mine,) = run_layers(x, [site(layer)], [m])
    assert [t.dtype for t in kept if t.shape[-1] == IN and t.numel() > m.down.numel()] == [torch.bfloat16]
    expected = layer(x) + (m.scale * F.linear(F.linear(x.float(), m.down), m.up)).to(torch.bfloat16)
    torch.testing.assert_close(mine, expected, rtol=3e-2, atol=1e-2)  # the sum is rounded once, not twice
    wanted = [m.down, m.up, x]
    torch.testing.assert_close(
        torch.autograd.grad(mine.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        rtol=6e-2,
        atol=6e-2,
    )


def test_per_example_gradients_by_torch_func() -> None:
    m = matrix(4)
    x, y = torch.randn(5, IN, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def loss(down: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(x[None], y[None], LowRank(down, m.up, 0.7)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(m.down.detach(), x, y)
    for row in range(5):
        (alone,) = torch.autograd.grad(loss(m.down, x[row], y[row]), m.down)
        torch.testing.assert_close(found[row], alone)


def test_layers_in_which_more_happens_are_left_to_autograd() -> None:
    x, m = torch.randn(*ROWS, IN, dtype=torch.float64), matrix(4)
    layer = linear(4)
    assert runs_by_hand(site(layer), x, m.down)
    assert not runs_by_hand(site(layer), x.float(), m.down)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_by_hand(site(layer), x, m.down)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not runs_by_hand(site(layer), x, m.down)
    handle.remove()
    layer.weight.requires_grad_(True)
    assert not runs_by_hand(site(layer), x, m.down)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert not runs_by_hand(site(Doubled(IN, 4, dtype=torch.float64).requires_grad_(False)), x, m.down)
