"""DiReFT: LoReFT without its projection, a low-rank change of the hidden state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from veneer.methods.loreft import Edit, LoReFT, LoReFTConfig
from veneer.registry import register


class DirectEdit(Edit):
    """h + W_2^T (W_1 h + b)."""

    def forward(self, h: Tensor, dropout: float) -> Tensor:
        return nn.functional.dropout(self.source(h), dropout) @ self.rows()


class DiReFT(LoReFT):
    r"""Adds a low-rank function to the hidden states of the first p and last s tokens of the prompt.

        h' = h + W_2^T (W_1 h + b)

    Positions, cost and errors: as `LoReFT`.
    Trains: W_1 (r, d) and b (r,); W_2, as (d, r), orthonormal at the start.
    Start: the matrices are random, so the outputs change. Merge: impossible, as no weight knows positions.
    Source: Wu et al. 2024, arXiv:2404.03592, eq. 3.
    """

    edit = DirectEdit


@register("direft")
@dataclass
class DiReFTConfig(LoReFTConfig):
    """Configuration of `DiReFT`."""

    adapter = DiReFT
    peft_name = "DIREFT"
