"""Compacter against Kronecker products that are formed, and the counts of the paper."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from tiny import bert, llama, randomise
from veneer import get_peft_model, parse_method
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.compacter import KroneckerLinear

SETTINGS = [{"bottleneck_size": 4, "terms": 2}, {"bottleneck_size": 2, "terms": 2, "non_linearity": "tanh"}]


def test_the_product_is_that_of_the_formed_matrix() -> None:
    torch.manual_seed(0)
    layer = KroneckerLinear(6, 9, 3).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    rule, x = torch.randn(3, 3, 3, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    weight = sum(torch.kron(rule[i], torch.outer(layer.s[i], layer.t[i])) for i in range(3))
    torch.testing.assert_close(layer(x, rule), x @ weight.T + layer.bias)


@pytest.mark.parametrize(("method", "share"), [("compacter", 0.073), ("compacter++", 0.047)])
def test_the_share_of_the_paper(method: str, share: float) -> None:
    """Table 2 of the paper, on T5-base: bottleneck 24, n = 4, norms counted."""
    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        base = T.T5ForConditionalGeneration(T.T5Config(**sizes))
        total = sum(p.numel() for p in base.parameters())
        model = get_peft_model(base, f"{method}:bottleneck_size=24,train_norms=true", low_cpu_mem_usage=True)
    trained = model.get_nb_trainable_parameters()[0]
    places = 48 if method == "compacter" else 24
    assert trained == places * (3 * (768 + 24)) + 4**3 + 62 * 768
    assert round(100 * trained / total, 3) == share


def test_the_rule_is_one_for_all_and_saved_once() -> None:
    model = get_peft_model(bert(), "compacter:bottleneck_size=8")
    adapters = [adapter for _, adapter in adapters_of(model, "default")]
    assert len({id(adapter.shared.compacter_rule) for adapter in adapters}) == 1
    randomise(model)
    names = [name for adapter in adapters for name in adapter.to_file()]
    assert set(names) == {f"adapter_{layer}.{name}" for layer in ("down", "up") for name in ("s", "t", "bias")}


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"o_proj: terms=4 does not divide 2, the width"):
        get_peft_model(llama(), "compacter:bottleneck_size=2")
    with pytest.raises(ConfigError, match=r"terms=0; a positive"):
        parse_method("compacter:terms=0")
