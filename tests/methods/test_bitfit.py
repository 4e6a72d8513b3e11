"""BitFit against the paper: which parameters, how many, and what they do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tiny import bert, llama, randomise, tokens
from veneer import BitFitConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import UnsupportedError


def test_the_delta_is_added_to_the_bias() -> None:
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.copy_(torch.tensor([1.0, 2.0]))
    model = get_peft_model(nn.Sequential(layer), BitFitConfig(target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.delta.copy_(torch.tensor([10.0, 20.0]))
    x = torch.tensor([[5.0, 6.0]], dtype=torch.float64)
    assert torch.equal(model(x), torch.tensor([[16.0, 28.0]], dtype=torch.float64))
    assert torch.equal(model.merge_and_unload()[0].bias, torch.tensor([11.0, 22.0], dtype=torch.float64))


def test_by_default_every_bias_of_the_model_is_trained() -> None:
    model = bert()
    biases = sum(
        p.numel() for name, p in model.named_parameters() if name.endswith("bias") and "classifier" not in name
    )
    head = sum(p.numel() for p in model.classifier.parameters())
    adapted = get_peft_model(model, BitFitConfig(task_type="SEQ_CLS"))
    assert adapted.get_nb_trainable_parameters()[0] == biases + head


def test_the_papers_subset_of_query_and_intermediate_biases() -> None:
    # Section 4.1: b_q and b_m2 alone, about a half of a percent of the trained share of all biases.
    model = get_peft_model(bert(), BitFitConfig(target_modules=["query", "intermediate.dense"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * (32 + 48)


def test_a_model_without_biases_gets_one_on_every_linear_layer() -> None:
    model = get_peft_model(llama(), BitFitConfig())
    places = {w.path.rpartition(".")[2] for w, _ in adapters_of(model, "default")}
    assert places == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    randomise(model)
    x = tokens()
    expected = model(x).logits
    merged = model.merge_and_unload()
    assert merged.model.layers[0].self_attn.q_proj.bias is not None
    torch.testing.assert_close(merged(x).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_norm_without_a_place_for_a_bias_is_not_merged() -> None:
    model = get_peft_model(llama(), BitFitConfig(target_modules=["input_layernorm"]))
    with pytest.raises(UnsupportedError, match=r"input_layernorm.*LlamaRMSNorm has no place for a bias"):
        model.merge_adapter()
