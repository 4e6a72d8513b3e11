"""LoReFT: hidden states of some positions of the prompt are edited within a small subspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from veneer import structure, targets
from veneer.adapter import Base
from veneer.config import ModuleConfig, check_positive, check_shares
from veneer.data.batches import IGNORED
from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.outputs import OutputAdapter
from veneer.registry import register
from veneer.sites import Site
from veneer.structure import is_encoder_decoder

PREFIX, SUFFIX = 1, 2
"""Of a position that is edited: at which end of the prompt it stands."""

# Ways to generate that run the model on parts of the text which cannot be told from single new tokens.
_IN_PARTS = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


@dataclass
class Prompt:
    """Where the prompts of one call of the model are edited.

    Args:
        ends: (rows, tokens), `PREFIX`, `SUFFIX` or 0; none while nothing is known of the text but what comes through.
        generating: Whether the model is run again and again, for new tokens.
        begun: Adapters that have seen the prompt.
    """

    ends: Tensor | None
    generating: bool = False
    begun: set[int] = field(default_factory=set)


def ends(real: Tensor, first: int, last: int) -> Tensor:
    """Which of the real tokens are the first and the last ones; the last where a token is both.

    >>> ends(torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(), 1, 2).tolist()
    [[0, 1, 0, 2, 2], [1, 2, 2, 0, 0]]
    """
    number = real.cumsum(1)  # from 1
    left = number[:, -1:] - number
    marks = torch.where(number <= first, PREFIX, torch.zeros_like(number))
    return torch.where(left < last, SUFFIX, marks) * real


class Edit(nn.Module):
    """h + U^T (W h + b - R h), of which methods leave out or tie parts.

    Args:
        width: Width of h.
        rank: Rows of the matrices.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.source = nn.Linear(width, rank)
        self.basis = nn.Parameter(torch.empty(width, rank))

    def reset(self) -> None:
        self.source.reset_parameters()
        nn.init.orthogonal_(self.basis)

    def rows(self) -> Tensor:
        """R, `(rank, width)`."""
        return self.basis.mT

    def forward(self, h: Tensor, dropout: float) -> Tensor:
        """What is added to hidden states `(tokens, width)`."""
        rows = self.rows()
        return nn.functional.dropout(self.source(h) - h @ rows.mT, dropout) @ rows


class OrthogonalEdit(Edit):
    """R has orthonormal rows: those that the QR decomposition makes of the trained matrix's columns."""

    def rows(self) -> Tensor:
        wide = self.basis.to(torch.promote_types(self.basis.dtype, torch.float32))
        q, r = torch.linalg.qr(wide)
        return (q * r.diagonal().sign()).mT.to(self.basis.dtype)  # R must not jump where a sign in `r` turns


class LoReFT(OutputAdapter):
    r"""Edits the hidden states of the first p and last s tokens of the prompt, within the space of R's rows.

        h' = h + R^T (W h + b - R h),     R R^T = I

    The prompt is the real tokens of the input (by the attention mask), in the training of a causal language model those
    before the first label; a row whose labels begin at once is a prompt as a whole. While text is generated the prompt
    stays what it was, so that new tokens are left alone, with a cache and without. A call that brings a filled cache
    continues a text, so that nothing is edited.

    Trains: W (r, d) and b (r,); the matrix (d, r) of which R is the orthonormal part; one set, or with
    `tied_weights=False` one for either end of the prompt.
    Cost: 2 r d + r parameters a place; matrix products for p + s tokens, and a QR decomposition, a call.
    Start: W and R are random, so the outputs change. Merge: impossible, as no weight knows positions.
    Raises: StateError where the model is not called through its PeftModel, or in parts; UnsupportedError for
    speculative decoding and chunked prefill, and for packed rows.
    Source: Wu et al. 2024, arXiv:2404.03592, eq. 2 and section 3.2.
    """

    edit: type[Edit] = OrthogonalEdit
    reads_inputs = True
    starts_as_base = False

    def __init__(self, module: nn.Module, site: Site | None, config: LoReFTConfig) -> None:
        super().__init__(module, site, config)
        if config.r > self.width:
            raise ConfigError(f"r={config.r} is more than the width of the hidden states, {self.width}.")
        self.config = config
        one = config.tied_weights or not (config.prefix_positions and config.suffix_positions)
        self.edits = nn.ModuleList(self.edit(self.width, config.r) for _ in range(1 if one else 2))

    def reset(self) -> None:
        for edit in self.edits:
            edit.reset()  # type: ignore[operator]

    @classmethod
    def note(cls, inputs: Mapping[str, Any], config: LoReFTConfig) -> Mapping[str, Any]:
        """Which positions are edited, from the mask and the labels."""
        generating = bool(inputs.get("generating"))
        settings = inputs.get("generation_config")
        if generating and (said := [n for n in _IN_PARTS if inputs.get(n) or getattr(settings, n, None)]):
            raise UnsupportedError(f"ReFT cannot be used with {said[0]}: positions of the prompt are not known then.")
        named = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "inputs"))
        text = next((value for value in named if isinstance(value, Tensor)), None)
        if text is None or (text.is_floating_point() and text.dim() != 3):
            return {_key(config): Prompt(None, generating)}
        mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
        real = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if cache is not None and cache.get_seq_length() > 0:
            return {_key(config): Prompt(real.new_zeros(real.shape, dtype=torch.long), generating)}
        if mask is not None:
            if mask.shape != real.shape:
                raise UnsupportedError(
                    f"ReFT: attention_mask has shape {tuple(mask.shape)}, and {tuple(real.shape)} was expected, one "
                    "number for each token. Give each text a row of its own."
                )
            real = mask.bool()
        labels = inputs.get("labels")
        if config.ends_at_labels and isinstance(labels, Tensor) and labels.shape == real.shape:
            asked = (labels != IGNORED) & real
            before = real & (asked.cumsum(1) == 0)
            real = torch.where(before.any(1, keepdim=True) & asked.any(1, keepdim=True), before, real)
        return {_key(config): Prompt(ends(real, config.prefix_positions, config.suffix_positions), generating)}

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h = self.output(x, base)
        marks = self._marks(h, base)
        if marks is None:
            return h
        shape = h.shape
        h = h.view(*marks.shape, self.width)
        for end, edit in enumerate(self.edits, start=PREFIX):
            at = (marks if len(self.edits) == 1 else marks == end).nonzero(as_tuple=True)
            picked = h[at].to(edit.basis.dtype)  # type: ignore[arg-type]
            added = edit(picked, self.config.dropout if self.training else 0.0)
            h = h.index_put(at, added.to(h.dtype), accumulate=True)
        return h.view(shape)

    def _marks(self, h: Tensor, base: Base) -> Tensor | None:
        """Which positions of this adapter's rows are edited, (rows, tokens); none for none.

        Raises:
            StateError: The prompt is not known.
        """
        prompt: Prompt | None = base.inputs.get(_key(self.config))
        if prompt is None:
            raise StateError("A ReFT adapter learns from its PeftModel where prompts are. Call the PeftModel itself.")
        own = base.entries if base.rows is None else base.rows
        rows, tokens = h.shape[0] if own is None else own.shape[0], 1 if h.dim() == 2 else h.shape[1]
        if prompt.ends is not None:
            marks = prompt.ends.to(h.device)
            if h.dim() != 3:
                raise StateError(f"ReFT: hidden states (rows, tokens, width) were expected, not {tuple(h.shape)}.")
        else:  # what is no text is not padded; a row without an axis of tokens is one token
            here = torch.ones(rows, tokens, dtype=torch.bool, device=h.device)
            marks = ends(here, self.config.prefix_positions, self.config.suffix_positions)
            prompt.ends = marks if prompt.generating else None
        if id(self) in prompt.begun:  # new tokens alone, or, without a cache, all over again
            if tokens <= marks.shape[1]:
                return None
            marks = nn.functional.pad(marks, (0, tokens - marks.shape[1]))
        elif tokens != marks.shape[1]:
            raise StateError(
                f"A ReFT adapter expected the prompt as a whole, {marks.shape[1]} tokens, and got {tokens}. Adapt "
                "blocks through which the whole text comes, and start to generate without a cache that holds a part."
            )
        if prompt.generating:
            prompt.begun.add(id(self))
        marks = marks.repeat_interleave(rows // marks.shape[0], 0)  # beams are rows next to each other
        if own is None:
            return marks
        return marks[own] if base.rows is None else marks * own[:, None]

    def to_file(self) -> dict[str, Tensor]:
        return {f"reft_{name}": tensor for name, tensor in super().to_file().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file({name.removeprefix("reft_"): tensor for name, tensor in tensors.items()})


def _key(config: LoReFTConfig) -> str:
    return f"reft {config.prefix_positions} {config.suffix_positions} {config.ends_at_labels}"


@register("loreft")
@dataclass
class LoReFTConfig(ModuleConfig):
    """Configuration of `LoReFT`, and of `NoReFT` and `DiReFT`.

    `target_modules=None` takes the model's blocks; of an encoder-decoder those of the encoder, which reads the prompt.

    Args:
        r: Rank of the edit.
        prefix_positions: p, how many of the first tokens are edited.
        suffix_positions: s, how many of the last.
        tied_weights: Whether one edit serves both ends of the prompt.
        dropout: Share of the edit's r numbers that is dropped in training.
        ends_at_labels: Whether the prompt ends where labels begin; none for causal language models.

    Raises:
        ConfigError: A rank that is not positive, no positions, or places in a decoder that reads another text.
    """

    adapter = LoReFT
    peft_name = "LOREFT"
    default_targets = (["block-output"],)
    learning_rates = {"classification": 2e-3, "causal-lm": 9e-4}  # noqa: RUF012  # 9e-4: appendix of the paper

    r: int = 8
    prefix_positions: int = 7
    suffix_positions: int = 7
    tied_weights: bool = True
    dropout: float = 0.0
    ends_at_labels: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
        check_shares(self, "dropout")
        positions = (self.prefix_positions, self.suffix_positions)
        if min(positions) < 0 or not any(positions):
            raise ConfigError(
                f"{type(self).__name__}: prefix_positions={positions[0]}, suffix_positions={positions[1]}; counts of "
                "which one at least is positive were expected."
            )

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        config = self
        two = is_encoder_decoder(root)
        if self.ends_at_labels is None:
            generates = getattr(root, "can_generate", lambda: False)()
            config = replace(config, ends_at_labels=bool(generates and not two))
        if two:
            if self.target_modules is None:
                paths = [path for path in structure.place("block-output", modules) if not _decodes(path)]
                config = replace(config, target_modules=targets.exactly(paths, modules))
            if any(_decodes(path) for path in targets.match(root, config, strict=False, modules=modules)):
                raise ConfigError(
                    f"{type(self).__name__}: the prompt of {type(root).__name__} goes through its encoder, and "
                    f"target_modules={self.target_modules!r} means places in its decoder. Name those of the encoder."
                )
        return config


def _decodes(path: str) -> bool:
    return "decoder" in path.split(".")
