"""SHiRA: as many entries of the weight as LoRA has parameters, scattered at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import ModuleConfig, check_positive, own
from veneer.errors import ConfigError
from veneer.methods.sparse import Sparse
from veneer.registry import register
from veneer.sites import Site


class Shira(Sparse):
    r"""Adds trained values to r (in + out) entries of the weight, chosen once.

        W' = W + M o V,     M a fixed mask with r (in + out) ones

    Trains: values (r (in + out),), zero at the start. Frozen: their indices.
    Cost: the parameters of LoRA of rank r, with a change of any rank; one (out, in) temporary a call.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own entries.
    Raises: ConfigError if the weight has fewer entries, or for a `mask_type` without its function.
    Source: Bhardwaj et al. 2024, arXiv:2406.13175, section 3; SHiRA-Rand.
    """

    kinds = frozenset({"linear", "conv", "embedding", "parameter"})

    def __init__(self, site: Site, config: ShiraConfig) -> None:
        each, count = site.shape[0] * site.shape[1], config.r * sum(site.shape)
        if count > each:
            raise ConfigError(
                f"ShiraConfig: r={config.r} asks for {count} entries of a weight of shape {tuple(site.shape)}, which "
                f"has {each}. Set r to {each // sum(site.shape)} or less, or leave this layer out."
            )
        super().__init__(site, config, count * torch.Size(site.batch).numel())
        self.config = config
        self.starts_as_base = config.init_weights

    def reset(self) -> None:
        self.put("indices", self._random() if self.config.mask_type == "random" else self._from_function())
        (nn.init.zeros_ if self.config.init_weights else nn.init.normal_)(self.values)

    def _random(self) -> Tensor:
        generator = torch.Generator()  # its own default seed is a fixed one
        if self.config.random_seed is not None:
            generator.manual_seed(self.config.random_seed)
        each, matrices = self.site.shape[0] * self.site.shape[1], torch.Size(self.site.batch).numel()
        count = self.config.r * sum(self.site.shape)
        chosen = [torch.randperm(each, generator=generator)[:count].sort().values for _ in range(matrices)]
        return torch.cat([start * each + indices for start, indices in enumerate(chosen)])

    def _from_function(self) -> Tensor:
        if self.config.mask_fn is None:
            raise ConfigError(
                f"mask_type={self.config.mask_type!r} is not known. Set `config.mask_fn` to a function of the layer "
                "and r that returns a mask in the shape of its weight, or use mask_type='random'."
            )
        mask = self.site.view(self.config.mask_fn(self.site.module, self.config.r))
        chosen = mask.reshape(-1).nonzero().flatten()
        if chosen.numel() != self.values.numel():
            raise ConfigError(
                f"config.mask_fn chose {chosen.numel()} entries of a weight of shape {tuple(mask.shape)}; "
                f"{self.values.numel()} were expected, which is r (in + out)."
            )
        return chosen

    # Layout of peft: one row of positions for each axis of the matrix.

    def to_file(self) -> dict[str, Tensor]:
        shape = (*self.site.batch, *self.site.shape)
        axes = torch.stack(torch.unravel_index(self.indices, shape))  # (2, k), for a stack (3, k)
        return {"shira_weight": self.values, "shira_indices": axes.to(torch.int32)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("values", tensors["shira_weight"])
        flat = torch.zeros_like(tensors["shira_indices"][0], dtype=torch.int64)
        for length, position in zip((*self.site.batch, *self.site.shape), tensors["shira_indices"], strict=True):
            flat = flat * length + position
        self.put("indices", flat)


@register("shira")
@dataclass
class ShiraConfig(ModuleConfig):
    """Configuration of `Shira`, field by field that of `peft`.

    Args:
        r: Rank of the LoRA that has as many parameters.
        mask_type: `"random"`, or a name of your own for the mask that `mask_fn` makes.
        random_seed: Seed of the random mask.
        fan_in_fan_out: Kept for `peft`'s files; how a layer stores its weight is seen from the layer.
        init_weights: Start at zero; False for random values (for tests).
        mask_fn: Function of the layer and r that returns a mask of zeros and r (in + out) ones, in the shape of the
            layer's weight. Not saved: the indices are.

    Raises:
        ConfigError: r is not positive.
    """

    adapter = Shira
    peft_name = "SHIRA"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only
    own_fields = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform"})

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    mask_fn: Callable[..., Tensor] | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")

    def to_dict(self) -> dict[str, Any]:
        return super(ShiraConfig, replace(self, mask_fn=None)).to_dict()
