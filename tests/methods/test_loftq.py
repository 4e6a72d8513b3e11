"""LoftQ against the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from veneer.adapted import adapters_of
from veneer.errors import CheckpointError, ConfigError, StateError
from veneer.inits.loftq import NORMAL_FLOAT, LoftQConfig, quantised
from veneer.methods.loftq import Loftq

SETTINGS = [
    {"r": 3, "lora_alpha": 7},
    {"r": 2, "lora_alpha": 3, "use_rslora": True, "loftq_config": {"loftq_bits": 8}},
    {"r": 2, "lora_alpha": 5, "loftq_config": {"loftq_iter": 3}, "lora_bias": True},
]


def on(layer: nn.Module, **settings: Any) -> tuple[PeftModel, Loftq]:
    model = get_peft_model(
        nn.Sequential(layer), LoraConfig(**{"init_lora_weights": "loftq", "target_modules": ["0"], **settings})
    )
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, Loftq)
    return model, adapter


def test_quantising_by_hand() -> None:
    row = torch.tensor([[2.0, -2.0, 0.0, 0.17, 1.3, -1.0]], dtype=torch.float64)
    by_hand = [min(NORMAL_FLOAT, key=lambda code, x=x: abs(code - x / 2)) * 2 for x in row[0].tolist()]
    torch.testing.assert_close(quantised(row, 4)[0].tolist(), by_hand)
    # 127 steps on either side of zero: 0.17 is 10.8 of them, 1.3 is 82.55.
    eighth = [2.0, -2.0, 0.0, 11 * 2 / 127, 83 * 2 / 127, -64 * 2 / 127]
    torch.testing.assert_close(quantised(row, 8)[0].tolist(), eighth)


def test_blocks_have_their_own_scale_and_quantising_twice_changes_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 20) * torch.linspace(0.01, 9, 10)[:, None]
    for bits in (4, 8):
        once = quantised(weight, bits)
        torch.testing.assert_close(quantised(once, bits), once)
    flat, blocks = weight.flatten(), quantised(weight, 4).flatten()
    for start in range(0, 200, 64):
        part = slice(start, start + 64)
        assert blocks[part].abs().max() == flat[part].abs().max()
        assert len(blocks[part].unique()) <= 16
    assert not quantised(torch.zeros(3, 5), 4).any()
    assert quantised(torch.zeros(3, 5), 8).isfinite().all()


def error(model: PeftModel, weight: Tensor, adapter: Loftq) -> float:
    return (adapter.adapt(weight) - weight).norm().item()


def test_the_start_is_nearer_to_the_weight_than_quantising_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30).double()
    weight = layer.weight.detach().clone()
    lost = (quantised(weight, 4) - weight).norm().item()
    errors = []
    for iterations in (1, 3):
        model, adapter = on(layer, r=5, lora_alpha=11, loftq_config={"loftq_iter": iterations})
        errors.append(error(model, weight, adapter))
        s = torch.linalg.svdvals(weight - adapter.frozen(weight))
        # What is left are the singular values of the lost part beyond the rank.
        assert errors[-1] == pytest.approx(s[5:].norm().item(), rel=1e-9)
        assert torch.equal(model.unload()[0].weight, weight)
    assert errors[1] < errors[0] < 0.9 * lost


def test_a_file_without_what_came_before_is_completed(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    layer = nn.Linear(40, 30).double()
    model, _ = on(layer, r=5, lora_alpha=11, loftq_config=LoftQConfig(loftq_iter=2))
    x = torch.randn(3, 40, dtype=torch.float64)
    expected = model(x)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".0.")[2] for key in tensors} == {"lora_A.weight", "lora_B.weight", "start_A", "start_B"}
    save_file({k: v for k, v in tensors.items() if "start" not in k}, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(loaded(x), expected)


@pytest.mark.parametrize(
    ("given", "message"), [({"loftq_bits": 3}, "loftq_bits=3; one of 4, 8"), ({"loftq_iter": 0}, "loftq_iter=0")]
)
def test_settings_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(init_lora_weights="loftq", loftq_config=given)


def test_what_quantising_lost_is_put_into_an_adapter(tmp_path: Any) -> None:
    from tiny import llama

    model = llama()
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(quantised(parameter, 4))
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules="all-linear"))
    asked: list[str] = []

    def keep(_: PeftModel, name: str) -> bool:
        asked.append(name)
        return not name.endswith("k_proj")

    replace_lora_weights_loftq(adapted, tmp_path, callback=keep)
    assert len(asked) == 14
    for wrapper, adapter in adapters_of(adapted.get_base_model(), "default"):
        held = wrapper.frozen_layer.weight
        lost = before[f"{wrapper.path}.weight"] - held
        left = (lost - (adapter.adapt(held) - held)).norm().item()
        taken_back = wrapper.path.endswith("k_proj")
        expected = lost.norm() if taken_back else torch.linalg.svdvals(lost)[4:].norm()
        assert left == pytest.approx(expected.item(), rel=1e-3)
    with pytest.raises(StateError, match="the model is not quantised"):
        replace_lora_weights_loftq(get_peft_model(llama(), LoraConfig(r=2)), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        replace_lora_weights_loftq(adapted, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"Name it in model_path"):
        replace_lora_weights_loftq(adapted)


def test_quantising_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    torch.testing.assert_close(quantised(weight, 4), dequantize_4bit(codes, state), rtol=1e-6, atol=1e-7)


def test_a_4_bit_model_gets_back_what_it_has_lost(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import tiny

    tiny.llama(hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype="float32"),
        LoraConfig(r=16, target_modules=["q_proj", "down_proj"]),
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").get_submodule("model.layers.0")
    wrappers = model.get_base_model().get_submodule("model.layers.0")

    def lost(path: str) -> float:
        wrapper, weight = wrappers.get_submodule(path), whole.get_submodule(path).weight
        with torch.no_grad():
            return float((wrapper.adapters["default"].adapt(wrapper.site.read()) - weight).norm() / weight.norm())

    before = {path: lost(path) for path in ("self_attn.q_proj", "mlp.down_proj")}
    replace_lora_weights_loftq(model, tmp_path)
    for path, share in before.items():
        assert 0.05 < share < 0.15
        assert lost(path) < 0.8 * share
