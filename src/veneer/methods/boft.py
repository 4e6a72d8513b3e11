"""BOFT: orthogonal fine-tuning by a product of sparse rotations, butterfly factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import WeightConfig, check_shares
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.rotations import cayley, turn
from veneer.sites import EmbeddingSite, Site


class Boft(WeightAdapter):
    r"""Turns the input of the layer by a product of block rotations between which its numbers are mixed; scales rows.

        W' = diag(s) W R^T,     R = M_m ... M_1,     M_i = P_i diag(R_i1, ..., R_id) P_i^T
        R_ij = (I - Q)(I + Q)^-1,     Q = (A_ij - A_ij^T) / 2

    P_i puts the even half blocks before the odd ones, within groups of 2^(i - 1) blocks. On an embedding the looked-up
    vectors are turned, W' = diag(s) R^T W. The bias is neither turned nor scaled. Dropout chooses one of the m factors
    at each call and replaces its rotations by I, each with that probability, in training only.

    Trains: rotation A (m, d, b, b), zero, and scale s (out,), one at the start; d b = in.
    Cost: m in b + out parameters and m in b multiply-adds a token; convolutions turn their weight instead.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError where blocks or factors do not divide the width.
    Source: Liu et al. 2023, arXiv:2311.06243, section 4, with its multiplicative dropout.
    """

    def __init__(self, site: Site, config: BOFTConfig) -> None:
        super().__init__(site, config)
        self.config = config
        width = site.shape[0] if site.kind == "embedding" else site.shape[1]
        factors, wanted = config.boft_n_butterfly_factor, config.boft_block_size or config.boft_block_num
        size, count = (wanted, width // wanted) if config.boft_block_size else (width // wanted, wanted)
        if size * count != width or count % 2 ** (factors - 1) or (factors > 1 and size % 2):
            raise ConfigError(
                f"boft_block_size={config.boft_block_size}, boft_block_num={config.boft_block_num} and "
                f"boft_n_butterfly_factor={factors} do not fit a layer of width {width}: block size times number has "
                "to be the width, and with m > 1 factors the size even and the number a multiple of 2^(m - 1)."
            )
        self.rotation = nn.Parameter(torch.empty(*site.batch, factors, count, size, size))
        self.scale = nn.Parameter(torch.empty(*site.batch, site.shape[0]))

    def reset(self) -> None:
        random = not self.config.init_weights
        nn.init.normal_(self.rotation, std=0.1 if random else 0)
        nn.init.normal_(self.scale, mean=1, std=0.1 if random else 0)

    def blocks(self) -> list[Tensor]:
        """The rotations of each factor, `(d, b, b)`."""
        blocks = cayley(0.5 * (self.rotation - self.rotation.mT))
        share = self.config.boft_dropout
        if self.training and share:
            shape = blocks.shape[:-2]
            chosen = torch.arange(shape[-2], device=blocks.device) == torch.randint(shape[-2], (), device=blocks.device)
            dropped = (torch.rand(shape, device=blocks.device) < share) & chosen[:, None]
            eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
            blocks = torch.where(dropped[..., None, None], eye, blocks)
        return list(blocks.unbind(-4))

    def turned(self, rows: Tensor) -> Tensor:
        """Rows times R."""
        blocks = self.blocks()
        for i in reversed(range(len(blocks))):
            rows = mixed(turn(unmixed(rows, blocks[i], i), blocks[i]), blocks[i], i)
        return rows

    def adapt(self, weight: Tensor) -> Tensor:
        weight = weight.to(self.scale.dtype)
        if self.site.kind == "embedding":
            weight = self.turned(weight.mT).mT
        else:
            for i, blocks in enumerate(self.blocks()):
                weight = mixed(turn(unmixed(weight, blocks, i), blocks.mT), blocks, i)
        return self.scale.unsqueeze(-1) * weight

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if isinstance(self.site, EmbeddingSite):
            y = base(x)
            flat = y.to(self.scale.dtype).reshape(-1, y.shape[-1])
            return self.site.without_padding(x, (self.turned(flat) * self.scale).view(y.shape).to(y.dtype))
        if self.site.kind != "linear":
            return super().forward(x, base)
        rows = x.to(self.scale.device, self.scale.dtype).reshape(-1, x.shape[-1])
        y, bias = base(self.turned(rows).view(x.shape).to(x.dtype)), base.bias()
        if bias is None:
            return (y * self.scale).to(y.dtype)
        # s (y - b) + b, so that what lies below runs as it is.
        return torch.addcmul(bias * (1 - self.scale), y.to(self.scale.dtype), self.scale).to(y.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {"boft_R": self.rotation, "boft_s": self.scale.unsqueeze(0 if self.site.kind == "conv" else -1)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("rotation", tensors["boft_R"])
        self.put("scale", tensors["boft_s"].reshape(self.scale.shape))


def mixed(rows: Tensor, blocks: Tensor, factor: int) -> Tensor:
    """Rows times P^T of this factor, counted from 0: what stands at an even half block of a group comes from its first
    half, in order, what stands at an odd one from its second. `unmixed` is the inverse."""
    return _mixed(rows, blocks, (2**factor, 2)) if factor else rows


def unmixed(rows: Tensor, blocks: Tensor, factor: int) -> Tensor:
    return _mixed(rows, blocks, (2, 2**factor)) if factor else rows


def _mixed(rows: Tensor, blocks: Tensor, axes: tuple[int, int]) -> Tensor:
    half = blocks.shape[-1] // 2
    return rows.unflatten(-1, (-1, *axes, half)).transpose(-3, -2).reshape(rows.shape)


@register("boft")
@dataclass
class BOFTConfig(WeightConfig):
    """Configuration of `Boft`, field by field that of `peft`.

    Args:
        boft_block_size: Width of a block; 0 where `boft_block_num` is given.
        boft_block_num: Number of blocks; 0 where `boft_block_size` is given.
        boft_n_butterfly_factor: Number of factors; 1 is OFT with scaled rows.
        boft_dropout: Probability with which a rotation of the chosen factor is left out in training.
        init_weights: Start as the base layer; False starts with small random numbers (for tests).

    Raises:
        ConfigError: Not exactly one of block size and number is given, or a value is out of its range.
    """

    adapter = Boft
    peft_name = "BOFT"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.boft_block_size, self.boft_block_num)
        if min(sizes) != 0 or max(sizes) <= 0:
            raise ConfigError(
                f"BOFTConfig: boft_block_size={sizes[0]} and boft_block_num={sizes[1]}; the one to go by has to be "
                "positive and the other one 0, since one follows from the other."
            )
        if self.boft_n_butterfly_factor < 1:
            raise ConfigError(
                f"BOFTConfig: boft_n_butterfly_factor={self.boft_n_butterfly_factor}; at least 1 was expected."
            )
        check_shares(self, "boft_dropout")
