"""Where things are in a transformers model: its blocks, their attention and feed-forward parts, and its head.

Found from the module tree, not from a list of model families: a block is an element of a `ModuleList` that holds an
attention module; the last projection outside the attention is the output of the feed-forward part, and the last one of
that width inside it is its output. A model of another build is told apart by a width check, and then the modules are
named by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from torch import nn

from veneer.errors import TargetError
from veneer.stores import quantised_store

PLACES = ("attention-output", "ffn-output", "attention-keys", "attention-values")
"""Names that `target_modules` understands, beside module names."""

# Query, key and value projections, or the fused one, by the names in use; the first that a model has is taken.
_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("qkv",),
    ("in_proj",),
)


def place(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the modules whose output is the named place, in model order.

    Args:
        name: One of `PLACES`.
        modules: All modules of the model by path.

    Raises:
        TargetError: The model has no such place that can be found.
    """
    if name in ("attention-keys", "attention-values"):
        return _projections(name, modules)
    found: dict[str, list[str]] = {"attention-output": [], "ffn-output": []}
    for block in blocks(modules):
        linears = [p for p in modules if _inside(p, block) and is_linear(modules[p])]
        attentions: dict[str, list[str]] = {}  # attention module -> its projections
        feed_forward = None
        for path in linears:
            attention = _attention_of(path, block, modules)
            if attention is None:
                feed_forward = path
            else:
                attentions.setdefault(attention, []).append(path)
        for paths in attentions.values():
            # Both outputs are added to the same stream; a fused input projection may stand last, but is wider.
            outputs = [p for p in paths if feed_forward and _width(modules[p]) == _width(modules[feed_forward])]
            found["attention-output"].append((outputs or paths)[-1])
        found["ffn-output"] += [feed_forward] if feed_forward else []
    widths = {place: {_width(modules[path]) for path in paths} for place, paths in found.items()}
    if not found[name] or len(widths[name]) != 1 or widths[name] != widths["attention-output"]:
        raise TargetError(
            f"The place {name!r} was not found in this model (looked for projections of one width at the end of each "
            f"block; saw {found[name][:3] or 'none'} of widths {sorted(widths[name])}, attention of "
            f"{sorted(widths['attention-output'])}). Name the modules in `target_modules`."
        )
    return found[name]


def blocks(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the innermost list elements that hold attention and projections beside it, or only attention."""
    held: dict[str, set[bool]] = {}  # list element -> whether its projections are inside attention
    for path in modules:
        if is_linear(modules[path]):
            for element in _list_elements(path, modules):
                held.setdefault(element, set()).add(_attention_of(path, element, modules) is not None)
    whole = [element for element, inside in held.items() if inside == {True, False}]
    if not whole:  # experts keep their weights as bare parameters, not as projections
        whole = [element for element, inside in held.items() if inside == {True}]
    return [element for element in whole if not any(_inside(other, element) for other in whole)]


def attention_inputs(modules: Mapping[str, nn.Module]) -> list[str] | None:
    """Names of the query and value projections, the usual places of low-rank adapters; none if there are none."""
    names = _projection_names(modules)
    return None if names is None else list(dict.fromkeys((names[0], names[-1])))


def _projection_names(modules: Mapping[str, nn.Module]) -> tuple[str, ...] | None:
    leaves = {path.rpartition(".")[2] for path, module in modules.items() if is_linear(module)}
    return next((names for names in _PROJECTIONS if leaves.issuperset((names[0], names[-1]))), None)


def _projections(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the key or value projections; of the fused ones where a model has those.

    Raises:
        TargetError: There are none that can be found.
    """
    names = _projection_names(modules) or ("",)
    leaf = names[-1] if name == "attention-values" else names[len(names) // 2]
    found = [
        path
        for path, module in modules.items()
        if path.rpartition(".")[2] == leaf and is_linear(module) and in_attention(path, modules)
    ]
    if not found:
        known = sorted({name for names in _PROJECTIONS for name in names})
        raise TargetError(
            f"The place {name!r} was not found in this model (looked for projections named {', '.join(known)} in "
            "attention modules). Name the modules in `target_modules`."
        )
    return found


def in_attention(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module lies within an attention module."""
    return any("Attention" in type(modules[above]).__name__ for above in _parents(path) if above in modules)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or quantised_store(module) is not None


def _inside(path: str, parent: str) -> bool:
    return path.startswith(parent + ".")


def _parents(path: str) -> list[str]:
    """Paths of all modules above, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _list_elements(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    parents = [*_parents(path), path]
    return [b for a, b in pairwise(parents) if isinstance(modules.get(a), nn.ModuleList)]


def _attention_of(path: str, block: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The outermost attention module above `path` within `block`, or none."""
    above = (p for p in _parents(path) if _inside(p, block) and p in modules)
    return next((p for p in above if "Attention" in type(modules[p]).__name__), None)


def _width(module: nn.Module) -> int:
    """Width of a projection's output, however its weight is kept."""
    return int(module.nf if type(module).__name__ == "Conv1D" else module.out_features)  # type: ignore[arg-type]
