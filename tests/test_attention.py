"""The hook around a model's attention: layouts, masks within rows, and what it passes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils

import tiny
from veneer import attention
from veneer.attention import CAUSAL, Packing, RowMask, Rows
from veneer.errors import UnsupportedError

REAL = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]]).bool()


def test_rows_are_packed_by_length_and_put_back() -> None:
    rows = Rows(REAL)
    x = torch.arange(20.0).view(5, 4, 1).requires_grad_()
    packed = rows.pack(x)
    assert packed.flatten().tolist() == [5, 0, 1, 2, 12, 14, 15, 16, 17, 18, 19]
    assert rows.lengths == [1, 3, 3, 4]
    assert rows.bounds.tolist() == [0, 1, 4, 7, 11]
    assert rows.bounds.dtype == torch.int32
    back = rows.unpack(packed)
    assert torch.equal(back, x * REAL[..., None])
    back.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x * REAL[..., None])


def test_what_is_alike_for_all_rows_is_packed_for_each() -> None:
    rows = Rows(REAL)
    positions = torch.arange(4)[None]
    assert rows.pack(positions).tolist() == [[1, 0, 1, 2, 0, 2, 3, 0, 1, 2, 3]]
    assert rows.pack_once(positions) is rows.pack_once(positions)


def _mask(rule: Any, **more: Any) -> RowMask:
    sizes = {"batch_size": 5, "q_length": 4, "kv_length": 4, "q_offset": 0, "kv_offset": 0}
    return RowMask(Rows(REAL), {**sizes, "mask_function": rule, "attention_mask": REAL, **more})


def _window(size: int) -> Any:
    return masking_utils.sliding_window_causal_mask_function(size)


def test_masks_within_rows_are_given_in_their_simplest_form() -> None:
    assert _mask(masking_utils.bidirectional_mask_function).within == [None, None, None]
    assert _mask(masking_utils.causal_mask_function).within == [CAUSAL, CAUSAL, CAUSAL]
    assert _mask(_window(4)).within == [None, CAUSAL, CAUSAL]  # wider than the rows


@pytest.mark.parametrize("vmap", [False, True])
def test_a_window_is_that_of_the_padded_row(vmap: bool) -> None:
    one, three, four = _mask(_window(2), use_vmap=vmap).within
    assert one is None
    assert isinstance(three, Tensor)
    assert isinstance(four, Tensor)
    assert three.shape == (2, 1, 3, 3)
    # A gap within the row counts: its third token stands two places after the first.
    assert three[:, 0].int().tolist() == [[[1, 0, 0], [1, 1, 0], [0, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]]]
    assert four[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_what_a_mask_is_computed_with_is_refused() -> None:
    mask: Any = _mask(masking_utils.causal_mask_function)
    with pytest.raises(UnsupportedError, match="computes with its attention mask itself"):
        torch.add(torch.ones(2), mask)


def test_masks_are_those_of_packed_rows_only_where_it_is_asked_for() -> None:
    name = attention.hooked("sdpa")
    make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
    given = {
        "batch_size": 5, "q_length": 4, "kv_length": 4, "q_offset": 0, "kv_offset": 0, "attention_mask": REAL,
        "mask_function": masking_utils.causal_mask_function, "device": "cpu",
    }  # fmt: skip
    usual = make(**given)
    assert usual.shape == (5, 1, 4, 4)
    with Packing(lambda real: True):
        first, second = make(**given), make(**{**given, "mask_function": _window(2)})
        assert isinstance(first, RowMask)
        assert first.rows is second.rows  # found once for both
        for other in ({"kv_length": 6, "attention_mask": torch.ones(5, 6).bool()}, {"q_offset": 3}):
            assert not isinstance(make(**{**given, **other}), RowMask)
        assert make(**{**given, "attention_mask": torch.ones(5, 4).bool()}) is None  # no padding: causal by a flag
    with Packing(lambda real: False):
        assert torch.equal(make(**given), usual)
    assert torch.equal(make(**given), usual)


@pytest.mark.parametrize("present", ["sdpa", "eager"])
def test_without_anything_to_add_the_present_attention_runs(present: str) -> None:
    model = tiny.llama(attn_implementation=present)
    inputs = {"input_ids": tiny.tokens(2), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    usual = model(**inputs).logits
    with attention.hooks(attention.configs_of(model)):
        assert model.config._attn_implementation == f"veneer_{present}"
        assert torch.equal(model(**inputs).logits, usual)
    assert model.config._attn_implementation == present


def test_flash_attention_is_given_where_rows_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU: here it is only seen what they would be called with."""
    calls: list[Any] = []

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any) -> tuple[Tensor, None]:
        calls.append((module.config._attn_implementation, query.shape, mask, how))
        return query.transpose(1, 2), None

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model = tiny.llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    real = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    mask = RowMask(Rows(real), {"mask_function": masking_utils.causal_mask_function})
    layer = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 4, 8)
    with attention.hooks(attention.configs_of(model)):
        hook = attention.ALL_ATTENTION_FUNCTIONS["veneer_flash_attention_2"]
        out, _ = hook(layer, x, x, x, mask, sliding_window=5, scaling=0.5, dropout=0.0)
        assert model.config._attn_implementation == "veneer_flash_attention_2"
    ((name, shape, given, how),) = calls
    assert (name, shape, given) == ("flash_attention_2", (1, 4, 4, 8), None)
    assert how.pop("cu_seq_lens_q").tolist() == how.pop("cu_seq_lens_k").tolist() == [0, 1, 4]
    assert how == {"max_length_q": 3, "max_length_k": 3, "sliding_window": 5, "scaling": 0.5, "dropout": 0.0}
    assert out.shape == (1, 4, 4, 8)


def test_other_implementations_cannot_be_wrapped() -> None:
    with pytest.raises(UnsupportedError, match="'flex_attention' cannot be wrapped"):
        attention.hooked("flex_attention")
