"""Starting values from data under the names of `peft`; `preparation.prepare` does the same for any method."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer import files, inits
from veneer.checkpoint import PREFIX
from veneer.errors import CheckpointError, ConfigError, StateError, UnsupportedError, VeneerWarning
from veneer.inits import corda, eva, lora_ga
from veneer.inits.start import balanced, wide
from veneer.methods.lora import Lora
from veneer.model import PeftModel, get_peft_model
from veneer.preparation import Run, places_of, settle


def labelled_positions(model_input: Any, peft_config: Any) -> Tensor | None:
    """Positions that are not padding and, with `use_label_mask`, carry a label; none where the input tells of none."""
    if not isinstance(model_input, Mapping) or not isinstance(model_input.get("input_ids"), Tensor):
        return None
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    labels = model_input.get("labels")
    if peft_config.eva_config.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != peft_config.eva_config.label_mask_value)
    return mask


def positions(layer_input: Tensor, model_input: Tensor | None, layer_name: str) -> Tensor:
    """The rows of a layer's input at these positions; all rows where the input is not one of positions."""
    if model_input is None or layer_input.shape[:-1] != model_input.shape:
        return layer_input.flatten(0, -2)
    return layer_input[model_input]


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = labelled_positions,
    prepare_layer_inputs_fn: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = positions,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The directions that EVA starts from, by name of the layer.

    Args:
        model: A model with LoRA adapters, or a plain one; adapters have no part in it, and nothing is changed.
        dataloader: Batches; gone through as often as it takes.
        peft_config: The configuration; of an adapted model, that of its adapter if none.
        forward_fn: How the model is called with a batch.
        prepare_model_inputs_fn: Makes of batch and configuration what `prepare_layer_inputs_fn` gets; none hands on the
            batch.
        prepare_layer_inputs_fn: Makes of a layer's input, of that and of the layer's name the rows that count, or a
            mapping of such functions by name; none takes all rows.
        adapter_name: The adapter, of an adapted model.
        gather_distributed_inputs: With several processes: they see different batches.
        show_progress_bar: Kept for `peft`; nothing is drawn.

    Raises:
        UnsupportedError: Several processes are to see different batches.
        ConfigError: There is no configuration, or a name is that of no layer.
        StateError: As `inits.eva.directions`.
    """
    if gather_distributed_inputs and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UnsupportedError(
            "gather_distributed_inputs=True: inputs are not gathered from other processes. Give every process the same "
            "batches and pass gather_distributed_inputs=False."
        )
    how = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    if isinstance(model, PeftModel):
        config = peft_config or model.peft_config[adapter_name]
        return _directions(model, dataloader, config, *how, name=adapter_name, prefix=PREFIX)
    if peft_config is None:
        raise ConfigError("get_eva_state_dict: a model without adapters needs a peft_config.")
    with _for_a_while(model, replace(peft_config, init_lora_weights="eva")) as adapted:
        return _directions(adapted, dataloader, adapted.peft_config["default"], *how, name="default", prefix="")


def _directions(
    model: PeftModel,
    batches: Iterable[Any],
    config: Any,
    call: Callable[[nn.Module, Any], Any] | None,
    of_model: Callable[[Any, Any], Any] | None,
    of_layer: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None,
    *,
    name: str,
    prefix: str,
) -> dict[str, Tensor]:
    places = {
        path: wrapper
        for path, wrapper in places_of(model, name).items()
        if wrapper.site is not None and wrapper.site.kind == "linear"
    }
    if isinstance(of_layer, Mapping):
        for key in of_layer:
            if key.removeprefix(prefix) not in places:
                raise ConfigError(f"prepare_layer_inputs_fn: {key!r} is no adapted linear layer of this model.")
    run = Run(model, places, batches, call=call)

    def select(path: str, x: Tensor) -> Tensor:
        own = of_layer.get(prefix + path) if isinstance(of_layer, Mapping) else of_layer
        if own is None:
            return x.flatten(0, -2)
        return own(x, run.batch if of_model is None else of_model(run.batch, config), prefix + path)

    ranks = {path: config.at(path).r for path in places}
    found = eva.directions(ranks, config.eva_config, run, select)
    return {prefix + path: rows for path, rows in found.items()}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = labelled_positions,
    prepare_layer_inputs_fn: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = positions,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Starts an adapter with `init_lora_weights="eva"`; arguments and errors as in `get_eva_state_dict`.

    Args:
        model: The adapted model.
        dataloader: Batches, unless `eva_state_dict` is given.
        eva_state_dict: What `get_eva_state_dict` gave.
        forward_fn: As there.
        prepare_model_inputs_fn: As there.
        prepare_layer_inputs_fn: As there.
        adapter_name: The adapter.
        gather_distributed_inputs: As there.
        show_progress_bar: As there.

    Raises:
        StateError: The model has no adapter that starts so, or neither batches nor directions were given.
    """
    if not isinstance(model, PeftModel) or adapter_name not in model.peft_config:
        raise StateError(f"initialize_lora_eva_weights: the model has no adapter {adapter_name!r}.")
    config: Any = model.peft_config[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise StateError("initialize_lora_eva_weights: the adapter's configuration must say init_lora_weights='eva'.")
    if eva_state_dict is None:
        if dataloader is None:
            raise StateError("initialize_lora_eva_weights: give a dataloader or an eva_state_dict.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    found = {key.removeprefix(PREFIX): rows for key, rows in eva_state_dict.items()}
    adapters: dict[str, Any] = {path: w.adapters[adapter_name] for path, w in places_of(model, adapter_name).items()}
    if missing := sorted(adapters.keys() - found.keys()):
        warnings.warn(
            f"No directions were found for {', '.join(missing[:4])}: they start by default.",
            VeneerWarning,
            stacklevel=2,
        )
    settle(model, adapter_name, adapters, eva.start(adapters, config, found))


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Lets a model see data before adapters with `init_lora_weights="corda"` are put on it.

    Args:
        model: The plain model; `get_peft_model` finds what was seen.
        lora_config: The configuration that the adapters will have.
        run_model: Runs the model on the data; not needed if the configuration names files that are there.
        hooked_model: What `run_model` runs, where that is another model of the same layers.

    Raises:
        StateError: There is nothing to run, or a layer saw no input.
        ConfigError: A place is no linear layer.
    """
    _check(lora_config, "corda")
    running = model if hooked_model is None else hooked_model
    with _for_a_while(running, lora_config) as adapted:
        places = places_of(adapted, "default")
        run = Run(adapted, places, [{}], call=lambda _, __: _must(run_model)())
        config = adapted.peft_config["default"]
        seen = dict(corda.observe({path: w.adapters["default"] for path, w in places.items()}, config, run))
    _foresee(model, "corda", seen)


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Lets a model see gradients before adapters with `init_lora_weights="lora_ga"` are put on it.

    Args:
        model: The plain model; `get_peft_model` finds what was seen.
        lora_config: The configuration that the adapters will have.
        train_step: Runs the model forward and backward, once or several times. In evaluation mode; large models may
            need it several times over.
        cache_file: A safetensors file with what was seen: read if it is there, otherwise written.

    Raises:
        StateError: A weight takes no part in the loss.
    """
    _check(lora_config, "lora_ga")
    cache = None if cache_file is None else Path(cache_file)
    if cache is not None and cache.is_file():
        seen: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(cache).items():
            path, _, part = key.rpartition(".")
            seen.setdefault(path, {})[part] = tensor
    else:
        with _for_a_while(model, lora_config) as adapted:
            places = places_of(adapted, "default")
            adapters = {path: wrapper.adapters["default"] for path, wrapper in places.items()}
            seen = dict(lora_ga.observe(adapters, lora_config, _Stepping(adapted, places, train_step)))
        if cache is not None:
            parts = {f"{path}.{k}": v.contiguous().cpu() for path, own in seen.items() for k, v in own.items()}
            files.write_together({cache: lambda partial: save_file(parts, partial)})
    _foresee(model, "lora_ga", seen)


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Starts a LoRA adapter on a quantised base as what quantising lost, by the weights from before.

    Of every adapted layer whose weights differ from those in the file, the factors become the best approximation of the
    difference.

    Args:
        peft_model: The quantised model with the adapter.
        model_path: The model before quantising: its `model.safetensors`, or a folder with it or with several and their
            index. None takes the folder that the model was loaded from.
        adapter_name: The adapter.
        callback: Called with the model and the name of each layer after its turn; False takes that back.

    Raises:
        CheckpointError: There is no such file, or a layer's weight is not in it.
        StateError: No weight differs.
    """
    base: Any = peft_model.get_base_model()
    if model_path is None:
        model_path = getattr(getattr(base, "config", None), "name_or_path", "")
        if not model_path or not Path(model_path).is_dir():
            raise CheckpointError(f"The model comes from no folder here ({model_path!r}). Name it in model_path.")
    weights = Weights(Path(model_path), getattr(base, "base_model_prefix", ""))
    done = False
    for path, wrapper in places_of(peft_model, adapter_name).items():
        site, adapter = wrapper.site, wrapper.adapters[adapter_name]
        if not isinstance(adapter, Lora) or site is None or site.kind != "linear":
            continue
        held = wide(site.read())
        lost = wide(site.view(weights.read(f"{path}.weight"))).to(held.device) - held
        if not bool(lost.any()):
            continue
        done = True
        before = adapter.down.detach().clone(), adapter.up.detach().clone()
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        rank = adapter.down.shape[-2]
        down, up = balanced(u[:, :rank], s[:rank], vh[:rank], adapter.scaling)
        adapter.down.copy_(down)
        adapter.up.copy_(up)
        if callback is not None and not callback(peft_model, path):
            adapter.down.copy_(before[0])
            adapter.up.copy_(before[1])
    if not done:
        raise StateError("No adapted weight differs from those in the file: the model is not quantised.")


class Weights:
    """Single tensors out of a model's safetensors files."""

    def __init__(self, path: Path, inner: str) -> None:
        folder = path if path.is_dir() else path.parent
        index = folder / "model.safetensors.index.json"
        self.inner = f"{inner}."
        self.files: dict[str, Path] = {}
        if path.is_dir() and index.is_file():
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: folder / file for name, file in table.items()}
            return
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(f"{path} has no model.safetensors. Name the folder of the model before quantising.")
        with safe_open(file, framework="pt") as opened:
            self.files = dict.fromkeys(opened.keys(), file)

    def read(self, name: str) -> Tensor:
        found = next((n for n in (name, name.removeprefix(self.inner), self.inner + name) if n in self.files), None)
        if found is None:
            raise CheckpointError(f"The model's files have no {name}: they are those of another model.")
        with safe_open(self.files[found], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(found)
            return tensor


class _Stepping(Run):
    """Shows gradients of the caller's own backward passes."""

    def __init__(self, model: PeftModel, places: Mapping[str, Any], step: Callable[[], Any]) -> None:
        super().__init__(model, places, [])
        self.step = step

    def gradients(self, see: Any, *, paths: Iterable[str] | None = None, **how: Any) -> int:
        with self.showing(self.slopes(see, paths)), torch.enable_grad():
            self.step()
        return 1


def _check(config: Any, name: str) -> None:
    if getattr(config, "init_lora_weights", None) != name:
        raise ConfigError(f"The configuration must say init_lora_weights={name!r} to start so.")


def _must(run_model: Callable[[], Any] | None) -> Callable[[], Any]:
    if run_model is None:
        raise StateError("preprocess_corda: run_model is needed: neither cache_file nor covariance_file is there.")
    return run_model


def _foresee(model: nn.Module, name: str, seen: Mapping[str, Mapping[str, Tensor]]) -> None:
    modules = dict(model.named_modules())
    for path, own in seen.items():
        if path in modules:
            inits.foresee(modules[path], name, own)


@contextmanager
def _for_a_while(model: nn.Module, config: Any) -> Iterator[PeftModel]:
    """The model with adapters, and afterwards as it was."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng():  # what the adapters would start from is not used
        adapted = get_peft_model(model, config)
    try:
        yield adapted
    finally:
        adapted.unload()
        for parameter in asking:
            parameter.requires_grad_(True)
