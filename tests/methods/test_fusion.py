"""AdapterFusion against the paper's formula, in its two stages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from contract.places import Spot
from tiny import bert, llama, randomise, tokens
from veneer.adapted import adapters_of
from veneer.errors import BaseMismatchError, CheckpointError, ConfigError, StateError, TargetError
from veneer.methods.fusion import FusionConfig

SETTINGS: list[dict[str, Any]] = [
    {"experts": {"a": "lora:r=2,init_lora_weights=false", "b": "lora:r=3,init_lora_weights=false,use_rslora=true"}}
]


def fits(settings: dict[str, Any], spot: Spot) -> bool:
    return spot.kind == "linear"


def trained(where: Path, **methods: str) -> dict[str, str]:
    """Folders of trained adapters."""
    for i, (name, method) in enumerate(methods.items()):
        model = veneer.get_peft_model(llama().double(), method)
        randomise(model, seed=i, scale=0.5)
        model.save_pretrained(where / name)
    return {name: str(where / name) for name in methods}


def test_tokens_attend_to_what_the_adapters_give(tmp_path: Path) -> None:
    folders = trained(tmp_path, a="pfeiffer:bottleneck_size=4", b="pfeiffer:bottleneck_size=3", c="pfeiffer")
    model = veneer.get_peft_model(llama().double(), FusionConfig(adapters=folders))
    randomise(model)
    (wrapper, fusion), *_ = adapters_of(model.get_base_model(), "default")
    x = torch.randn(2, 3, 48, dtype=torch.float64)
    y = wrapper.frozen_layer(x)
    added = []
    for folder in folders.values():  # W_up relu(W_down y + b_down) + b_up, from the file
        file, _ = veneer.checkpoint.read(folder)
        w = {k.rpartition("down_proj.")[2]: t for k, t in file.items() if "layers.0" in k}
        inner = torch.relu(y @ w["adapter_down.weight"].T + w["adapter_down.bias"])
        added.append(inner @ w["adapter_up.weight"].T + w["adapter_up.bias"])
    expected = y.clone()
    for row in range(2):
        for token in range(3):
            q = fusion.query @ y[row, token]
            shares = torch.stack([q @ (fusion.key @ z[row, token]) for z in added]).softmax(0)
            for share, z in zip(shares, added, strict=True):
                expected[row, token] += share * fusion.value @ z[row, token]
    torch.testing.assert_close(wrapper(x), expected, rtol=1e-10, atol=1e-10)


def test_the_loss_keeps_the_values_near_the_identity(tmp_path: Path) -> None:
    model = veneer.get_peft_model(
        llama().double(), FusionConfig(adapters=trained(tmp_path, a="pfeiffer", b="pfeiffer"))
    )
    ids = tokens()
    with torch.no_grad():
        plain = model(ids, labels=ids).loss
        for _, fusion in adapters_of(model.get_base_model(), "default"):
            assert torch.equal(fusion.value, torch.eye(32, dtype=torch.float64))
            fusion.value[0, 1], fusion.value[2, 2] = 3.0, 0.0  # 9 + 1 from the identity
    model.train()
    with_term, (config,) = model(ids, labels=ids).loss, model.peft_config.values()
    config.regularization = 0.0
    torch.testing.assert_close(with_term - model(ids, labels=ids).loss, torch.tensor(0.01 * 2 * 10.0).double())
    assert plain != with_term
    fused = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert fused == 2 * 3 * 32 * 32


def test_both_ways_to_fuse_are_the_same_and_need_nothing_else(tmp_path: Path) -> None:
    folders = trained(tmp_path, a="houlsby", b="houlsby:bottleneck_size=5")
    from_files = veneer.get_peft_model(llama().double(), f"fusion:adapters=[{folders['a']},{folders['b']}]")
    randomise(from_files)
    on_model = veneer.PeftModel.from_pretrained(llama().double(), folders["a"], "a")
    on_model.load_adapter(folders["b"], "b")
    veneer.fuse(on_model, ["a", "b"])
    assert on_model.active_adapters == ["fusion"]
    randomise(on_model)
    ids = tokens()
    expected = from_files.eval()(ids).logits
    assert torch.equal(on_model.eval()(ids).logits, expected)
    on_model.save_pretrained(tmp_path / "whole", selected_adapters=["fusion"])
    on_model.delete_adapter("a")
    on_model.delete_adapter("b")
    assert torch.equal(on_model(ids).logits, expected)
    for folder in folders.values():
        for file in Path(folder).iterdir():
            file.unlink()
    loaded = veneer.PeftModel.from_pretrained(llama().double(), tmp_path / "whole" / "fusion")
    assert torch.equal(loaded(ids).logits, expected)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **how), loaded.generate(ids, use_cache=False, **how))


def test_heads_that_were_trained_along_are_left_out(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        model = veneer.get_peft_model(bert(), {"name": "pfeiffer", "task_type": "SEQ_CLS"})
        randomise(model, seed)
        model.save_pretrained(tmp_path / name)
    both = {name: str(tmp_path / name) for name in "ab"}
    model = veneer.get_peft_model(bert(), FusionConfig(adapters=both, task_type="SEQ_CLS"))
    assert torch.equal(model.get_base_model().classifier.adapters["default"].module.weight, bert().classifier.weight)


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    folders = trained(tmp_path, a="pfeiffer", b="houlsby", v="vera:target_modules=[down_proj]", c="lora:bias=all")
    for names, error, message in (
        ("ab", TargetError, "is not adapted by all"),
        ("av", ConfigError, "is more than what stands at its places"),
        ("ac", ConfigError, "trains biases or bare parameters"),
        ("", ConfigError, "there is nothing to combine"),
    ):
        with pytest.raises(error, match=message):
            veneer.get_peft_model(llama().double(), FusionConfig(adapters={name: folders[name] for name in names}))
    with pytest.raises(BaseMismatchError, match="another base model"):
        veneer.get_peft_model(llama(seed=9).double(), FusionConfig(adapters={"a": folders["a"]}))
    with pytest.raises(CheckpointError):
        veneer.get_peft_model(llama().double(), FusionConfig(adapters=[str(tmp_path / "none")]))
    with pytest.raises(ConfigError, match="several folders alike"):
        FusionConfig(adapters=["x/run", "y/run"])
    with pytest.raises(ConfigError, match="write a list"):
        FusionConfig(adapters="x")
    with pytest.raises(ConfigError, match="regularization=-1"):
        FusionConfig(regularization=-1.0)
    model = veneer.get_peft_model(llama(), "pfeiffer", "a")
    with pytest.raises(ConfigError, match="two or more different ones"):
        veneer.fuse(model, ["a"])
    with pytest.raises(StateError, match="There is no adapter 'b'"):
        veneer.fuse(model, ["a", "b"])
    assert list(copy.deepcopy(model).peft_config) == ["a"]
