"""The ladder side network against the paper's formula; what it promises on models is in tests/contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import bert, llama, randomise, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, TargetError
from veneer.methods.ladder import prune

SETTINGS: list[dict[str, Any]] = []  # needs a whole model: see tests/contract/test_whole_models.py


def test_the_state_climbs_from_block_to_block() -> None:
    model = get_peft_model(bert().double(), "ladder:reduction=4").eval()
    randomise(model, scale=0.4)
    found = sorted(adapters_of(model.get_base_model(), "default"), key=lambda pair: pair[0].path)
    (first, a), (second, b) = found
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    h = [x, first.frozen_layer(x, None)]
    h.append(second.frozen_layer(h[1], None))
    state = x @ a.first.T
    for rung, given in ((a, h[1]), (b, h[2])):
        mu = torch.sigmoid(rung.gate / 0.1)
        state = rung.side(mu * state + (1 - mu) * given @ rung.down.T, None)
    expected = h[2] + state @ b.up.T
    torch.testing.assert_close(second(first(x, None), None), expected, rtol=1e-12, atol=1e-12)
    assert (a.up, b.first) == (None, None)


def test_side_blocks_start_as_the_weights_of_chosen_channels() -> None:
    model = get_peft_model(bert(), "ladder:reduction=4")
    for wrapper, rung in adapters_of(model.get_base_model(), "default"):
        channels = rung.shared.channels
        whole = wrapper.frozen_layer
        query = whole.attention.self.query.weight[channels][:, channels]
        assert torch.equal(rung.side.attention.self.query.weight, query)
        assert torch.equal(rung.side.output.LayerNorm.weight, whole.output.LayerNorm.weight[channels])
        norms = whole.intermediate.dense.weight.square().sum(1) + whole.intermediate.dense.bias.square()
        norms = norms + whole.output.dense.weight.square().sum(0)
        inner = norms.topk(12).indices.sort().values
        assert torch.equal(rung.side.intermediate.dense.weight, whole.intermediate.dense.weight[inner][:, channels])
        assert torch.equal(rung.down @ torch.arange(32.0), channels.float())
        again = type(whole)(rung.side.attention.self.config)
        prune(whole, again, channels, 32, heads=False)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), rung.side.parameters(), strict=True))


def test_heads_keep_their_width_where_positions_are_rotary() -> None:
    model = get_peft_model(llama(), "ladder:reduction=4")
    for wrapper, rung in adapters_of(model.get_base_model(), "default"):
        attention, whole = rung.side.self_attn, wrapper.frozen_layer.self_attn
        assert (attention.head_dim, attention.q_proj.weight.shape, attention.k_proj.weight.shape) == (8, (8, 8), (8, 8))
        norm, frozen = rung.side.post_attention_layernorm, wrapper.frozen_layer.post_attention_layernorm
        assert torch.equal(norm.weight, frozen.weight[rung.shared.channels])
        assert torch.equal(attention.o_proj.weight, whole.o_proj.weight[rung.shared.channels][:, :8])
        assert torch.equal(attention.q_proj.weight, whole.q_proj.weight[:8][:, rung.shared.channels])
    # A block: four projections and three of the feed-forward part, two norms; D, gate. Then D_0 and U.
    block = 4 * 8 * 8 + 3 * 8 * 12 + 2 * 8 + 8 * 32 + 1
    assert model.get_nb_trainable_parameters()[0] == 2 * block + 2 * 8 * 32


def test_some_blocks_alone_can_have_it() -> None:
    model = get_peft_model(llama(num_hidden_layers=3), "ladder:target_modules=[model.layers.1,model.layers.2]").eval()
    randomise(model)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **how), model.generate(tokens(), use_cache=False, **how))


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("ladder:reduction=0", ConfigError, "reduction=0"),
        ("ladder:layers_to_transform=[1]", ConfigError, "name blocks in target_modules"),
        ("ladder:target_modules=[q_proj]", TargetError, "q_proj is a Linear"),
        ("ladder:target_modules=[mlp]", TargetError, "is no transformer block"),
    ],
)
def test_what_has_no_side_network_is_refused(method: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(llama(), method)
