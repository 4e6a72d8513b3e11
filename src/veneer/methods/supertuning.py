"""Super-Tuning: the largest entries of the weight, with LoRA beside them where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig, check_positive, check_shares
from veneer.errors import ConfigError
from veneer.methods.lora import Lora, LoraConfig
from veneer.methods.sparse import Sparse
from veneer.registry import register
from veneer.sites import Site


class Supertuning(Sparse):
    r"""Adds trained values to the entries of the weight that are largest by magnitude, and a low-rank product if asked.

        W' = W + M o V + s up down,     M the mask of the largest (or smallest) |W|,   s = alpha / r

    Trains: values (k,), k = (1 - sparsity) in out, zero at the start; with `r` also down (r, in) and up (out, r), zero
    at the start. Frozen: the indices (k,).
    Cost: k parameters, with `r` also r (in + out); one (out, in) temporary a call.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own entries.
    Raises: ConfigError if no entry is left, or for dropout where there is no input to drop from.
    Source: arXiv:2607.09287; Super, and Supra with `r`.
    """

    optional = frozenset({"supertuning_indices"})

    def __init__(self, site: Site, config: SupertuningConfig) -> None:
        self.each = int(site.shape[0] * site.shape[1] * (1 - config.sparsity))
        if self.each < 1:
            raise ConfigError(
                f"SupertuningConfig: sparsity={config.sparsity} leaves no entry of a weight of shape "
                f"{tuple(site.shape)} to train. Lower it, or leave this layer out."
            )
        super().__init__(site, config, self.each * torch.Size(site.batch).numel())
        self.config = config
        self.starts_as_base = config.init_weights
        self.low_rank: Lora | None = None
        if config.r is not None:
            if config.lora_dropout and site.kind == "norm":
                raise ConfigError("lora_dropout: nothing can be dropped from the input of a norm; set it to 0.")
            alpha = 2 * config.r if config.lora_alpha is None else config.lora_alpha
            low_rank = LoraConfig(r=config.r, lora_alpha=alpha)
            low_rank.lora_dropout, low_rank.init_lora_weights = config.lora_dropout, config.init_weights
            self.low_rank = Lora(site, low_rank)

    def reset(self) -> None:
        self.put("indices", self._ranked().sort().values)
        (nn.init.zeros_ if self.config.init_weights else nn.init.normal_)(self.values)
        if self.low_rank is not None:
            self.low_rank.reset()

    def _ranked(self) -> Tensor:
        """The chosen entries in the order of their magnitude, which is the order of values in files without indices."""
        magnitude = self.site.read().abs().reshape(-1, self.site.shape[0] * self.site.shape[1])
        chosen = magnitude.topk(self.each, largest=self.config.select_top).indices  # (n, k), n = 1 for one matrix
        starts = torch.arange(chosen.shape[0], device=chosen.device) * magnitude.shape[1]
        return (starts[:, None] + chosen).flatten()

    def adapt(self, weight: Tensor) -> Tensor:
        weight = super().adapt(weight)
        return weight if self.low_rank is None else self.low_rank.adapt(weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.low_rank is not None and self.site.kind in ("parameter", "norm"):
            return WeightAdapter.forward(self, x, base)
        y = super().forward(x, base)
        return y if self.low_rank is None else self.low_rank.add(x, y)

    def to_file(self) -> dict[str, Tensor]:
        tensors = {"supertuning_values": self.values, "supertuning_indices": self.indices}
        if not self.config.save_precomputed_indices:
            del tensors["supertuning_indices"]
            if not self.values.is_meta:
                by_entry = self._ranked().argsort()
                tensors["supertuning_values"] = torch.empty_like(self.values).index_copy(0, by_entry, self.values)
        low_rank = {} if self.low_rank is None else self.low_rank.to_file()
        return {**tensors, **{f"supertuning_{name}": tensor for name, tensor in low_rank.items()}}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        values, indices = tensors["supertuning_values"], tensors.get("supertuning_indices")
        if indices is None:
            indices = self._ranked().to(values.device)
        order = indices.argsort()
        self.put("values", values[order])
        self.put("indices", indices[order])
        if self.low_rank is not None:
            given = {name.removeprefix("supertuning_"): tensor for name, tensor in tensors.items()}
            self.low_rank.from_file({name: given[name] for name in self.low_rank.to_file()})


@register("supertuning")
@dataclass
class SupertuningConfig(ModuleConfig):
    """Configuration of `Supertuning`, field by field that of `peft`.

    Args:
        sparsity: Share of the entries that stay frozen.
        select_top: Train the largest entries; False for the smallest.
        r: Rank of the LoRA beside the entries; none for none.
        lora_alpha: Numerator of its scaling; twice the rank if none.
        lora_dropout: Share of its input that is dropped in training.
        init_weights: Start at zero; False for random values (for tests).
        save_precomputed_indices: Save the indices. False leaves them to be found from the base model on loading, which
            must then have the weights that it had in training, in the same type.

    Raises:
        ConfigError: A share outside [0, 1), a rank that is not positive, or `lora_alpha` without a rank.
    """

    adapter = Supertuning
    peft_name = "SUPERTUNING"
    learning_rates = {"classification": 1e-2, "causal-lm": 5e-3}  # noqa: RUF012  # read only
    own_fields = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform"})

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
        check_shares(self, "sparsity", "lora_dropout")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError(
                f"SupertuningConfig: lora_alpha={self.lora_alpha!r} scales a low-rank part, which only `r` asks for. "
                "Set r, or leave lora_alpha out."
            )
