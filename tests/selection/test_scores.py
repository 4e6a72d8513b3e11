"""Scores: each criterion by hand, sums by row and by weight, files that know their model, and what memory they take."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tiny import bert, llama, randomise, tokens
from veneer.adapted import adapters_of
from veneer.errors import BaseMismatchError, CheckpointError, ConfigError, StateError
from veneer.methods.sparse import SparseConfig
from veneer.selection import scores
from veneer.selection.score_file import Scores, layer_and_name, score


class Two(nn.Module):
    """Two layers in a row, each example's gradient known."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)]).double()

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return (self.layers[1](self.layers[0](x)) * at).sum()


X = torch.tensor([[1.0, 2.0, 0.0], [1.0, -2.0, 3.0], [0.5, 0.0, 1.0]], dtype=torch.float64)
AT = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-1.0, 2.0]], dtype=torch.float64)
BATCHES = [(X[:2], AT[:2]), (X[2:], AT[2:])]


def model() -> Two:
    torch.manual_seed(0)
    return Two()


def found(criterion: str, **how: Any) -> dict[str, Tensor]:
    return score(model(), BATCHES, criterion, loss=lambda m, batch: m(*batch), target_modules=["0", "1"], **how).tensors


def gradients() -> dict[str, Tensor]:
    """(example, out, in) of each layer."""
    a, b = (layer.weight.detach() for layer in model().layers)  # type: ignore[union-attr]
    return {
        "layers.0": (AT @ b)[:, :, None] * X[:, None, :],
        "layers.1": AT[:, :, None] * (X @ a.t())[:, None, :],
    }


def weights() -> dict[str, Tensor]:
    return {path: module.weight.detach() for path, module in model().named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    ("criterion", "formula"),
    [
        ("magnitude", lambda w, g: w.abs()),
        ("gradient", lambda w, g: g.sum(0).abs()),
        ("snip", lambda w, g: (w * g.sum(0)).abs()),
        ("fisher", lambda w, g: g.square().sum(0)),
        ("quantization", lambda w, g: g.square().sum(0) * (w - rounded(w)).square() / 2),
    ],
)
def test_each_criterion_is_its_formula(criterion: str, formula: Any) -> None:
    tensors, w, g = found(criterion), weights(), gradients()
    for path, tensor in tensors.items():
        torch.testing.assert_close(tensor, formula(w[path], g[path]).float(), atol=1e-6, rtol=1e-5)


def rounded(weight: Tensor) -> Tensor:
    """To 15 levels, the largest of a row as scale: rows here are shorter than a group."""
    step = weight.abs().amax(1, keepdim=True) / 7
    return (weight / step).round() * step


def test_rounding_has_a_scale_for_each_group_of_a_row() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, scores.GROUP + 5).double()
    weight[:, -1] = 100.0
    lost = scores.rounding(weight)
    assert lost.shape == weight.shape
    torch.testing.assert_close(lost[:, : scores.GROUP], rounded(weight[:, : scores.GROUP]) - weight[:, : scores.GROUP])
    assert float(lost[:, : scores.GROUP].abs().max()) < 0.3 < float(lost[:, scores.GROUP : -1].abs().max())


def test_movement_is_that_of_gradient_descent_and_leaves_the_model_as_it_was() -> None:
    expected = {"layers.0": torch.zeros(2, 3).double(), "layers.1": torch.zeros(2, 2).double()}
    trained = model()
    for x, at in BATCHES:
        trained.zero_grad()
        trained(x, at).backward()
        for path, module in trained.named_modules():
            if isinstance(module, nn.Linear):
                assert module.weight.grad is not None
                expected[path] -= module.weight.grad * module.weight.detach()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter -= scores.MOVEMENT_RATE * parameter.grad  # type: ignore[operator]
    base, before = model(), model().state_dict()
    tensors = score(base, BATCHES, "movement", loss=lambda m, b: m(*b), target_modules=["0", "1"]).tensors
    for path, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[path].float(), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "fisher", "movement"])
def test_rows_and_weights_have_the_sum_of_their_entries(criterion: str) -> None:
    each = found(criterion)
    for path, rows in found(criterion, level="neuron").items():
        torch.testing.assert_close(rows, each[path].sum(-1))
    for path, whole in found(criterion, level="module").items():
        torch.testing.assert_close(whole, each[path].sum())


def test_means_are_by_entry_and_over_layers() -> None:
    made = score(model(), BATCHES, "fisher", loss=lambda m, b: m(*b), target_modules=["0", "1"])
    assert made.modules() == pytest.approx({path: tensor.mean().item() for path, tensor in made.tensors.items()})
    two = Scores("snip", "module", {"h.0.a": torch.tensor(6.0), "h.0.b": torch.tensor(2.0), "x": torch.tensor(1.0)},
                 {"h.0.a": 2, "h.0.b": 6, "x": 1}, 1, {})  # fmt: skip
    assert two.layers() == {0: 1.0, None: 1.0}
    assert layer_and_name("encoder.layer.11.mlp.0.up") == (11, "mlp.0.up")


def test_one_dense_gradient_is_held_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    rule = scores.CRITERIA["fisher"]

    def watched(gradient: Tensor) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(gradient))
        most = max(most, sum(ref() is not None for ref in alive))
        return gradient.square()

    batch = {"input_ids": tokens(), "labels": tokens()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scores.CRITERIA, "fisher", scores.Criterion(rule.score, watched, True, True))
        made = score(llama(), [batch], "fisher", level="module")
    assert len(alive) == 3 * len(made.tensors) == 3 * 14  # of each example, of each weight
    assert most == 1


def test_scores_above_an_adapter_are_those_of_the_adapted_weights() -> None:
    batch = {"input_ids": tokens(), "labels": tokens()}
    adapted = veneer.get_peft_model(llama(), "lora:r=4,target_modules=[q_proj,up_proj]")
    randomise(adapted)
    alone = score(adapted, [batch], "snip").tensors
    above = score(adapted, [batch], "snip", above="default").tensors
    merged = adapted.merge_and_unload()
    expected = score(merged, [batch], "snip").tensors
    assert above.keys() == expected.keys() == alone.keys()
    # The weight itself is read from the base: what is weighed is the gradient, of the adapted model.
    path = "model.layers.1.self_attn.k_proj"
    torch.testing.assert_close(above[path], expected[path], atol=1e-6, rtol=1e-3)
    assert not torch.allclose(alone[path], expected[path], rtol=1e-2)


def saved(tmp_path: Path, **how: Any) -> Path:
    file = tmp_path / "scores.safetensors"
    score(llama(), [{"input_ids": tokens(), "labels": tokens()}], "fisher", **how).save(file)
    return file


def choosing(base: nn.Module, file: Path, **settings: Any) -> veneer.PeftModel:
    config = SparseConfig(**{"criterion": "fisher", "scope": "model", **settings}, scores=str(file))
    adapted = veneer.get_peft_model(base, config)
    veneer.prepare(adapted)
    return adapted


def test_scores_from_a_file_choose_what_fresh_ones_choose(tmp_path: Path) -> None:
    batch = {"input_ids": tokens(), "labels": tokens()}
    fresh = veneer.get_peft_model(llama(), "fish_mask:density=0.02")
    veneer.prepare(fresh, [batch])
    read = choosing(llama(), saved(tmp_path), density=0.02)
    ours, theirs = (veneer.get_peft_model_state_dict(m) for m in (fresh, read))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    randomise(read)
    read.save_pretrained(tmp_path / "adapter")
    (tmp_path / "scores.safetensors").unlink()  # what was chosen stands in the adapter
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(loaded(tokens()).logits, read.eval()(tokens()).logits)


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseMismatchError, match="of another model: its weights differ by"):
        choosing(llama(seed=1), saved(tmp_path))
    with pytest.raises(ConfigError, match=r"no scores for bert\.encoder"):
        choosing(bert(), saved(tmp_path))
    with pytest.raises(BaseMismatchError, match="in shape"):
        choosing(llama(intermediate_size=64), saved(tmp_path))


def test_scores_that_do_not_fit_the_method_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="by fisher, and the method says criterion='snip'"):
        choosing(llama(), saved(tmp_path), criterion="snip")
    with pytest.raises(ConfigError, match="one for each module, and one for each parameter is needed"):
        choosing(llama(), saved(tmp_path, level="module"))
    with pytest.raises(ConfigError, match=r"no scores for model\.layers\.0\.self_attn\.k_proj"):
        choosing(llama(), saved(tmp_path, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="LtSftConfig: scores"):
        veneer.parse_method("lt_sft:scores=a.safetensors")


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    made = score(llama(), [{"input_ids": tokens(), "labels": tokens()}] * 2, "snip", level="neuron")
    made.save(tmp_path / "scores.safetensors")
    read = Scores.load(tmp_path / "scores.safetensors")
    assert list(read.tensors) == list(made.tensors)
    assert all(torch.equal(read.tensors[path], tensor) for path, tensor in made.tensors.items())
    assert (read.criterion, read.level, read.batches, read.sizes, read.base) == (
        "snip", "neuron", 2, made.sizes, made.base,
    )  # fmt: skip


def test_files_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        choosing(llama(), tmp_path / "none.safetensors")
    adapted = veneer.get_peft_model(llama(), "lora:r=2")
    adapted.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no scores"):
        Scores.load(tmp_path / "adapter_model.safetensors")
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        Scores.load(file)
    broken = Scores("fisher", "module", {"a": torch.tensor(float("nan"))}, {"a": 1}, 1, {})
    broken.save(file)
    with pytest.raises(CheckpointError, match="the score of a is not a number"):
        Scores.load(file)


def test_what_cannot_be_scored_says_why() -> None:
    batch = {"input_ids": tokens(), "labels": tokens()}
    with pytest.raises(ConfigError, match=r"Unknown criterion 'fischer'\. Did you mean 'fisher'"):
        score(llama(), [batch], "fischer")
    with pytest.raises(ConfigError, match="level='layer'"):
        score(llama(), [batch], "fisher", level="layer")  # type: ignore[arg-type]
    for criterion in ("fisher", "movement"):
        with pytest.raises(StateError, match="no batch"):
            score(llama(), [], criterion)
    base = llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(StateError, match=r"fisher score of .* is not a number"):
        score(base, [batch], "fisher")
    with pytest.raises(StateError, match="magnitude score"):
        score(base, criterion="magnitude")
    assert not list(adapters_of(base, "scored"))  # nothing is left on it
