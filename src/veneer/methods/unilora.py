"""Uni-LoRA: one vector for the whole model, whose elements stand in all places of LoRA's factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn

from veneer.adapter import Shared, WeightAdapter
from veneer.config import WeightConfig, check_positive, check_shares
from veneer.products import LowRank
from veneer.registry import register
from veneer.sites import Site


class Theta(Shared):
    """The vector, `(d,)`, and what each of its elements is divided by: the root of how often it is used."""

    scale: Tensor

    def __init__(self, sites: Mapping[str, Site], config: UniLoraConfig) -> None:
        super().__init__(sites, config)
        self.config = config
        self.unilora_theta_d = nn.Parameter(torch.empty(config.theta_d_length))
        shapes = [shape for site in sites.values() for shape in shapes_of(site, config.r)]
        indices = assign(sum(math.prod(shape) for shape in shapes), config.theta_d_length, config.proj_seed)
        counts = torch.bincount(indices, minlength=config.theta_d_length)
        self.register_buffer("scale", counts.clamp_min(1).float().rsqrt(), persistent=False)
        chunks = indices.split([math.prod(shape) for shape in shapes])
        parts = iter(chunk.view(shape).clone() for chunk, shape in zip(chunks, shapes, strict=True))
        self.parts = {path: (next(parts), next(parts)) for path in sites}  # until the places take them

    def reset(self) -> None:
        if self.config.init_weights:
            nn.init.uniform_(self.unilora_theta_d, -self.config.init_theta_d_bound, self.config.init_theta_d_bound)
        else:
            nn.init.normal_(self.unilora_theta_d)


def shapes_of(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of down and up."""
    out_features, in_features = site.shape
    return (*site.batch, r, in_features), (*site.batch, out_features, r)


def assign(places: int, length: int, seed: int) -> Tensor:
    """Which element stands in each of so many places: each as often as any other, give or take one; as `peft` does."""
    generator = numpy.random.default_rng(seed)
    elements = numpy.repeat(numpy.arange(length), places // length)
    if rest := places % length:
        elements = numpy.concatenate([elements, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(elements)
    return torch.from_numpy(elements)


class UniLora(WeightAdapter):
    r"""Adds a low-rank product; every element of its factors is an element of one vector theta.

        W' = W + up down,     element i of all factors = theta[k_i] / sqrt(n[k_i])

    k_i is drawn from the configuration's seed, and n[k] is how often k was: the factors are an isometric projection of
    theta.

    Trains: theta (d,), once for all layers.
    Cost: d parameters in all. The indices k take r (in + out) whole numbers a layer in memory, and none in files unless
    `save_indices`. Dropout as in `Lora`.
    Start: theta is uniform, so the outputs change slightly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has factors of its own.
    Raises: ConfigError for dropout on a bare parameter.
    Source: Li et al. 2025, arXiv:2506.00799, section 3.2.
    """

    shares = Theta
    shared: Theta
    starts_as_base = False
    optional = frozenset(f"unilora_{what}_{factor}" for what in ("indices", "scales") for factor in "AB")

    indices_down: Tensor
    indices_up: Tensor

    def __init__(self, site: Site, config: UniLoraConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.dropout = self.input_dropout(config.unilora_dropout, "unilora_dropout")

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        for name, indices in zip(("indices_down", "indices_up"), self.shared.parts.pop(path), strict=True):
            self.register_buffer(name, indices, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """down `(r, in)` and up `(out, r)`."""
        theta = self.shared.unilora_theta_d * self.shared.scale
        theta = theta.to(self.indices_down.device)
        down, up = (
            theta.index_select(0, indices.flatten()).view(indices.shape)
            for indices in (self.indices_down, self.indices_up)
        )
        return down, up

    def product(self) -> LowRank:
        return LowRank(*self.factors())

    def to_file(self) -> dict[str, Tensor]:
        if not self.config.save_indices:
            return {}
        tensors = {}
        for factor, indices in (("A", self.indices_down), ("B", self.indices_up)):
            tensors[f"unilora_indices_{factor}"] = indices
            tensors[f"unilora_scales_{factor}"] = self.shared.scale.to(indices.device)[indices]
        return tensors

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for factor, name in (("A", "indices_down"), ("B", "indices_up")):
            if (indices := tensors.get(f"unilora_indices_{factor}")) is not None:
                self.put(name, indices)
                scale = self.shared.scale
                scale[indices.flatten().to(scale.device)] = tensors[f"unilora_scales_{factor}"].flatten().to(scale)


@register("unilora")
@dataclass
class UniLoraConfig(WeightConfig):
    """Configuration of `UniLora`, field by field that of `peft`.

    Args:
        r: Rank.
        theta_d_length: Length of the vector: the number of trained parameters.
        proj_seed: Seed of the indices.
        unilora_dropout: Share of the input that is dropped in training.
        init_theta_d_bound: The vector starts uniform between this and its negative.
        init_weights: False starts it normal (for tests).
        save_indices: Write the indices and scales into the file. False draws them again on loading.

    Raises:
        ConfigError: A size that is not positive, or a dropout outside [0, 1).
    """

    adapter = UniLora
    peft_name = "UNILORA"
    own_fields = frozenset({"exclude_modules"})
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only

    r: int = 4
    theta_d_length: int = 256
    proj_seed: int = 42
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "theta_d_length", "init_theta_d_bound")
        check_shares(self, "unilora_dropout")
