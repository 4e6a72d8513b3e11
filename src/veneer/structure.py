"""Where things are in a transformers model: its blocks, their attention and feed-forward parts, and its head.

Found from the module tree, not from a list of model families: a block is an element of a `ModuleList` that holds an
attention module; the last projection outside the attention is the output of the feed-forward part, and the last one of
that width inside it is its output. A model of another build is told apart by a width check, and then the modules are
named by hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from veneer.errors import TargetError
from veneer.stores import quantised_store

PLACES = (
    "attention-output",
    "self-attention-output",
    "ffn-input",
    "ffn-output",
    "attention-keys",
    "attention-values",
    "block-output",
    "embedding-output",
)
"""Names that `target_modules` understands, beside module names: projections at the end of attention, and of
self-attention alone; the first projection of the feed-forward part, and its last; key and value projections; whole
blocks; and what turns tokens or patches into vectors."""

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

_PROJECTED = ("attention-output", "self-attention-output", "ffn-input", "ffn-output")


def place(name: str, modules: Mapping[str, nn.Module], tokens: str | None = None) -> list[str]:
    """Paths of the modules that are the named place, or whose output is, in model order.

    Args:
        name: One of `PLACES`.
        modules: All modules of the model by path.
        tokens: Path of the embedding of its input tokens; needed for `embedding-output`.

    Raises:
        TargetError: The model has no such place that can be found.
    """
    if name in ("attention-keys", "attention-values"):
        return _projections(name, modules)
    if name == "embedding-output":
        return [_embeddings(modules, tokens)]
    found: dict[str, list[str]] = {"block-output": blocks(modules), **{place: [] for place in _PROJECTED}}
    for block in found["block-output"]:
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
        # Where there is attention to an encoder too, it comes second.
        found["self-attention-output"] += found["attention-output"][-len(attentions) :][:1]
        if feed_forward:
            beside = [p for p in linears if _attention_of(p, block, modules) is None]
            width = _width(modules[feed_forward])
            found["ffn-output"].append(feed_forward)
            found["ffn-input"] += [p for p in beside if p != feed_forward and input_width(modules[p]) == width][:1]
    if name == "block-output" and found[name]:  # whose widths may differ: each is seen by itself
        return found[name]
    widths = {place: {_width(modules[path]) for path in found[place]} for place in _PROJECTED}
    widths["ffn-input"] = {input_width(modules[path]) for path in found["ffn-input"]}
    paired = name != "ffn-input" or len(found[name]) == len(found["ffn-output"])
    if name == "block-output" or not paired or len(widths[name]) != 1 or widths[name] != widths["attention-output"]:
        raise TargetError(
            f"The place {name!r} was not found in this model (looked for projections of one width at the end of each "
            f"block; saw {found[name][:3] or 'none'} of widths {sorted(widths.get(name, ()))}, attention of "
            f"{sorted(widths['attention-output'])}). Name the modules in `target_modules`."
        )
    return found[name]


def _embeddings(modules: Mapping[str, nn.Module], tokens: str | None) -> str:
    """Path of the largest module that holds the embedding of the input tokens and no block.

    Raises:
        TargetError: There is none.
    """
    stacks = blocks(modules)
    # Vision models have no tokens; what comes before their blocks is a module of that name.
    start = tokens or next((p for p in modules if stacks and p.rpartition(".")[2] == "embeddings"), None)
    if start is None:
        raise TargetError(
            "The place 'embedding-output' was not found in this model (it has no embedding of input tokens). Name the "
            "modules in `target_modules`."
        )
    above = [path for path in _parents(start) if path in modules]
    clear = [p for p in above if stacks and not any(_inside(block, p) for block in stacks)]
    return next((p for p in clear if not isinstance(modules[p], nn.ModuleList | nn.ModuleDict)), start)


def output_width(module: nn.Module) -> int | None:
    """Width of what a module gives; none where it has no layer whose width is known.

    That is the width of its last projection outside attention, or else of its last embedding or convolution.
    """
    inner = dict(module.named_modules())
    linears = [path for path in inner if is_linear(inner[path])]
    if linears:
        outside = [path for path in linears if _attention_of(path, "", inner) is None]
        return _width(inner[(outside or linears)[-1]])
    for layer in reversed(inner.values()):
        for name in ("embedding_dim", "out_channels"):
            if isinstance(width := getattr(layer, name, None), int):
                return width
    return None


def input_width(module: nn.Module) -> int:
    """Width of what a projection takes, however its weight is kept."""
    return int(module.nx if type(module).__name__ == "Conv1D" else module.in_features)  # type: ignore[arg-type]


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


def fused_projection(attention: nn.Module) -> nn.Module | None:
    """The projection to queries, keys and values in one; none where an attention module has no such."""
    names = {name for names in _PROJECTIONS if len(names) == 1 for name in names}
    return next((child for name, child in attention.named_children() if name in names), None)


def key_and_value_projections(attention: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Those of an attention module that has them apart.

    Raises:
        TargetError: They are not found.
    """
    children = dict(attention.named_children())
    for _, *names in (names for names in _PROJECTIONS if len(names) == 3):
        if all(name in children for name in names):
            return children[names[0]], children[names[1]]
    known = ", ".join(f"{key}/{value}" for _, key, value in (names for names in _PROJECTIONS if len(names) == 3))
    raise TargetError(
        f"{type(attention).__name__} has no key and value projections of a known name (looked for {known}; it has "
        f"{', '.join(children)}), so no prompt can take their way. Use prefix_tuning or cartridge."
    )


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


# How modules that attend from one text to another are called, or the part of them that does.
_CROSS = ("cross", "encoder_attn", "EncDec", "encoder_attention")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads one text and writes another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def inputs_by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with, each under the name that its `forward` has for it."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def attentions(root: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Paths of the modules that look their attention function up where transformers registers them.

    Returns:
        By kind: `self` of a decoder, or of an encoder that stands alone; `encoder`, that of an encoder beside a
        decoder; `cross`, from one to the other.
    """
    both = is_encoder_decoder(root)
    found: dict[str, list[str]] = {"self": [], "encoder": [], "cross": []}
    for path, module in modules.items():
        forward = inspect.unwrap(type(module).forward)
        if "ALL_ATTENTION_FUNCTIONS" not in getattr(forward, "__code__", forward).co_names:
            continue
        kind = "encoder" if both and "encoder" in path.split(".") else "self"
        found["cross" if any(word in part for part in path.split(".") for word in _CROSS) else kind].append(path)
    return found


def in_attention(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module lies within an attention module."""
    return any("Attention" in type(modules[above]).__name__ for above in _parents(path) if above in modules)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or quantised_store(module) is not None


def _inside(path: str, parent: str) -> bool:
    return path.startswith(parent + ".") or not parent


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
