"""AdapterPlus: a bottleneck at the end of every block, with a scale for each channel, at times left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from veneer.config import check_shares
from veneer.errors import ConfigError
from veneer.methods.bottleneck import Bottleneck, BottleneckConfig
from veneer.registry import register
from veneer.sites import Site


class AdapterPlus(Bottleneck):
    r"""Adds to the output of a block, after its residual sum, a narrow layer's with a trained scale for each channel.

        h' = h + s * (up f(down h + b_down) + b_up),     s (d,) ones at the start

    In training the added part is left out of a row with probability `drop_path`, and is larger by 1 / (1 - drop_path)
    otherwise.

    Trains: down (m, d), up (d, m), truncated normal of deviation 0.01; both biases, zero; s (d,).
    Cost: 2 m d + m + 2 d parameters a block.
    Start: changes the outputs slightly, as up is not zero. Merge: impossible, f is not linear.
    Source: Steitz and Roth 2024, arXiv:2406.06820, sections 3.2 to 3.4.
    """

    starts_as_base = False

    def __init__(self, module: nn.Module, site: Site | None, config: AdapterPlusConfig) -> None:
        super().__init__(module, site, config)
        self.drop_path = config.drop_path

    def reset(self) -> None:
        super().reset()
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)

    def branch(self, x: Tensor) -> Tensor:
        added = super().branch(x)
        if not (self.training and self.drop_path):
            return added
        stays = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.drop_path
        return added * stays / (1 - self.drop_path)


@register("adapterplus")
@dataclass
class AdapterPlusConfig(BottleneckConfig):
    """Configuration of `AdapterPlus`. `target_modules=None` takes the model's blocks.

    Args:
        bottleneck_size: Width of the bottleneck; 8 in the paper.
        drop_path: How often the adapter is left out of a row in training.

    Raises:
        ConfigError: As `BottleneckConfig`, or a share outside [0, 1).
    """

    adapter = AdapterPlus
    peft_name = "ADAPTER_PLUS"
    default_targets = (["block-output"],)

    bottleneck_size: int | None = 8
    drop_path: float = 0.1
    scaling: float | Literal["learned", "channel"] = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "drop_path")
        if self.around_norm:
            raise ConfigError("AdapterPlusConfig: around_norm=True; it stands at the end of blocks. Leave it out.")
