"""CPT: examples of the task before the text, whose embeddings are refined within narrow bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import put
from veneer.config import TaskType
from veneer.data.batches import IGNORED
from veneer.errors import ConfigError
from veneer.methods.prompt_tuning import embedded
from veneer.prompting.prompts import Lengthened, Prompt, VirtualTokens, VirtualTokensConfig
from veneer.registry import register
from veneer.sites import Site

# Kinds of tokens, by the remainder of their type: the first example has types 1 to 4, the second 5 to 8, and so on.
KINDS = 4
INPUT_FORMAT, INPUT, OUTPUT_FORMAT, LABEL = 1, 2, 3, 0
_WIDTH = 2048  # the width of embeddings that the bounds are given for


class Context(Prompt):
    """The embeddings of the examples' tokens (n, d), frozen, and what is added to them (n, d)."""

    optional = frozenset({"prompt_encoder.context", "prompt_encoder.delta"})
    context: Tensor

    def __init__(self, sites: Mapping[str, Site], config: CPTConfig) -> None:
        super().__init__(sites, config)
        self.places = list(sites.values())  # the frozen embedding: no submodule
        shape = (config.num_virtual_tokens, config.token_dim)
        self.register_buffer("context", torch.empty(shape))  # type: ignore[arg-type]
        self.delta = nn.Parameter(torch.zeros(shape))  # type: ignore[arg-type]
        scale = (config.token_dim / _WIDTH) ** 0.5  # type: ignore[operator]
        formats = config.opt_projection_format_epsilon * scale
        limits = {INPUT_FORMAT: formats, INPUT: config.opt_projection_epsilon * scale, OUTPUT_FORMAT: formats}
        self.limits = [limits.get(kind % KINDS, 0.0) if kind > 0 else 0.0 for kind in config.types]

    def reset(self) -> None:
        self.context.copy_(embedded(self.places[0], self.config.cpt_token_ids))
        nn.init.zeros_(self.delta)

    def projected(self) -> Tensor:
        """The additions, each shortened to its bound; none to labels."""
        bound = torch.tensor(self.limits, device=self.delta.device, dtype=self.delta.dtype)[:, None]
        length = self.delta.detach().norm(dim=1, keepdim=True)
        return self.delta * torch.where(length > bound, bound / length, 1)

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and self.delta.requires_grad):
            return self.context + self.projected()
        # What was learnt is brought back to the bounds before it is used, and the gradient is that of what is used.
        with torch.no_grad():
            self.delta.copy_(self.projected())
        trained = torch.tensor(self.limits, device=self.delta.device)[:, None] > 0
        return self.context + self.delta * trained

    def to_file(self) -> dict[str, Tensor]:
        own = {"prompt_encoder.context": self.context, "prompt_encoder.delta": self.projected()}
        return {"prompt_embeddings": self.context + self.projected(), **own}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        whole = tensors["prompt_embeddings"]
        if tensors.keys() >= self.optional:
            context, delta = tensors["prompt_encoder.context"], tensors["prompt_encoder.delta"]
        else:  # of `peft`, where training goes on with new bounds around what was learnt
            context, delta = whole, torch.zeros_like(whole)
        put(self, "context", context)
        put(self, "delta", delta)


class CPT(VirtualTokens):
    r"""Puts the embeddings of a context, such as examples of the task, before the text, and refines them a little.

        E' = [E(context) + D; E],     |D_i| <= eps_i sqrt(d / 2048)

    `cpt_tokens_type_mask` says what a token of the context is: of the k-th example, from 0, 4k+1 the format of the
    input, 4k+2 the input, 4k+3 the format of the output, 4k+4 the label; 0 is none of these. Labels stay as they are,
    and the model is trained to say them as well: in the loss, the mean over all labels, those of the text count fully
    and with `decay` the example before it times the factor, the one before that times its square, and so on. The
    call may have `input_type_mask`, (rows, length), in the same manner; else all of the text is a label.

    Trains: D (n, d), zero at the start; brought back into its bounds in every step.
    Cost: n d parameters. Start: the base model that reads the context. Merge: impossible, since the text is longer.
    Source: Blau et al. 2024, arXiv:2410.17222, section 3.
    """

    shares = Context
    reads_inputs = True
    own_inputs = frozenset({"input_type_mask"})

    def __init__(self, site: Site, config: CPTConfig) -> None:
        super().__init__(site, config)
        self.types = config.types
        self.tokens: list[int] = list(config.cpt_token_ids)  # type: ignore[arg-type]

    @property
    def labels(self) -> Sequence[int]:
        return [
            token if kind > 0 and kind % KINDS == LABEL else IGNORED
            for token, kind in zip(self.tokens, self.types, strict=True)
        ]

    @classmethod
    def loss(cls, adapters: Sequence[Self], config: Any, output: Any, text: Lengthened) -> Tensor | None:
        if text.goes_on or text.given.get("labels") is None:
            return None
        (adapter,) = adapters
        types = adapter.types_of(text)  # (rows, columns)
        is_label = (types > 0) & (types % KINDS == LABEL)
        labels = text.inputs["labels"].masked_fill(~is_label, IGNORED)
        places = labels[:, 1:] != IGNORED
        scores = output.logits[:, :-1][places.to(output.logits.device)]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        losses = F.cross_entropy(scores, labels[:, 1:][places].to(scores.device), reduction="none")
        if config.opt_weighted_loss_type == "decay":
            ages = torch.zeros_like(types[:, 1:])  # how many examples stand behind a token's own
            for row, kinds, found in zip(ages, types[:, 1:], is_label[:, 1:], strict=True):
                known = kinds[found].unique()
                row.copy_(len(known) - 1 - torch.searchsorted(known, kinds))
            losses = losses * config.opt_loss_decay_factor ** ages[places].to(losses)
        return losses.mean()

    def types_of(self, text: Lengthened) -> Tensor:
        """The types of all tokens, (rows, columns); those of the text go on where those of the context end."""
        given, device = text.given.get("input_type_mask"), text.text.device
        own = torch.full((text.rows, text.length), KINDS, device=device) if given is None else given.to(device).long()
        last = max(self.types)
        own = torch.where(own > 0, own + (last + -last % KINDS), own)
        ids, _ = text.how.blocks(text.rows, device)
        which = ids - self.first
        table = torch.tensor(self.types, device=device)
        mine = (which >= 0) & (which < self.size)
        return text.put(torch.where(mine, table[which.clamp(0, self.size - 1)], 0), own)


@register("cpt", task_type="CAUSAL_LM")
@dataclass
class CPTConfig(VirtualTokensConfig):
    """Configuration of `CPT`.

    Args:
        cpt_token_ids: The tokens of the context.
        cpt_mask: Kept for `peft`, which does not read it: tokens that are not to be seen have to be left out.
        cpt_tokens_type_mask: What each is; all of them formats of an input if none.
        opt_weighted_loss_type: `decay` weighs labels of the context by age, `none` does not.
        opt_loss_decay_factor: Weight of an example over that of the next.
        opt_projection_epsilon: Bound of the changes of inputs.
        opt_projection_format_epsilon: Bound of the changes of formats.
        tokenizer_name_or_path: Kept for `peft`; which tokenizer the tokens are from.

    Raises:
        ConfigError: The lists differ in length, tokens are masked, or the task is another than CAUSAL_LM.
    """

    adapter = CPT
    peft_name = "CPT"

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        ones = [1] * len(self.cpt_token_ids)
        self.cpt_mask = ones if self.cpt_mask is None else list(self.cpt_mask)
        self.cpt_tokens_type_mask = ones if self.cpt_tokens_type_mask is None else list(self.cpt_tokens_type_mask)
        self.num_virtual_tokens, self.num_transformer_submodules = len(ones), 1
        super().__post_init__()
        if not len(self.cpt_mask) == len(self.cpt_tokens_type_mask) == len(ones):
            raise ConfigError(
                f"CPTConfig: {len(ones)} cpt_token_ids, {len(self.cpt_mask)} entries of cpt_mask and "
                f"{len(self.cpt_tokens_type_mask)} of cpt_tokens_type_mask; one for each token was expected."
            )
        if 0 in self.cpt_mask:
            raise ConfigError(
                f"CPTConfig: cpt_mask hides {self.cpt_mask.count(0)} tokens; `peft` does not read it, and shows them. "
                "Leave these tokens out of cpt_token_ids."
            )

    @property
    def types(self) -> list[int]:
        """`cpt_tokens_type_mask`, as it is filled in."""
        return list(self.cpt_tokens_type_mask or ())

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(
                f"CPTConfig: task_type={self.task_type!r}; CPT continues examples of a task, which CAUSAL_LM does."
            )
        return super().on(root, modules)
