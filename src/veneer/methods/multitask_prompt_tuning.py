"""Multitask prompt tuning: one prompt for all tasks, and of each task a low-rank change of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from veneer.config import check_positive, own
from veneer.errors import ConfigError, StateError, VeneerWarning
from veneer.methods.prompt_tuning import Embeddings, PromptTuningConfig
from veneer.prompting.prompts import VirtualTokens
from veneer.registry import register
from veneer.sites import Site


class MultitaskPromptTuningInit(StrEnum):
    """What the prompt of all tasks and the changes of each start as."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_FROM_SOURCE = frozenset(MultitaskPromptTuningInit) - {"TEXT", "RANDOM"}
_NAMES = {"embedding": "prompt_embeddings", "columns": "prefix_task_cols", "rows": "prefix_task_rows"}
_NOISE = 0.02  # standard deviation of what tasks start as, in `peft`


class TaskEmbeddings(Embeddings):
    """The prompt of all tasks (n, d), and of each task columns (n, r) and rows (r, d)."""

    def __init__(self, sites: Mapping[str, Site], config: MultitaskPromptTuningConfig) -> None:
        super().__init__(sites, config)
        total, width = self.embedding.shape
        self.columns = nn.Parameter(torch.empty(config.num_tasks, total, config.num_ranks))
        self.rows = nn.Parameter(torch.empty(config.num_tasks, config.num_ranks, width))

    def reset(self) -> None:
        super().reset()
        nn.init.normal_(self.columns, std=_NOISE)
        nn.init.normal_(self.rows, std=_NOISE)
        if self.config.prompt_tuning_init in _FROM_SOURCE:
            self._start_from_source()

    @torch.no_grad()
    def _start_from_source(self) -> None:
        """Takes over what was trained on other tasks; every task here starts the same."""
        start, task = self.config.prompt_tuning_init, self.config.prompt_tuning_init_task
        source = _read(self.config)
        if start == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            source = {"embedding": source["embedding"]}
        elif start == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
            source |= {name: source[name].mean(0, keepdim=True) for name in ("columns", "rows")}
        else:
            if task >= len(source["rows"]):
                raise ConfigError(
                    f"MultitaskPromptTuningConfig: prompt_tuning_init_task={task}; the source has "
                    f"{len(source['rows'])} tasks, counted from 0."
                )
            source |= {name: source[name][task : task + 1] for name in ("columns", "rows")}
        for name, tensor in source.items():
            own = getattr(self, name)
            if tensor.shape[-2:] != own.shape[-2:]:
                raise ConfigError(
                    f"{self.config.prompt_tuning_init_state_dict_path}: {_NAMES[name]} has shape "
                    f"{tuple(tensor.shape[-2:])} for each task, {tuple(own.shape[-2:])} was expected. Use the "
                    "num_virtual_tokens, num_transformer_submodules and num_ranks of the source, on the same model."
                )
            own.copy_(tensor.expand_as(own))

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        n = self.config.num_virtual_tokens
        tasks = self._tasks(inputs)
        prompts = self.embedding[:n] * (self.columns[tasks, :n] @ self.rows[tasks])  # (rows or 1, n, d)
        return prompts[0] if len(prompts) == 1 else prompts

    def _tasks(self, inputs: Mapping[str, Any]) -> Tensor:
        """The task of every row, or the one of all, (rows or 1,)."""
        count, task = self.config.num_tasks, self.config.task
        tasks = inputs.get("task_ids")
        if task is not None or count == 1:
            return torch.tensor([task or 0], device=self.rows.device)
        if tasks is None:
            raise StateError(
                "A multitask prompt has to know the task of every row: call the PeftModel with task_ids=[...], or set "
                "`task` in its configuration to run one task."
            )
        if tasks.dim() != 1 or not 0 <= int(tasks.min()) <= int(tasks.max()) < count:
            raise StateError(
                f"task_ids={tasks.tolist()}: one task for each row was expected, out of num_tasks={count}, counted "
                "from 0."
            )
        return tasks.to(self.rows.device)

    @classmethod
    def tokens_in(cls, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        prompt, columns, rows = (tensors[name] for name in _NAMES.values())
        prompts = (prompt * (columns @ rows))[:, : config.num_virtual_tokens]
        return {f"task {task}": tokens for task, tokens in enumerate(prompts)}

    def to_file(self) -> dict[str, Tensor]:
        return {key: getattr(self, name) for name, key in _NAMES.items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super(Embeddings, self).from_file({name: tensors[key] for name, key in _NAMES.items()})


def _read(config: Any) -> dict[str, Tensor]:
    """A source prompt: an adapter's folder, or its file of tensors.

    Raises:
        ConfigError: It is no multitask prompt.
        CheckpointError: It is missing or cannot be read.
    """
    from veneer import checkpoint

    path = Path(config.prompt_tuning_init_state_dict_path)
    tensors, _ = checkpoint.read_file(path) if path.is_file() else checkpoint.read(path)
    if missing := set(_NAMES.values()) - set(tensors):
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path={str(path)!r} has no {', '.join(sorted(missing))}; a multitask prompt "
            "was expected."
        )
    return {name: tensors[key] for name, key in _NAMES.items()}


class MultitaskPromptTuning(VirtualTokens):
    r"""Puts n trained embeddings before the text, scaled for the task of the row by a matrix of low rank.

        E'_t = [P * (u_t v_t); E],     * element by element

    The model's call says the task of every row: `model(**batch, task_ids=[0, 2, 0])`; so does `generate`. With
    `num_tasks=1`, or where the configuration names one `task`, that one is run for all rows. Of an encoder-decoder the
    encoder's text is lengthened, as in the paper; see `num_transformer_submodules`.

    Trains: P (n, d); of each task u (n, r) and v (r, d).
    Cost: n d + tasks r (n + d) parameters.
    Start: P random normal or from a text, u and v normal with deviation 0.02; or from a prompt that was trained on
    other tasks: with their mean, with one of them, or with P alone. The model is not the base model at the start.
    Merge: impossible, since the text itself is longer.
    Raises: StateError where the task is not known; ConfigError where a source does not fit.
    Source: Wang et al. 2023, arXiv:2303.02861, section 3.1; starts for a new task: section 3.2.
    """

    shares = TaskEmbeddings
    reads_inputs = True
    own_inputs = frozenset({"task_ids"})

    @classmethod
    def note(cls, inputs: Mapping[str, Any], config: Any) -> Mapping[str, Any]:
        """The tasks as a tensor, so that a mixed batch can pick those of its rows."""
        tasks = inputs.get("task_ids")
        return {} if tasks is None else {"task_ids": torch.as_tensor(tasks)}


@register("multitask_prompt_tuning", num_virtual_tokens=20)
@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Configuration of `MultitaskPromptTuning`.

    Args:
        prompt_tuning_init: `RANDOM`, `TEXT`, or one of those from a source: `AVERAGE_SOURCE_TASKS`,
            `EXACT_SOURCE_TASK`, `ONLY_SOURCE_SHARED`.
        prompt_tuning_init_state_dict_path: The source: folder or safetensors file of a multitask prompt.
        prompt_tuning_init_task: Which of its tasks, for `EXACT_SOURCE_TASK`.
        num_ranks: Rank r of what a task has of its own.
        num_tasks: Number of tasks.
        num_transformer_submodules: 1; `peft`'s 2 for encoder-decoders puts tokens before the decoder's text as well,
            in training and not in generation. Of such files what both have is read, the encoder's.
        task: The one task to run, whatever the rows are; none where the call says them.

    Raises:
        ConfigError: A size that is not positive, a task that there is not, or no source where one is needed.
    """

    adapter = MultitaskPromptTuning  # type: ignore[assignment]
    peft_name = "MULTITASK_PROMPT_TUNING"
    starts: ClassVar[type[StrEnum]] = MultitaskPromptTuningInit

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1
    task: int | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_ranks", "num_tasks")
        if self.prompt_tuning_init in _FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"MultitaskPromptTuningConfig: prompt_tuning_init={str(self.prompt_tuning_init)!r} needs "
                "prompt_tuning_init_state_dict_path, a prompt that was trained on other tasks."
            )
        if self.prompt_tuning_init_task < 0:
            raise ConfigError(
                f"MultitaskPromptTuningConfig: prompt_tuning_init_task={self.prompt_tuning_init_task}; tasks are "
                "counted from 0."
            )
        if self.task is not None and not 0 <= self.task < self.num_tasks:
            raise ConfigError(
                f"MultitaskPromptTuningConfig: task={self.task}; with num_tasks={self.num_tasks} they are counted "
                f"from 0 to {self.num_tasks - 1}."
            )

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.num_transformer_submodules == 2:
            warnings.warn(
                "MultitaskPromptTuningConfig: num_transformer_submodules=2, `peft`'s default for encoder-decoders, has "
                "virtual tokens before the decoder's text in training, and not in generation. Here only the encoder's "
                "are used.",
                VeneerWarning,
                stacklevel=5,
            )
        config = replace(self, num_transformer_submodules=self.num_transformer_submodules or 1)
        return super(MultitaskPromptTuningConfig, config).on(root, modules)
