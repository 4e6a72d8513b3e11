"""MTL-LoRA: one low-rank adapter for several tasks, each with its own transform and its own mixture of ups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import WeightConfig, check_positive, check_shares
from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.registry import register
from veneer.sites import Site


class MtlLora(WeightAdapter):
    r"""LoRA whose factors all tasks share, with a transform between them and a weighting of several ups for each task.

        W'_t = W + s (sum_i p_ti up_i) transform_t down,     p_t = softmax(mix_t / temperature),     s = alpha / r

    The model's call says the task of every row: `model(**batch, task_ids=[0, 2, 0])`, by number; so does `generate`.
    Where the configuration names one `task`, that one is run for all rows, and can be merged.

    Trains: down (r, in); ups (n, out, r), zero at the start; transform (tasks, r, r), identities at the start, or their
    diagonals (tasks, r); mix (tasks, n).
    Cost: r in + n r out + tasks (r^2 + n) parameters; n tasks r out multiply-adds a call, and r (in + out) a token.
    Dropout acts on the input of down, in training only.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype, for the `task` of the configuration.
    Raises: StateError where the task is not known; UnsupportedError on merging without one.
    Source: Yang et al. 2024, arXiv:2410.09437, eq. 4 to 6; starting values as in the authors' code.
    """

    kinds = frozenset({"linear"})
    reads_inputs = True
    own_inputs = frozenset({"task_ids"})

    def __init__(self, site: Site, config: MtlLoraConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.scaling = config.lora_alpha / config.r
        tasks, r = config.num_tasks, config.r
        self.down = nn.Parameter(torch.empty(r, site.shape[1]))
        self.ups = nn.Parameter(torch.empty(config.num_ups, site.shape[0], r))
        self.transform = nn.Parameter(torch.empty(tasks, r) if config.diagonal else torch.empty(tasks, r, r))
        self.mix = nn.Parameter(torch.empty(tasks, config.num_ups))

    def reset(self) -> None:
        nn.init.uniform_(self.down, -(self.down.shape[1] ** -0.5), self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.ups)
        nn.init.uniform_(self.mix, -(self.mix.shape[1] ** -0.5), self.mix.shape[1] ** -0.5)
        nn.init.ones_(self.transform)
        if not self.config.diagonal:
            with torch.no_grad():
                self.transform.copy_(torch.eye(self.config.r).expand_as(self.transform))

    @classmethod
    def note(cls, inputs: Mapping[str, Any], config: MtlLoraConfig) -> Mapping[str, Any]:
        """The tasks as a tensor, so that a mixed batch can pick those of its rows."""
        tasks = inputs.get("task_ids")
        if tasks is None or isinstance(tasks, Tensor):
            return {}
        if strange := [task for task in tasks if not 0 <= task < config.num_tasks]:
            raise StateError(
                f"task_ids has the task {strange[0]}, but the adapter has num_tasks={config.num_tasks}, counted from 0."
            )
        return {"task_ids": torch.tensor(tasks)}

    def up(self) -> Tensor:
        """What maps down's output to the layer's, for every task, `(tasks, out, r)`."""
        shares = (self.mix / self.config.temperature).softmax(-1)
        mixed = (shares @ self.ups.flatten(1)).unflatten(1, self.ups.shape[1:])
        return mixed * self.transform.unsqueeze(1) if self.config.diagonal else mixed @ self.transform

    def adapt(self, weight: Tensor) -> Tensor:
        if self.config.task is None:
            raise UnsupportedError(
                "An MTL-LoRA adapter changes the weight for every task in its own way, so it can neither be merged nor "
                "lie below a method that needs the adapted weight. Set `task` in its configuration to run one task."
            )
        return weight + self.scaling * (self.up()[self.config.task] @ self.down)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        x = x.to(self.down.device, self.down.dtype)
        if self.config.lora_dropout:
            x = F.dropout(x, self.config.lora_dropout, self.training)
        if self.config.task is not None:
            return self.site.add_factored(x, y, self.down, self.up()[self.config.task], self.scaling)
        up = self.up()[tasks_of(base, y.shape[0], "An MTL-LoRA adapter").to(x.device)]  # (rows, out, r)
        # Beams are rows next to each other, and so are the tokens of a row where they are flattened.
        hidden = F.linear(x, self.down).reshape(up.shape[0], -1, up.shape[2])  # (rows, tokens, r)
        return y + (self.scaling * torch.bmm(hidden, up.mT)).reshape(y.shape).to(y.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {f"mtl_lora_{name}": tensor for name, tensor in super().to_file().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            self.put(key.removeprefix("mtl_lora_"), tensor)


def tasks_of(base: Base, count: int, who: str) -> Tensor:
    """The task of every row, `(rows,)`, as the model's call says it.

    Args:
        base: What lies below the adapter.
        count: How many rows the layer was called with.
        who: What needs to know.

    Raises:
        StateError: The call does not say it, or not for these rows.
    """
    tasks: Tensor | None = base.inputs.get("task_ids")
    if tasks is None:
        raise StateError(
            f"{who} has to know the task of every row: call the PeftModel with task_ids=[...], or set `task` in its "
            "configuration to run one task."
        )
    if tasks.dim() != 1 or count % tasks.shape[0]:
        raise StateError(
            f"task_ids has the shape {tuple(tasks.shape)}, and a layer was called with {count} rows: one task for "
            "each row of the batch was expected."
        )
    return tasks


@register("mtl_lora")
@dataclass
class MtlLoraConfig(WeightConfig):
    """Configuration of `MtlLora`.

    Args:
        r: Rank.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Share of the input that is dropped in training.
        num_tasks: Number of tasks.
        num_ups: Number of ups, of which every task has its own mixture.
        temperature: Divides the weights of a mixture before their softmax; the lower, the more one up counts.
        diagonal: Diagonal transforms, of r numbers a task, instead of r x r.
        task: The one task to run, whatever the rows are; none where the call says them.

    Raises:
        ConfigError: A size that is not positive, a dropout outside [0, 1), or a task that there is not.
    """

    adapter = MtlLora
    peft_name = "MTL_LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    num_tasks: int = 2
    num_ups: int = 3
    temperature: float = 0.5
    diagonal: bool = False
    task: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "num_tasks", "num_ups", "temperature")
        check_shares(self, "lora_dropout")
        if self.task is not None and not 0 <= self.task < self.num_tasks:
            raise ConfigError(
                f"MtlLoraConfig: task={self.task}; with num_tasks={self.num_tasks} they are counted from 0 to "
                f"{self.num_tasks - 1}."
            )
