"""Bottleneck and ReFT adapters of AdapterHub, and what that library computes with them.

The files lie in `legacy/adapterhub_<case>/`, with the outputs in `logits.json`. They are written by the functions
below, which say for each method what its tensors are, and by hooks on a plain model what they do. To write them again:

    VENEER_WRITE_GOLDEN=1 python -m pytest tests/golden/test_adapterhub.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden.test_legacy import numbers
from veneer import PeftConfig, PeftModel
from veneer.cli import main
from veneer.errors import CheckpointError, VeneerWarning
from veneer.methods.direft import DiReFTConfig
from veneer.methods.noreft import NoReFTConfig

HERE = Path(__file__).parent / "legacy"
D, M = 8, 4
Tensors = dict[str, Tensor]
Case = tuple[dict[str, Any], Tensors, Callable[[nn.Module], None]]

BASE: dict[str, Any] = {  # what all bottleneck adapters say
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "init_weights": "bert",
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": True,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_dim": 4,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": D // M,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}


def fill(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            values = numbers(*parameter.shape, seed=number % 7)
            parameter.copy_(values + 1 if "orm" in name and name.endswith("weight") else values)
    return model.eval()


def bert() -> Any:
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return fill(T.BertForSequenceClassification(T.BertConfig(**sizes, vocab_size=11, max_position_embeddings=8)))


def gpt2() -> Any:
    return fill(T.GPT2Model(T.GPT2Config(n_embd=D, n_layer=2, n_head=2, vocab_size=11, n_positions=8)))


def run(model: nn.Module) -> Tensor:
    ids = torch.arange(10).view(2, 5) % 11
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
    # What stands at padding is nobody's affair.
    return output.logits if hasattr(output, "logits") else output.last_hidden_state * mask[..., None]


def bottleneck(seed: int) -> tuple[Tensors, Callable[[Tensor], Tensor]]:
    """Tensors of one place by their names there, and what it adds."""
    down, up = numbers(M, D, seed=seed), numbers(D, M, seed=seed + 1)
    biases = numbers(M, seed=seed + 2), numbers(D, seed=seed + 3)
    given = {"adapter_down.0.weight": down, "adapter_down.0.bias": biases[0]}
    given |= {"adapter_up.weight": up, "adapter_up.bias": biases[1]}
    return given, lambda h: torch.relu(h @ down.T + biases[0]) @ up.T + biases[1]


def at(path: str, given: Tensors) -> Tensors:
    return {f"{path}.{name}": tensor for name, tensor in given.items()}


def houlsby() -> Case:
    given: Tensors = {}
    hooks = []
    for layer in range(2):
        for part in ("attention.output", "output"):
            path = f"bert.encoder.layer.{layer}.{part}"
            own, branch = bottleneck(layer + len(part))
            given |= at(f"{path}.adapters.task", own)
            hooks.append((f"{path}.dense", branch))

    def change(model: nn.Module) -> None:
        for path, branch in hooks:
            model.get_submodule(path).register_forward_hook(lambda m, a, h, f=branch: h + f(h))

    return BASE, given, change


def pfeiffer() -> Case:
    """The bottleneck is given the norm's output, and what it adds goes in before the norm; from a headless model."""
    given: Tensors = {}
    branches = []
    for layer in range(2):
        own, branch = bottleneck(layer + 4)
        given |= at(f"encoder.layer.{layer}.output.adapters.task", own)
        branches.append(branch)

    def change(model: nn.Module) -> None:
        for layer, branch in enumerate(branches):
            norm = model.get_submodule(f"bert.encoder.layer.{layer}.output.LayerNorm")
            plain = norm.forward
            norm.forward = lambda u, f=branch, n=plain: n(u + f(n(u)))

    return {**BASE, "mh_adapter": False, "original_ln_before": True}, given, change


def parallel() -> Case:
    given: Tensors = {}
    branches = []
    for layer in range(2):
        own, branch = bottleneck(layer + 2)
        given |= at(f"bert.encoder.layer.{layer}.output.adapters.task", own)
        branches.append(branch)

    def change(model: nn.Module) -> None:
        for layer, branch in enumerate(branches):
            block = model.get_submodule(f"bert.encoder.layer.{layer}")
            seen: list[Tensor] = []
            block.intermediate.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
            block.output.dense.register_forward_hook(lambda m, a, h, s=seen, f=branch: h + 4 * f(s.pop()))

    return {**BASE, "mh_adapter": False, "is_parallel": True, "scaling": 4.0}, given, change


def compacter() -> Case:
    rule = numbers(4, 4, 4, seed=1)
    given: Tensors = {"bert.shared_parameters.task.phm_rule": rule}
    hooks = []
    for layer in range(2):
        for part in ("attention.output", "output"):
            factors = {
                "adapter_down.0.W_left": numbers(4, D // 4, 1, seed=layer + 1),
                "adapter_down.0.W_right": numbers(4, 1, M // 4, seed=layer + 2),
                "adapter_down.0.b": numbers(M, seed=3),
                "adapter_up.W_left": numbers(4, M // 4, 1, seed=layer + 3),
                "adapter_up.W_right": numbers(4, 1, D // 4, seed=layer + 4),
                "adapter_up.b": numbers(D, seed=5),
            }
            path = f"bert.encoder.layer.{layer}.{part}"
            given |= at(f"{path}.adapters.task", factors)
            hooks.append((f"{path}.dense", factors))

    def matrix(left: Tensor, right: Tensor) -> Tensor:
        return sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(4))  # type: ignore[return-value]

    def branch(h: Tensor, f: Tensors) -> Tensor:
        inner = h @ matrix(f["adapter_down.0.W_left"], f["adapter_down.0.W_right"]) + f["adapter_down.0.b"]
        return torch.relu(inner) @ matrix(f["adapter_up.W_left"], f["adapter_up.W_right"]) + f["adapter_up.b"]

    def change(model: nn.Module) -> None:
        for path, factors in hooks:
            model.get_submodule(path).register_forward_hook(lambda m, a, h, f=factors: h + branch(h, f))

    return {**BASE, "phm_layer": True}, given, change


def adapterplus() -> Case:
    given: Tensors = {}
    hooks = []
    for layer in range(2):
        own, branch = bottleneck(layer + 5)
        scale = numbers(D, seed=layer) + 1
        given |= at(f"bert.encoder.layer.{layer}.output.adapters.task", {**own, "scaling": scale})
        hooks.append((f"bert.encoder.layer.{layer}.output", branch, scale))

    def change(model: nn.Module) -> None:
        for path, branch, scale in hooks:
            model.get_submodule(path).register_forward_hook(lambda m, a, h, f=branch, s=scale: h + s * f(h))

    own = {"mh_adapter": False, "original_ln_before": True, "original_ln_after": False, "residual_before_ln": False}
    return {**BASE, **own, "scaling": "channel", "stochastic_depth": 0.1, "init_weights": "houlsby"}, given, change


def loreft() -> Case:
    """Two units, of which the second is for the last positions; the constraint as torch keeps it."""
    given: Tensors = {}
    edits = []
    for layer in range(2):
        units = []
        for unit in range(2):
            projection = nn.utils.parametrizations.orthogonal(nn.Linear(D, 2, bias=False))
            projection.weight = torch.linalg.qr(numbers(D, 2, seed=layer + unit + 1) + torch.eye(D, 2))[0].T
            source = {"learned_source.weight": numbers(2, D, seed=layer), "learned_source.bias": numbers(2, seed=unit)}
            own = {f"projection.{name}": tensor.clone() for name, tensor in projection.state_dict().items()}
            given |= at(f"bert.encoder.layer.{layer}.reft_layer.refts.task.units.{unit}", {**source, **own})
            units.append((projection.weight.detach(), *source.values()))
        edits.append(units)

    def edit(h: Tensor, unit: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        rows, weight, bias = unit
        return h + (h @ weight.T + bias - h @ rows.T) @ rows

    def change(model: nn.Module) -> None:
        for layer, units in enumerate(edits):

            def hook(m: nn.Module, a: Any, h: Any, units: Any = units) -> Any:
                x = h[0] if isinstance(h, tuple) else h
                y = x.clone()
                y[:, 0] = edit(x[:, 0], units[0])
                for row, length in enumerate((5, 3)):
                    y[row, length - 2 : length] = edit(x[row, length - 2 : length], units[1])
                return (y, *h[1:]) if isinstance(h, tuple) else y

            model.get_submodule(f"bert.encoder.layer.{layer}").register_forward_hook(hook)

    own = {"architecture": "reft", "dropout": 0.05, "layers": "all", "orthogonality": True, "r": 2, "dtype": None}
    own |= {"prefix_positions": 1, "suffix_positions": 2, "tied_weights": False, "non_linearity": None}
    return own, given, change


def decoder() -> Case:
    """Pfeiffer's on GPT-2: on the sum that the block ends with."""
    given: Tensors = {}
    branches = []
    for layer in range(2):
        own, branch = bottleneck(layer + 1)
        given |= at(f"transformer.h.{layer}.output_adapters.adapters.task", own)
        branches.append(branch)

    def change(model: nn.Module) -> None:
        for layer, branch in enumerate(branches):
            block = model.get_submodule(f"h.{layer}")
            block.register_forward_hook(
                lambda m, a, h, f=branch: (h[0] + f(h[0]), *h[1:]) if isinstance(h, tuple) else h + f(h)
            )

    return {**BASE, "mh_adapter": False, "original_ln_before": True}, given, change


CASES: dict[str, tuple[Callable[[], Case], Callable[[], Any]]] = {
    "houlsby": (houlsby, bert),
    "pfeiffer": (pfeiffer, bert),
    "parallel": (parallel, bert),
    "compacter": (compacter, bert),
    "adapterplus": (adapterplus, bert),
    "loreft": (loreft, bert),
    "decoder": (decoder, gpt2),
}


def write(folder: Path, case: str) -> Path:
    make, base = CASES[case]
    own, given, change = make()
    folder.mkdir(parents=True, exist_ok=True)
    model = base()
    values = {
        "config": own,
        "config_id": "0123456789abcdef",
        "hidden_size": D,
        "model_class": f"{type(model).__name__}",
        "model_name": "some/base",
        "model_type": model.config.model_type,
        "name": "task",
        "version": "adapters.1.2.0",
    }
    save_file({key: tensor.contiguous() for key, tensor in given.items()}, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    change(model)
    (folder / "logits.json").write_text(json.dumps(run(model).tolist()) + "\n")
    return folder


def kept(case: str) -> Path:
    return HERE / f"adapterhub_{case}"


@pytest.mark.parametrize("case", CASES)
def test_writing(case: str, tmp_path: Path) -> None:
    """Elsewhere, unless the files are asked for; they say what is stored."""
    folder = write(kept(case) if "VENEER_WRITE_GOLDEN" in os.environ else tmp_path, case)
    assert (folder / "adapter_config.json").read_text() == (kept(case) / "adapter_config.json").read_text()
    ours, theirs = (load_file(place / "adapter.safetensors") for place in (folder, kept(case)))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if "parametrizations" not in key:  # torch draws a part of these, and makes up for it in the other
            torch.testing.assert_close(tensor, theirs[key])


@pytest.mark.parametrize("case", CASES)
def test_load_and_save_again(case: str, tmp_path: Path) -> None:
    base = CASES[case][1]
    expected = torch.tensor(json.loads((kept(case) / "logits.json").read_text()))
    assert (expected - run(base())).abs().max() > 1e-3
    model = PeftModel.from_pretrained(base(), kept(case))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(run(again), expected, rtol=1e-4, atol=1e-5)
    assert PeftConfig.from_pretrained(kept(case)).peft_type == again.peft_config["default"].peft_type
    assert main(["inspect", str(kept(case))]) == 0


def test_pickles_are_refused_unless_asked_for(tmp_path: Path) -> None:
    torch.save(load_file(kept("pfeiffer") / "adapter.safetensors"), tmp_path / "pytorch_adapter.bin")
    (tmp_path / "adapter_config.json").write_text((kept("pfeiffer") / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match=r"pytorch_adapter\.bin is a pickle.*allow_pickle=True"):
        PeftModel.from_pretrained(bert(), tmp_path)
    model = PeftModel.from_pretrained(bert(), tmp_path, allow_pickle=True)
    expected = torch.tensor(json.loads((kept("pfeiffer") / "logits.json").read_text()))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


# Heads


def with_head(folder: Path, own: dict[str, Any], layers: list[int]) -> Path:
    write(folder, "houlsby")
    (folder / "head_config.json").write_text(json.dumps({"config": own, "name": "task"}))
    sizes = [D] * len(layers) + [2]
    tensors: Tensors = {}
    for place, inputs, outputs in zip(layers, sizes[:-1], sizes[1:], strict=True):
        tensors[f"heads.task.{place}.weight"] = numbers(outputs, inputs, seed=place + 1)
        tensors[f"heads.task.{place}.bias"] = numbers(outputs, seed=place + 2)
    save_file(tensors, folder / "model_head.safetensors")
    return folder


def test_a_head_that_the_model_has(tmp_path: Path) -> None:
    own = {"head_type": "classification", "num_labels": 2, "layers": 1, "use_pooler": True, "bias": True}
    folder = with_head(tmp_path, own, [1])
    model = PeftModel.from_pretrained(bert(), folder)
    plain = bert()
    with torch.no_grad():
        plain.classifier.weight.copy_(numbers(2, D, seed=2))
        plain.classifier.bias.copy_(numbers(2, seed=3))
    houlsby()[2](plain)
    torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].modules_to_save == ["classifier"]


def test_a_head_with_two_layers_is_that_of_roberta(tmp_path: Path) -> None:
    own = {"head_type": "classification", "num_labels": 2, "layers": 2, "use_pooler": False}
    folder = with_head(tmp_path, {**own, "activation_function": "tanh"}, [1, 4])
    with pytest.warns(VeneerWarning, match=r"left out: BertForSequenceClassification has no classifier\.dense\.bias"):
        model = PeftModel.from_pretrained(bert(), folder)
    expected = torch.tensor(json.loads((kept("houlsby") / "logits.json").read_text()))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    config = PeftConfig.from_pretrained(folder)
    assert config.modules_to_save == ["classifier"]  # type: ignore[attr-defined]


def test_a_head_that_is_none_here(tmp_path: Path) -> None:
    folder = with_head(tmp_path, {"head_type": "masked_lm", "layers": 2}, [0])
    with pytest.warns(VeneerWarning, match=r"left out: there is no such head in transformers \(head_type='masked_lm'"):
        PeftModel.from_pretrained(bert(), folder)


# What has no exact counterpart


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_gating": True}, r"use_gating=True of AdapterHub has no counterpart"),
        ({"inv_adapter": "nice"}, r"inv_adapter='nice' of AdapterHub has no"),
        ({"ln_before": True}, r"ln_before=True"),
        ({"phm_rank": 2}, r"phm_rank=2"),
        ({"original_ln_before": True, "residual_before_ln": "post_add"}, r"residual_before_ln='post_add'"),
        ({"original_ln_after": False}, r"original_ln_before=False, original_ln_after=False"),
    ],
)
def test_what_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path, "houlsby")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["config"] |= change
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=said):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_tensors_of_something_else(tmp_path: Path) -> None:
    for change, said in (
        ({"adapters.task.gate.weight": torch.ones(1)}, r"holds adapters\.task\.gate\.weight, which is no tensor"),
        ({"bert.encoder.layer.0.output.adapters.task.adapter_up.weight": None}, r"holds no adapter_up\.weight of"),
    ):
        write(tmp_path, "houlsby")
        given = {**load_file(tmp_path / "adapter.safetensors"), **change}
        save_file({k: v for k, v in given.items() if v is not None}, tmp_path / "adapter.safetensors")
        with pytest.raises(CheckpointError, match=said):
            PeftModel.from_pretrained(bert(), tmp_path)


def test_models_whose_places_are_not_known(tmp_path: Path) -> None:
    write(tmp_path, "decoder")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["model_type"] = "bart"
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"for 'bart' are not read; those for BERT"):
        PeftModel.from_pretrained(gpt2(), tmp_path)


def test_what_a_file_of_reft_does_not_say(tmp_path: Path) -> None:
    write(tmp_path, "loreft")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["config"]["orthogonality"] = False
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"of NoReFT or of DiReFT: AdapterHub does not save which"):
        PeftModel.from_pretrained(bert(), tmp_path)
    said = {"r": 2, "prefix_positions": 1, "suffix_positions": 2, "tied_weights": False, "ends_at_labels": False}
    kinds = (NoReFTConfig(**said), DiReFTConfig(**said))
    assert not torch.allclose(*(run(PeftModel.from_pretrained(bert(), tmp_path, config=kind)) for kind in kinds))
