"""C3A: blocks of circulant matrices, computed as circular convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import WeightConfig, check_positive, own
from veneer.registry import register
from veneer.sites import EmbeddingSite, LinearSite, Site


class C3A(WeightAdapter):
    r"""Adds a matrix of circulant blocks, each given by its first row.

        W' = W + C / in,     block (p, q) of C, (b, b):  C_pq[t, k] = kernel[p, q, (k - t) mod b]

    Where b does not divide a side, the last blocks are cut short.

    Trains: kernel (out / b, in / b, b).
    Cost: in out / b parameters. Linear layers convolve with real Fourier transforms, computed in float32 at least:
    O(in log b + in out / b) a token; embeddings look up what they need. Others form the adapted weight once a call.
    Start: the kernel is uniform, which changes the outputs; zero, so that they are the base layer's, with
    `init_weights=True`. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has a kernel of its own.
    Source: Chen et al. 2024, arXiv:2407.19342, eq. 4 and section 3.4.
    """

    def __init__(self, site: Site, config: C3AConfig) -> None:
        super().__init__(site, config)
        self.block = config.block_size
        self.init_weights = config.init_weights
        self.starts_as_base = config.init_weights is True
        rows, columns = (-(-side // self.block) for side in site.shape)
        self.kernel = nn.Parameter(torch.empty(*site.batch, rows, columns, self.block))

    def reset(self) -> None:
        out_features, in_features = self.site.shape
        if self.init_weights is True:
            nn.init.zeros_(self.kernel)
        elif self.init_weights == "gaussian":
            nn.init.normal_(self.kernel)
        else:
            kaiming = self.init_weights == "kaiming_uniform"
            bound = math.sqrt(1 / in_features if kaiming else 6 / (in_features + out_features))
            nn.init.uniform_(self.kernel, -bound, bound)

    def adapt(self, weight: Tensor) -> Tensor:
        out_features, in_features = self.site.shape
        kernel = self.kernel / in_features
        # Row t of a block is the kernel moved by t: the window that starts at -t of the kernel repeated.
        windows = torch.cat([kernel, kernel], dim=-1)[..., 1:].unfold(-1, self.block, 1).flip(-2)  # (..., p, q, t, k)
        delta = windows.transpose(-3, -2).flatten(-4, -3).flatten(-2)
        return weight + delta[..., :out_features, :in_features]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        out_features, in_features = self.site.shape
        if isinstance(self.site, EmbeddingSite) and self.site.is_plain:
            return self.looked_up(x, base(x))
        if not isinstance(self.site, LinearSite):
            return super().forward(x, base)
        y = base(x)
        _, columns, block = self.kernel.shape
        wide = torch.promote_types(self.kernel.dtype, torch.float32)
        x = F.pad(x.to(self.kernel.device, wide), (0, columns * block - in_features))
        signal = torch.fft.rfft(x.unflatten(-1, (columns, block)))
        filters = torch.fft.rfft(self.kernel.to(wide) / in_features).conj()
        delta = torch.fft.irfft(torch.einsum("...qf,pqf->...pf", signal, filters), n=block).flatten(-2)
        return y + delta[..., :out_features].to(y.dtype)

    def looked_up(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds to y, an embedding's output, the columns of the change that x asks for."""
        assert isinstance(self.site, EmbeddingSite)
        out_features, in_features = self.site.shape
        x = x.to(self.kernel.device)
        kernels = F.embedding(x // self.block, self.kernel.transpose(0, 1).flatten(1)).unflatten(-1, (-1, self.block))
        moved = (x[..., None] - torch.arange(self.block, device=x.device)) % self.block  # (..., t) -> (k - t) mod b
        column = kernels.gather(-1, moved.unsqueeze(-2).expand_as(kernels)).flatten(-2)[..., :out_features]
        return y + self.site.given(x, column / in_features).to(y.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {"c3a_kernel": self.kernel}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("kernel", tensors["c3a_kernel"])


@register("c3a")
@dataclass
class C3AConfig(WeightConfig):
    """Configuration of `C3A`, field by field that of `peft`.

    Args:
        block_size: Side of a block; larger ones mean fewer parameters. Best a divisor of the layers' sides.
        block_size_pattern: `block_size` by module name or regular expression, where it differs.
        init_weights: True starts from zero; `"xavier_uniform"` (False means the same), `"kaiming_uniform"` and
            `"gaussian"` at random.

    Raises:
        ConfigError: A block size that is not positive.
    """

    adapter = C3A
    peft_name = "C3A"
    own_fields = frozenset({"exclude_modules"})
    patterns = {"block_size_pattern": "block_size"}  # noqa: RUF012  # read only
    learning_rates = {"classification": 1e-1, "causal-lm": 3e-2}  # noqa: RUF012  # read only

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = "xavier_uniform"
    fan_in_fan_out: bool = own(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "block_size", "block_size_pattern")
