"""Arrow and GenKnowSub against the formula and peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from parity.families import FAMILIES
from parity.oracle import output, peft_says
from tiny import llama, randomise, tokens
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, StateError, TargetError, UnsupportedError
from veneer.methods.arrow import ArrowConfig

SETTINGS: list[dict[str, Any]] = []  # there is nothing to choose from on a model without other adapters
RANK = 3


def folders(where: Path, count: int, family: str = "llama", seed: int = 0, **settings: Any) -> list[str]:
    """Trained adapters, each with one singular value that is far above the others, as peft's iteration needs it."""
    kind, found = FAMILIES[family], []
    for i in range(seed, seed + count):
        values = {"r": RANK, "lora_alpha": 3 + i, "target_modules": kind.targets, **settings}
        model = veneer.get_peft_model(kind.model(), veneer.LoraConfig(**values))
        randomise(model, seed=i)
        with torch.no_grad():
            for _, adapter in adapters_of(model.get_base_model(), "default"):
                adapter.up[:, 1:] *= 0.05
        found.append(str(where / f"{i}"))
        model.save_pretrained(found[-1])
    return found


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"top_k": 2}),
        ("bert", {"top_k": 3, "router_temperature": 0.4}),
        ("llama", {"use_gks": True, "top_k": 2}),
    ],
)
def test_it_is_that_of_peft(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    kind = FAMILIES[family]
    plain = {"target_modules": [name for name in kind.targets if "." not in name]}  # peft keeps the last part alone
    tasks = folders(tmp_path, 3, family, **plain)
    general = folders(tmp_path, 2, family, seed=7, **plain) if "use_gks" in settings else None
    here = veneer.create_arrow_model(kind.model(), tasks, ArrowConfig(**settings), general)
    with peft_says():
        config = peft.ArrowConfig(**settings, rng_seed=0)
        there = peft.create_arrow_model(kind.model(), tasks, config, general, autocast_adapter_dtype=False).eval()
    x = kind.inputs()
    expected = output(there, x)
    torch.testing.assert_close(output(here, x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, output(kind.model(), x), rtol=1e-3, atol=1e-4)
    there.save_pretrained(str(tmp_path / "theirs"), selected_adapters=["arrow_router"])
    here.save_pretrained(tmp_path / "ours", selected_adapters=["arrow_router"])
    here.delete_adapter("arrow_router")
    here.load_adapter(tmp_path / "theirs" / "arrow_router", "arrow_router")
    here.set_adapter("arrow_router")
    torch.testing.assert_close(output(here, x), expected, rtol=1e-4, atol=1e-5)
    with peft_says():
        read = peft.PeftConfig.from_pretrained(str(tmp_path / "ours" / "arrow_router"))
    assert read.arrow_config.top_k == settings["top_k"]


def test_tokens_are_weighed_by_the_first_singular_vectors(tmp_path: Path) -> None:
    kind = FAMILIES["llama"]
    model = veneer.create_arrow_model(kind.model(), folders(tmp_path, 3), {"top_k": 2, "router_temperature": 0.5})
    (wrapper, _), *_ = adapters_of(model.get_base_model(), "arrow_router")
    experts = [wrapper.adapters[f"task_{i}"] for i in range(3)]
    x = torch.randn(4, 5, 32, dtype=torch.float64)
    expected = wrapper.frozen_layer(x)
    vectors = torch.stack([torch.linalg.svd(e.up @ e.down).Vh[0] for e in experts])
    for row in range(4):
        for token in range(5):
            similar = (vectors @ x[row, token]).abs()
            best = similar.topk(2).indices
            for share, i in zip((similar[best] / 0.5).softmax(0), best.tolist(), strict=True):
                expected[row, token] += share * experts[i].scaling * experts[i].up @ experts[i].down @ x[row, token]
    torch.testing.assert_close(wrapper(x), expected, rtol=1e-9, atol=1e-9)


def test_experts_stay_as_they_are_and_may_be_added(tmp_path: Path) -> None:
    kind, paths = FAMILIES["llama"], folders(tmp_path, 3)
    model = veneer.create_arrow_model(kind.model(), paths[:2], ArrowConfig(use_gks=True), paths[2:])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = kind.inputs()
    y = output(model, x)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(output(copy.deepcopy(model), x), y)
    model.load_adapter(paths[2], "task_2")
    assert not torch.allclose(output(model, x), y)
    names = ["arrow_router", "task_0", "__base__"]
    mixed = output(model, x, adapter_names=names)
    torch.testing.assert_close(mixed[0], output(model, x)[0])
    model.set_adapter("task_0")
    torch.testing.assert_close(mixed[1], output(model, x)[1])
    model.set_adapter("arrow_router")
    with pytest.raises(UnsupportedError, match="An Arrow router weighs its experts for each token"):
        model.merge_adapter()


def test_generation_is_the_same_with_and_without_a_cache(tmp_path: Path) -> None:
    model = veneer.create_arrow_model(
        llama(attention_bias=True, mlp_bias=True).double(), folders(tmp_path, 2), check_base=False
    )
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **how), model.generate(tokens(), use_cache=False, **how))


def test_what_cannot_be_routed_is_refused(tmp_path: Path) -> None:
    kind, paths = FAMILIES["llama"], folders(tmp_path, 1)
    model = veneer.get_peft_model(kind.model(), "arrow")
    with pytest.raises(StateError, match=r"has no LoRA adapter on its layer"):
        output(model, kind.inputs())
    with pytest.raises(ConfigError, match="general_adapter_paths is empty"):
        veneer.create_arrow_model(kind.model(), paths, ArrowConfig(use_gks=True))
    with pytest.raises(ConfigError, match="top_k=0"):
        ArrowConfig(top_k=0)
    other = folders(tmp_path / "other", 1, target_modules=["k_proj"])
    with pytest.raises(TargetError, match="are not on the same modules"):
        veneer.create_arrow_model(kind.model(), [*paths, *other])
    dora = folders(tmp_path / "dora", 1, use_dora=True)
    model = veneer.create_arrow_model(kind.model(), [*paths, *dora])
    with pytest.raises(UnsupportedError, match=r"'task_1' is another \(Dora\)"):
        output(model, kind.inputs())
