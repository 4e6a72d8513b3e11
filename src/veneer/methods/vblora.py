"""VB-LoRA: LoRA whose factors are composed of vectors from one bank for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import Shared, WeightAdapter
from veneer.config import WeightConfig, check_positive, check_shares
from veneer.errors import ConfigError, StateError
from veneer.products import LowRank
from veneer.registry import register
from veneer.sites import Site


class Bank(Shared):
    """The vectors `(h, b)` that all factors are composed of; trained."""

    def __init__(self, sites: Mapping[str, Site], config: VBLoRAConfig) -> None:
        super().__init__(sites, config)
        self.bound = config.init_vector_bank_bound
        self.vblora_vector_bank = nn.Parameter(torch.empty(config.num_vectors, config.vector_length))

    def reset(self) -> None:
        nn.init.uniform_(self.vblora_vector_bank, -self.bound, self.bound)


class VBLoRA(WeightAdapter):
    r"""Adds a low-rank product whose factors consist of sub-vectors, each a mixture of k vectors of the bank.

        W' = W + up down,     sub-vector = sum over the k largest of its h logits: softmax(logits)_j bank_j

    down's rows and up's columns are cut into sub-vectors of the bank's length b; the last one is cut short where b does
    not divide the side.

    Trains: the bank (h, b), once for all layers; logits (r, in / b, h) and (out / b, r, h).
    Cost: h b parameters, and r h (in + out) / b more a layer; with `save_only_topk_weights` a file holds 2k - 1 numbers
    in place of h logits, and cannot be trained further.
    Start: bank and logits are random, so the outputs change slightly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has logits of its own. Dropout as in `Lora`.
    Raises: ConfigError for dropout on a bare parameter; StateError on training what was saved without its logits.
    Source: Li, Han and Ji 2024, arXiv:2405.15179, eq. 2 to 4.
    """

    shares = Bank
    shared: Bank
    starts_as_base = False

    def __init__(self, site: Site, config: VBLoRAConfig) -> None:
        super().__init__(site, config)
        out_features, in_features = site.shape
        h, b = config.num_vectors, config.vector_length
        self.config = config
        self.complete = True  # whether all logits are known
        self.dropout = self.input_dropout(config.vblora_dropout, "vblora_dropout")
        self.logits_down = nn.Parameter(torch.empty(*site.batch, config.r, -(-in_features // b), h))
        self.logits_up = nn.Parameter(torch.empty(*site.batch, -(-out_features // b), config.r, h))

    def reset(self) -> None:
        nn.init.normal_(self.logits_down, std=self.config.init_logits_std)
        nn.init.normal_(self.logits_up, std=self.config.init_logits_std)

    def factors(self) -> tuple[Tensor, Tensor]:
        """down `(r, in)` and up `(out, r)`."""
        if not self.complete and self.training and self.logits_down.requires_grad and torch.is_grad_enabled():
            raise StateError(
                "This VB-LoRA adapter was saved with save_only_topk_weights=True: the logits that choose other vectors "
                "are not in its file, so it cannot be trained. Call model.eval(), or train from a file with all logits."
            )
        out_features, in_features = self.site.shape
        down = self.compose(self.logits_down).flatten(-2)[..., :in_features]
        up = self.compose(self.logits_up).transpose(-1, -2).flatten(-3, -2)[..., :out_features, :]
        return down, up

    def compose(self, logits: Tensor) -> Tensor:
        """Sub-vectors `(..., b)` from logits `(..., h)`."""
        top, indices = logits.topk(self.config.topk)
        bank = self.shared.vblora_vector_bank.to(logits)
        return torch.einsum("...k,...kb->...b", top.softmax(-1), bank[indices])

    def product(self) -> LowRank:
        return LowRank(*self.factors())

    def to_file(self) -> dict[str, Tensor]:
        logits: dict[str, Tensor] = {"vblora_logits_A": self.logits_down, "vblora_logits_B": self.logits_up}
        if not self.config.save_only_topk_weights:
            return logits
        tensors: dict[str, Tensor] = {}
        for name, tensor in logits.items():
            top, indices = tensor.topk(self.config.topk)
            types = (torch.uint8, torch.int16, torch.int32)
            small = next(dtype for dtype in types if self.config.num_vectors <= torch.iinfo(dtype).max)
            tensors[f"{name}_topk_indices"] = indices.to(small)
            tensors[f"{name}_topk_weights"] = top.softmax(-1)[..., :-1]  # the last is what is left to one
        return tensors

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, own in (("vblora_logits_A", "logits_down"), ("vblora_logits_B", "logits_up")):
            logits = tensors.get(name)
            if logits is None:
                indices, weights = tensors[f"{name}_topk_indices"].long(), tensors[f"{name}_topk_weights"]
                weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
                logits = weights.new_full((*weights.shape[:-1], self.config.num_vectors), -torch.inf)
                logits = logits.scatter(-1, indices, weights.log())
                self.complete = False
            self.put(own, logits)


@register("vblora")
@dataclass
class VBLoRAConfig(WeightConfig):
    """Configuration of `VBLoRA`, field by field that of `peft`.

    Args:
        r: Rank.
        num_vectors: Vectors in the bank.
        vector_length: Their length.
        topk: How many of them are mixed into one sub-vector.
        save_only_topk_weights: Write only the chosen vectors' weights: a far smaller file, for inference.
        vblora_dropout: Share of the input that is dropped in training.
        init_vector_bank_bound: The bank starts uniform between this and its negative.
        init_logits_std: Standard deviation of the logits at the start.

    Raises:
        ConfigError: A size that is not positive, a dropout outside [0, 1), or more chosen vectors than there are.
    """

    adapter = VBLoRA
    peft_name = "VBLORA"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "num_vectors", "vector_length", "topk")
        check_shares(self, "vblora_dropout")
        if self.topk > self.num_vectors:
            raise ConfigError(
                f"VBLoRAConfig: topk={self.topk} with num_vectors={self.num_vectors}; no more was expected."
            )
