"""EVA: `down` starts as the principal directions of the layer's inputs, and ranks go where they explain most."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.config import Nested
from veneer.errors import ConfigError, StateError, VeneerWarning
from veneer.inits.start import low_rank

if TYPE_CHECKING:
    from veneer.preparation import Run

ROUNDS = 100
"""How often the data is gone through at most."""

Select = Callable[[str, Tensor], Tensor]
"""Gets the path of a layer and its input, and gives those rows of it that count, `(rows, in)`."""


@dataclass(frozen=True)
class EvaConfig(Nested):
    """Settings of EVA.

    Args:
        rho: A layer gets at most rho times the rank that the configuration gives it; 1 leaves all ranks as they are.
        tau: Cosine similarity with those of the step before from which on directions count as found.
        use_label_mask: Leave out positions that carry no label.
        label_mask_value: The label of such.
        whiten: Divide directions by the square root of their singular values.
        adjust_scaling_factors: Keep alpha / r of each layer as its rank changes.

    Raises:
        ConfigError: rho is less than 1, or tau outside [0, 1].
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 1 or not 0 <= self.tau <= 1:
            raise ConfigError(f"EvaConfig: rho={self.rho}, tau={self.tau}; at least 1, and a share, were expected.")


def prepare(adapters: dict[str, Any], config: Any, run: Run) -> Any:
    """Makes the starting values of all adapters on linear layers from a run of the data; others keep the default."""
    others = [path for path, adapter in adapters.items() if adapter.site.kind != "linear"]
    if others:
        warnings.warn(
            f"init_lora_weights='eva': {', '.join(others[:4])} are no linear layers, and start by default.",
            VeneerWarning,
            stacklevel=4,
        )
    linear = {path: adapter.down.shape[-2] for path, adapter in adapters.items() if adapter.site.kind == "linear"}
    settings: EvaConfig = config.eva_config
    mask = settings.label_mask_value if settings.use_label_mask else None
    return start(adapters, config, directions(linear, settings, run, lambda path, x: run.rows(x, mask)))


def start(adapters: dict[str, Any], config: Any, found: Mapping[str, Tensor]) -> Any:
    """Gives adapters the directions found, and their number as the rank; those without any are taken out.

    Args:
        adapters: By path.
        config: Their configuration.
        found: Directions `(rank, in)` by path.

    Returns:
        The configuration with the ranks as they are now.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, adapter in list(adapters.items()):
        here = config.at(path)
        rank, alpha = here.r, here.lora_alpha
        if path in found:
            rank = found[path].shape[0]
            if rank == 0:
                del adapters[path]
                continue
            if config.eva_config.adjust_scaling_factors:
                alpha = alpha * rank / here.r
            adapter.resize(replace(here, r=rank, lora_alpha=alpha))
            with torch.no_grad():
                adapter.down.copy_(found[path])
        if rank != config.r:
            ranks[path] = rank
        if alpha != config.lora_alpha:
            alphas[path] = alpha
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)


@torch.no_grad()
def directions(ranks: Mapping[str, int], settings: EvaConfig, run: Run, select: Select) -> dict[str, Tensor]:
    """The principal directions of every layer's inputs, as many as the layer is to have rank.

    Batches are gone through, again and again if need be, until the directions that are needed stand still. All ranks
    together are as many as before; they go to the directions that explain the largest shares of their layer's variance.

    Args:
        ranks: Rank by path, as configured.
        settings: How.
        run: Passes batches through the model.
        select: Rows of an input that count.

    Raises:
        StateError: Batches are too small, or directions do not stand still.

    Source: Paischer et al. 2024, arXiv:2410.07170, algorithm 1.
    """
    most = {path: round(rank * settings.rho) for path, rank in ranks.items()}
    same = _same_inputs(most, run, select)  # the layers that see what another one sees
    for path, first in same.items():
        most[first] = max(most[first], most[path])
    for path, first in same.items():
        most[path] = most[first]
    parts = {path: Components(most[path]) for path in ranks if path not in same}
    owner = {**{path: path for path in parts}, **same}
    current = dict(most)
    budget = sum(ranks.values())

    def settled(path: str) -> bool:
        still = parts[path].similarity
        return still is not None and bool((still[: current[path]] >= settings.tau).all())

    def see(path: str, x: Tensor) -> None:
        if path in parts and not settled(path):
            parts[path].update(select(path, x))

    def until() -> bool:
        if all(part.directions is not None for part in parts.values()):
            current.update(_shared_out(parts, owner, same, budget, most))
        return all(map(settled, parts))

    for _ in range(ROUNDS):
        run.inputs(see, until)
        if all(map(settled, parts)):
            break
        if short := [path for path, part in parts.items() if part.directions is None]:
            raise StateError(
                f"init_lora_weights='eva': no batch has the {most[short[0]]} positions that {short[0]} needs for as "
                "many directions. Use larger batches, or a lower r or eva_config.rho."
            )
    else:
        late = next(path for path in parts if not settled(path))
        raise StateError(
            f"init_lora_weights='eva': the directions of {late} did not stand still in {ROUNDS} rounds of the data. "
            "Use more data, or a lower eva_config.tau."
        )
    found = {}
    for path, first in owner.items():
        rows, values = parts[first].directions, parts[first].values
        assert rows is not None
        assert values is not None
        kept = rows[: current[path]]
        found[path] = kept / values[: current[path], None].sqrt() if settings.whiten else kept.clone()
    return {path: found[path] for path in ranks}


def _same_inputs(paths: Mapping[str, int], run: Run, select: Select) -> dict[str, str]:
    """Layers that get the input which another one got before, such as query, key and value; on the first batch."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}

    def see(path: str, x: Tensor) -> None:
        if path not in paths:
            return
        rows = select(path, x).contiguous()
        digest = hashlib.sha256(f"{rows.shape}".encode() + rows.view(torch.uint8).cpu().numpy().tobytes()).digest()
        if first.setdefault(digest, path) != path:
            same[path] = first[digest]

    run.inputs(see, until=lambda: True)
    return same


def _shared_out(
    parts: Mapping[str, Components],
    owner: Mapping[str, str],
    same: Mapping[str, str],
    budget: int,
    most: Mapping[str, int],
) -> dict[str, int]:
    """How many directions each layer gets when the budget goes to those that explain most."""
    shares = {path: part.shares for path, part in parts.items()}
    owners = [path for path, first in owner.items() for _ in shares[first][: most[path]]]
    values = torch.cat([shares[first][: most[path]] for path, first in owner.items()])
    counts = dict.fromkeys(owner, 0)
    for index in values.argsort(descending=True)[:budget].tolist():
        counts[owners[index]] += 1
    for path, first in same.items():  # the one whose components are followed gets the most of those that share them
        if counts[first] < counts[path]:
            counts[first], counts[path] = counts[path], counts[first]
    return counts


class Components:
    """Leading principal components of rows that come in batches.

    Args:
        count: How many.

    Attributes:
        directions: `(count, in)`, orthonormal; none before the first batch.
        values: Their singular values `(count,)`.
        shares: What share of the variance each explains, `(count,)`.
        similarity: Cosine of each with itself one batch before; none before the second batch.

    Source: Ross et al. 2008, "Incremental learning for robust visual tracking", section 3.1.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.directions: Tensor | None = None
        self.values: Tensor | None = None
        self.similarity: Tensor | None = None
        self.shares = torch.empty(0)
        self.mean: Tensor | None = None
        self.seen = 0
        self.spread = 0.0  # sum of squared distances from the mean

    def update(self, rows: Tensor) -> None:
        """Takes in a batch of `(rows, in)`; passes over one with fewer rows than components."""
        number = rows.shape[0]
        if number < self.count:
            return
        rows = rows.float()
        mean = rows.mean(0, dtype=torch.float64)
        centred = rows - mean.float()
        spread = float(centred.double().square().sum())
        if self.directions is None or self.values is None or self.mean is None:
            stacked, self.spread, self.mean = centred, spread, mean
        else:
            apart = (self.seen * number / (self.seen + number)) ** 0.5 * (self.mean - mean)
            # In double from here on, as peft does it: the type decides what is drawn for the decomposition.
            stacked = torch.cat([self.values[:, None] * self.directions, centred.double(), apart[None]])
            self.spread += spread + float(apart.square().sum())
            self.mean = (self.seen * self.mean + number * mean) / (self.seen + number)
        self.seen += number
        _, s, vh = low_rank(stacked, min(2 * self.count, *stacked.shape), 4)
        largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
        vh = vh * largest.sign()  # a direction and its opposite are the same
        before, self.directions, self.values = self.directions, vh[: self.count], s[: self.count]
        self.shares = self.values.square() / max(self.spread, torch.finfo(torch.float64).tiny)
        if before is not None:
            self.similarity = F.cosine_similarity(self.directions, before)
