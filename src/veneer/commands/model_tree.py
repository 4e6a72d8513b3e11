"""A model as a tree of the places that methods can attach to, built without weights.

The model is made from its configuration alone on the meta device, where tensors have shapes but no memory, so that the
largest model can be looked at on any machine.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from veneer import units
from veneer.config import ModuleConfig
from veneer.errors import ConfigError, nearest
from veneer.method_strings import parse_method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from veneer.sites import Site

TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


@dataclass(frozen=True)
class Node:
    """A module in the tree of a model; neighbours that are alike are one node.

    Args:
        name: Its own name; `0-29` stands for thirty alike.
        type: Its class.
        parameters: How many it holds, all below included.
        place: What a method sees of it, such as `linear 1536 x 576`; empty for a mere container.
        matched: Whether the method or target means it.
        children: What is in it that holds parameters.
        repeats: How many modules it stands for.
    """

    name: str
    type: str
    parameters: int
    place: str = ""
    matched: bool = False
    children: tuple["Node", ...] = ()
    repeats: int = 1


@dataclass(frozen=True)
class ModelReport:
    """What `veneer inspect` shows of a model.

    Args:
        name: As it was asked for.
        root: The model.
        sites: Kind and `(out, in)` of every place that a method can attach to, by path.
        matched: Paths that the method or target means; none where neither was given.
        method: The method that was asked about.
        trained: How many parameters it would train.
    """

    name: str
    root: Node
    sites: dict[str, tuple[str, tuple[int, ...]]]
    matched: list[str] | None = None
    method: str | None = None
    trained: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "class": self.root.type,
            "parameters": self.root.parameters,
            "sites": [{"path": path, "kind": kind, "shape": shape} for path, (kind, shape) in self.sites.items()],
            "matched": self.matched,
            "method": self.method,
            "trained": self.trained,
        }

    def __rich__(self) -> RenderableType:
        head = Text.assemble((self.name, "bold"), f"  {self.root.type}, {units.count(self.root.parameters)} parameters")
        tree = Tree(head, guide_style="dim")
        for child in self.root.children:
            _grow(tree, child)
        lines: list[RenderableType] = [tree, Text("shapes are out x in", "dim")]
        if self.matched is not None:
            lines.append(Text(f"* matched: {len(self.matched)} modules", "green"))
        if self.trained is not None:
            share = units.share(self.trained, self.root.parameters)
            lines.append(Text(f"{self.method} trains {units.count(self.trained)} parameters, {share} of the model's"))
        return Group(*lines)


def inspect_model(
    name: str, method: str | None = None, target: str | None = None, task: str | None = None
) -> ModelReport:
    """Build a model without weights and find its places, and what a method or target means in it.

    Raises:
        ConfigError: There is no such model, or the method or task is unknown.
        TargetError: Nothing matches.
    """
    from veneer import targets

    model = build(name, task)
    config = None
    if method is not None or target is not None:
        config = parse_method(method or "lora")
    if target is not None:
        if not isinstance(config, ModuleConfig):
            raise ConfigError(f"The method {method!r} attaches to no modules. Leave --target out.")
        config = dataclasses.replace(config, target_modules=parse_target(target))
    if task is not None and config is not None:
        config = dataclasses.replace(config, task_type=TASK_TYPES[task])  # then the new head counts as trained
    matched = None
    if isinstance(config, ModuleConfig):
        matched = targets.match(model, config.on(model, dict(targets.walk(model))))
    root = _node("", "", model, frozenset(matched or ()))
    sites = dict(_sites(model))
    trained = None
    if method is not None and config is not None:
        import torch

        from veneer.model import get_peft_model

        with torch.device("meta"):
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)  # there are no weights to start from
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return ModelReport(name, root, sites, matched, method, trained)


def parse_target(expression: str) -> str | list[str]:
    """A target as it is typed: names with commas between, else a regular expression or a word such as `all-linear`.

    >>> parse_target("query,value"), parse_target("layers.3.mlp"), parse_target("all-linear")
    (['query', 'value'], ['layers.3.mlp'], 'all-linear')
    >>> parse_target(r".*[.](0|1)[.].*proj")
    '.*[.](0|1)[.].*proj'
    """
    from veneer.targets import is_shorthand

    names = [name.strip() for name in expression.split(",")]
    plain = all(re.fullmatch(r"[\w.-]+", name) for name in names)
    return names if plain and not is_shorthand(expression) else expression


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers, with runs of them as ranges.

    >>> ranges([0, 1, 2, 7]), ranges([3])
    ('0-2,7', '3')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def build(name: str, task: str | None) -> "nn.Module":
    """The model without weights, by name or folder, with the head for a task or as it was published.

    Raises:
        ConfigError: There is no such model, or the task is unknown.
    """
    import torch

    config = _config(name)
    with torch.device("meta"):
        return _class(config, task)(config)


def _config(name: str) -> "PretrainedConfig":
    from transformers import AutoConfig

    from veneer import samples

    found = samples.resolve_model(name)
    try:
        if not (Path(found).exists() or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)):
            raise OSError("there is no such folder")  # and it cannot be a hub id, so the network need not be asked
        return AutoConfig.from_pretrained(found)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{name!r} is neither an adapter's folder nor a model ({reason}).{nearest(name, samples.SAMPLES)} "
            "Expected a folder with a config.json, a hub id, or the name of a sample model."
        ) from error


def _class(config: "PretrainedConfig", task: str | None) -> Any:
    """The class that the checkpoint was saved from, or the one for a task."""
    import transformers

    tasks = {
        "classification": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }
    if task is not None:
        if task not in tasks:
            raise ConfigError(f"Unknown task {task!r}.{nearest(task, tasks)} Known: {', '.join(tasks)}.")
        return tasks[task].from_config
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named or transformers.AutoModel.from_config


def _sites(model: "nn.Module") -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    from veneer.sites import site_of
    from veneer.targets import walk

    for path, module in walk(model):
        if (site := site_of(module)) is not None:
            yield path, (site.kind, site.shape)


def _node(name: str, path: str, module: "nn.Module", matched: frozenset[str]) -> Node:
    from veneer.sites import site_of

    site = site_of(module)
    children = []
    if site is None:
        # Bare tensors, such as the stacked weights of experts: methods reach them by `target_parameters`.
        for key, tensor in module.named_parameters(recurse=False):
            shape = " x ".join(map(str, tensor.shape))
            children.append(Node(key, "parameter", tensor.numel(), shape))
    for key, child in module.named_children():
        if next(child.parameters(), None) is not None:
            children.append(_node(key, f"{path}.{key}" if path else key, child, matched))
    return Node(
        name=name,
        type=type(module).__name__,
        parameters=_parameters(module),
        place="" if site is None else _place(site),
        matched=path in matched,
        children=tuple(_fold(children)),
    )


def _place(site: "Site") -> str:
    # A norm's weight is a vector; that it counts as a matrix with one column is the engine's affair.
    shape = site.shape[:1] if site.kind == "norm" else site.shape
    return f"{site.kind} {' x '.join(map(str, (*site.batch, *shape)))}"


def _fold(nodes: Sequence[Node]) -> Iterator[Node]:
    """Neighbours with numbers for names that differ in nothing else become one node."""
    run: list[Node] = []
    for node in nodes:
        if run and not (node.name.isdigit() and dataclasses.replace(node, name=run[0].name) == run[0]):
            yield _joined(run)
            run = []
        run.append(node)
    if run:
        yield _joined(run)


def _joined(run: Sequence[Node]) -> Node:
    if len(run) == 1:
        return run[0]
    return dataclasses.replace(run[0], name=f"{run[0].name}-{run[-1].name}", repeats=len(run))


def _parameters(module: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _grow(tree: Tree, node: Node) -> None:
    style = "bold green" if node.matched else ""
    mark = " *" if node.matched else ""
    times = f" ({node.repeats} alike)" if node.repeats > 1 else ""
    # A bare parameter's class says nothing that its shape does not.
    kind = node.place or node.type
    count = f"  {units.count(node.parameters)}{' each' if node.repeats > 1 else ''}"
    branch = tree.add(Text.assemble((node.name, style or "cyan"), f"{times}  {kind}", (count, "dim"), (mark, style)))
    for child in node.children:
        _grow(branch, child)
