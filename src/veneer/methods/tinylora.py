"""TinyLoRA: a few numbers, shared by layers, between the main directions of every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, Shared, WeightAdapter
from veneer.config import WeightConfig, check_positive, check_shares
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import LinearSite, Site


class Vectors(Shared):
    """One vector (u,) for each group of consecutive places."""

    def __init__(self, sites: Mapping[str, Site], config: TinyLoraConfig) -> None:
        super().__init__(sites, config)
        self.config = config
        groups = max(1, round(len(sites) * (1 - config.weight_tying)))
        size = max(1, len(sites) // groups)
        self.place = {path: number for number, path in enumerate(sites)}
        self.group = {path: str(min(number // size, groups - 1)) for path, number in self.place.items()}
        vectors = {group: nn.Parameter(torch.empty(config.u)) for group in dict.fromkeys(self.group.values())}
        self.tinylora_v = nn.ParameterDict(vectors)

    def reset(self) -> None:
        for vector in self.tinylora_v.values():
            if self.config.init_weights is True:
                nn.init.zeros_(vector)
            elif self.config.init_weights == "uniform":
                nn.init.uniform_(vector, -self.config.init_v_bound, self.config.init_v_bound)
            else:
                nn.init.normal_(vector)


class TinyLora(WeightAdapter):
    r"""Adds a change between the r main directions of the weight, mixed from u random matrices.

        W' = W + up R down,     R = sum over i of v_i P_i,     down = S^1/2 V^T,  up = U S^1/2,  W ~ U S V^T of rank r

    P_i (r, r) is random; a group of layers, of a size that `weight_tying` gives, has one v.

    Trains: v (u,) for each group, zero at the start.
    Cost: u parameters a group, down to 1 for the whole model; LoRA's time. A singular value decomposition of every
    weight at the start. Dropout as in `Lora`.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own directions.
    Raises: ConfigError for dropout on a bare parameter.
    Source: 2026, arXiv:2602.04118, section 4; directions: Bałazy et al. 2024 (LoRA-XS), arXiv:2405.17604.
    """

    shares = Vectors
    shared: Vectors
    optional = frozenset({"tinylora_P"})

    down: Tensor
    up: Tensor
    bases: Tensor

    def __init__(self, site: Site, config: TinyLoraConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.starts_as_base = config.init_weights is True
        self.dropout = self.input_dropout(config.tinylora_dropout, "tinylora_dropout")
        self.r = min(config.r, *site.shape)
        self.register_buffer("down", torch.empty(*site.batch, self.r, site.shape[1]))
        self.register_buffer("up", torch.empty(*site.batch, site.shape[0], self.r))

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.group = self.shared.group[path]
        generator = torch.Generator("cpu").manual_seed(self.config.projection_seed + self.shared.place[path])
        size = (self.config.u, self.r, self.r)
        self.register_buffer("bases", torch.normal(0.0, self.r**-0.5, size, generator=generator, device="cpu"))

    def reset(self) -> None:
        weight = self.site.read()
        u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        root = s[..., : self.r].sqrt()
        with torch.no_grad():
            self.down.copy_(root.unsqueeze(-1) * v[..., : self.r, :])
            self.up.copy_(u[..., : self.r] * root.unsqueeze(-2))

    def mixed(self) -> Tensor:
        """R, (r, r)."""
        vector = self.shared.tinylora_v[self.group].to(self.bases)
        mixed = (vector @ self.bases.flatten(1)).view(self.r, self.r)
        # P is as in files, which hold the directions of an embedding's stored, transposed weight.
        return mixed.mT if self.site.kind == "embedding" else mixed

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.up @ (self.mixed() @ self.down)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "parameter":
            return super().forward(x, base)
        y = base(x)
        if x.is_floating_point():
            x = F.dropout(x.to(self.down.dtype), self.dropout, self.training)
        if isinstance(self.site, LinearSite):  # step by step: down and up get no gradient
            return self.site.add_factored(F.linear(x.to(self.down.device), self.down), y, self.mixed(), self.up)
        return self.site.add_factored(x, y, self.mixed() @ self.down, self.up)

    # Layout of peft: B and A are up and down; on embeddings those of the stored weight, which is the transposed one.

    def to_file(self) -> dict[str, Tensor]:
        a, b = (self.up.mT, self.down.mT) if self.site.kind == "embedding" else (self.down, self.up)
        return {"tinylora_A": a, "tinylora_B": b, **({"tinylora_P": self.bases} if self.config.save_projection else {})}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        a, b = tensors["tinylora_A"], tensors["tinylora_B"]
        turned = self.site.kind == "embedding"
        self.put("down", b.mT if turned else a)
        self.put("up", a.mT if turned else b)
        if "tinylora_P" in tensors:
            self.put("bases", tensors["tinylora_P"])


@register("tinylora")
@dataclass
class TinyLoraConfig(WeightConfig):
    """Configuration of `TinyLora`, field by field that of `peft`.

    Args:
        r: How many directions of each weight; at most as many as it has.
        u: Numbers that are trained for each group.
        weight_tying: 0 gives every layer a vector of its own, 1 gives all layers one.
        projection_seed: Seed of the random matrices, to which the number of the layer is added.
        save_projection: Write the random matrices into the file. False draws them again on loading.
        init_v_bound: Bound of the starting values with `init_weights="uniform"`.
        tinylora_dropout: Share of the input that is dropped in training.
        init_weights: True starts from zero, `"uniform"` at random; False normal (for tests).

    Raises:
        ConfigError: A size that is not positive, a dropout outside [0, 1), or a tying outside [0, 1].
    """

    adapter = TinyLora
    peft_name = "TINYLORA"
    own_fields = frozenset({"exclude_modules"})
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    init_weights: bool | Literal["uniform"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "u", "init_v_bound")
        check_shares(self, "tinylora_dropout")
        if not 0 <= self.weight_tying <= 1:
            raise ConfigError(f"TinyLoraConfig: weight_tying={self.weight_tying}; a number from 0 to 1 was expected.")
