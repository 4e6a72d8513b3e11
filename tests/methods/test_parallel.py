"""Parallel adapters against values computed by hand, and the count of the paper."""

from __future__ import annotations

import copy

import torch
import transformers as T
from torch import nn

from tiny import bert, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of

SETTINGS = [{"reduction": 2, "scaling": 4.0}, {"bottleneck_size": 3, "scaling": "learned", "non_linearity": "gelu"}]


def test_the_formula() -> None:
    layer = nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    model = get_peft_model(nn.Sequential(layer), "scaled_parallel:target_modules=['0'],bottleneck_size=1")
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[2.0, -1.0]]))
        adapter.down.bias.copy_(torch.tensor([1.0]))
        adapter.up.weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
        adapter.up.bias.copy_(torch.tensor([0.0, 0.5, 0.0]))
    # x = (3, 1): F = (3, 2, 4); relu(6 - 1 + 1) = 6; up gives (6, .5, -6); 4 of it.
    x = torch.tensor([[3.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
    assert torch.equal(model(x), torch.tensor([[27.0, 4.0, -20.0], [0.0, 12.0, 5.0]], dtype=torch.float64))


def test_it_stands_beside_a_feed_forward_part_that_is_no_module() -> None:
    """Of BERT: what the block's two projections start from, and before the residual sum and norm."""
    model = get_peft_model(bert().double(), "parallel:bottleneck_size=2")
    blocks = copy.deepcopy(model).unload().bert.encoder.layer
    adapters = [a for _, a in adapters_of(model, "default") if hasattr(a, "up")]
    for adapter in adapters:
        nn.init.normal_(adapter.up.weight)
    seen: dict[str, torch.Tensor] = {}
    block = model.get_base_model().bert.encoder.layer[1]
    block.attention.register_forward_hook(lambda m, a, y: seen.update(x=y[0]))
    block.register_forward_hook(lambda m, a, y: seen.update(y=y[0] if isinstance(y, tuple) else y))
    model(tokens())
    x, frozen, adapter = seen["x"], blocks[1], adapters[1]
    inner = adapter.up(torch.relu(adapter.down(x)))
    expected = frozen.output.LayerNorm(frozen.output.dense(frozen.intermediate(x)) + inner + x)
    torch.testing.assert_close(seen["y"], expected)


def test_the_share_of_the_paper() -> None:
    """He et al. 2022, table 3: 2.4% of BART-large with size 200 at the feed-forward parts."""
    sizes = {"d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096}
    with torch.device("meta"):
        base = T.BartForConditionalGeneration(T.BartConfig(**sizes, decoder_ffn_dim=4096))
        total = sum(p.numel() for p in base.parameters())
        model = get_peft_model(base, "par_bn:bottleneck_size=200", low_cpu_mem_usage=True)
    trained = model.get_nb_trainable_parameters()[0]
    assert trained == 24 * (2 * 1024 * 200 + 1024 + 200)
    assert round(100 * trained / total, 1) == 2.4
