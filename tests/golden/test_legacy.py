"""Adapters of older versions and of other libraries, and what those libraries compute with them.

The files lie in `legacy/<case>/`, with the outputs in `logits.json`. They are written by the functions below, which say
for each layout what its tensors are and, by weights changed by hand, what they do. To write them again:

    VENEER_WRITE_GOLDEN=1 python -m pytest tests/golden/test_legacy.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer import LoraConfig, PeftConfig, PeftModel, legacy
from veneer.cli import main
from veneer.commands.inspection import inspect_adapter
from veneer.errors import CheckpointError, ConfigError

HERE = Path(__file__).parent / "legacy"
Config = dict[str, Any]
Tensors = dict[str, Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(4, 12)
        self.o_proj = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, -1)
        return self.o_proj(torch.tanh(q * k) + v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.down(torch.relu(self.up(x)))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    """A small decoder-like model with a head, named as transformers names them."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(numbers(*parameter.shape, seed=number))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.model(ids).mean(1))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that are neither random nor alike."""
    count = int(torch.tensor(shape).prod())
    steps = torch.arange(count, dtype=torch.float32) * (3 + 2 * seed) + seed
    return ((steps % 13 - 6) / 16).view(shape)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(10).view(2, 5) % 7)


def changed(changes: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """Outputs of the model with these parameters changed."""
    model = Net()
    with torch.no_grad():
        for name, change in changes.items():
            parameter = model.get_parameter(name)
            parameter.copy_(change(parameter))
    return logits(model)


def weight(path: str) -> str:
    return f"model.layers.{path}.weight"


PEFT: Config = {  # what peft 0.3 wrote
    "base_model_name_or_path": "some/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 5,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["o_proj", "up"],
    "task_type": None,
}
PATHS = ["0.attn.o_proj", "1.attn.o_proj", "0.up", "1.up"]
SIZES = {"o_proj": (4, 4), "up": (4, 6), "down": (6, 4), "c_attn": (4, 12)}


def factors(path: str, rank: int = 2, seed: int = 3) -> tuple[Tensor, Tensor]:
    inputs, outputs = SIZES[path.rpartition(".")[2]]
    return numbers(rank, inputs, seed=seed), numbers(outputs, rank, seed=seed + 1)


def peft_03(version: str = "") -> tuple[Config, Tensors, Tensor]:
    given: Tensors = {}
    changes = {}
    for number, path in enumerate(PATHS):
        down, up = factors(path, seed=number + 2)
        given |= {f"base_model.model.model.layers.{path}.lora_A{version}.weight": down}
        given |= {f"base_model.model.model.layers.{path}.lora_B{version}.weight": up}
        changes[weight(path)] = lambda w, d=down, u=up: w + 5 / 2 * u @ d
    return PEFT, given, changed(changes)


def peft_state_dict() -> tuple[Config, Tensors, Tensor]:
    """Cut out of a whole state dict: the adapter's name is in the keys."""
    return peft_03(".default")


def peft_02_merged() -> tuple[Config, Tensors, Tensor]:
    """LoRA on query and value of a merged projection, as peft had it at first; B was a grouped convolution."""
    down, up = numbers(4, 4, seed=1), numbers(8, 2, seed=2)
    config = {**PEFT, "enable_lora": [True, False, True], "merge_weights": False, "target_modules": ["c_attn"]}
    given, changes = {}, {}
    whole = torch.cat([up[:4] @ down[:2], torch.zeros(4, 4), up[4:] @ down[2:]])
    for layer in range(2):
        key = f"base_model.model.model.layers.{layer}.attn.c_attn"
        given |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up.unsqueeze(-1).clone()}
        changes[weight(f"{layer}.attn.c_attn")] = lambda w: w + 5 / 2 * whole
    return config, given, changed(changes)


def dora(w: Tensor, delta: Tensor, lengths: Tensor) -> Tensor:
    return lengths[:, None] * (w + delta) / (w + delta).norm(dim=1, keepdim=True)


def peft_dora() -> tuple[Config, Tensors, Tensor]:
    """The lengths once were a module of their own, with a `weight`."""
    config, given, _ = peft_03()
    changes = {}
    for number, path in enumerate(PATHS):
        key = f"base_model.model.model.layers.{path}"
        lengths = numbers(SIZES[path.rpartition(".")[2]][1], seed=number) + 1
        given[f"{key}.lora_magnitude_vector.weight"] = lengths
        delta = 5 / 2 * given[f"{key}.lora_B.weight"] @ given[f"{key}.lora_A.weight"]
        changes[weight(path)] = lambda w, d=delta, m=lengths: dora(w, d, m)
    return {**config, "use_dora": True}, given, changed(changes)


def bone() -> tuple[Config, Tensors, Tensor]:
    """Bone, which became MiSS: every r columns get the same block."""
    given, changes = {}, {}
    for number, path in enumerate(PATHS):
        inputs, outputs = SIZES[path.rpartition(".")[2]]
        block = numbers(2, outputs, seed=number + 1)
        given[f"base_model.model.model.layers.{path}.bone_block"] = block
        changes[weight(path)] = lambda w, b=block, n=inputs: w + b.T.repeat(1, n // 2)
    config = {
        "peft_type": "BONE",
        "r": 2,
        "init_weights": True,
        "bias": "bone_only",
        "target_modules": ["o_proj", "up"],
    }
    return {**config, "bias": "none"}, given, changed(changes)


def bone_bat() -> tuple[Config, Tensors, Tensor]:
    """Its other variant: block by block, W + W b + b."""
    given, changes = {}, {}
    for number, path in enumerate(PATHS):
        inputs, outputs = SIZES[path.rpartition(".")[2]]
        block = numbers(outputs // 2, 2, 2, seed=number + 1)
        given[f"base_model.model.model.layers.{path}.bone_block"] = block
        changes[weight(path)] = lambda w, b=block, m=outputs // 2, n=inputs // 2: bat(w, b, m, n)
    config = {"peft_type": "BONE", "r": 2, "init_weights": "bat", "target_modules": ["o_proj", "up"]}
    return config, given, changed(changes)


def bat(w: Tensor, block: Tensor, rows: int, columns: int) -> Tensor:
    """W_mn + W_mn b_m + b_m for every 2 x 2 block."""
    made = w.clone()
    for m in range(rows):
        for n in range(columns):
            piece = w[2 * m : 2 * m + 2, 2 * n : 2 * n + 2]
            made[2 * m : 2 * m + 2, 2 * n : 2 * n + 2] = piece + piece @ block[m] + block[m]
    return made


def mlx(kind: str = "lora", **parameters: Any) -> tuple[Config, Tensors, Tensor]:
    """mlx-lm: factors stand the other way round, and the scale is not divided by the rank."""
    given, changes = {}, {}
    scale = 1.5 * parameters.get("alpha", 2) / 2
    for number, path in enumerate(PATHS):
        down, up = factors(path, seed=number + 2)
        given |= {f"model.layers.{path}.lora_a": down.T.contiguous(), f"model.layers.{path}.lora_b": up.T.contiguous()}
        delta = scale * up @ down
        changes[weight(path)] = lambda w, d=delta: w + d
        if kind == "dora":
            lengths = given[f"model.layers.{path}.m"] = numbers(up.shape[0], seed=number) + 1
            changes[weight(path)] = lambda w, d=delta, m=lengths: dora(w, d, m)
    config = {
        "adapter_path": "adapters",
        "fine_tune_type": kind,
        "lora_parameters": {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": ["attn.o_proj", "up"], **parameters},
        "model": "some/base",
        "num_layers": 2,
    }
    return config, given, changed(changes)


def mlx_dora() -> tuple[Config, Tensors, Tensor]:
    return mlx("dora")


def mlx_alpha() -> tuple[Config, Tensors, Tensor]:
    """As earlier versions wrote it: times alpha over rank."""
    return mlx(alpha=8)


ADAPTERHUB: Config = {
    "config": {
        "alpha": 6,
        "architecture": "lora",
        "attn_matrices": ["q", "v"],
        "composition_mode": "add",
        "dropout": 0.0,
        "init_weights": "lora",
        "intermediate_lora": True,
        "leave_out": [],
        "output_lora": False,
        "r": 2,
        "selfattn_lora": True,
        "use_gating": False,
    },
    "config_id": "0123456789abcdef",
    "hidden_size": 4,
    "model_class": "NetAdapterModel",
    "model_name": "some/base",
    "model_type": "net",
    "name": "task",
    "version": "adapters.1.2.0",
}


def adapterhub() -> tuple[Config, Tensors, Tensor]:
    """AdapterHub: query and value of a merged projection, and the feed-forward part; from a headless model."""
    down, up = numbers(4, 4, seed=1), numbers(8, 2, seed=2)
    whole = torch.cat([up[:4] @ down[:2], torch.zeros(4, 4), up[4:] @ down[2:]])
    given, changes = {}, {}
    for layer in range(2):
        attention, up_path = f"layers.{layer}.attn.c_attn.loras.task", f"layers.{layer}.up.loras.task"
        a, b = factors("up", seed=layer + 5)
        given |= {
            f"{attention}.lora_A": down,
            f"{attention}.lora_B": up,
            f"{up_path}.lora_A": a,
            f"{up_path}.lora_B": b,
        }
        changes[weight(f"{layer}.attn.c_attn")] = lambda w: w + 3 * whole
        changes[weight(f"{layer}.up")] = lambda w, a=a, b=b: w + 3 * b @ a
    return ADAPTERHUB, given, changed(changes)


def adapterhub_ia3() -> tuple[Config, Tensors, Tensor]:
    """(IA)^3 there: outputs are scaled, that of the feed-forward part before its activation; times alpha."""
    own = {**ADAPTERHUB["config"], "composition_mode": "scale", "init_weights": "ia3", "r": 1, "alpha": 2}
    given, changes = {}, {}
    for layer in range(2):
        for path in (f"{layer}.attn.o_proj", f"{layer}.up"):
            scale = numbers(SIZES[path.rpartition(".")[2]][1], 1, seed=layer + 1) + 0.5
            given[f"model.layers.{path}.loras.task.lora_B"] = scale
            changes[weight(path)] = lambda w, s=scale: 2 * s * w
        changes[f"model.layers.{layer}.up.bias"] = lambda b, s=scale: 2 * s[:, 0] * b
    return {**ADAPTERHUB, "config": own}, given, changed(changes)


CASES: dict[str, tuple[Callable[[], tuple[Config, Tensors, Tensor]], str]] = {
    "peft_0.3": (peft_03, "adapter_model.safetensors"),
    "peft_state_dict": (peft_state_dict, "adapter_model.safetensors"),
    "peft_0.2_merged": (peft_02_merged, "adapter_model.safetensors"),
    "peft_dora": (peft_dora, "adapter_model.safetensors"),
    "peft_bone": (bone, "adapter_model.safetensors"),
    "peft_bone_bat": (bone_bat, "adapter_model.safetensors"),
    "mlx": (mlx, "adapters.safetensors"),
    "mlx_dora": (mlx_dora, "adapters.safetensors"),
    "mlx_alpha": (mlx_alpha, "adapters.safetensors"),
    "adapterhub": (adapterhub, "adapter.safetensors"),
    "adapterhub_ia3": (adapterhub_ia3, "adapter.safetensors"),
}


def write(folder: Path, case: str) -> Path:
    make, name = CASES[case]
    config, given, expected = make()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in given.items()}, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "logits.json").write_text(json.dumps(expected.tolist()) + "\n")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_writing(case: str, tmp_path: Path) -> None:
    """Elsewhere, unless the files are asked for; they say what is stored."""
    folder = write((HERE if "VENEER_WRITE_GOLDEN" in os.environ else tmp_path) / case, case)
    kept = HERE / case
    assert (folder / "adapter_config.json").read_text() == (kept / "adapter_config.json").read_text()
    ours, theirs = load_file(folder / CASES[case][1]), load_file(kept / CASES[case][1])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def expected(case: str) -> Tensor:
    return torch.tensor(json.loads((HERE / case / "logits.json").read_text()))


@pytest.mark.filterwarnings("ignore:.*ignored the unknown, empty setting")
@pytest.mark.parametrize("case", CASES)
def test_load(case: str) -> None:
    model = PeftModel.from_pretrained(Net(), HERE / case)
    torch.testing.assert_close(logits(model), expected(case), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected(case), logits(Net()), rtol=1e-2)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_beside_another_and_saved_again(case: str, tmp_path: Path) -> None:
    model = veneer.get_peft_model(Net(), LoraConfig(target_modules=["up"]))
    model.load_adapter(HERE / case, "old")
    model.set_adapter("old")
    torch.testing.assert_close(logits(model), expected(case), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path, selected_adapters=["old"])
    again = PeftModel.from_pretrained(Net(), tmp_path / "old")
    torch.testing.assert_close(logits(again), expected(case), rtol=1e-5, atol=1e-6)
    assert set(json.loads((tmp_path / "old" / "adapter_config.json").read_text())) >= {"peft_type", "peft_version"}


@pytest.mark.parametrize("case", CASES)
def test_inspected_and_converted_without_a_model(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_adapter(str(HERE / case))
    assert report.config == PeftConfig.from_pretrained(HERE / case)
    if case != "peft_0.2_merged":  # whose blocks are smaller than the matrix that they are written into
        assert report.parameters == sum(tensor.numel() for tensor in legacy.load(HERE / case)[1].values())
    assert main(["inspect", str(HERE / case)]) == 0
    assert str(report.config.peft_type) in capsys.readouterr().out
    assert main(["convert", str(HERE / case), "--output", str(tmp_path / "new")]) == 0
    assert "today's layout" in capsys.readouterr().out
    model = PeftModel.from_pretrained(Net() if case != "adapterhub" else Net().model, tmp_path / "new")
    if case != "adapterhub":  # saved from a model without a head
        torch.testing.assert_close(logits(model), expected(case), rtol=1e-5, atol=1e-6)


def test_pickles_are_refused_unless_asked_for(tmp_path: Path) -> None:
    for case, name in (("peft_0.3", "adapter_model.bin"), ("adapterhub", "pytorch_adapter.bin")):
        config, given, wanted = CASES[case][0]()
        folder = tmp_path / case
        folder.mkdir()
        torch.save(given, folder / name)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=rf"{name} is a pickle.*allow_pickle=True"):
            PeftModel.from_pretrained(Net(), folder)
        model = PeftModel.from_pretrained(Net(), folder, allow_pickle=True)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    assert main(["convert", str(tmp_path / "peft_0.3"), "--output", str(tmp_path / "new")]) == 1
    assert main(["convert", str(tmp_path / "peft_0.3"), "--output", str(tmp_path / "new"), "--allow-pickle"]) == 0


# loralib: a file of tensors, without a configuration


def loralib() -> tuple[Tensors, Tensor]:
    down, up = numbers(6, 4, seed=1), numbers(12, 2, seed=2)
    table = (numbers(2, 7, seed=3), numbers(4, 2, seed=4))
    a, b = factors("up", rank=3)
    given = {
        "model.layers.0.attn.c_attn.lora_A": down,
        "model.layers.0.attn.c_attn.lora_B": up,
        "model.embed_tokens.lora_A": table[0],
        "model.embed_tokens.lora_B": table[1],
        "model.layers.1.up.lora_A": a,
        "model.layers.1.up.lora_B": b,
    }
    whole = torch.cat([up[4 * i : 4 * i + 4] @ down[2 * i : 2 * i + 2] for i in range(3)])
    wanted = changed(
        {
            weight("0.attn.c_attn"): lambda w: w + 6 / 2 * whole,
            "model.embed_tokens.weight": lambda w: w + 6 / 2 * (table[1] @ table[0]).T,
            weight("1.up"): lambda w: w + 6 / 3 * b @ a,
        }
    )
    return given, wanted


def test_loralib(tmp_path: Path) -> None:
    given, wanted = loralib()
    kept = HERE / "loralib.safetensors"
    if "VENEER_WRITE_GOLDEN" in os.environ:
        save_file(given, kept)
    stored = load_file(kept)
    assert all(torch.equal(stored[key], given[key]) for key in given)
    model = PeftModel.from_pretrained(Net(), kept, config=LoraConfig(lora_alpha=6, task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    config: Any = model.peft_config["default"]
    assert (config.r, config.task_type) == (2, "CAUSAL_LM")
    assert config.rank_pattern == {"model.layers.0.attn.c_attn": 6, "model.layers.1.up": 3}
    torch.save(given, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=r"lora\.pt is a pickle"):
        PeftModel.from_pretrained(Net(), tmp_path / "lora.pt", config=LoraConfig(lora_alpha=6))
    model = PeftModel.from_pretrained(Net(), tmp_path / "lora.pt", config=LoraConfig(lora_alpha=6), allow_pickle=True)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)


def test_loralib_with_some_parts_of_a_projection() -> None:
    down, up = numbers(4, 4, seed=1), numbers(8, 2, seed=2)
    given = {"c_attn.lora_A": down, "c_attn.lora_B": up}
    config, tensors = legacy.from_loralib(given, LoraConfig(lora_alpha=3), enable_lora=[True, False, True])
    assert (config.r, config.lora_alpha) == (4, 6)
    whole = torch.cat([up[:4] @ down[:2], torch.zeros(4, 4), up[4:] @ down[2:]])
    key = "base_model.model.c_attn.lora_"
    torch.testing.assert_close(tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"], whole)
    with pytest.raises(CheckpointError, match=r"not those of 1 parts.*enable_lora"):
        legacy.from_loralib(given, LoraConfig(lora_alpha=3), enable_lora=[True, False, False])


# What has no exact counterpart


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"peft_type": "OFT", "r": 4}, "", r"OFT of peft 0\.13 or earlier"),
        (
            {"peft_type": "OFT", "oft_block_size": 2, "r": 0},
            "oft_r.default.weight",
            r"OFT as peft 0\.15 and",
        ),
        (
            {"peft_type": "OFT", "oft_block_size": 2, "use_cayley_neumann": True, "r": 0},
            "",
            r"before 0\.18, which",
        ),
        (
            {"peft_type": "OFT", "oft_block_size": 2, "use_cayley_neumann": True, "peft_version": "0.17.1", "r": 0},
            "",
            r"peft 0\.17\.1, which summed",
        ),
        ({"fine_tune_type": "full"}, "weight", r"fine_tune_type='full' of mlx-lm is not read"),
        (
            {"fine_tune_type": "lora", "lora_parameters": {}},
            "weight",
            r"holds layer\.weight, which are no tensors of LoRA",
        ),
        ({"lora_parameters": {}, "fine_tune_type": "lora"}, "experts", r"LoRA on (the )?experts"),
        ({"lora_parameters": {}, "fine_tune_type": "lora"}, "embedding", r"is an embedding.*tied head"),
        ({"config": {"architecture": None}}, "lora_A", r"architecture None of AdapterHub"),
        ({"config": {"architecture": "lora", "use_gating": True}}, "lora_A", r"use_gating=True"),
        ({"hello": 1}, "", r"names no peft_type, and is the configuration of no other library.*hello"),
    ],
)
def test_what_is_refused(values: Config, key: str, said: str, tmp_path: Path) -> None:
    given = {f"layer.{key or 'x'}": torch.ones(2, 2)}
    if key == "experts":
        given = {"layer.lora_a": torch.ones(3, 2, 4), "layer.lora_b": torch.ones(3, 4, 2)}
    if key == "embedding":
        given = {"wte.lora_a": torch.ones(7, 2), "wte.lora_b": torch.ones(2, 4)}
    for name in ("adapter_model", "adapters", "adapter"):
        save_file(given, tmp_path / f"{name}.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    model = Net()
    with pytest.raises(CheckpointError, match=said):
        PeftModel.from_pretrained(model, tmp_path)
    assert isinstance(model.model.layers[0].up, nn.Linear)


def test_what_loralib_does_not_say() -> None:
    given, _ = loralib()
    with pytest.raises(ConfigError, match=r"does not say how it is scaled.*lora_alpha"):
        legacy.from_loralib(given)
    with pytest.raises(CheckpointError, match=r"holds head\.bias, which are no tensors of LoRA"):
        legacy.from_loralib({**given, "head.bias": torch.ones(3)}, LoraConfig())
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(CheckpointError, match=r"0 is a convolution.*another rank"):
        legacy.from_loralib({"0.lora_A": torch.ones(6, 9), "0.lora_B": torch.ones(12, 6)}, LoraConfig(), convolution)


def test_files_that_lack_a_part(tmp_path: Path) -> None:
    for make, name in ((adapterhub, "adapter"), (mlx, "adapters"), (mlx_dora, "adapters")):
        config, given, _ = make()
        del given[sorted(given)[-1]]
        save_file({key: tensor.clone() for key, tensor in given.items()}, tmp_path / f"{name}.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"holds no layers\.|holds no model\.layers|is not of dora"):
            legacy.load(tmp_path)


def test_a_given_configuration_wins(tmp_path: Path) -> None:
    config, given, _ = peft_03()
    save_file(given, tmp_path / "adapter_model.safetensors")
    own = LoraConfig(r=2, lora_alpha=10, target_modules=["o_proj", "up"])
    doubled = PeftModel.from_pretrained(Net(), tmp_path, config=own)  # a folder without a configuration
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    same = PeftModel.from_pretrained(Net(), tmp_path, config=own)
    assert torch.equal(logits(doubled), logits(same))
    assert doubled.peft_config["default"].lora_alpha == 10  # type: ignore[attr-defined]
