"""SSF against its formula, and the count of the paper."""

from __future__ import annotations

import torch
import transformers as T
from torch import nn

from tiny import bert, llama, randomise
from veneer import get_peft_model
from veneer.adapted import adapters_of

SETTINGS = [{}, {"init_std": 0.0}]


def test_the_formula() -> None:
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    model = get_peft_model(nn.Sequential(layer), "ssf:target_modules=['0']")
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.scale.copy_(torch.tensor([2.0, -1.0]))
        adapter.offset.copy_(torch.tensor([0.5, 3.0]))
    # x = (1, 2): y = (6, 1); scaled (12, -1); moved (12.5, 2).
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert model(x).tolist() == [[12.5, 2.0]]
    merged = model.merge_and_unload()[0]
    assert merged.weight.tolist() == [[2.0, 4.0], [0.0, -1.0]]
    assert merged.bias.tolist() == [2.5, 4.0]


def test_the_count_of_the_paper() -> None:
    """Table 1: 0.28M parameters on CIFAR-100 with ViT-B/16; its head of 100 classes has 76,900 of them."""
    with torch.device("meta"):
        base = T.ViTForImageClassification(T.ViTConfig(num_labels=100))
        config = "ssf:task_type=SEQ_CLS"
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    trained = model.get_nb_trainable_parameters()[0]
    assert trained == 12 * 2 * (768 * 6 + 768 + 3072) + 2 * 768 * 2 + 76_900
    assert f"{trained / 1e6:.2f}" == "0.28"


def test_default_places() -> None:
    paths = {w.path for w, _ in adapters_of(get_peft_model(bert(), "ssf:task_type=SEQ_CLS"), "default")}
    inner = {p for p in paths if p.startswith("bert.encoder.layer.0.")}
    assert len(inner) == 8
    assert "bert.embeddings.LayerNorm" in paths
    paths = {w.path for w, _ in adapters_of(get_peft_model(llama(), "ssf"), "default")}
    assert "lm_head" not in paths
    assert {"model.norm", "model.layers.1.mlp.up_proj"} <= paths


def test_a_norm_without_a_bias_is_scaled_alone() -> None:
    model = get_peft_model(llama(), "ssf:target_modules=[norm]")
    ((_, adapter),) = adapters_of(model, "default")
    assert set(adapter.to_file()) == {"scale"}
    randomise(model)
    x = torch.tensor([[5, 6, 7]])
    expected = model(x).logits
    torch.testing.assert_close(model.merge_and_unload()(x).logits, expected)
