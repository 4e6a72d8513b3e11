"""Poly: an inventory of low-rank skills in every layer, of which every task has its own mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig, check_positive, own
from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.methods.mtl_lora import tasks_of
from veneer.products import LowRank
from veneer.registry import register
from veneer.sites import Site

_EPS = 1e-12


class Poly(WeightAdapter):
    r"""Adds a low-rank product whose factors are mixed from skills, by the task of the row.

        W'_t = W + up_t down_t / r,     down_t = sum_i p_ti A_i,     up_t = sum_i p_ti B_i,
        p_t = z_t / sum_i z_ti,     z_t = sigmoid(router_t)

    In training z_t is drawn anew for every row and layer, from a relaxed Bernoulli distribution with these logits. With
    n splits, inputs and outputs are cut in n parts, each with its own mixture (multi-head routing). The model's call
    says the task of every row: `model(**batch, task_ids=[0, 2, 0])`; so does `generate`. With `n_tasks=1`, or where the
    configuration names one `task`, that one is run for all rows, and can be merged.

    Trains: A (splits, skills, in / splits, r); B (splits, skills, r, out / splits), zero at the start; router
    (tasks, splits skills).
    Cost: skills r (in + out) + tasks splits skills parameters.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype, for one task.
    Raises: StateError where the task is not known; UnsupportedError on merging without one; ConfigError where the
    splits do not divide the layer.
    Source: Ponti et al. 2022, arXiv:2202.13914, section 3; splits: Caccia et al. 2022, arXiv:2211.03831, section 3.1.
    """

    kinds = frozenset({"linear"})
    reads_inputs = True
    own_inputs = frozenset({"task_ids"})

    def __init__(self, site: Site, config: PolyConfig) -> None:
        super().__init__(site, config)
        splits, (out_features, in_features) = config.n_splits, site.shape
        if in_features % splits or out_features % splits:
            raise ConfigError(
                f"n_splits={splits} does not divide a layer of {in_features} inputs and {out_features} outputs. Choose "
                "a divisor of both, or leave the layer out of target_modules."
            )
        self.config = config
        self.task = 0 if config.n_tasks == 1 else config.task
        self.A = nn.Parameter(torch.empty(splits, config.n_skills, in_features // splits, config.r))
        self.B = nn.Parameter(torch.empty(splits, config.n_skills, config.r, out_features // splits))
        self.router = nn.Parameter(torch.empty(config.n_tasks, splits * config.n_skills))

    def reset(self) -> None:
        a, b = self.A.shape[2] ** -0.5, 0.0 if self.config.init_weights else self.config.r**-0.5
        nn.init.uniform_(self.A, -a, a)
        nn.init.uniform_(self.B, -b, b)
        nn.init.uniform_(self.router, -1e-3, 1e-3)

    @classmethod
    def note(cls, inputs: Mapping[str, Any], config: PolyConfig) -> Mapping[str, Any]:
        """The tasks as a tensor, so that a mixed batch can pick those of its rows."""
        tasks = inputs.get("task_ids")
        return {} if tasks is None else {"task_ids": torch.as_tensor(tasks)}

    def factors(self, tasks: Tensor, drawn: bool) -> tuple[Tensor, Tensor]:
        """down `(rows, r, in)` and up `(rows, out, r)` for the tasks of some rows."""
        logits = self.router[tasks].unflatten(1, (self.config.n_splits, self.config.n_skills))
        z = RelaxedBernoulli(logits.new_ones(()), logits=logits).rsample() if drawn else logits.sigmoid()
        p = z / (z.sum(-1, keepdim=True) + _EPS)  # (rows, splits, skills)
        down = torch.einsum("bqs,qsdr->brqd", p, self.A).flatten(2)
        up = torch.einsum("bqs,qsrd->bqdr", p, self.B).flatten(1, 2)
        return down, up

    def product(self) -> LowRank | None:
        if self.task is None or self.training:
            return None
        (down,), (up,) = self.factors(torch.tensor([self.task], device=self.A.device), drawn=False)
        return LowRank(down, up, 1 / self.config.r)

    def adapt(self, weight: Tensor) -> Tensor:
        if self.task is None:
            raise UnsupportedError(
                "A Poly adapter changes the weight for every task in its own way, so it can neither be merged nor lie "
                "below a method that needs the adapted weight. Set `task` in its configuration to run one task."
            )
        (down,), (up,) = self.factors(torch.tensor([self.task], device=self.A.device), drawn=False)
        return weight + (up @ down) / self.config.r

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.product() is not None:
            return super().forward(x, base)
        y = base(x)
        down, up = self.factors(self._tasks(base, y.shape[0]).to(self.A.device), self.training)
        # Beams are rows next to each other, and so are the tokens of a row where they are flattened.
        rows = x.to(self.A).reshape(down.shape[0], -1, x.shape[-1])  # (rows, tokens, in)
        delta = torch.bmm(torch.bmm(rows, down.mT), up.mT) / self.config.r
        return y + delta.reshape(y.shape).to(y.dtype)

    def _tasks(self, base: Base, count: int) -> Tensor:
        """The task of every row, `(rows,)`."""
        if self.task is not None:
            return torch.full((count,), self.task)
        tasks = tasks_of(base, count, "A Poly adapter of several tasks")
        if not 0 <= int(tasks.min()) <= int(tasks.max()) < self.config.n_tasks:
            raise StateError(
                f"task_ids={tasks.tolist()}: the adapter has n_tasks={self.config.n_tasks}, counted from 0."
            )
        return tasks

    def to_file(self) -> dict[str, Tensor]:
        return {"poly_lora_A": self.A, "poly_lora_B": self.B, "poly_router.module_logits": self.router}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, key in (("A", "poly_lora_A"), ("B", "poly_lora_B"), ("router", "poly_router.module_logits")):
            self.put(name, tensors[key])


@register("poly")
@dataclass
class PolyConfig(ModuleConfig):
    """Configuration of `Poly`, field by field that of `peft`, and `task`.

    Args:
        r: Rank.
        init_weights: True starts with B of zero, False with random ones (for tests).
        poly_type: There is one kind of router.
        n_tasks: Number of tasks.
        n_skills: Number of skills in every layer.
        n_splits: Parts of inputs and outputs with mixtures of their own.
        task: The one task to run, whatever the rows are; none where the call says them.

    Raises:
        ConfigError: A size that is not positive, or a task that there is not.
    """

    adapter = Poly
    peft_name = "POLY"
    own_fields = frozenset({"layers_to_transform", "layers_pattern"})

    r: int = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    task: int | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "n_tasks", "n_skills", "n_splits")
        if self.task is not None and not 0 <= self.task < self.n_tasks:
            raise ConfigError(
                f"PolyConfig: task={self.task}; with n_tasks={self.n_tasks} they are counted from 0 to "
                f"{self.n_tasks - 1}."
            )
