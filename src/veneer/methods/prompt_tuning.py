"""Prompt tuning: trained embeddings of virtual tokens before the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.field_types import member
from veneer.prompting.prompts import Prompt, VirtualTokens, VirtualTokensConfig
from veneer.registry import register
from veneer.sites import Site
from veneer.targets import frozen


class PromptTuningInit(StrEnum):
    """What virtual tokens start as."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class Embeddings(Prompt):
    """The virtual tokens themselves, (n, d); with two submodules (2 n, d), of which the first n are used."""

    def __init__(self, sites: Mapping[str, Site], config: Any) -> None:
        super().__init__(sites, config)
        self.places = list(sites.values())  # the frozen embedding: no submodule
        total = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Parameter(torch.empty(total, config.token_dim))

    def reset(self) -> None:
        start, total = self.config.prompt_tuning_init, len(self.embedding)
        if start == PromptTuningInit.TEXT:
            ids = text_ids(self.config)
            self._start_from((ids * (total // len(ids) + 1))[:total])
        elif start == PromptTuningInit.SAMPLE_VOCAB:
            self._start_from(torch.randint(self.places[0].shape[1], (total,)).tolist())
        else:
            nn.init.normal_(self.embedding)

    @torch.no_grad()
    def _start_from(self, ids: list[int]) -> None:
        """Takes what the model's embedding makes of some tokens; some models scale it."""
        self.embedding.copy_(embedded(self.places[0], ids))

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.embedding[: self.config.num_virtual_tokens]

    def to_file(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.embedding}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file({"embedding": tensors["prompt_embeddings"]})


def embedded(site: Site, ids: list[int]) -> Tensor:
    """What the frozen embedding makes of tokens, (length, d)."""
    vectors: Tensor = frozen(site.module)(torch.tensor(ids, device=site.device))
    return vectors.detach()


def text_ids(config: Any) -> list[int]:
    """The tokens of the text that a prompt starts from.

    Raises:
        ConfigError: The text has none.
    """
    from transformers import AutoTokenizer

    # Not what a file asks for: remote code would run.
    how = {name: value for name, value in (config.tokenizer_kwargs or {}).items() if name != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **how)
    ids: list[int] = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens. Give a text.")
    return ids


class PromptTuning(VirtualTokens):
    r"""Puts n trained embeddings before those of the text.

        E' = [P; E],     P (n, d) trained, E (length, d) the embeddings of the text

    Trains: P. Cost: n d parameters; every token attends to n more.
    Start: random normal; the embeddings of a text, repeated or cut to n; or those of random tokens of the vocabulary
    (which the paper finds far better than random ones). The model is not the base model at the start. Without a number
    n, a text is taken whole: what is trained starts as the model that has read it, such as a few examples of the task.
    Merge: impossible, since the text itself is longer.
    Source: Lester et al. 2021, arXiv:2104.08691, section 2; starts: section 3.2.
    """

    shares = Embeddings


@register("prompt_tuning", num_virtual_tokens=20)
@dataclass
class PromptTuningConfig(VirtualTokensConfig):
    """Configuration of `PromptTuning`.

    Args:
        prompt_tuning_init: `RANDOM`, `TEXT` or `SAMPLE_VOCAB`.
        prompt_tuning_init_text: The text to start from.
        tokenizer_name_or_path: Its tokenizer; that of the base model if none.
        tokenizer_kwargs: Arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        ConfigError: Another start, or a start from text without text or tokenizer.
    """

    adapter = PromptTuning
    peft_name = "PROMPT_TUNING"
    learning_rates = {"classification": 3e-2, "causal-lm": 3e-2}  # noqa: RUF012  # read only
    starts: ClassVar[type[StrEnum]] = PromptTuningInit

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = member(self, "prompt_tuning_init", self.starts)
        name, from_text = type(self).__name__, self.prompt_tuning_init == PromptTuningInit.TEXT
        if from_text and not self.prompt_tuning_init_text:
            raise ConfigError(f"{name}: prompt_tuning_init='TEXT' needs prompt_tuning_init_text, the text.")
        if not from_text and self.tokenizer_kwargs:
            raise ConfigError(f"{name}: tokenizer_kwargs are used with prompt_tuning_init='TEXT' only. Leave them out.")

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        config = self
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            named = self.tokenizer_name_or_path or getattr(getattr(root, "config", None), "name_or_path", None)
            if not named:
                raise ConfigError(
                    f"{type(self).__name__}: prompt_tuning_init='TEXT' needs tokenizer_name_or_path, since the base "
                    "model has no name."
                )
            config = replace(self, tokenizer_name_or_path=named)
            if self.num_virtual_tokens is None:
                config = replace(config, num_virtual_tokens=len(text_ids(config)))
        return super(PromptTuningConfig, config).on(root, modules)
