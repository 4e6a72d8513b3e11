"""Adapters of older versions and of other libraries, read as if they had been written today.

| layout | files | what is read |
|---|---|---|
| `peft` to 0.21 | `adapter_config.json` with `peft_type`; `adapter_model.safetensors`, `.bin` | methods that are here |
| mlx-lm | `adapter_config.json` with `lora_parameters`; `adapters.safetensors` | LoRA and DoRA on linear layers |
| AdapterHub | `adapter_config.json` with `config`; `adapter.safetensors` or `pytorch_adapter.bin` | see `adapterhub` |
| loralib | a file of tensors named `....lora_A`, `....lora_B` | LoRA on linear, merged and embedding layers |

`load` tells them apart. What has no exact counterpart here is refused, with the reason.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import adapterhub, checkpoint, files
from veneer.config import CONFIG_NAME, PeftConfig
from veneer.errors import CheckpointError, ConfigError, VeneerWarning

Loaded = tuple[PeftConfig, dict[str, Tensor], dict[str, Any]]
"""Configuration, tensors by their names in today's files, and header."""

MLX_WEIGHTS = "adapters.safetensors"
HUB_WEIGHTS, HUB_PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
OTHER_WEIGHTS = (MLX_WEIGHTS, HUB_WEIGHTS)

# Leaves of the paths of embeddings, for where there is no model to look at.
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings")


def load(
    source: str | Path,
    config: PeftConfig | None = None,
    model: nn.Module | None = None,
    *,
    allow_pickle: bool = False,
    **hub: Any,
) -> Loaded:
    """An adapter of any layout that is known.

    Args:
        source: A folder, a hub id, or a file of tensors.
        config: Use this configuration instead of the saved one; needed for a file of tensors, which has none.
        model: The base model, which tells what kind of layers the adapter is on, and how they are called here.
        allow_pickle: Also read pickles.
        hub: As in `files.find`.

    Raises:
        CheckpointError: The files are missing, truncated, corrupted, or of no layout that is known; or what they hold
            has no exact counterpart here.
        ConfigError: A setting is unknown, or one that is needed is missing.
    """
    path = Path(source)
    if path.is_file():
        tensors, _ = checkpoint.read_file(path, allow_pickle=allow_pickle)
        return (*from_loralib(tensors, config, model, where=str(path)), {})
    found = files.find(source, CONFIG_NAME, required=config is None, **hub)
    values = _json(found) if found.is_file() else {"peft_type": None}
    if "peft_type" in values:
        tensors, header = checkpoint.read(source, allow_pickle=allow_pickle, **hub)
        tensors = _renamed(tensors, str(found.parent))
        if config is None:
            config = PeftConfig.from_dict(settings(values, str(found)), str(found))
        if enabled := values.get("enable_lora"):
            tensors = _unmerged(tensors, enabled)
        return config, tensors, header
    if "lora_parameters" in values or "fine_tune_type" in values:
        tensors, _ = checkpoint.read(source, safe=MLX_WEIGHTS, pickled=MLX_WEIGHTS, **hub)
        made = from_mlx(values, tensors, model, where=str(found.parent))
    elif isinstance(values.get("config"), Mapping):
        tensors, _ = checkpoint.read(source, allow_pickle=allow_pickle, safe=HUB_WEIGHTS, pickled=HUB_PICKLE, **hub)
        made = from_adapterhub(values, tensors, model, where=str(found.parent), config=config)
        made = _with_head(made, source, model, allow_pickle, hub)
    else:
        raise CheckpointError(
            f"{found} names no peft_type, and is the configuration of no other library that is known (mlx-lm, "
            f"AdapterHub). It has {', '.join(sorted(values)[:8]) or 'nothing'}."
        )
    return (made[0] if config is None else config, made[1], {})


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Restore or save the adapter again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, found a {type(values).__name__}.")
    return values


# peft


def settings(values: Mapping[str, Any], where: str = "adapter configuration") -> dict[str, Any]:
    """The values of an `adapter_config.json` of any version of `peft` as today's version would write them.

    Raises:
        CheckpointError: The method has changed since, so that the tensors mean something else today.
    """
    values = dict(values)
    if values.get("peft_type") == "BONE":  # until 0.17; its successor computes the same
        values["peft_type"] = "MISS"
        if str(values.get("bias", "none")).lower() == "bone_only":
            values["bias"] = "miss_only"
    if values.get("peft_type") == "OFT":
        if "oft_block_size" not in values:
            raise CheckpointError(
                f"{where}: OFT of peft 0.13 or earlier. Its blocks were other matrices, which today's parameters "
                "cannot express. Train the adapter again, or merge it with that version."
            )
        if values.get("use_cayley_neumann") and _version(values) < (0, 18):
            raise CheckpointError(
                f"{where}: OFT with use_cayley_neumann of peft {values.get('peft_version') or 'before 0.18'}, which "
                "summed another series. Train the adapter again, or merge it with that version."
            )
    if enabled := values.pop("enable_lora", None):  # until 0.2; see `_unmerged`
        for name in ("r", "lora_alpha"):
            values[name] = sum(enabled) * values[name]
    values.pop("merge_weights", None)  # only steered the library
    return values


def _version(values: Mapping[str, Any]) -> tuple[int, ...]:
    """The version of peft that wrote this; those before 0.18 did not say."""
    said = re.match(r"(\d+)\.(\d+)", str(values.get("peft_version") or "0.0"))
    return (int(said[1]), int(said[2])) if said else (0, 0)


def _renamed(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors of a file of `peft` under today's names."""
    named = {}
    for key, tensor in tensors.items():
        if ".oft_r." in key or key.endswith(".oft_r"):
            raise CheckpointError(
                f"{where}: {key} is of OFT as peft 0.15 and earlier had it. Its blocks were other matrices, which "
                "today's parameters cannot express. Train the adapter again, or merge it with that version."
            )
        # Files that were cut out of a whole state dict have the adapter's name in their keys.
        key = re.sub(r"(\.(?:lora_|ia3_|vera_|hada_|lokr_|bone_|miss_)\w+)\.default(?=\.|$)", r"\1", key)
        key = re.sub(r"\.modules_to_save\.default\.", ".", key)
        key = re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", key)
        named[re.sub(r"\.bone_block$", ".miss_block", key)] = tensor
    return named


def _unmerged(tensors: Mapping[str, Tensor], enabled: Sequence[bool]) -> dict[str, Tensor]:
    """LoRA on parts of merged projections, of `peft` 0.2 and earlier, as one of several times the rank."""
    made = dict(tensors)
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            up_key = key.replace(".lora_A.", ".lora_B.")
            made[up_key] = blocks(down, tensors[up_key].flatten(1), enabled, key)
    return made


def blocks(down: Tensor, up: Tensor, enabled: Sequence[bool], where: str) -> Tensor:
    """`up` of a merged projection, written as one matrix with a block for each adapted part.

    Args:
        down: `(r n, in)`, n the number of adapted parts.
        up: `(n out / parts, r)`.
        enabled: Which parts are adapted.
        where: For messages.

    Returns:
        `(out, r n)`, zero outside the blocks.

    Raises:
        CheckpointError: The shapes are not those of so many parts.
    """
    count, rank = sum(enabled), up.shape[1]
    if count == 0 or down.shape[0] != count * rank or up.shape[0] % count:
        raise CheckpointError(
            f"{where}: lora_A is {tuple(down.shape)} and lora_B {tuple(up.shape)}, which are not those of {count} "
            "parts. Say which parts of the projection are adapted (enable_lora)."
        )
    rows = up.shape[0] // count
    whole = up.new_zeros(rows * len(enabled), count * rank)
    for number, part in enumerate(index for index, on in enumerate(enabled) if on):
        block = up[number * rows : (number + 1) * rows]
        whole[part * rows : (part + 1) * rows, number * rank : (number + 1) * rank] = block
    return whole


# Other libraries


def from_mlx(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module | None = None, where: str = "mlx-lm"
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter of mlx-lm.

        y = W x + scale * (x lora_a) lora_b;   with DoRA every row is divided by its length and multiplied by m

    Args:
        values: Its `adapter_config.json`.
        tensors: lora_a `(in, r)`, lora_b `(r, out)`, and m `(out,)` of DoRA.
        model: The base model.
        where: For messages.

    Raises:
        CheckpointError: It trained whole weights, experts or embeddings.
    """
    kind = values.get("fine_tune_type", "dora" if values.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        raise CheckpointError(f"{where}: fine_tune_type={kind!r} of mlx-lm is not read here; `lora` and `dora` are.")
    parameters = values.get("lora_parameters") or {}
    parts = _parts(tensors, ("lora_a", "lora_b", "m"), where)
    scale = float(parameters.get("scale", 20.0))
    ranks: dict[str, int] = {}
    made: dict[str, Tensor] = {}
    for path, here in _aligned(parts, model).items():
        part = parts[path]
        down, up = part["lora_a"], part["lora_b"]
        if down.dim() != 2:
            raise CheckpointError(
                f"{where}: {path} has LoRA on the experts of mlx-lm's layout, which is not read here."
            )
        if _is_embedding(here, model):
            raise CheckpointError(
                f"{where}: {path} is an embedding, whose adapter mlx-lm also applies to a tied head and, with DoRA, to "
                "the rows of single tokens. That has no counterpart here."
            )
        ranks[here] = down.shape[1]
        made |= {f"{here}.lora_A.weight": down.T, f"{here}.lora_B.weight": up.T}
        if (kind == "dora") != ("m" in part):
            raise CheckpointError(f"{where}: {path} is not of {kind}, which adapter_config.json says it is.")
        if kind == "dora":
            made[f"{here}.lora_magnitude_vector"] = part["m"]
    # In earlier versions of mlx-lm the scale stood beside an alpha, which was divided by the rank.
    alpha = parameters.get("alpha")
    factors = {path: scale * (rank if alpha is None else float(alpha)) for path, rank in ranks.items()}
    config = _lora(ranks, factors, use_dora=kind == "dora", task_type="CAUSAL_LM", base=values.get("model"))
    return replace(config, lora_dropout=float(parameters.get("dropout", 0.0))), _prefixed(made)


def _with_head(
    made: tuple[PeftConfig, dict[str, Tensor]],
    source: str | Path,
    model: nn.Module | None,
    allow_pickle: bool,
    hub: Mapping[str, Any],
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter of AdapterHub with the head that lies beside it, as a module that is trained whole.

    A head without a counterpart is left out, with a warning: the adapter can be used without.
    """
    found = files.find(source, adapterhub.HEAD_CONFIG, required=False, **hub)
    if not found.is_file():
        return made
    tensors, _ = checkpoint.read(
        source, allow_pickle=allow_pickle, safe=adapterhub.HEAD_WEIGHTS, pickled=adapterhub.HEAD_PICKLE, **hub
    )
    head = adapterhub.head(_json(found), tensors, model)
    if isinstance(head, str):
        warnings.warn(f"{found}: the head of this adapter is left out: {head}.", VeneerWarning, stacklevel=4)
        return made
    module, own = head
    return replace(made[0], modules_to_save=[module]), {**made[1], **_prefixed(own)}  # type: ignore[call-arg]


def from_adapterhub(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module | None = None,
    where: str = "AdapterHub",
    config: PeftConfig | None = None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter of AdapterHub's `adapters`.

    Args:
        values: Its `adapter_config.json`.
        tensors: lora_A `(r, in)` and lora_B `(out, r)`; of (IA)^3 lora_B `(out, 1)` alone.
        model: The base model.
        where: For messages.
        config: Says of which kind a ReFT adapter is, where its file does not.

    Raises:
        CheckpointError: It is another method, or has gates.
    """
    own: Mapping[str, Any] = values["config"]
    if own.get("architecture") is None and "reduction_factor" in own:
        other, named = adapterhub.bottleneck(values, tensors, model, where)
        rule = named.pop("compacter_rule", None)
        if rule is None:
            return other, _prefixed(named)
        # What all places have in common stands above the model in files.
        return other, {
            **_prefixed(named),
            f"{checkpoint.PREFIX.removesuffix('model.')}compacter_rule": rule.contiguous(),
        }
    if own.get("architecture") == "reft":
        other, named = adapterhub.reft(values, tensors, model, where, config)
        return other, _prefixed(named)
    if own.get("architecture") != "lora":
        raise CheckpointError(
            f"{where}: architecture {own.get('architecture')!r} of AdapterHub is not read here; LoRA, (IA)^3, "
            "bottleneck adapters and ReFT are."
        )
    if own.get("use_gating"):
        raise CheckpointError(f"{where}: use_gating=True: gates that depend on the input have no counterpart here.")
    tensors = {re.sub(r"\.loras\.[^.]+\.", ".", key): tensor for key, tensor in tensors.items()}
    scales = own.get("composition_mode") == "scale"
    parts = _parts(tensors, ("lora_B",) if scales else ("lora_A", "lora_B"), where)
    names = _aligned(parts, model)
    base = values.get("model_name")
    if scales:
        from veneer.methods.ia3 import IA3Config

        scaled = {
            f"{names[path]}.ia3_l": float(own.get("alpha", 1)) * part["lora_B"].reshape(-1, 1)
            for path, part in parts.items()
        }
        # All are scaled after the layer, those of the feed-forward part too.
        targets = list(names.values())
        ia3 = IA3Config(target_modules=targets, feedforward_modules=[], base_model_name_or_path=base)
        return ia3, _prefixed(scaled)
    enabled = [matrix in own.get("attn_matrices", "qv") for matrix in "qkv"]
    ranks: dict[str, int] = {}
    factors: dict[str, float] = {}
    made: dict[str, Tensor] = {}
    for path, here in names.items():
        down, up = parts[path]["lora_A"], parts[path]["lora_B"]
        scaling = float(own.get("alpha", 8)) / up.shape[1]
        if down.shape[0] != up.shape[1]:  # one projection for query, key and value
            up = blocks(down, up, enabled, f"{where}: {path}")
        ranks[here] = up.shape[1]
        factors[here] = scaling * up.shape[1]
        made |= {f"{here}.lora_A.weight": down, f"{here}.lora_B.weight": up}
    lora = replace(_lora(ranks, factors, base=base), lora_dropout=float(own.get("dropout", 0.0)))
    return lora, _prefixed(made)


def from_loralib(
    tensors: Mapping[str, Tensor],
    config: Any = None,
    model: nn.Module | None = None,
    where: str = "loralib",
    enable_lora: Sequence[bool] | None = None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """What loralib's `lora_state_dict` gives.

    Args:
        tensors: lora_A `(r, in)` and lora_B `(out, r)` by path, of `Linear`, `MergedLinear` and `Embedding`.
        config: A `LoraConfig` with the `lora_alpha` of the training, and its `lora_dropout` where it goes on.
        model: The base model.
        where: For messages.
        enable_lora: Which parts of merged projections are adapted; all of them if none.

    Raises:
        ConfigError: There is no configuration: loralib's files do not say alpha.
        CheckpointError: There are other tensors, such as biases, or layers that have no counterpart.
    """
    parts = _parts(tensors, ("lora_A", "lora_B"), where)
    if config is None or not hasattr(config, "lora_alpha"):
        raise ConfigError(
            f"{where} holds LoRA of loralib, which does not say how it is scaled. Pass "
            "config=LoraConfig(lora_alpha=...) with the lora_alpha that it was trained with (loralib's default is 1)."
        )
    ranks: dict[str, int] = {}
    factors: dict[str, float] = {}
    made: dict[str, Tensor] = {}
    for path, here in _aligned(parts, model).items():
        down, up = parts[path]["lora_A"], parts[path]["lora_B"]
        scaling = float(config.lora_alpha) / up.shape[1]
        module = dict(model.named_modules()).get(here) if model is not None else None
        if isinstance(module, nn.Conv2d) or up.dim() != 2:
            raise CheckpointError(
                f"{where}: {path} is a convolution. loralib folds its kernel into both factors, and their product has "
                "another rank in the layout of peft. Merge it there."
            )
        if down.shape[0] != up.shape[1]:
            enabled = enable_lora or [True] * (down.shape[0] // up.shape[1])
            up = blocks(down, up, enabled, f"{where}: {path}")
        ranks[here], factors[here] = up.shape[1], scaling * up.shape[1]
        embedding = _is_embedding(here, model)
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        made |= {f"{here}.{a}": down, f"{here}.{b}": up}
    lora = _lora(ranks, factors, base=config.base_model_name_or_path, task_type=config.task_type)
    return replace(lora, lora_dropout=config.lora_dropout), _prefixed(made)


def _parts(tensors: Mapping[str, Tensor], names: Sequence[str], where: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by path and name.

    Raises:
        CheckpointError: There is something else among them, or nothing.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    other = []
    for key, tensor in sorted(tensors.items()):  # files have no order
        path, _, name = key.rpartition(".")
        if name in names:
            parts.setdefault(path, {})[name] = tensor
        else:
            other.append(key)
    wanted = [name for name in names if name != "m"]
    other += [f"no {path}.{name}" for path, part in parts.items() for name in wanted if name not in part]
    if other or not parts:
        shown = ", ".join(sorted(other)[:4]) or "no tensors"
        raise CheckpointError(f"{where} holds {shown}, which are no tensors of LoRA as {', '.join(names)}.")
    return parts


def _aligned(paths: Iterable[str], model: nn.Module | None) -> dict[str, str]:
    """What the layers are called in this model: with or without the name of the model inside a headed one."""
    if model is None:
        return {path: path for path in paths}
    modules = {re.sub(r"\.base_layer\b|\bbase_layer\.", "", name) for name, _ in model.named_modules()}
    inner = getattr(model, "base_model_prefix", "") or ""
    found = {}
    for path in paths:
        candidates = (path, f"{inner}.{path}", path.removeprefix(f"{inner}."))
        found[path] = next((candidate for candidate in candidates if candidate in modules), path)
    return found


def _is_embedding(path: str, model: nn.Module | None) -> bool:
    module = None if model is None else dict(model.named_modules()).get(path)
    return path.rpartition(".")[2] in EMBEDDINGS if module is None else isinstance(module, nn.Embedding)


def _lora(
    ranks: Mapping[str, int],
    factors: Mapping[str, float],
    use_dora: bool = False,
    task_type: str | None = None,
    base: str | None = None,
) -> Any:
    """The configuration of LoRA with these ranks and alphas."""
    from veneer.methods.lora import LoraConfig

    rank, alpha = next(iter(ranks.values())), next(iter(factors.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={path: other for path, other in ranks.items() if other != rank},
        alpha_pattern={path: other for path, other in factors.items() if other != alpha},
        target_modules=list(ranks),
        use_dora=use_dora,
        task_type=task_type,
        base_model_name_or_path=base,
    )


def _prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {checkpoint.PREFIX + key: torch.as_tensor(tensor).contiguous() for key, tensor in tensors.items()}
