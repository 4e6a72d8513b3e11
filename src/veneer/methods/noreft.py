"""NoReFT: LoReFT whose matrix need not be orthogonal."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.methods.loreft import Edit, LoReFT, LoReFTConfig
from veneer.registry import register


class NoReFT(LoReFT):
    r"""Edits the hidden states of the first p and last s tokens of the prompt, as LoReFT does without its constraint.

        h' = h + W_2^T (W_1 h + b - W_2 h)

    Positions, cost and errors: as `LoReFT`.
    Trains: W_1 (r, d) and b (r,); W_2, as (d, r), orthonormal at the start.
    Start: the matrices are random, so the outputs change. Merge: impossible, as no weight knows positions.
    Source: Wu et al. 2024, arXiv:2404.03592, ablation in its appendix.
    """

    edit = Edit


@register("noreft")
@dataclass
class NoReFTConfig(LoReFTConfig):
    """Configuration of `NoReFT`."""

    adapter = NoReFT
    peft_name = "NOREFT"
