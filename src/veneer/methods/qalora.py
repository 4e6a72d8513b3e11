"""QA-LoRA: LoRA on sums over groups of the input, so that a merge changes only the zeros of a quantised weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site


@variant("qalora", use_qalora=True)
class QaLora(Lora):
    r"""Gives all inputs of a group one column of `down`.

        W' = W + s c up down P,     P_gi = 1 where input i is in group g, else 0;     c = groups / group size

    Within a group, every row of the weight thus moves by one number, as the zero of its quantisation scale does.

    Trains: down (r, in / group size), up (out, r) zero at the start.
    Cost: r (in / group size + out) parameters.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if the group size does not divide the number of inputs.
    Source: Xu et al. 2023, arXiv:2309.14717, section 3.3. The paper's c is 1; this one is that of `peft`'s files.
    """

    kinds = frozenset({"linear", "parameter"})

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        in_features, self.size = site.shape[1], config.qalora_group_size
        if self.size <= 0 or in_features % self.size:
            raise ConfigError(
                f"qalora_group_size={self.size}, but the layer has {in_features} inputs; a divisor was expected."
            )
        groups = in_features // self.size
        self.down = nn.Parameter(torch.empty(*site.batch, config.r, groups))
        self.gain = groups / self.size

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.gain * self.down, self.up

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.factors()
        delta = self.scaling * (up @ down)  # (out, groups)
        return (weight.unflatten(-1, (-1, self.size)) + delta.unsqueeze(-1)).flatten(-2)

    def add_product(
        self, x: Tensor, y: Tensor, down: Tensor, up: Tensor, scaling: float, bias: Tensor | None = None
    ) -> Tensor:
        return super().add_product(x.unflatten(-1, (-1, self.size)).sum(-1), y, down, up, scaling, bias)
