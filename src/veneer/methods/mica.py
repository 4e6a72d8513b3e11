"""MiCA: LoRA whose `up` spans the weight's minor directions and stays frozen."""

from __future__ import annotations

from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site


@variant("mica", init_lora_weights="mica")
class Mica(Lora):
    r"""Trains what is added in the directions of the output that the weight uses least.

        W' = W + s up down,     up = the left singular vectors of the r smallest singular values of W

    Trains: down (r, in), zero at the start; up (out, r) stays as it is.
    Cost: r in parameters, and LoRA's 2 r (in + out) multiply-adds a token; one decomposition when the adapter is made.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if r > min(in, out).
    Source: arXiv:2604.01694.
    """

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        up = self.up.detach()
        del self.up
        self.register_buffer("up", up)
