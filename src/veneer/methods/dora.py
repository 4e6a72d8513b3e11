"""DoRA: LoRA on the direction of every row of the weight, with its length trained beside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.adapter import Base
from veneer.errors import ConfigError
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import EmbeddingSite, Site


@variant("dora", use_dora=True)
class Dora(Lora):
    r"""Splits the weight into row lengths and directions, and trains both.

        W' = m * (W + s up down) / ||W + s up down||_row,     s = alpha / r

    On an embedding a row is one dimension of the vectors, over the whole vocabulary.

    Trains: down (r, in), up (out, r) zero at the start, magnitude m (out,), the row lengths of W at the start.
    Cost: r (in + out) + out parameters, and r in out multiply-adds a call for the lengths, however many tokens.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError with `lora_bias`.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5. No gradient flows through the norm, as in its section 4.3.
    """

    kinds = frozenset({"linear", "conv", "embedding"})
    moving_starts = True

    def __init__(self, site: Site, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ConfigError("lora_bias=True with use_dora: the method has no such bias. Leave one of them out.")
        super().__init__(site, config)
        self.magnitude = nn.Parameter(torch.empty(site.shape[0]))

    def reset(self) -> None:
        super().reset()
        with torch.no_grad():
            nn.init.ones_(self.magnitude)
            self.magnitude.div_(self.gain(self.site.read()))

    def gain(self, weight: Tensor) -> Tensor:
        """What every row is multiplied by, `(out,)`.

        ||w + d||^2 = ||w||^2 + 2 w.d + ||d||^2 for each row, so that W + s up down is never formed.
        """
        with torch.no_grad():
            down, up = self.factors()
            up = self.scaling * up
            weight = weight.to(up.dtype)
            square = torch.linalg.vector_norm(weight, dim=1).square()
            square += 2 * (weight @ down.t() * up).sum(1) + (up @ (down @ down.t()) * up).sum(1)
            norm = square.clamp_min(torch.finfo(up.dtype).tiny).sqrt()
        return self.magnitude / norm

    def adapt(self, weight: Tensor) -> Tensor:
        return self.gain(weight)[:, None] * super().adapt(weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        weight, bias = base.weight(), base.bias()
        y = self.add(x, self.site.apply(x, weight, None, base.args, base.kwargs))
        y = y * self.site.per_channel(self.gain(weight), y)
        if isinstance(self.site, EmbeddingSite):
            y = self.site.without_padding(x, y)
        return y if bias is None else self.site.add_bias(y, bias)

    def to_file(self) -> dict[str, Tensor]:
        shape = (
            (1, -1, *[1] * (self.site.module.get_parameter("weight").dim() - 2)) if self.site.kind == "conv" else (-1,)
        )
        return {**super().to_file(), "lora_magnitude_vector": self.magnitude.view(shape)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file(tensors)
        self.put("magnitude", tensors["lora_magnitude_vector"].flatten())
