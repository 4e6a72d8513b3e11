"""FourierFT: a few coefficients of the weight's spectrum are trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.adapter import WeightAdapter
from veneer.config import WeightConfig, check_positive
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import Site


class FourierFT(WeightAdapter):
    r"""Adds the inverse Fourier transform of a sparse matrix of trained coefficients.

        W' = W + s Re ifft2(F),     F[p_i, q_i] = c_i for i < n, 0 elsewhere

    The places (p_i, q_i) are drawn from the configuration's seed, so a file holds c alone.

    Trains: c (n,).
    Cost: n parameters a layer, and one real transform of (out, in) a call, O(in out log(in out)).
    Start: c is normal, which changes the outputs; zero, so that they are the base layer's, with `init_weights`.
    Merge: exact up to rounding of the dtype. The transform is computed in float32 at least.
    On a stack of n matrices every matrix has coefficients of its own, at the same places.
    Raises: ConfigError for more coefficients than the weight has elements.
    Source: Gao et al. 2024, arXiv:2405.03003, eq. 2 to 4.
    """

    slots: Tensor
    sources: Tensor

    def __init__(self, site: Site, config: FourierFTConfig) -> None:
        super().__init__(site, config)
        size = site.shape[0] * site.shape[1]
        if config.n_frequency > size:
            raise ConfigError(
                f"n_frequency={config.n_frequency} on a weight of {site.shape[0]} x {site.shape[1]}: {size} at most "
                "was expected. Lower it, or set n_frequency_pattern for this layer."
            )
        self.scaling = config.scaling
        self.starts_as_base = config.init_weights
        self.spectrum = nn.Parameter(torch.empty(*site.batch, config.n_frequency))
        chosen = places(size, config.n_frequency, config.random_loc_seed)
        slots, sources = half(chosen, *site.shape)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("sources", sources, persistent=False)

    def reset(self) -> None:
        if self.starts_as_base:
            nn.init.zeros_(self.spectrum)
        else:
            nn.init.normal_(self.spectrum)

    def adapt(self, weight: Tensor) -> Tensor:
        out_features, in_features = self.site.shape
        columns = in_features // 2 + 1
        wide = torch.promote_types(torch.promote_types(weight.dtype, self.spectrum.dtype), torch.float32)
        values = self.spectrum.to(wide).index_select(-1, self.sources) * (self.scaling / 2)
        dense = values.new_zeros(*self.site.batch, out_features * columns).index_add(-1, self.slots, values)
        return torch.fft.irfft2(dense.unflatten(-1, (-1, columns)), s=self.site.shape).add_(weight)

    def to_file(self) -> dict[str, Tensor]:
        return {"fourierft_spectrum": self.spectrum}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("spectrum", tensors["fourierft_spectrum"])


@functools.lru_cache(maxsize=16)  # layers of one shape have the same places
def places(size: int, count: int, seed: int) -> Tensor:
    """Which elements of the flat weight carry coefficients: the first of a random permutation, as `peft` draws it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:count].clone()


def half(chosen: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Where the coefficients stand in the half of the spectrum that determines a real matrix.

    The real part of the transform is that of (F[p, q] + F[-p, -q]) / 2. Of each such pair one lies in the first
    in / 2 + 1 columns; both do in the columns that are their own mirror image.

    Returns:
        Indices into the flat half, and the coefficient that is added to each.
    """
    row, column = chosen // in_features, chosen % in_features
    own, mirrored = (row, column), (-row % out_features, -column % in_features)
    columns = in_features // 2 + 1
    slots = torch.cat([row * columns + column for row, column in (own, mirrored)])
    kept = torch.cat([column < columns for _, column in (own, mirrored)])
    sources = torch.arange(len(chosen), device="cpu").repeat(2)
    return slots[kept], sources[kept]


@register("fourierft")
@dataclass
class FourierFTConfig(WeightConfig):
    """Configuration of `FourierFT`, field by field that of `peft`.

    Args:
        n_frequency: Number of coefficients a layer.
        scaling: What the transform is multiplied by.
        random_loc_seed: Seed of the places of the coefficients.
        n_frequency_pattern: `n_frequency` by module name or regular expression, where it differs.
        init_weights: True starts from zero; False from normal coefficients.

    Raises:
        ConfigError: A number of coefficients that is not positive, or no seed.
    """

    adapter = FourierFT
    peft_name = "FOURIERFT"
    patterns = {"n_frequency_pattern": "n_frequency"}  # noqa: RUF012  # read only
    learning_rates = {"classification": 5e-2, "causal-lm": 2e-2}  # noqa: RUF012  # read only

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n_frequency", "n_frequency_pattern")
        if self.random_loc_seed is None:
            raise ConfigError(
                "FourierFTConfig: random_loc_seed=None; a number was expected, from which the places are drawn again "
                "on loading: a file holds the coefficients alone."
            )
