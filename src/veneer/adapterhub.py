"""Bottleneck and ReFT adapters of AdapterHub's `adapters`, and its heads, as they are written here.

LoRA and (IA)^3 of it are read in `legacy`.

| there | here |
|---|---|
| `double_seq_bn` (Houlsby) | `bottleneck` on the projections that end attention and the feed-forward part |
| `seq_bn` (Pfeiffer) | around the norm after the residual sum (BERT and its like), or at the block's end (GPT-2 ...) |
| `par_bn` | `parallel`, with BERT and its like |
| `compacter`, `compacter++` | `compacter`, in the same places as the first two |
| `adapter_plus` | `adapterplus` |
| `seq_bn_inv` | refused: its invertible part would be another adapter |
| LoReFT, NoReFT, DiReFT | the same |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer import structure, targets
from veneer.config import PeftConfig
from veneer.errors import CheckpointError

HEAD_CONFIG, HEAD_WEIGHTS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"

# Models whose norms come before attention and feed-forward part: AdapterHub gives their adapters the residual sum.
_NORMS_BEFORE = ("gpt2", "gptj", "llama", "mistral", "vit")

_BLOCK = r"(?P<block>.+?)\.(?P<part>attention\.output|output|attention_adapters|output_adapters)"
_PLACE = re.compile(_BLOCK + r"\.adapters\.[^.]+\.(?P<name>.+)")
_REFT = re.compile(r"(?P<block>.+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>\d)\.(?P<name>.+)")

# What must be as it is by default, or the adapter computes what no method here does.
_ONLY = {
    "use_gating": False,
    "ln_before": False,
    "ln_after": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "invertible_adapter": None,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "learn_phm": True,
    "phm_rank": 1,
    "phm_bias": True,
}


def bottleneck(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module | None, where: str
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """A bottleneck adapter: its configuration, and its tensors by their names here, without a prefix.

    Args:
        values: Its `adapter_config.json`.
        tensors: What its file holds.
        model: The base model; needed for all but BERT and its like.
        where: For messages.

    Raises:
        CheckpointError: It computes what no method here does, or the tensors are not those of one.
    """
    own: Mapping[str, Any] = values["config"]
    for name, only in _ONLY.items():
        if own.get(name, only) not in (only, None if only is False else only):
            raise CheckpointError(f"{where}: {name}={own[name]!r} of AdapterHub has no counterpart here.")
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    rule = None
    for key, tensor in tensors.items():
        if found := _PLACE.fullmatch(key):
            parts.setdefault((found["block"], found["part"]), {})[found["name"]] = tensor
        elif re.fullmatch(r"(.+\.)?shared_parameters\.[^.]+\.phm_rule", key):
            rule = tensor
        else:
            raise CheckpointError(f"{where} holds {key}, which is no tensor of a bottleneck adapter.")
    if not parts:
        raise CheckpointError(f"{where} holds no tensors of a bottleneck adapter.")
    kind = _kind(own, where)
    paths = {place: _path(*place, kind, values, model, where) for place in parts}
    made: dict[str, Tensor] = {}
    sizes = set()
    for place, part in parts.items():
        try:
            named = _kronecker(part) if rule is not None else _linear(part)
        except KeyError as error:
            raise CheckpointError(f"{where} holds no {error.args[0]} of {'.'.join(place)}.") from error
        sizes.add(named["adapter_down.bias"].shape[0])
        if isinstance(own.get("scaling"), str):
            named["scaling"] = part["scaling"]
        made |= {f"{paths[place]}.{name}": tensor for name, tensor in named.items()}
    if len(sizes) > 1:
        raise CheckpointError(f"{where}: its bottlenecks have the sizes {sorted(sizes)}; one for all is read here.")
    if rule is not None:
        made["compacter_rule"] = rule.transpose(1, 2)  # there the product is formed for rows, x W
    return _config(kind, own, rule, sizes.pop(), list(paths.values()), values, model), made


def _kind(own: Mapping[str, Any], where: str) -> str:
    """Where the residual sum and the norm are: `plain`, `around`, `parallel` or `end`."""
    if own.get("is_parallel") and not own.get("original_ln_before") and own.get("original_ln_after", True):
        return "parallel"
    before, after = own.get("original_ln_before", False), own.get("original_ln_after", True)
    residual = own.get("residual_before_ln", True)
    kinds = {(False, True): "plain", (True, True): "around", (True, False): "end"}
    kind = kinds.get((before, after))
    if (
        kind is None
        or own.get("is_parallel")
        or (kind == "around" and residual is not True)
        or (kind == "end" and residual)
    ):
        raise CheckpointError(
            f"{where}: original_ln_before={before}, original_ln_after={after}, residual_before_ln={residual!r} of "
            "AdapterHub have no counterpart here together."
        )
    return kind


def _path(block: str, part: str, kind: str, values: Mapping[str, Any], model: nn.Module | None, where: str) -> str:
    """What an adapter in this part of the block is on here."""
    if part.endswith("output"):  # as BERT has it: a module with a projection and a norm
        if kind == "end":
            return _named(block, model)
        return _named(f"{block}.{part}.{'LayerNorm' if kind == 'around' else 'dense'}", model)
    if values.get("model_type") not in _NORMS_BEFORE or kind == "parallel":
        raise CheckpointError(
            f"{where}: bottleneck adapters of AdapterHub for {values.get('model_type')!r} are not read; those for BERT "
            f"and its like, and sequential ones for {', '.join(_NORMS_BEFORE)} are."
        )
    if kind in ("around", "end"):
        if part == "attention_adapters":
            raise CheckpointError(f"{where}: an adapter on the residual sum after attention has no counterpart here.")
        return _named(block, model)
    if model is None:
        raise CheckpointError(f"{where}: where its adapters are is seen from the base model. Load it onto that.")
    place = "self-attention-output" if part == "attention_adapters" else "ffn-output"
    path = _named(block, model)
    return next(found for found in structure.place(place, dict(targets.walk(model))) if found.startswith(f"{path}."))


def _named(path: str, model: nn.Module | None) -> str:
    """What a module is called in this model: with or without the name of the model inside a headed one."""
    if model is None:
        return path
    modules, inner = dict(targets.walk(model)), getattr(model, "base_model_prefix", "")
    candidates = (path, f"{inner}.{path}", path.removeprefix(f"{inner}."))
    return next((candidate for candidate in candidates if candidate in modules), path)


def _linear(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"adapter_{layer}.{name}": part[f"adapter_{layer}{inner}.{name}"]
        for layer, inner in (("down", ".0"), ("up", ""))
        for name in ("weight", "bias")
    }


def _kronecker(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for layer, inner in (("down", ".0"), ("up", "")):
        there, here = f"adapter_{layer}{inner}", f"adapter_{layer}"
        named |= {f"{here}.t": part[f"{there}.W_left"].squeeze(-1), f"{here}.s": part[f"{there}.W_right"].squeeze(-2)}
        named[f"{here}.bias"] = part[f"{there}.b"]
    return named


def _config(
    kind: str,
    own: Mapping[str, Any],
    rule: Tensor | None,
    size: int,
    paths: list[str],
    values: Mapping[str, Any],
    model: nn.Module | None,
) -> PeftConfig:
    from veneer.methods.adapterplus import AdapterPlusConfig
    from veneer.methods.bottleneck import BottleneckConfig
    from veneer.methods.compacter import CompacterConfig
    from veneer.methods.parallel import ParallelConfig

    # Of models with norms before, the sum that the adapter is given is what the block ends with.
    around = kind == "around" and paths[0].endswith("LayerNorm")
    settings: dict[str, Any] = {
        "bottleneck_size": size,
        "non_linearity": own["non_linearity"].lower(),
        "dropout": float(own.get("dropout") or 0.0),
        "scaling": own.get("scaling", 1.0),
        "base_model_name_or_path": values.get("model_name"),
    }
    if kind == "parallel":
        inputs = [path.replace(".output.dense", ".intermediate.dense") for path in paths]
        return ParallelConfig(target_modules=[*inputs, *paths], input_modules=inputs, **settings)
    if rule is not None:
        return CompacterConfig(target_modules=paths, around_norm=around, terms=rule.shape[0], **settings)
    if own.get("stochastic_depth"):
        return AdapterPlusConfig(target_modules=paths, drop_path=own["stochastic_depth"], **settings)
    return BottleneckConfig(target_modules=paths, around_norm=around, **settings)


def reft(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module | None,
    where: str,
    given: PeftConfig | None = None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """A ReFT adapter; arguments as of `bottleneck`.

    Args:
        given: A configuration that says which kind it is, where the file does not.

    Raises:
        CheckpointError: As `bottleneck`; or the file does not say whether it is of NoReFT or DiReFT.
    """
    from veneer.methods.direft import DiReFTConfig
    from veneer.methods.loreft import LoReFTConfig
    from veneer.methods.noreft import NoReFTConfig

    own: Mapping[str, Any] = values["config"]
    if own.get("non_linearity"):
        raise CheckpointError(f"{where}: non_linearity={own['non_linearity']!r} of ReFT has no counterpart here.")
    subtracts = own.get("subtract_projection")
    if given is not None:
        cls: Any = type(given)
    elif own.get("orthogonality"):
        cls = LoReFTConfig
    elif subtracts is None:
        names = ("r", "prefix_positions", "suffix_positions", "tied_weights")
        said = ", ".join(f"{name}={own.get(name, False)}" for name in names)
        raise CheckpointError(
            f"{where} is of NoReFT or of DiReFT: AdapterHub does not save which. Pass as config NoReFTConfig or "
            f"DiReFTConfig, with {said}, ends_at_labels=False."
        )
    else:
        cls = NoReFTConfig if subtracts else DiReFTConfig
    units: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not (found := _REFT.fullmatch(key)):
            raise CheckpointError(f"{where} holds {key}, which is no tensor of ReFT.")
        units.setdefault((_named(found["block"], model), int(found["unit"])), {})[found["name"]] = tensor
    first, last = own["prefix_positions"], own["suffix_positions"]
    tied = own.get("tied_weights", False)
    made: dict[str, Tensor] = {}
    for (path, unit), part in units.items():
        if not tied and not (first and last):
            if unit != (0 if first else 1):
                continue  # there is no such position
            unit = 0
        basis = _basis(part).mT.contiguous()
        edit = f"{path}.reft_edits.{unit}"
        made |= {f"{edit}.source.{name}": part[f"learned_source.{name}"] for name in ("weight", "bias")}
        made[f"{edit}.basis"] = basis
    config = cls(
        target_modules=list(dict.fromkeys(path for path, _ in units)),
        r=own["r"],
        prefix_positions=first,
        suffix_positions=last,
        tied_weights=tied,
        ends_at_labels=False,
        base_model_name_or_path=values.get("model_name"),
    )
    return config, made


def _basis(part: Mapping[str, Tensor]) -> Tensor:
    """The projection, `(r, d)`; an orthogonal one from the two tensors that torch keeps of it."""
    if "projection.weight" in part:
        return part["projection.weight"]
    original = part["projection.parametrizations.weight.original"]
    rank, width = original.shape
    layer: Any = nn.utils.parametrizations.orthogonal(nn.Linear(width, rank, bias=False))
    kept = {name.removeprefix("projection."): tensor for name, tensor in part.items() if name.startswith("projection.")}
    layer.load_state_dict(kept)
    with torch.no_grad():
        weight: Tensor = layer.weight.clone()
    return weight


def head(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module | None
) -> tuple[str, dict[str, Tensor]] | str:
    """A prediction head as part of the base model: the module that it is, and its tensors by their paths.

    Args:
        values: Its `head_config.json`.
        tensors: What its file holds.
        model: The base model, whose head has to be built alike.

    Returns:
        The module and the tensors; or a sentence that says why there is no counterpart.
    """
    own: Mapping[str, Any] = values.get("config") or {}
    kind, layers, pooled = own.get("head_type"), own.get("layers"), own.get("use_pooler", False)
    said = f"head_type={kind!r}, layers={layers}, use_pooler={pooled}"
    if (kind, layers, pooled) == ("classification", 1, True):
        module, names = "classifier", {"1": ""}
    elif (kind, layers, pooled, own.get("activation_function")) == ("classification", 2, False, "tanh"):
        module, names = "classifier", {"1": ".dense", "4": ".out_proj"}
    elif (kind, layers) == ("tagging", 1):
        module, names = "classifier", {"1": ""}
    elif (kind, layers) == ("question_answering", 1):
        module, names = "qa_outputs", {"1": ""}
    else:
        return f"there is no such head in transformers ({said})"
    made = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"heads\.[^.]+\.(\d+)\.(weight|bias)", key)
        if not found or found[1] not in names:
            return f"it holds {key}, which is no tensor of such a head ({said})"
        made[f"{module}{names[found[1]]}.{found[2]}"] = tensor
    if model is not None and (lacking := sorted(path for path in made if not _has(model, path))):
        return f"{type(model).__name__} has no {lacking[0]} ({said})"
    return module, made


def _has(model: nn.Module, path: str) -> bool:
    names: Iterable[str] = (re.sub(r"\.(base_layer|_frozen\.\d)\b", "", name) for name, _ in model.named_parameters())
    return path in set(names)
