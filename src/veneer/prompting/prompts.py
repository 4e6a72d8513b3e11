"""Virtual tokens: trained embeddings that stand before the text.

A virtual token is a token with an id of its own beyond the vocabulary. The text is lengthened by these ids, with mask,
positions, token types and labels to match, and the adapter on the input embedding knows what they stand for. So
whatever else happens to the text, in a model's `forward` or in `generate` (caches of every kind, beams, batches of
unequal rows, prompts of unequal length in one batch), happens as it does to a longer text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Base, Shared
from veneer.config import ModuleConfig, TaskType, check_positive
from veneer.data.batches import IGNORED
from veneer.errors import CheckpointError, ConfigError, TargetError, UnsupportedError
from veneer.prompting.positions import holes, positions_of, takes_positions
from veneer.sites import Site
from veneer.structure import is_encoder_decoder
from veneer.targets import frozen, input_embedding, walk


class Prompt(Shared):
    """What the virtual tokens of one adapter are made from: the embedding, and what encodes it if anything does.

    In files, what comes out of it is `prompt_embeddings`, as in `peft`; what only training needs stands beside it.
    """

    above = ""

    def __init__(self, sites: Mapping[str, Site], config: Any) -> None:
        super().__init__(sites, config)
        self.config = config

    @classmethod
    def tokens_in(cls, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The virtual tokens that a file holds, (n, d), by a name for each sequence of them.

        Args:
            tensors: The file.
            config: Its configuration.
        """
        return {"prompt": tensors["prompt_embeddings"][: config.num_virtual_tokens]}

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """The virtual tokens, (n, d) or (rows, n, d).

        Args:
            inputs: What the model was called with, where the method reads it.
        """
        raise NotImplementedError


class EncodedPrompt(Prompt):
    """A prompt that a network makes of an embedding; without a network, the embedding itself.

    Only training needs both: in files they stand beside what comes out of the network, and may be missing.
    """

    within: ClassVar[str] = "prompt_encoder."
    """What names of embedding and network begin with in files."""

    embedding: nn.Parameter

    def __init__(self, sites: Mapping[str, Site], config: Any) -> None:
        super().__init__(sites, config)
        self.network: nn.Module | None = None

    def encode(self) -> Tensor:
        """All that the file holds, (m, d)."""
        return self.embedding if self.network is None else self.network(self.embedding)

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.encode()

    def _own(self) -> dict[str, Tensor]:
        """Embedding and network by their names in files; none where there is no network."""
        named = () if self.network is None else self.named_parameters()
        return {self.within + name: tensor for name, tensor in named}

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self._own())

    def to_file(self) -> dict[str, Tensor]:
        training = self.training
        self.eval()  # without dropout
        try:
            return {"prompt_embeddings": self.encode(), **self._own()}
        finally:
            self.train(training)

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        tensors = dict(tensors)
        whole = tensors.pop("prompt_embeddings")
        if self.network is None:
            super().from_file({"embedding": whole})
        elif tensors.keys() >= self.optional:
            super().from_file({name.removeprefix(self.within): tensor for name, tensor in tensors.items()})
        elif self.config.inference_mode:
            self.network = None
            self.embedding = nn.Parameter(whole.clone(), requires_grad=False)
        else:
            raise CheckpointError(
                "The file holds what a network has made, but not the network, so its training cannot go on (`peft` "
                "does not save it). Load it without is_trainable, or train a method without a network from there."
            )


class VirtualTokens(Adapter):
    """On the input embedding: looks up virtual tokens in the prompt and all others in what lies below."""

    kinds = frozenset({"embedding"})
    outermost = True
    starts_as_base = False
    shared: Prompt

    _reserved = 0

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)
        self.size: int = config.num_virtual_tokens
        # No two adapters have ids in common, so that one may stand on another.
        self.first = site.shape[1] + VirtualTokens._reserved
        VirtualTokens._reserved += self.size

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        assert self.site is not None
        VirtualTokens._reserved = max(VirtualTokens._reserved, self.first + self.size - self.site.shape[1])

    @property
    def ids(self) -> range:
        """The ids of the virtual tokens, in order."""
        return range(self.first, self.first + self.size)

    @property
    def labels(self) -> Sequence[int]:
        """What the model is to learn to say in their places."""
        return [IGNORED] * self.size

    def forward(self, x: Tensor, base: Base) -> Tensor:
        virtual = (x >= self.first) & (x < self.first + self.size)  # (rows, length)
        y = base(x.masked_fill(virtual, 0))
        prompt = self.shared(base.inputs).to(y.dtype)
        which = (x - self.first).clamp(0, self.size - 1)
        if prompt.dim() == 3:  # a prompt for each row; beams are rows next to each other
            prompt = prompt.repeat_interleave(len(x) // len(prompt), 0)
            tokens = prompt.gather(1, which[..., None].expand(*which.shape, prompt.shape[-1]))
        else:
            tokens = prompt[which]
        return torch.where(virtual[..., None], tokens, y)


@dataclass(frozen=True)
class Lengthening:
    """What stands before the text of each row, or of all rows alike.

    Args:
        tokens: The ids of its virtual tokens.
        labels: Their labels.
        shift: By how many positions prefixes move it.
        fill: Id of padding.
    """

    tokens: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]
    shift: Sequence[int]
    fill: int

    @property
    def most(self) -> int:
        """The number of columns that are added."""
        return max(len(ids) for ids in self.tokens)

    def blocks(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and labels of what is added, with padding before them, each (rows, most)."""
        ids, labels = (
            [[fill] * (self.most - len(row)) + list(row) for row in rows_of]
            for rows_of, fill in ((self.tokens, self.fill), (self.labels, IGNORED))
        )
        return tuple(torch.tensor(block, device=device).expand(rows, self.most) for block in (ids, labels))  # type: ignore[return-value]

    def counts(self, rows: int, device: torch.device) -> Tensor:
        """How many virtual tokens each row has, (rows,)."""
        return torch.tensor([len(ids) for ids in self.tokens], device=device).expand(rows)

    def shifts(self, rows: int, device: torch.device) -> Tensor:
        """By how many positions each row is moved, (rows, 1); rows of a beam are next to each other."""
        shift = torch.tensor(self.shift, device=device)
        return shift.repeat_interleave(rows // len(shift))[:, None]


class Lengthened:
    """A batch with virtual tokens before its text.

    Decoders that generate get texts that end together: padding comes first, then virtual tokens, then the text. All
    others get texts that begin together, since a classifier may read the first place. Where the model goes on from a
    cache, or from what its encoder has made, they have been read, and only the mask and the positions follow.

    Args:
        how: What is added.
        model: The base model.
        given: What it is called with, by name.
        generating: Whether `generate` is called, which is given the whole text beside a cache of its beginning.

    Attributes:
        inputs: What it is to be called with instead.

    Raises:
        UnsupportedError: There is no text, or its mask is not (rows, length).
    """

    def __init__(self, how: Lengthening, model: nn.Module, given: Mapping[str, Any], generating: bool = False) -> None:
        ids, embeds, mask, encoded, cache = (
            given.get(name)
            for name in ("input_ids", "inputs_embeds", "attention_mask", "encoder_outputs", "past_key_values")
        )
        text = ids if ids is not None else embeds if embeds is not None or encoded is None else encoded[0]
        if text is None:
            raise UnsupportedError(
                f"{type(model).__name__} has virtual tokens before its text and was called without input_ids or "
                f"inputs_embeds (given: {', '.join(given) or 'nothing'}). Pass one of them by name."
            )
        if mask is not None and mask.dim() != 2:
            raise UnsupportedError(
                f"attention_mask has shape {tuple(mask.shape)}; (rows, length) is needed with virtual tokens."
            )
        self.how, self.model, self.given, self.text = how, model, given, text
        self.rows, self.length = text.shape[:2]
        self.ends_together = is_decoder(model)
        self.inputs = dict(given)
        self.counts = how.counts(self.rows, text.device)
        read = encoded[0].shape[1] if encoded is not None else 0  # columns that have been read
        if cache is not None and self.ends_together and not generating:
            read = int(cache.get_seq_length())
        self.goes_on = read > 0
        if self.goes_on:
            columns = read if encoded is not None else read + self.length
            self.length = columns - how.most
            if mask is not None and mask.shape[1] not in (self.length, columns):
                raise UnsupportedError(
                    f"attention_mask has {mask.shape[1]} columns; that of the whole text, {self.length}, was expected, "
                    f"since its {read} first tokens, virtual ones included, have been read."
                )
        real = torch.ones(self.rows, self.length, dtype=torch.long, device=text.device) if mask is None else mask
        # Without padding anywhere no numbers are looked at (`veneer estimate` has none).
        padded = mask is not None or len({len(ids) for ids in how.tokens}) > 1
        self.order = self._order(real) if padded else None
        own = torch.arange(how.most, device=text.device) >= how.most - self.counts[:, None]
        lengthened = self.goes_on and real.shape[1] > self.length  # by the caller
        whole = real if lengthened else self.put(own.to(real), real)
        if padded:
            self.inputs["attention_mask"] = whole
        if given.get("position_ids") is not None:
            self.inputs["position_ids"] = given["position_ids"] + self.counts[:, None]
        if not self.goes_on:
            self._lengthen(own, *how.blocks(self.rows, text.device))
        if padded and given.get("position_ids") is None and takes_positions(model) and holes(whole):
            self.inputs["position_ids"] = positions_of(model, {**self.inputs, "attention_mask": whole})

    def _lengthen(self, own: Tensor, ids: Tensor, labels: Tensor) -> None:
        """Puts virtual tokens, and all that belongs to them, before the text.

        Args:
            own: Where there are any, (rows, most); padding stands before them.
            ids: Their ids, (rows, most).
            labels: Their labels, (rows, most).
        """
        given = self.given
        if given.get("input_ids") is not None:
            self.inputs["input_ids"] = self.put(ids, given["input_ids"])
        else:
            model: Any = self.model
            reader = model.get_encoder() if is_encoder_decoder(model) else model
            self.inputs["inputs_embeds"] = self.put(reader.get_input_embeddings()(ids), self.text)
        if given.get("token_type_ids") is not None:
            self.inputs["token_type_ids"] = self.put(torch.zeros_like(ids), given["token_type_ids"])
        if given.get("position_ids") is not None:
            numbers = (own.long().cumsum(1) - 1).clamp_min(0)
            self.inputs["position_ids"] = self.put(numbers, self.inputs["position_ids"])
        wanted = given.get("labels")
        if wanted is not None and wanted.shape[:2] == self.text.shape[:2] and _labels_tokens(self.model):
            self.inputs["labels"] = self.put(labels, wanted)
        for name in ("start_positions", "end_positions"):
            if given.get(name) is not None:
                by = torch.full_like(self.counts, self.how.most) if self.ends_together else self.counts
                self.inputs[name] = given[name] + by.view(-1, *[1] * (given[name].dim() - 1))

    def put(self, front: Tensor, text: Tensor) -> Tensor:
        """What stands before the text, and the text: (rows, most + length, ...)."""
        whole = torch.cat([front.to(text.dtype), text.expand(len(front), *text.shape[1:])], 1)
        return whole if self.order is None else _gathered(whole, self.order)

    def _order(self, mask: Tensor) -> Tensor | None:
        """Which column of (front, text) stands where, (rows, most + length); none where they stand as they are."""
        most = self.how.most
        at = torch.arange(most + self.length, device=mask.device).expand(self.rows, -1)
        spare = (most - self.counts)[:, None]
        if not self.ends_together:
            return (at + spare) % (most + self.length) if bool(spare.any()) else None
        ahead = mask.long().cumsum(1).eq(0).sum(1, keepdim=True)  # padding before the text of each row
        if not bool(ahead.any()):
            return None
        moved = torch.where(at < spare + ahead, at - spare + most, at - ahead)
        return torch.where((at < spare) | (at >= most + ahead), at, moved)

    def finish(self, output: Any) -> Any:
        """The model's output with the texts in its last columns, where their virtual tokens differ in number."""
        if self.ends_together or self.order is None or not hasattr(output, "items"):
            return output
        back = self.order.argsort(1)
        for name, value in list(output.items()):
            if isinstance(value, Tensor) and value.shape[:2] == back.shape:
                output[name] = _gathered(value, back)
        return output


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    """The columns of x, (rows, columns, ...), in another order, (rows, columns)."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:]))


def is_decoder(model: nn.Module) -> bool:
    """Whether the model continues the text that it is given."""
    generates = getattr(model, "can_generate", lambda: False)()
    return bool(generates) and not is_encoder_decoder(model)


def _labels_tokens(model: nn.Module) -> bool:
    """Whether labels are those of the tokens of the text: not of whole rows, nor of another text."""
    return not is_encoder_decoder(model) and "SequenceClassification" not in type(model).__name__


@dataclass
class PromptLearningConfig(ModuleConfig):
    """What the configurations of virtual tokens and of prefixes have in common.

    Args:
        num_virtual_tokens: How many there are.
        token_dim: Width of what is trained: of an embedding, or of all heads of keys. Found from the model.
        num_transformer_submodules: 2 for an encoder-decoder, else 1, as in `peft`'s files.
        num_attention_heads: Number of heads; for prefixes, of keys. Found from the model.
        num_layers: Number of layers. Found from the model.

    Raises:
        ConfigError: There are no virtual tokens.
    """

    own_fields = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_virtual_tokens")

    @property
    def is_prompt_learning(self) -> bool:
        return True

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.num_virtual_tokens is None:
            raise ConfigError(f"{type(self).__name__}: num_virtual_tokens is not set. Say how many there are to be.")
        settings: Any = getattr(root, "config", None)
        text: Any = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
        filled: dict[str, Any] = {
            "num_layers": getattr(text, "num_hidden_layers", None),
            "token_dim": getattr(text, "hidden_size", None),
            "num_attention_heads": getattr(text, "num_attention_heads", None),
            "num_transformer_submodules": 2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1,
        }
        unknown = {name: value for name, value in filled.items() if getattr(self, name) is None}
        return replace(self, **unknown)


@dataclass
class VirtualTokensConfig(PromptLearningConfig):
    """What the configurations of virtual tokens before the text have in common."""

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        """As in `ModuleConfig`.

        Raises:
            TargetError: The model has no embedding that can be found.
            ConfigError: Another place was named.
        """
        for name in ("target_modules", "target_parameters"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{type(self).__name__}: {name}={getattr(self, name)!r}; virtual tokens stand before the text, so "
                    f"their place is the model's input embedding. Leave {name} out."
                )
        path = text_embedding(root, modules)
        if path is None:
            raise TargetError(
                f"{type(root).__name__} has no input embedding (get_input_embeddings), so there is no text that "
                "virtual tokens could stand before."
            )
        embedding: Any = modules[path]
        width: int = embedding.weight.shape[1]
        if self.token_dim not in (None, width):
            raise ConfigError(
                f"{type(self).__name__}: token_dim={self.token_dim}; the embeddings of this {type(root).__name__} have "
                f"{width}. Leave it out, or load the prompt on the model that it was made for."
            )
        return replace(super().on(root, modules), token_dim=width, target_modules=[path])

    def resolved(self, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> Self:
        return replace(self, target_modules=None)


def text_embedding(root: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Path of the embedding that reads the text; of an encoder-decoder, the encoder's."""
    if not is_encoder_decoder(root):
        return input_embedding(root, modules)
    encoder: Any = root.get_encoder()  # type: ignore[operator]
    above = next((path for path, module in modules.items() if module is frozen(encoder)), None)
    # Embeddings that both halves share are registered in several places: the one that the encoder calls is wanted.
    inner = None if above is None else input_embedding(encoder, dict(walk(encoder)))
    return None if inner is None else f"{above}.{inner}"
