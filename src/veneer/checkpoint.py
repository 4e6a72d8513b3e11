"""Adapter files: `adapter_config.json` and `adapter_model.safetensors`, in the layout of `peft`.

A tensor is named `base_model.model.<path of the module>.<name in the method>`, without the name of the adapter. Files
are written completely or not at all, carry a checksum of their tensors and a fingerprint of the base model in the
header of the safetensors file (which other readers pass over), and are read whole before the model is touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from veneer import files
from veneer.adapted import Adapted, adapters_of
from veneer.adapter import Adapter, BiasOnly, Shared
from veneer.config import CONFIG_NAME, PeftConfig
from veneer.errors import BaseMismatchError, CheckpointError, VeneerWarning, nearest
from veneer.sites import ParameterSite, Site, site_of
from veneer.targets import frozen, walk
from veneer.trained_copy import TrainedCopy

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
HEADER = "veneer"

# With bias="all" peft writes the biases of modules that are trained whole under these names once more.
_REPEATED = re.compile(r"\.(modules_to_save|original_module)\.bias$")


def adapter_tensors(root: nn.Module, name: str, prefix: str = PREFIX) -> dict[str, Tensor]:
    """The named adapter's tensors under their names in a file."""
    keyed = _keyed(root, name)
    prefix = _prefix(prefix, keyed)
    tensors = {
        f"{prefix}{key}.{tensor_name}": tensor.detach()
        for key, adapter in keyed
        for tensor_name, tensor in adapter.to_file().items()
    }
    for key, adapter in _with_bias(keyed):
        assert adapter.bias_delta is not None
        tensors[prefix + key] = (_base_bias(adapter) + adapter.bias_delta).detach()
        tensors[f"{prefix}{key}_delta"] = adapter.bias_delta.detach()  # ours: the sum has lost its last bits
    shared = _shared(keyed)
    if shared is not None:
        above, written = _above(prefix, shared), shared.to_file().items()
        tensors |= {above + key: tensor.detach() for key, tensor in written if key not in shared.derived}
    return tensors


def fill(
    root: nn.Module, name: str, tensors: Mapping[str, Tensor], *, prefix: str = PREFIX, where: str = "state dict"
) -> None:
    """Puts tensors of a file into the named adapter.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of another shape; lists all of them, and changes nothing.
    """
    keyed = _keyed(root, name)
    prefix = _prefix(prefix, keyed)
    given = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if not _REPEATED.search(key)}
    for key, adapter in keyed:
        if type(adapter).expect is not Adapter.expect:
            inner = f"{key}."
            adapter.expect({own.removeprefix(inner): t for own, t in given.items() if own.startswith(inner)})
    adapters = [(key, adapter, list(adapter.to_file().items())) for key, adapter in keyed]
    expected = {f"{key}.{own}": tensor.shape for key, _, tensors in adapters for own, tensor in tensors}
    optional = {f"{key}.{own}" for key, adapter, _ in adapters for own in adapter.optional}
    free = {f"{key}.{own}" for key, adapter, _ in adapters for own in adapter.free}
    biases = dict(_with_bias(keyed))
    expected |= {key: _base_bias(adapter).shape for key, adapter in biases.items()}
    optional |= {f"{key}_delta" for key in biases}
    shared = _shared(keyed)
    above = "" if shared is None else _above(prefix, shared)
    if shared is not None:
        expected |= {above + key: tensor.shape for key, tensor in shared.to_file().items()}
        optional |= {above + key for key in shared.derived | shared.optional}
    extra = set(given) - set(expected) - optional
    base = _base_tensors(root, {key: given[key] for key in extra})
    problems = [f"missing {key} {tuple(expected[key])}" for key in expected if key not in given and key not in optional]
    problems += [
        f"unexpected {key} {tuple(given[key].shape)}{nearest(key, expected, 1)}" for key in sorted(extra - set(base))
    ]
    problems += [
        f"{key} has shape {tuple(given[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in given and given[key].shape != shape and not (key in free and given[key].dim() == len(shape))
    ]
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(
            f"{where} does not fit adapter {name!r} on this {type(root).__name__}:\n  {shown}\n"
            "Load it onto the base model and with the configuration that it was trained with."
        )
    if shared is not None:  # first: adapters may make what the file lacks from it
        shared.from_file({key: given[above + key] for key in shared.to_file() if above + key in given})
    for key, adapter, own in adapters:
        names = dict.fromkeys([*(tensor_name for tensor_name, _ in own), *adapter.optional])
        adapter.from_file({own_name: given[f"{key}.{own_name}"] for own_name in names if f"{key}.{own_name}" in given})
    if shared is not None:  # what was created without memory lies where the file was read
        devices = [adapter.device for _, adapter, _ in adapters if adapter.device is not None]
        if devices and devices[0].type != "meta":
            shared.to(devices[0])
    for _, adapter, _ in adapters:
        adapter.prepared = True  # what it needed data for has been read
    for key, adapter in biases.items():
        own_delta = given.get(f"{key}_delta")
        adapter.put("bias_delta", given[key] - _base_bias(adapter).to(given[key]) if own_delta is None else own_delta)
    for key, parameter in base.items():
        if not torch.equal(parameter, given[key].to(parameter)):
            warnings.warn(
                f"{where} brings its own {key}; it replaced the base model's, for all adapters.",
                VeneerWarning,
                stacklevel=3,
            )
            with torch.no_grad():
                parameter.copy_(given[key])


def save(
    root: nn.Module,
    name: str,
    config: PeftConfig,
    folder: Path,
    prefix: str = PREFIX,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the named adapter into a folder.

    Args:
        root: The base model.
        name: The adapter.
        config: Its configuration.
        folder: Where to.
        prefix: What names of tensors begin with.
        tensors: What to write in place of the adapter's own tensors, where it is written as another.

    Raises:
        CheckpointError: It could not be written; what the folder held before is unchanged.
        ConfigError: The configuration has no form in JSON; as above.
    """
    given = adapter_tensors(root, name, prefix) if tensors is None else tensors
    _warn_if_resized(root, config)
    write(given, config, folder, fingerprint(root, name), quantised=_is_quantised(_keyed_wrappers(root, name)))


def write(
    given: Mapping[str, Tensor], config: PeftConfig, folder: Path, base: Mapping[str, Any], quantised: bool = False
) -> None:
    """Writes an adapter's two files.

    Args:
        given: Tensors by their names in a file.
        config: The configuration.
        folder: Where to.
        base: The fingerprint of the base model; empty where that is not known.
        quantised: Whether it is that of quantised weights, which are near to those of the base model and not equal.

    Raises:
        CheckpointError: They could not be written; what the folder held before is unchanged.
        ConfigError: The configuration has no form in JSON; as above.
    """
    text = config.to_text()
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in given.items()}
    seen: set[int] = set()
    for key, tensor in tensors.items():  # tied copies share memory, which the format does not allow
        if tensor.data_ptr() in seen:
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    own = {"sha256": checksum(tensors, base), "base": base} | ({"quantised": True} if quantised else {})
    # The configuration comes last: a folder with one is a folder with an adapter.
    files.write_together(
        {
            folder / WEIGHTS_NAME: lambda path: fill_tensors(path, tensors, own),
            folder / CONFIG_NAME: lambda path: files.fill_text(path, text),
        }
    )


def fill_tensors(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """Writes a safetensors file with a header of ours, as `read_file` gives it back.

    Raises:
        OSError: It could not be written.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", HEADER: json.dumps(own)})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def _warn_if_resized(root: nn.Module, config: PeftConfig) -> None:
    """Says so where the base has other embeddings than the one that the adapter names: they are in neither file."""
    source = config.base_model_name_or_path
    model_config: Any = getattr(root, "config", None)
    if source is None or not hasattr(model_config, "get_text_config") or getattr(config, "modules_to_save", None):
        return
    path: Any = Path(source) / "config.json"
    if not path.is_file():
        path = try_to_load_from_cache(source, "config.json") if "/" in source and not Path(source).exists() else None
    if not isinstance(path, str | Path):
        return
    named = type(model_config).from_pretrained(str(Path(path).parent)).get_text_config().vocab_size
    now = model_config.get_text_config().vocab_size
    if named != now:
        warnings.warn(
            f"The base model has {now} embeddings, {source} has {named}: the new ones are saved with neither. Resize "
            "the base in the same way before loading, and name the embeddings in modules_to_save to train them.",
            VeneerWarning,
            stacklevel=4,
        )


def read(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    safe: str = WEIGHTS_NAME,
    pickled: str = PICKLE_NAME,
    **hub: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of an adapter in a folder or on the hub.

    Args:
        source: A folder or a hub id.
        allow_pickle: Also read a pickle, of older adapters.
        safe: Name of the safetensors file.
        pickled: Name of the pickle.
        hub: As in `files.find`.

    Raises:
        CheckpointError: The file is missing, truncated or corrupted.
    """
    path = files.find(source, safe, required=False, **hub)
    if not path.is_file():
        older = files.find(source, pickled, required=False, **hub)
        if not older.is_file():
            raise CheckpointError(f"{path.parent} has no {safe}. Name the folder that an adapter was saved to.")
        return read_file(older, allow_pickle=allow_pickle)
    return read_file(path)


def read_file(path: Path, *, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of one file; all but safetensors are pickles.

    Raises:
        CheckpointError: The file is truncated or corrupted, or a pickle that may not be read.
    """
    if path.suffix != ".safetensors":
        if not allow_pickle:
            raise CheckpointError(
                f"{path} is a pickle, and loading one can run code. If you trust where it comes from, pass "
                "allow_pickle=True, and save the adapter again to get a safetensors file."
            )
        return _read_pickle(path), {}
    try:
        # At once: with hundreds of small tensors, asking the file for each takes longer than all the rest.
        data = path.read_bytes()
        tensors = load(data)
        own = _metadata(data).get(HEADER)
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or no safetensors file ({error}). Copy or save the adapter again."
        ) from error
    if own is None:  # not written by Veneer
        return tensors, {}
    try:
        header: dict[str, Any] = json.loads(own)
        intact = header["sha256"] == checksum(tensors, header["base"])
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(
            f"{path} is corrupted: its contents do not have the checksum that was saved with them. Copy or save the "
            "adapter again."
        )
    return tensors, header


def _metadata(data: bytes) -> dict[str, str]:
    """The free-text part of a safetensors file's header: eight bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated, or holds more than tensors ({first}). "
            "Copy or save the adapter again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} holds no dictionary of tensors. Save the adapter again.")
    return tensors


def checksum(tensors: Mapping[str, Tensor], base: Mapping[str, Any]) -> str:
    """SHA-256 over the fingerprint of the base model and over names, shapes, types and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(base, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# The fingerprint of a base model: a few numbers out of every adapted weight. Rounding to a 16-bit type moves them by
# less than a percent, quantising to 4 bits by 10% of their length and seldom by a third, another model by far more (two
# models that have nothing in common differ by 140%).
SAMPLES = 4
TOLERANCE = 0.02
QUANTISED_TOLERANCE = 0.5


def fingerprint(root: nn.Module, name: str) -> dict[str, list[float]]:
    """Some numbers of each adapted weight of the base model, by path."""
    # What is trained as a whole is in the file itself; a new head of the base is different in every process.
    keyed = [entry for entry in _keyed_wrappers(root, name) if not isinstance(entry[2], TrainedCopy)]
    return samples({key: site for key, wrapper, _ in keyed if (site := _known_weight(wrapper)) is not None})


def check_base(root: nn.Module, name: str, header: Mapping[str, Any], where: str) -> None:
    """Refuses an adapter that was trained on other weights than these.

    Raises:
        BaseMismatchError: So.
    """
    keyed = [entry for entry in _keyed_wrappers(root, name) if entry[0] in (header.get("base") or {})]
    quantised = _is_quantised(keyed)
    sites = {key: site for key, wrapper, _ in keyed if (site := _known_weight(wrapper)) is not None}
    check_weights(header, sites, where, quantised, f"this {type(root).__name__}")


def check_weights(
    header: Mapping[str, Any], sites: Mapping[str, Site], where: str, quantised: bool = False, whose: str = "this model"
) -> None:
    """Refuses an adapter file that was trained on other weights than those of these layers.

    Args:
        header: That of the file.
        sites: The layers, by their names in files; those that the file does not know are passed over.
        where: The file.
        quantised: Whether the weights are quantised.
        whose: What has the weights, for the message.

    Raises:
        BaseMismatchError: So.
    """
    saved = header.get("base") or {}
    own = {key: site for key, site in sites.items() if key in saved}
    if not own:
        return
    difference = distance(own, saved)
    if difference > (QUANTISED_TOLERANCE if header.get("quantised") or quantised else TOLERANCE):
        raise BaseMismatchError(
            f"{where} was trained on another base model: the weights it adapts differ by {difference:.0%} "
            f"from those of {whose}. Load the base that the adapter names "
            "(base_model_name_or_path), or pass check_base=False if you mean it."
        )


def _is_quantised(keyed: Iterable[tuple[str, Adapted, Adapter]]) -> bool:
    """Whether the base model keeps an adapted weight quantised."""
    return any((site := _known_weight(wrapper)) is not None and site.store.quantised for _, wrapper, _ in keyed)


def _known_weight(wrapper: Adapted) -> Site | None:
    """The adapted weight; of a module that is no matrix, the first one in it."""
    if wrapper.site is not None:
        return wrapper.site
    inner = (module for _, module in walk(wrapper.frozen_layer))
    return next((site for module in inner if (site := site_of(module)) is not None), None)


def distance(sites: Mapping[str, Site], saved: Mapping[str, list[float]]) -> float:
    """How far frozen weights are from those of a fingerprint, relative to its length.

    Args:
        sites: The weights, by their key in the fingerprint.
        saved: The fingerprint.
    """
    # Where a number is not finite, nothing can be compared but that it is so on both sides.
    now = torch.cat([_sample(site) for site in sites.values()]).nan_to_num(0, 0, 0)
    then = torch.tensor([value for key in sites for value in saved[key]]).nan_to_num(0, 0, 0)
    if now.shape != then.shape:
        return float("inf")
    return float((now - then).norm() / then.norm().clamp_min(1e-12))


def samples(sites: Mapping[str, Site]) -> dict[str, list[float]]:
    """Some numbers of each frozen weight: its part of a fingerprint."""
    return {key: [float(f"{value:.6g}") for value in _sample(site).tolist()] for key, site in sites.items()}


def _sample(site: Site) -> Tensor:
    """Evenly spread elements of the frozen weight."""
    weight = site.store.read(site.module, site.name).reshape(-1)
    return weight[:: max(1, weight.numel() // SAMPLES)][:SAMPLES].float().cpu()


def _keyed_wrappers(root: nn.Module, name: str) -> list[tuple[str, Adapted, Adapter]]:
    """File key, wrapper and adapter of every place.

    In files, bare parameters of one module are nested, the one that the module registers last outermost: in `peft`
    that is how its wrappers lie.
    """
    found = list(adapters_of(root, name))
    bare: dict[str, list[str]] = {}  # module -> its adapted parameters
    for wrapper, _ in found:
        if isinstance(wrapper.site, ParameterSite):
            owner, leaf = _owner(wrapper.path, wrapper.site)
            bare.setdefault(owner, []).append(leaf)
    keyed: list[tuple[str, Adapted, Adapter]] = []
    for wrapper, adapter in found:
        key = wrapper.path
        if isinstance(wrapper.site, ParameterSite):
            key, leaf = _owner(wrapper.path, wrapper.site)
            registered = frozen(wrapper).get_submodule(wrapper.site.parameter.rpartition(".")[0])._parameters
            key += ".base_layer" * [name for name in reversed(registered) if name in bare[key]].index(leaf)
        keyed.append((key, wrapper, adapter))
    return keyed


def _owner(path: str, site: ParameterSite) -> tuple[str, str]:
    """Path of the module that holds a bare parameter, and the parameter's name in it."""
    owner, _, leaf = f"{path}.{site.parameter}".rpartition(".")
    return owner, leaf


def _keyed(root: nn.Module, name: str) -> list[tuple[str, Adapter]]:
    return [(key, adapter) for key, _, adapter in _keyed_wrappers(root, name)]


def _shared(keyed: Iterable[tuple[str, Adapter]]) -> Shared | None:
    """What the places of an adapter have in common."""
    return next((adapter.shared for _, adapter in keyed if hasattr(adapter, "shared")), None)


def _prefix(prefix: str, keyed: Iterable[tuple[str, Adapter]]) -> str:
    """What names begin with: `peft` does not wrap the model for methods whose tensors stand above it."""
    shared = _shared(keyed)
    return prefix if shared is None or shared.above is None else prefix.removesuffix("model.")


def _above(prefix: str, shared: Shared) -> str:
    """What the names of shared tensors begin with: in `peft` they lie beside the model."""
    return prefix.removesuffix("model.") if shared.above is None else shared.above


def _with_bias(keyed: Iterable[tuple[str, Adapter]]) -> list[tuple[str, Adapter]]:
    """Adapters that train their layer's bias, by the bias's name in files, where it stands whole as in `peft`."""
    return [
        (f"{key}.bias" if isinstance(adapter, BiasOnly) else f"{key}.base_layer.bias", adapter)
        for key, adapter in keyed
        if adapter.bias_delta is not None
    ]


def _base_bias(adapter: Adapter) -> Tensor:
    assert adapter.site is not None
    bias = adapter.site.bias()
    assert bias is not None
    return bias


def _base_tensors(root: nn.Module, given: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The embeddings of the base model that a file brings along; peft saves them whole when they were resized."""
    found: dict[str, nn.Parameter] = {}
    if not given:
        return found
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(root, getter, lambda: None)()
        except NotImplementedError:  # vision models have none
            continue
        for path, other in walk(root):
            if module is not None and other is frozen(module):
                for key in (f"{path}.weight", f"{path}.base_layer.weight"):
                    if key in given and given[key].shape == other.weight.shape:
                        found[key] = other.weight  # type: ignore[assignment]
    return found
