"""aLoRA: LoRA that acts from its invocation tokens on, so that what is cached of the text before is reused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import Base
from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site

# Ways to generate that run the model on parts of the text which cannot be told from single new tokens.
_IN_PARTS = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


# The preset is what a name alone asks for; there is no invocation that would fit all tokenizers.
@variant("alora", alora_invocation_tokens=[])
class Alora(Lora):
    r"""LoRA on the tokens from the start of the last invocation sequence of a row on.

        y_t = W x_t + b + s up down x_t  for t >= t0,     y_t = W x_t + b  before,     s = alpha / r

    t0 is where the last occurrence of `alora_invocation_tokens` starts; rows without one are left alone. Before t0
    outputs are those of the base layer bit for bit, so keys and values are those that the base model has cached. With a
    cache that already holds the beginning, the invocation is looked for in what the model is called with; or the call
    says `alora_offsets`, for each row how many of its last tokens are adapted (none: row left alone).

    With gradient checkpointing, the model may be called once before each backward pass.

    Trains, cost, start: as LoRA.
    Merge: impossible, since no weight knows positions.
    Raises: ConfigError without invocation tokens, or for encoder-decoders. StateError where the model is called without
    `input_ids`. UnsupportedError for speculative decoding and chunked prefill.
    Source: Greenewald et al. 2025, arXiv:2504.12397, section 3.
    """

    kinds = frozenset({"linear", "embedding"})
    moving_starts = True
    reads_inputs = True
    own_inputs = frozenset({"alora_offsets"})

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        if not config.alora_invocation_tokens:
            raise ConfigError(
                "alora_invocation_tokens is empty. Give the ids of the tokens that invoke the adapter, for example "
                "tokenizer.encode('<answer>', add_special_tokens=False)."
            )
        if config.task_type == "SEQ_2_SEQ_LM":
            raise ConfigError("alora_invocation_tokens: an encoder-decoder has two texts; only one is looked through.")
        self.key = _key(config)

    @classmethod
    def note(cls, inputs: Mapping[str, Any], config: LoraConfig) -> Mapping[str, Any]:
        """How many of the last tokens of each row are adapted, `(rows,)`, and how many tokens there are."""
        ids = inputs.get("input_ids", inputs.get("inputs"))
        offsets, text = inputs.get("alora_offsets"), ids if ids is not None else inputs.get("inputs_embeds")
        if text is None or (ids is None and offsets is None):
            return {}
        if offsets is None:
            adapted = _adapted(ids, ids.new_tensor(config.alora_invocation_tokens))
        else:
            adapted = torch.tensor([offset or 0 for offset in offsets], device=text.device)
        return {_key(config): adapted, "alora_length": text.shape[1]}

    def adapt(self, weight: Tensor) -> Tensor:
        raise UnsupportedError(
            "An aLoRA adapter acts from its invocation tokens on, so it is no change of the weight: it can neither be "
            "merged nor lie below a method that needs the adapted weight. Keep it beside the model, alone."
        )

    def merge_into(self, layer: nn.Module) -> nn.Module:
        self.adapt(self.down)  # raises
        return layer

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return torch.where(self._mask(y, base.inputs), self.add(x, y), y)

    def _mask(self, y: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Which tokens are adapted, in a shape that fits the layer's output `(rows, tokens, ..., out)`."""
        if self.key not in inputs:
            raise StateError(
                "An aLoRA adapter looks for its invocation tokens in `input_ids`, but the model was called without. "
                "Call the PeftModel itself, with input_ids or with alora_offsets."
            )
        settings = inputs.get("generation_config")
        if said := [name for name in _IN_PARTS if inputs.get(name) or getattr(settings, name, None)]:
            raise UnsupportedError(f"aLoRA cannot be used with {said[0]}: positions of tokens are not known then.")
        adapted, length = inputs[self.key].to(y.device), inputs["alora_length"]
        if y.dim() == 2:  # (rows * tokens, out)
            rows, tokens = adapted.shape[0], y.shape[0] // adapted.shape[0]
        else:
            rows, tokens = y.shape[:2]
        adapted = adapted.repeat_interleave(rows // adapted.shape[0])  # beams are rows next to each other
        # Without a cache, tokens that were generated follow the text; with one, only the last tokens of it are here.
        position = torch.arange(tokens, device=y.device)
        mask = (position >= min(tokens, length) - adapted[:, None]) & (adapted[:, None] > 0)  # (rows, tokens)
        return mask.reshape(-1, 1) if y.dim() == 2 else mask.reshape(rows, tokens, *[1] * (y.dim() - 2))


def _key(config: LoraConfig) -> str:
    return f"alora {config.alora_invocation_tokens}"


def _adapted(ids: Tensor, invocation: Tensor) -> Tensor:
    """How many tokens of each row stand from the start of the last invocation on; 0 where there is none."""
    length, size = ids.shape[1], invocation.shape[0]
    if length < size:
        return ids.new_zeros(ids.shape[0])
    found = (ids.unfold(1, size, 1) == invocation).all(-1)  # (rows, length - size + 1), by where it would start
    left = torch.arange(length, size - 1, -1, device=ids.device)
    return torch.where(found, left, length + 1).amin(1) % (length + 1)
