"""BD-LoRA: LoRA with a block-diagonal factor, so that each device of a sharded model needs its own blocks only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from veneer.config import Nested
from veneer.errors import ConfigError
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site


@dataclass(frozen=True)
class BdLoraConfig(Nested):
    """Which factor is block-diagonal where. A place is named by any part of its path.

    Args:
        target_modules_bd_a: Places where `down` is: layers whose input is sharded, such as `o_proj` and `down_proj`.
        target_modules_bd_b: Places where `up` is: layers whose output is sharded, such as `q_proj` and `up_proj`.
        nblocks: Number of blocks; that of the shards of the serving engine.
        match_strict: Refuse places that neither names; otherwise they get plain LoRA.

    Raises:
        ConfigError: A name is in both lists, or there is no block.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if both := set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()):
            raise ConfigError(f"BdLoraConfig: {sorted(both)} in both lists. Leave each in one of them.")
        if self.nblocks <= 0:
            raise ConfigError(f"BdLoraConfig: nblocks={self.nblocks}; a positive whole number was expected.")

    def at(self, path: str) -> Self:
        """The settings with the place itself in one of the lists, or in none.

        Raises:
            ConfigError: Both lists name the place, or none does and `match_strict` is on.
        """
        a, b = (
            [path] if any(name in path for name in names or ()) else None
            for names in (self.target_modules_bd_a, self.target_modules_bd_b)
        )
        if a and b:
            raise ConfigError(f"use_bdlora: {path} is named by target_modules_bd_a and target_modules_bd_b.")
        if self.match_strict and not a and not b:
            raise ConfigError(
                f"use_bdlora: {path} is named neither by target_modules_bd_a nor by target_modules_bd_b. Add it to "
                "one, or set match_strict=False to have plain LoRA there."
            )
        return replace(self, target_modules_bd_a=a, target_modules_bd_b=b)

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        for field in ("target_modules_bd_a", "target_modules_bd_b"):
            if idle := [name for name in getattr(self, field) or () if not any(name in path for path in paths)]:
                yield f"{field}: {idle} match none of the adapted modules."


@variant("bdlora", use_bdlora=BdLoraConfig())
class BdLora(Lora):
    r"""LoRA with down or up zero outside of n blocks along the diagonal.

        W' = W + s up down,     down = diag(down_1, ..., down_n)  or  up = diag(up_1, ..., up_n)

    Trains: the blocks. Of `down` (r, in / n) and up (out, r), or down (r, in) and of `up` (out, r / n); up zero at the
    start.
    Cost: r (in / n + out) or r (in + out / n) parameters; where down is block-diagonal, its start has the wider
    Kaiming-uniform distribution that `peft` gives it.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if n does not divide the rank and the layer's side, or for starts that need whole factors.
    Source: Wang et al. 2025, arXiv:2510.23346, section 3.
    """

    kinds = frozenset({"linear", "parameter"})

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        settings: BdLoraConfig = config.use_bdlora
        self.blocks = settings.nblocks
        self.splits_down, self.splits_up = bool(settings.target_modules_bd_a), bool(settings.target_modules_bd_b)
        if not (self.splits_down or self.splits_up):
            return
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"use_bdlora with init_lora_weights={config.init_lora_weights!r}: blocks start as True, False or "
                "'gaussian' says."
            )
        out_features, in_features = site.shape
        side = in_features if self.splits_down else out_features
        if side % self.blocks or config.r % self.blocks:
            raise ConfigError(
                f"use_bdlora: nblocks={self.blocks} divides r={config.r} and {site.shape} of the layer not evenly."
            )
        if self.splits_down:
            self.down = nn.Parameter(torch.empty(*site.batch, config.r, in_features // self.blocks))
        else:
            self.up = nn.Parameter(torch.empty(*site.batch, out_features, config.r // self.blocks))

    def reset(self) -> None:
        super().reset()
        if self.splits_down and self.config.init_lora_weights is True:
            for matrix in self.down if self.site.batch else [self.down]:
                nn.init.kaiming_uniform_(matrix)

    def factors(self) -> tuple[Tensor, Tensor]:
        return (
            _spread(self.down, self.blocks) if self.splits_down else self.down,
            _spread(self.up, self.blocks) if self.splits_up else self.up,
        )


def _spread(rows: Tensor, blocks: int) -> Tensor:
    """The block-diagonal matrix of blocks that lie below each other: `(m, k)` as `(m, blocks * k)`."""
    identity = torch.eye(blocks, dtype=rows.dtype, device=rows.device)
    stacked = rows.unflatten(-2, (blocks, -1)).unsqueeze(-2)  # (blocks, m / blocks, 1, k)
    spread = identity[:, None, :, None] * stacked  # (blocks, m / blocks, blocks, k)
    return spread.flatten(-2).flatten(-3, -2)
