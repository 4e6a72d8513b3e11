"""Arrow: LoRA adapters that are on the model, chosen for every token by the directions that they answer to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Base
from veneer.config import Nested
from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.experts import freeze
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site


@dataclass(frozen=True)
class ArrowConfig(Nested):
    """Settings of Arrow, field by field those of `peft`.

    Args:
        top_k: Experts that each token has.
        router_temperature: Divides the similarities; the lower, the sharper.
        use_gks: Subtract general knowledge.
        task_adapter_names: Adapters that have to be among the experts.
        gks_adapter_names: Adapters of general knowledge.
        rng_seed: Kept for `peft`; nothing is drawn here.

    Raises:
        ConfigError: A number that is not positive, or nothing to subtract.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "router_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"ArrowConfig: {name}={getattr(self, name)!r}; a positive number was expected.")


@variant("arrow", arrow_config=ArrowConfig())
class Arrow(Lora):
    r"""Weighs the LoRA adapters of its place by how much a token points in the main direction of each.

        y = W x + b + sum_i c_i s_i up_i down_i x,     c = softmax(top_k(|v_i . x|) / T),
        v_i the first right singular vector of up_i down_i

    All other LoRA adapters of the place are its experts, those that are added later too; they are read where they are
    and not changed. With `use_gks`, the mean factors of those named in `gks_adapter_names` (`gks_0`, ...) are
    subtracted from the factors of each expert (GenKnowSub), and they are no experts themselves. v_i is exact; `peft`
    comes near it in 15 steps from a random start, which is what `rng_seed` is for there. Where there are fewer than
    `top_k` experts, all are taken. `create_arrow_model` puts experts and router on a model.

    Trains: nothing; its own factors have no effect and are kept for `peft`'s files.
    Merge: impossible, since each token has its own weights. It has to be active alone.
    Raises: StateError where the place has no expert; UnsupportedError for experts that are more than LoRA.
    Source: Ostapenko et al. 2024, arXiv:2405.11157, section 4.1; GenKnowSub: Bagherifard et al. 2025, arXiv:2505.10939.
    """

    kinds = frozenset({"linear"})
    sees_others = True
    starts_as_base = False

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.settings: ArrowConfig = config.arrow_config
        self.others: list[nn.ModuleDict] = []
        self.prototypes: tuple[Any, Tensor] | None = None
        freeze(self)

    def adapt(self, weight: Tensor) -> Tensor:
        raise UnsupportedError(
            "An Arrow router weighs its experts for each token, so it is no change of the weight: it can neither be "
            "merged nor lie below a method that needs the adapted weight. Merge one of the experts instead."
        )

    def merge_into(self, layer: nn.Module) -> nn.Module:
        self.adapt(self.down)  # raises
        return layer

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        experts, general = self.experts()
        factors = self.subtracted(experts, general)
        x = x.to(factors[0][0].dtype)
        similar = (x @ self.directions([*experts, *general], factors).mT).abs()  # (..., experts)
        top = similar.topk(min(self.settings.top_k, len(experts)), -1)
        chosen = torch.full_like(similar, float("-inf")).scatter(-1, top.indices, top.values)
        shares = (chosen / self.settings.router_temperature).softmax(-1)
        delta = torch.zeros((), dtype=x.dtype, device=x.device)
        for i, ((down, up), expert) in enumerate(zip(factors, experts, strict=True)):
            delta = delta + shares[..., i, None] * expert.scaling * self.site.apply_factored(x, down, up)
        return y + nn.functional.dropout(delta, self.dropout, self.training).to(y.dtype)

    def experts(self) -> tuple[list[Lora], list[Lora]]:
        """The adapters that it chooses from, and those whose knowledge is subtracted."""
        others: dict[str, Adapter] = {} if not self.others else dict(self.others[0].items())  # type: ignore[arg-type]
        general = self.settings.gks_adapter_names or []
        found = {n: a for n, a in others.items() if a is not self and isinstance(a, Lora) and not isinstance(a, Arrow)}
        missing = [name for name in [*(self.settings.task_adapter_names or []), *general] if name not in found]
        experts = {name: adapter for name, adapter in found.items() if name not in general}
        if missing or not experts:
            raise StateError(
                f"An Arrow router has {'no adapter ' + repr(missing[0]) if missing else 'no LoRA adapter'} on its "
                f"layer (there are {', '.join(found) or 'none'}). Load the adapters that it chooses from onto the same "
                "layers; create_arrow_model does so."
            )
        for name, adapter in found.items():
            if type(adapter) is not Lora or adapter.bias is not None:
                raise UnsupportedError(
                    f"Arrow chooses from plain LoRA adapters without a bias, and {name!r} is another "
                    f"({type(adapter).__name__}). Delete it, or take it off these layers."
                )
        return list(experts.values()), [found[name] for name in general] if self.settings.use_gks else []

    @staticmethod
    def subtracted(experts: list[Lora], general: list[Lora]) -> list[tuple[Tensor, Tensor]]:
        """down and up of every expert, general knowledge subtracted."""
        factors, known = [[adapter.factors() for adapter in adapters] for adapters in (experts, general)]
        if not known:
            return factors
        if len({down.shape for down, _ in [*factors, *known]}) > 1:
            raise UnsupportedError("GenKnowSub subtracts factors, so all adapters need the same rank.")
        down, up = (torch.stack(parts).mean(0) for parts in zip(*known, strict=True))
        return [(d - down, u - up) for d, u in factors]

    @torch.no_grad()
    def directions(self, adapters: list[Lora], factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The first right singular vectors, `(experts, in)`; made again where a factor of an adapter has changed."""
        whole = [tensor for adapter in adapters for tensor in (adapter.down, adapter.up)]
        state = [(tensor.data_ptr(), tensor._version) for tensor in whole]
        if self.prototypes is None or self.prototypes[0] != state:
            found = []
            for down, up in factors:
                wide = torch.promote_types(down.dtype, torch.float32)
                q, r = torch.linalg.qr(down.to(wide).mT)  # down = r^T q^T
                reduced = up.to(wide) @ r.mT  # (out, r), with the singular values of up down
                found.append(q @ torch.linalg.eigh(reduced.mT @ reduced).eigenvectors[:, -1])
            self.prototypes = state, torch.stack(found).to(factors[0][0].dtype)
        return self.prototypes[1]
