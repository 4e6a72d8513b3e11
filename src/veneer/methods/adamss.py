"""AdaMSS: low-rank changes within subspaces of the weight's own, some of which may be left to rest in training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter, onto
from veneer.config import ModuleConfig, check_positive, own
from veneer.errors import ConfigError, VeneerWarning
from veneer.registry import register
from veneer.sites import LinearSite, Site


class Adamss(WeightAdapter):
    r"""Groups the rows of [W b] by their direction in its leading singular vectors, and adapts every group in these.

        [W' b']_k = [W b]_k + up_k down_k basis,     k = 1 .. K groups of rows

    basis holds the r leading right singular vectors of [W b] (of W where there is no bias). The rows of the left ones
    are split by k-means; down_k starts as the main directions of its group.
    With `use_asa`, between the steps `init_warmup` and `final_warmup` every `mask_interval` steps those groups of all
    layers whose parameters matter least, by the same measure as in AdaLoRA, come to rest as they are, until
    `asa_target_subspaces` are trained.

    Trains: down_k (rank, r) and up_k (rows of k, rank), zero at the start. Frozen: basis (r, in + 1), the groups.
    Cost: rank (K r + out) parameters. The downs are multiplied with basis once a call, K rank r in, and a token takes
    K rank (in + out) multiply-adds.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Files hold the groups in a tensor that `peft` does not have; from its own files they are computed again, which needs
    the very same base weights.
    Source: Zheng et al. 2025, AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning (NeurIPS).
    """

    kinds = frozenset({"linear", "conv"})
    optional = frozenset({"adamss_order"})
    basis: Tensor
    order: Tensor

    def __init__(self, site: Site, config: AdamssConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.starts_as_base = config.init_weights is not None
        columns = site.shape[1] + (site.bias() is not None)
        self.register_buffer("basis", torch.empty(min(config.r, site.shape[0], columns), columns))
        # Row o of the change is row order[o] of the groups' rows, one group after the other.
        self.register_buffer("order", torch.arange(site.shape[0], device="cpu"))
        self.resize([])

    def resize(self, sizes: list[tuple[int, int]]) -> None:
        """Makes tensors for groups of these numbers of rows and ranks."""
        like, r = self.basis, self.basis.shape[0]
        asks = all(parameter.requires_grad for parameter in self.parameters())
        self.down = nn.ParameterList(nn.Parameter(like.new_empty(rank, r), asks) for _, rank in sizes)
        self.up = nn.ParameterList(nn.Parameter(like.new_empty(rows, rank), asks) for rows, rank in sizes)
        self.trained = [True] * len(sizes)
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}  # of importance and of its uncertainty

    def fit(self, sizes: list[tuple[int, int]]) -> None:
        """The same, unless the tensors have these sizes."""
        if sizes != [tuple(up.shape) for up in self.up]:
            self.resize(sizes)

    def reset(self) -> None:
        basis, groups = self.split()
        self.basis.copy_(basis)
        self.arrange(groups)
        for up, down, (_, directions) in zip(self.up, self.down, groups, strict=True):
            with torch.no_grad():
                down.copy_(directions)
            nn.init.normal_(up, std=0.0 if self.starts_as_base else 0.01)

    def arrange(self, groups: list[tuple[Tensor, Tensor]]) -> None:
        self.put("order", torch.cat([rows for rows, _ in groups]).argsort())
        self.fit([(len(rows), len(directions)) for rows, directions in groups])

    def split(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """basis, and for every group its rows and its main directions `(rank, r)`."""
        weight, bias, config = self.site.read().float(), self.site.bias(), self.config
        matrix = weight if bias is None else torch.cat([weight, bias.float()[:, None]], dim=1)
        devices = [] if matrix.device.type == "cpu" else [matrix.device]
        with torch.random.fork_rng(devices=devices, device_type=matrix.device.type):  # as peft draws it
            torch.manual_seed(config.random_seed)
            left, _, right = torch.svd_lowrank(matrix, q=self.basis.shape[0], niter=2)
        groups = []
        for rows in clusters(left.cpu(), config.num_subspaces):
            _, lengths, directions = torch.linalg.svd(left[rows.to(left.device)], full_matrices=False)
            rank = min(len(lengths), config.subspace_rank)
            if config.use_dynamic_rank:
                rank = min(rank, max(1, int((lengths.square() > config.svd_threshold * lengths[0].square()).sum())))
            groups.append((rows, directions[:rank]))
        return right.t(), groups

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(K rank, in + 1)` and `(out, K rank)`: all groups as one product."""
        downs = [down if on else down.detach() for down, on in zip(self.down, self.trained, strict=True)]
        ups = [up if on else up.detach() for up, on in zip(self.up, self.trained, strict=True)]
        return torch.cat(downs) @ self.basis, torch.block_diag(*ups)[self.order]

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.factors()
        return onto(up @ down[:, : weight.shape[1]], weight)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        down, up = self.factors()
        return bias + up @ down[:, -1]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, site = base(x), self.site
        down, up = self.factors()
        has_bias = down.shape[1] > site.shape[1]
        if has_bias and isinstance(site, LinearSite) and y.dtype == down.dtype:
            hidden = F.linear(x.to(down), down[:, :-1], down[:, -1]).reshape(-1, len(down))
            return torch.addmm(y.reshape(-1, y.shape[-1]), hidden, up.t()).view(y.shape)
        y = site.add_factored(x, y, down[:, : site.shape[1]], up)
        return site.add_bias(y, up @ down[:, -1]) if has_bias else y

    # The schedule

    @classmethod
    @torch.no_grad()
    def allocate(cls, adapters: Mapping[str, Self], config: AdamssConfig, step: int) -> None:
        if not config.use_asa or not adapters or not config.init_warmup <= step <= config.final_warmup:
            return
        for adapter in adapters.values():
            adapter.observe(config.asa_importance_beta, config.asa_uncertainty_beta)
        if step % config.mask_interval and step != config.final_warmup:
            return
        scores = {(path, i): score for path, adapter in adapters.items() for i, score in adapter.scores().items()}
        wanted = config.budget(step, sum(len(adapter.trained) for adapter in adapters.values()))
        if wanted < len(scores):
            ranked = sorted(scores, key=lambda place: scores[place], reverse=True)
            for path, i in ranked[wanted:]:
                adapters[path].trained[i] = False
        for adapter in adapters.values():
            adapter.averages.clear()

    def observe(self, beta1: float, beta2: float) -> None:
        """Takes the importance of every parameter into the averages."""
        for name, parameter in self.named_parameters():
            if parameter.grad is None or name == "bias_delta":
                continue
            now = (parameter * parameter.grad).abs()
            average, uncertainty = self.averages.get(name) or (torch.zeros_like(now), torch.zeros_like(now))
            uncertainty = beta2 * uncertainty + (1 - beta2) * (now - average).abs()
            self.averages[name] = beta1 * average + (1 - beta1) * now, uncertainty

    def scores(self) -> dict[int, float]:
        """How much each group that is trained and has been seen matters."""
        means = {name: torch.mul(*averages).mean().item() for name, averages in self.averages.items()}
        seen = [i for i, on in enumerate(self.trained) if on and f"down.{i}" in means and f"up.{i}" in means]
        return {i: means[f"down.{i}"] + means[f"up.{i}"] for i in seen}

    @classmethod
    def kept(cls, adapters: Mapping[str, Self]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for path, adapter in adapters.items():
            if adapter.config.use_asa:
                kept[f"{path}:trained"] = torch.tensor(adapter.trained)
                for name, (average, uncertainty) in adapter.averages.items():
                    kept |= {f"{path}:{name}.average": average, f"{path}:{name}.uncertainty": uncertainty}
        return kept

    @classmethod
    def resume(cls, adapters: Mapping[str, Self], config: AdamssConfig, kept: Mapping[str, Tensor]) -> None:
        for path, adapter in adapters.items():
            adapter.trained = kept[f"{path}:trained"].tolist()
            adapter.averages = {}
            for name, parameter in adapter.named_parameters():
                if (key := f"{path}:{name}.average") in kept:
                    pair = kept[key], kept[f"{path}:{name}.uncertainty"]
                    adapter.averages[name] = pair[0].to(parameter.device), pair[1].to(parameter.device)

    # Layout of peft, and the order of the rows, which it computes again.

    def to_file(self) -> dict[str, Tensor]:
        downs = {f"adamss_A.{i}": tensor for i, tensor in enumerate(self.down)}
        ups = {f"adamss_B.{i}": tensor for i, tensor in enumerate(self.up)}
        return {**downs, **ups, "adamss_newB": self.basis, "adamss_order": self.order}

    def expect(self, tensors: Mapping[str, Tensor]) -> None:
        count = sum(key.startswith("adamss_B.") for key in tensors)
        sizes = [tuple(tensors[key].shape) for i in range(count) if (key := f"adamss_B.{i}") in tensors]
        if "adamss_order" not in tensors:
            self.arrange(self.split()[1])
        else:
            self.fit(sizes)  # type: ignore[arg-type]

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        names = {"A": "down", "B": "up", "newB": "basis", "order": "order"}
        for key, tensor in tensors.items():
            name, dot, number = key.removeprefix("adamss_").partition(".")
            self.put(names[name] + dot + number, tensor)


def clusters(points: Tensor, number: int) -> list[Tensor]:
    """Rows of `points`, `(n, r)`, in groups by k-means: ten steps at most, from random rows that are always the same.

    The same groups as scikit-learn's `KMeans(number, init="random", n_init=1, max_iter=10, random_state=123456789)`.
    """
    import numpy as np

    count = len(points)
    number = min(number, count)
    points = points - points.mean(0)
    enough = 1e-4 * points.var(0, unbiased=False).mean()
    even = np.full(count, 1 / count, dtype=np.float32)
    chosen = np.random.RandomState(123456789).choice(count, size=number, replace=False, p=even)
    centres = points[torch.from_numpy(chosen)]
    labels = nearest_centres(points, centres)
    for _ in range(10):
        moved = torch.stack([points[labels == i].mean(0) if (labels == i).any() else centres[i] for i in range(number)])
        done = (moved - centres).square().sum() <= enough
        centres = moved
        before, labels = labels, nearest_centres(points, centres)
        if done or torch.equal(before, labels):
            break
    groups = [(labels == i).nonzero().flatten() for i in range(number)]
    return [rows for rows in groups if len(rows)]


def nearest_centres(points: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(1) - 2 * points @ centres.t()).argmin(1)


@register("adamss")
@dataclass
class AdamssConfig(ModuleConfig):
    """Configuration of `Adamss`, field by field that of `peft`.

    Args:
        r: Singular vectors that the weight is described by.
        num_subspaces: Groups of rows of each weight.
        subspace_rank: Rank of the change in each group.
        init_weights: `"orthogonal"` starts as the base layer, None with small random ups.
        use_asa: Let groups come to rest in training.
        asa_target_subspaces: Groups of all layers that are trained in the end.
        init_warmup: The first step of the schedule.
        final_warmup: The last step of the schedule.
        mask_interval: Steps from one choice to the next.
        asa_importance_beta: Share of the past in the average of the importance.
        asa_uncertainty_beta: The same for its uncertainty.
        asa_schedule_exponent: How much faster groups come to rest at first than in the end; 1 is evenly.
        use_dynamic_rank: Lower the rank of groups whose directions are few.
        svd_threshold: Directions that are shorter than this share of the longest, squared, do not count then.
        random_seed: Seed of the singular value decomposition.

    Raises:
        ConfigError: A size that is not positive, or a schedule without steps.
    """

    adapter = Adamss
    peft_name = "ADAMSS"
    learning_rates = {"classification": 1e-2, "causal-lm": 5e-3}  # noqa: RUF012  # read only

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: Literal["orthogonal", False] | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0
    exclude_modules: list[str] | str | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = self.init_weights or None
        check_positive(self, "r", "num_subspaces", "subspace_rank")
        if self.use_asa:
            check_positive(self, "mask_interval", "asa_target_subspaces", "asa_schedule_exponent")
            if self.init_warmup >= self.final_warmup:
                raise ConfigError(
                    f"AdamssConfig: init_warmup={self.init_warmup} and final_warmup={self.final_warmup} leave no step "
                    "for the schedule. Lower the first or raise the second."
                )

    def budget(self, step: int, total: int) -> int:
        """How many of all groups are to be trained after this step."""
        left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
        return int(self.asa_target_subspaces + (total - self.asa_target_subspaces) * left**self.asa_schedule_exponent)

    def begin(self, steps: int) -> None:
        if self.use_asa and self.final_warmup >= steps:
            warnings.warn(
                f"use_asa=True: the training has {steps} steps and the schedule ends at final_warmup="
                f"{self.final_warmup}, so more than asa_target_subspaces={self.asa_target_subspaces} groups will be "
                "trained to the end. Lower final_warmup.",
                VeneerWarning,
                stacklevel=2,
            )
