"""Linear layers in int8: equal to the layer that their integers stand for, up to the rounding of their input."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from veneer.sites import LinearSite, site_of
from veneer.stores import int8, int8_kernels
from veneer.stores.int8 import Int8Linear, Int8Store

STORE = Int8Store()


@pytest.fixture(params=["integers", "floats"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply the integers, whatever this processor does faster."""
    monkeypatch.setattr(int8_kernels, "_way", lambda *args: request.param)
    return str(request.param)


def layer(out: int = 24, inputs: int = 40, outliers: int = 0, dtype: torch.dtype = torch.float64) -> Int8Linear:
    torch.manual_seed(0)
    return Int8Linear.from_linear(nn.Linear(inputs, out, dtype=dtype), torch.randperm(inputs)[:outliers])


def plain(of: Int8Linear) -> nn.Linear:
    return STORE.plain(of)


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (2, 5, 40), (0, 40)])
@pytest.mark.usefixtures("way")
def test_output_and_gradient_are_those_of_the_weight_up_to_rounding(shape: tuple[int, ...], outliers: int) -> None:
    of = layer(outliers=outliers)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = of(x), plain(of)(x)
    g = torch.randn_like(y)
    (back,), (exact,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g)

    # An entry is off by half a step of its row at most, so a sum by that times the sum of the other factor's sizes.
    inside = torch.ones(40, dtype=torch.bool)
    inside[of.outliers] = False
    rounded = of.dequantised()[:, inside].abs()
    step = x.detach()[..., inside].abs().amax(-1, keepdim=True) / 127
    assert ((y - expected).abs() <= 0.5 * step * rounded.sum(1) + 1e-6).all()
    step = (g * of.scale).abs().amax(-1, keepdim=True) / 127
    assert ((back - exact).abs() <= 0.5 * step * of.weight.double().abs().sum(0) + 1e-6).all()
    if x.numel():
        assert (y != expected).any()  # it does round
    torch.testing.assert_close(back[..., of.outliers], exact[..., of.outliers])


@pytest.mark.usefixtures("way")
def test_what_is_whole_numbers_anyway_is_exact() -> None:
    weight, x, g = (torch.randint(-126, 127, size).double() for size in ((24, 1100), (5, 1100), (5, 24)))
    for rows in (weight, x, g):
        rows[:, 0] = 127  # a step of one
    linear = nn.Linear(1100, 24, dtype=torch.float64)
    linear.weight.data, linear.bias.data = weight, torch.arange(24).double()
    x.requires_grad_()
    y = Int8Linear.from_linear(linear)(x)
    assert torch.equal(y, linear(x))
    y.backward(g)
    assert torch.equal(x.grad, g @ weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("way")
def test_both_ways_of_multiplying_agree_in_every_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    of = layer(outliers=2).to(dtype)
    assert (of.weight.dtype, of.scale.dtype, of.dtype) == (torch.int8, torch.float32, dtype)
    x = torch.randn(7, 40, dtype=dtype, requires_grad=True)
    y = of(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    monkeypatch.setattr(int8_kernels, "_way", lambda *args: "integers")
    torch.testing.assert_close(of(x), y)


def test_a_product_in_pieces_is_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    q, matrix = (
        torch.randint(-127, 128, (6, 33), dtype=torch.int8),
        torch.randint(-127, 128, (50, 33), dtype=torch.int8),
    )
    monkeypatch.setattr(int8_kernels, "_CHUNK", 33 * 7)
    exact = q.long() @ matrix.long().t()
    assert torch.equal(int8_kernels._by_floats(q, matrix.t(), torch.float32).long(), exact)
    assert torch.equal(int8_kernels._by_integers(q, matrix.t()).long(), exact)


def test_columns_with_outliers_are_exact_and_give_the_others_their_precision() -> None:
    linear = nn.Linear(64, 32)
    x = torch.randn(16, 64)
    x[:, 5] *= 300
    exact = linear(x).detach()

    def error(outliers: list[int]) -> float:
        return float(
            (Int8Linear.from_linear(linear, torch.tensor(outliers, dtype=torch.long))(x).detach() - exact).norm()
        )

    assert error([5]) < 0.02 * error([])
    of = Int8Linear.from_linear(linear, torch.tensor([5]))
    assert torch.equal(of.dequantised()[:, 5], linear.weight[:, 5])
    assert not of.weight[:, 5].any()


def test_transformers_conv1d_is_taken_too() -> None:
    linear = Conv1D(24, 40)
    linear.bias.data.normal_()
    x = torch.randn(3, 40)
    torch.testing.assert_close(Int8Linear.from_linear(linear)(x), linear(x), atol=0.01, rtol=0.05)


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that gets quantised."""
    seen: list[Tensor] = []

    def count(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen.append(x.detach().clone())
        return int8_kernels.quantise(x, factor)

    monkeypatch.setattr(int8, "quantise", count)
    return seen


def test_an_input_of_several_layers_is_quantised_once(quantised: list[Tensor]) -> None:
    first, second, other = layer(), layer(), layer(outliers=2)
    quantised.clear()
    x = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True) * 2
    first(x)
    y = second(x)
    STORE.product(second, x.reshape(-1, 40))
    assert len(quantised) == 1
    other(x)  # other columns are exact there
    assert len(quantised) == 2
    y.sum().backward()
    assert len(quantised) == 3


def test_an_input_that_changed_is_quantised_again(quantised: list[Tensor]) -> None:
    of = layer()
    quantised.clear()
    x = torch.randn(3, 40, dtype=torch.float64)
    before = of(x)
    x.mul_(3)
    after = of(x)
    assert len(quantised) == 2
    torch.testing.assert_close(after - of.bias, 3 * (before - of.bias))
    of(x[:2])  # the same memory, other rows
    assert len(quantised) == 3
    with torch.inference_mode():  # whose tensors do not tell that they changed
        y = torch.randn(3, 40, dtype=torch.float64)
        before = of(y)
        y.mul_(3)
        torch.testing.assert_close(of(y) - of.bias, 3 * (before - of.bias))


def test_the_input_is_not_kept_alive() -> None:
    of, x = layer(), torch.randn(3, 40, dtype=torch.float64)
    of(x)
    assert int8._MEMO.source is not None
    assert int8._MEMO.source() is x
    del x
    gc.collect()
    assert int8._MEMO.source is None
    assert not hasattr(int8._MEMO, "result")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient(reentrant: bool) -> None:
    first, second = layer(40, 40), layer(40, 40, outliers=3)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        hidden = (x * 2).tanh()
        return first(hidden) + second(hidden)

    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_nothing_is_saved_for_the_backward_pass_but_the_layer() -> None:
    of, saved = layer(outliers=2), []
    own = {tensor.data_ptr() for tensor in [*of.parameters(), *of.buffers()]}
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        of(x)
    assert set(saved) <= own


def test_autocast_decides_the_type_and_not_the_arithmetic() -> None:
    of = layer(dtype=torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = of(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, of(x.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_trained_bias_gets_its_gradient() -> None:
    of = layer()
    of.bias.requires_grad_()
    of(torch.randn(2, 3, 40, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(of.bias.grad, torch.full((24,), 6.0, dtype=torch.float64))


# torch's own, of how its compiler looks at a torch.autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_is_compiled_without_a_break() -> None:
    of = layer(outliers=2, dtype=torch.float32)
    x = torch.randn(5, 40, requires_grad=True)
    compiled: Any = torch.compile(of, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), of(x)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    (back,), (wanted,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g)
    torch.testing.assert_close(back, wanted)


def test_function_transforms_see_it() -> None:
    of, x = layer(), torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(of(x).square().sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: of(x).square().sum())(x.detach()), expected)


def test_another_weight_can_be_put_in_its_place() -> None:
    of, x, weight = layer(outliers=2), torch.randn(5, 40, dtype=torch.float64), torch.randn(24, 40, dtype=torch.float64)
    torch.testing.assert_close(functional_call(of, {"weight": weight}, (x,)), x @ weight.t() + of.bias)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda of: pickle.loads(pickle.dumps(of))])
def test_copies_answer_the_same(how: Callable[[nn.Module], nn.Module]) -> None:
    of, x = layer(outliers=2), torch.randn(5, 40, dtype=torch.float64)
    assert torch.equal(how(of)(x), of(x))


def test_a_state_is_loaded_with_its_exact_columns() -> None:
    of, x = layer(outliers=3), torch.randn(5, 40, dtype=torch.float64)
    other = Int8Linear(40, 24, dtype=torch.float64)
    other.load_state_dict(of.state_dict())
    assert torch.equal(other(x), of(x))


def test_the_state_of_a_plain_layer_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"weight is torch.float64, and the layer keeps int8. Load it into the plain"
    ):
        layer().load_state_dict(nn.Linear(40, 24, dtype=torch.float64).state_dict())


def test_the_store_reads_writes_and_recovers() -> None:
    of = layer(outliers=3)
    site = site_of(of)
    assert isinstance(site, LinearSite)
    assert site.is_plain
    assert (site.shape, site.dtype, site.device.type) == ((24, 40), torch.float64, "cpu")
    before = {name: tensor.clone() for name, tensor in of.state_dict().items()}
    new = torch.randn(24, 40, dtype=torch.float64)
    twin = site.write(new, None)
    held = STORE.read(twin, "weight")
    inside = torch.ones(40, dtype=torch.bool)
    inside[of.outliers] = False
    assert torch.equal(held[:, of.outliers], new[:, of.outliers])
    step = new[:, inside].abs().amax(1, keepdim=True) / 127
    assert ((held - new)[:, inside].abs() <= 0.5 * step + 1e-6).all()
    torch.testing.assert_close(STORE.read(site.write(held, None), "weight"), held)  # what fits is not moved again
    assert twin.bias is of.bias
    assert all(torch.equal(tensor, before[name]) for name, tensor in of.state_dict().items())

    x = torch.randn(6, 40, dtype=torch.float64)
    y, kept = STORE.product(of, x)
    assert torch.equal(y, of(x))
    assert kept[0].dtype == torch.int8
    recovered = STORE.recover(kept)
    torch.testing.assert_close(plain(of)(recovered), y, rtol=1e-5, atol=1e-6)  # the layer multiplies just that
    assert torch.equal(recovered[:, of.outliers], x[:, of.outliers])


def test_a_row_that_is_not_finite_stays_so_and_others_are_not_touched() -> None:
    of, x = layer(), torch.randn(3, 40, dtype=torch.float64)
    expected = of(x)
    x[1, 4] = float("nan")
    y = of(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    assert torch.equal(of(torch.zeros(2, 40, dtype=torch.float64)), of.bias.expand(2, -1))


# Which way is taken


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_kernels, "_STEPS", (int8_kernels._quantise, int8_kernels._rescale))
    monkeypatch.setattr(int8_kernels, "_FASTEST", {})
    monkeypatch.setattr(int8_kernels, "_BEST", {})
    monkeypatch.setattr(int8_kernels, "_EXACT", [])


@pytest.mark.usefixtures("steps")
def test_without_a_fast_way_nothing_is_compiled_and_it_is_said() -> None:
    int8_kernels._BEST.update({8: "floats", 7: "floats"})
    eager = int8_kernels._STEPS
    assert "of 8 bits no faster than float32" in int8_kernels.compile_steps(8)
    assert int8_kernels._STEPS is eager
    assert int8_kernels.weight_bits() == 8
    q, matrix = torch.ones(20, 40, dtype=torch.int8), torch.ones(40, 24, dtype=torch.int8)
    assert int8_kernels._way(q, matrix, torch.float32, 8) == "floats"


@pytest.mark.usefixtures("steps")
def test_without_a_compiler_the_steps_are_not_compiled_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    int8_kernels._BEST[8] = "integers"

    def compiler(function: object, **how: object) -> Callable[..., None]:
        def run(*args: object) -> None:
            raise RuntimeError("no working C++ compiler\nat all")

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    said = int8_kernels.compile_steps(8)
    assert said.endswith("the steps around them are not compiled (no working C++ compiler)")
    assert int8_kernels._STEPS[0] is int8_kernels._quantise


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("faster", [True, False])
def test_each_compiled_step_is_used_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    int8_kernels._BEST[8] = "integers"
    compiled = (lambda *args: int8_kernels._quantise(*args), lambda *args: int8_kernels._rescale(*args))
    given = iter(compiled)
    monkeypatch.setattr(torch, "compile", lambda function, **how: next(given))
    times = iter([1.0, 2.0, 2.0, 1.0] if faster else [2.0, 1.0, 2.0, 1.0])  # compiled first, quantising first

    def seconds(run: Callable[[], object], times_: int = 3) -> float:
        run()
        return next(times)

    monkeypatch.setattr(int8_kernels, "seconds", seconds)
    drawn = torch.get_rng_state()
    said = int8_kernels.compile_steps(8)
    assert torch.equal(torch.get_rng_state(), drawn)  # who compiles first trains what the next one trains
    assert said.endswith("; quantising compiled" if faster else "no faster, so not used")
    assert (compiled[0] if faster else int8_kernels._quantise, int8_kernels._rescale) == int8_kernels._STEPS
    if faster:
        assert int8_kernels.compile_steps(8) == said


@pytest.mark.usefixtures("steps")
def test_each_shape_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    int8_kernels._BEST[8] = "integers"
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(int8_kernels, "_fastest", lambda *key: asked.append(key) or "floats")  # type: ignore[func-returns-value]
    of = layer()
    for rows in (5, 5, 100, 90, 300):
        of(torch.randn(rows, 40, dtype=torch.float64))
    assert asked == [(40, 24, False, rows, 8) for rows in (1, 64, 256)]


# oneDNN, and weights of 7 bits


def onednn_with(bits: int) -> None:
    if int8_kernels.exact_bits() < bits:
        pytest.skip(f"oneDNN has no exact products of weights of {bits} bits on this processor")


@pytest.mark.parametrize("bits", int8_kernels.BITS)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_the_largest_numbers_are_multiplied_exactly_in_the_way_that_is_used(bits: int, rows: int) -> None:
    torch.manual_seed(0)
    q = 127 * (2 * torch.randint(0, 2, (rows, 576)) - 1)
    q[0] = 127
    weight = (2 ** (bits - 1) - 1) * (2 * torch.randint(0, 2, (96, 576)) - 1)
    weight[0] = weight.abs().amax()
    exact = (q @ weight.t()).float()
    one = torch.ones(rows, 1)
    found = int8_kernels.product(q.to(torch.int8), one, weight.to(torch.int8).t(), bits, torch.float32)
    assert torch.equal(found, exact)


def test_onednn_multiplies_exactly_both_ways_round() -> None:
    onednn_with(7)
    q, matrix = torch.randint(-127, 128, (6, 33), dtype=torch.int8), torch.randint(-63, 64, (50, 33), dtype=torch.int8)
    channel = torch.rand(50)
    exact = q.long() @ matrix.long().t()
    assert torch.equal(int8_kernels._by_onednn(q, matrix.t(), None).long(), exact)
    assert torch.equal(int8_kernels._by_onednn(q, matrix.t().contiguous(), None).long(), exact)
    torch.testing.assert_close(int8_kernels._by_onednn(q, matrix.t(), channel), exact * channel)


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_onednn_gives_output_and_gradient_of_the_other_ways(monkeypatch: pytest.MonkeyPatch, outliers: int) -> None:
    onednn_with(7)
    linear = nn.Linear(40, 24)
    of = Int8Linear.from_linear(linear, torch.randperm(40)[:outliers], bits=7)
    assert of.weight.abs().amax() == 63
    x, g = torch.randn(2, 5, 40, requires_grad=True), torch.randn(2, 5, 24)

    def both(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        y = run(x)
        return y.detach(), torch.autograd.grad(y, x, g)[0]

    monkeypatch.setattr(int8_kernels, "_way", lambda *args: "floats")
    expected = both(of)
    monkeypatch.setattr(int8_kernels, "_way", lambda *args: "onednn")
    torch.testing.assert_close(both(of), expected)
    compiled: Any = torch.compile(of, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(both(compiled), expected)


@pytest.mark.usefixtures("steps")
def test_weights_get_7_bits_only_where_that_alone_is_fast() -> None:
    chosen = {("floats", "onednn"): 7, ("floats", "floats"): 8, ("integers", "onednn"): 8, ("onednn", "onednn"): 8}
    for (eight, seven), bits in chosen.items():
        int8_kernels._BEST.update({8: eight, 7: seven})
        assert int8_kernels.weight_bits() == bits


@pytest.mark.usefixtures("steps")
def test_onednn_is_not_asked_for_what_it_cannot_multiply_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_kernels, "seconds", lambda run: float("onednn" not in run.__code__.co_names[-1]))
    int8_kernels._EXACT[:] = [7]
    assert int8_kernels.best_way(8) != "onednn"
    assert int8_kernels.best_way(7) == "onednn"
    q, matrix = torch.ones(20, 40, dtype=torch.int8), torch.ones(40, 24, dtype=torch.int8)
    assert int8_kernels._way(q, matrix, torch.float64, 7) == "floats"  # its result is float32


@pytest.mark.usefixtures("steps")
def test_a_build_without_onednn_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    monkeypatch.setattr(int8_kernels, "_by_onednn", absent)
    assert int8_kernels.exact_bits() == 0
    assert int8_kernels.best_way(7) != "onednn"


def test_a_state_with_larger_integers_is_not_taken_for_7_bits() -> None:
    of, small = layer(), Int8Linear(40, 24, bits=7, dtype=torch.float64)
    small.load_state_dict(of.state_dict())
    assert small.bits == 8
