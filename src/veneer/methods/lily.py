"""Lily: layers share their low-rank factors, and each mixes the shared ones by what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Adapter, Base, Shared, put
from veneer.config import ModuleConfig, check_positive
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import Site


class Factors(Shared):
    """down for every `stride_A` neighbours, and `num_B` ups for all, among places of one target and one shape."""

    def __init__(self, sites: Mapping[str, Site], config: LilyConfig) -> None:
        super().__init__(sites, config)
        self.config = config
        self.starts_as_base = config.init_weights
        groups: dict[Any, list[str]] = {}
        for path, site in sites.items():
            groups.setdefault((_target(path, config.target_modules), site.shape), []).append(path)
        self.down = nn.ParameterList()
        self.up = nn.ParameterList()
        self.numbers: dict[str, tuple[int, int]] = {}  # path -> which down, which up
        for (_, (out_features, in_features)), paths in groups.items():
            self.up.append(nn.Parameter(torch.empty(config.num_B * config.r, out_features)))
            for i, path in enumerate(paths):
                if i % config.stride_A == 0:
                    self.down.append(nn.Parameter(torch.empty(config.r, in_features)))
                self.numbers[path] = len(self.down) - 1, len(self.up) - 1

    def reset(self) -> None:
        for down in self.down:
            nn.init.uniform_(down, -(down.shape[-1] ** -0.5), down.shape[-1] ** -0.5)
        for up in self.up:
            bound = 0.0 if self.config.init_weights else up.shape[-1] ** -0.5
            nn.init.uniform_(up, -bound, bound)

    def to_file(self) -> dict[str, Tensor]:
        return {}  # peft writes them at every place


class Lily(Adapter):
    r"""Adds a low-rank product whose second factor is mixed from shared ones, by a router.

        y' = y + s h sum_e p_e up_e,     h = down x,     p = mean over all tokens of softmax(router h)

    Places of one target and one shape are a group: all have the same `num_B` ups, and `stride_A` neighbours the same
    down; every place has its own router.

    Trains: down (r, in), router (num_B, r), ups (num_B r, out), zero at the start.
    Cost: for L places in a group L / stride_A r in + num_B r out + L num_B r parameters.
    Start: equals the base layer exactly. Merge: impossible, since the change depends on the input.
    p is a mean over the batch, padding included, as in the authors' code and in `peft`: what a row gets depends on the
    rows it runs with, and generation with a cache sees only the new tokens. In a mixed batch the rows of one adapter
    count as a batch.
    Source: Zhong and Zhou 2024, arXiv:2407.09946, eq. 3 to 6.
    """

    kinds = frozenset({"linear"})
    shares = Factors
    shared: Factors
    mixes_rows = True

    def __init__(self, site: Site, config: LilyConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.router = nn.Parameter(torch.empty(config.num_B, config.r))

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.down_number, self.up_number = self.shared.numbers[path]

    def reset(self) -> None:
        nn.init.uniform_(self.router, -(self.config.r**-0.5), self.config.r**-0.5)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        router = self.router
        down, up = self.shared.down[self.down_number], self.shared.up[self.up_number]
        hidden = F.linear(x.to(router), down.to(router.device))
        share = F.linear(hidden, router).softmax(-1).reshape(-1, router.shape[0]).mean(0)
        mixed = (share.to(up.dtype) @ up.to(router.device).reshape(router.shape[0], -1)).view(router.shape[1], -1)
        if y.dtype != hidden.dtype:
            return y + (self.config.scaling * (hidden @ mixed)).to(y.dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return torch.addmm(y.reshape(-1, y.shape[-1]), flat, mixed, alpha=self.config.scaling).view(y.shape)

    # Layout of peft: what is shared stands at every place.

    def to_file(self) -> dict[str, Tensor]:
        down, up = self.shared.down[self.down_number], self.shared.up[self.up_number]
        return {"lily_A.weight": down, "lily_B.weight": up, "lily_router.weight": self.router}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        assert self.site is not None
        put(self.shared, f"down.{self.down_number}", tensors["lily_A.weight"], self.site.device)
        put(self.shared, f"up.{self.up_number}", tensors["lily_B.weight"], self.site.device)
        self.put("router", tensors["lily_router.weight"])


def _target(path: str, targets: Any) -> str:
    """The target that the path is matched by, the longest of several."""
    if not isinstance(targets, list):
        return str(targets)
    return max((name for name in targets if path.endswith(name)), key=len, default=path)


@register("lily")
@dataclass
class LilyConfig(ModuleConfig):
    """Configuration of `Lily`, field by field that of `peft`.

    Args:
        r: Rank.
        stride_A: Neighbours that share one down.
        num_B: Ups of each group, which all its places mix.
        scaling: Factor of the change.
        init_weights: True starts with ups of zero, False with random ones (for tests).

    Raises:
        ConfigError: A size that is not positive, or fewer than two ups.
    """

    adapter = Lily
    peft_name = "LILY"

    r: int = 32
    stride_A: int = 1  # noqa: N815  # as in peft
    num_B: int = 2  # noqa: N815
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "stride_A")
        if self.num_B < 2:
            raise ConfigError(f"LilyConfig: num_B={self.num_B}; a router needs two ups or more to choose from.")
