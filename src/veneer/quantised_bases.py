"""Base models that are kept in fewer bits: the names of the forms, how each is made, and how to leave it again.

Forms of bitsandbytes and torchao are made by transformers while it reads the weights, so that the whole model is never
in memory; the others are made layer by layer of a model that has been loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer import quantization
from veneer.adapted import Adapted
from veneer.errors import ConfigError
from veneer.sites import site_of
from veneer.stores import int8_kernels, quantised_store
from veneer.stores.int8 import Int8Linear
from veneer.targets import HEADS, walk


@dataclass(frozen=True)
class Form:
    """One form.

    Args:
        package: What makes it and has to be installed; also the name of the extra. None for Veneer's own.
        settings: Makes transformers' configuration of the quantisation from the type to compute in and the modules to
            leave out (none for transformers' choice). None where it has no part in it.
        layer: Makes a layer of one that was loaded: of a plain linear one, or with `settings` of a quantised one.
    """

    package: str | None = None
    settings: Callable[[torch.dtype, list[str] | None], Any] | None = None
    layer: Callable[[Any], nn.Module] | None = None


def _bits_and_bytes(**chosen: Any) -> Callable[[torch.dtype, list[str] | None], Any]:
    def settings(dtype: torch.dtype, skip: list[str] | None) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**chosen, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skip)

    return settings


def _four_bits(kind: str) -> Callable[[torch.dtype, list[str] | None], Any]:
    return _bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)


def _torchao(bits: int) -> Callable[[torch.dtype, list[str] | None], Any]:
    def settings(dtype: torch.dtype, skip: list[str] | None) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup
        from transformers import TorchAoConfig

        # torchao's packed int4 gives no gradient to the layer's input; this form keeps each code in a byte and does.
        int4 = torch.int4  # type: ignore[attr-defined]
        four = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32))
        return TorchAoConfig(four if bits == 4 else Int8WeightOnlyConfig(), modules_to_not_convert=skip)

    return settings


def _hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def layer(linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        group = next(size for size in (64, 32, 16, 8, None) if size is None or linear.in_features % size == 0)
        return HQQLinear(
            linear.requires_grad_(False),
            BaseQuantizeConfig(nbits=bits, group_size=group),
            compute_dtype=linear.weight.dtype,
            device=str(linear.weight.device),
        )

    return layer


def _nf4_int8(layer: nn.Module) -> nn.Module:
    from veneer.stores.nf4_int8 import Nf4Int8Linear

    return Nf4Int8Linear.from_linear4bit(layer)


FORMS = {
    "int8": Form(),  # `veneer.quantization.quantize`, which looks at real batches
    "nf4": Form("bitsandbytes", _four_bits("nf4")),
    "fp4": Form("bitsandbytes", _four_bits("fp4")),
    "nf4-int8": Form("bitsandbytes", _four_bits("nf4"), _nf4_int8),
    "bnb-int8": Form("bitsandbytes", _bits_and_bytes(load_in_8bit=True)),
    "torchao-int8": Form("torchao", _torchao(8)),
    "torchao-int4": Form("torchao", _torchao(4)),
    "hqq-8": Form("hqq", layer=_hqq(8)),
    "hqq-4": Form("hqq", layer=_hqq(4)),
}
"""By name, as `model.quantize` and `--model.quantize` take it."""


def loading_settings(name: str, dtype: str, classification: bool, config: Any) -> dict[str, Any]:
    """What `from_pretrained` is given for a form; nothing where it is made afterwards.

    Args:
        name: The form.
        dtype: Name of the type that the model computes in; `auto` computes in float32.
        classification: Whether the model gets a new head, which is trained and stays plain.
        config: The model's configuration.

    Raises:
        ConfigError: The package is missing, or the model's files are quantised already.
    """
    form = FORMS[name]
    held = getattr(config, "quantization_config", None)
    if held is not None:
        method = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", held)
        raise ConfigError(
            f"model.quantize is {name!r}, but the files of this model are quantised already ({method}). Remove "
            "model.quantize to load them as they are, or name the model in full precision."
        )
    if form.package is not None and importlib.util.find_spec(form.package) is None:
        raise ConfigError(
            f"model.quantize is {name!r}, which needs {form.package}. Install it: pip install 'veneer[{form.package}]'."
        )
    if form.settings is None:
        return {}
    compute = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return {"quantization_config": form.settings(compute, list(HEADS) if classification else None)}


def convert(model: nn.Module, name: str | None) -> None:
    """Gives a model that was just loaded the form that is made layer by layer; nothing for other forms.

    The output head, heads of classifiers and layers that share their weight with another module stay as they are.
    """
    form = FORMS[name] if name is not None else Form()
    if form.layer is None:
        return
    for path in _convertible(model, plain=form.settings is None):
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        owner._modules[leaf] = form.layer(owner._modules[leaf])


def _convertible(model: nn.Module, plain: bool) -> list[str]:
    """Layers that are converted after loading, of those that are plain or of those that are quantised."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return [
        path
        for path, module in walk(model)
        if (type(module) is nn.Linear if plain else quantised_store(module) is not None)
        and not (module is output or path.partition(".")[0] in HEADS or count[id(module.weight)] > 1)
    ]


def quantised_paths(model: nn.Module, name: str, settings: Any = None) -> list[str]:
    """The layers that a form quantises.

    Args:
        model: A plain model, perhaps on the meta device. Of packages that put their own layers in it before weights are
            read, it has them afterwards.
        name: The form.
        settings: What `loading_settings` gave for it.
    """
    if name == "int8":
        return quantization.quantisable(model)
    if not settings:
        return _convertible(model, plain=True)
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings["quantization_config"], pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    linears = [path for path, module in walk(model) if isinstance(module, nn.Linear)]
    return [path for path in linears if quantizer.param_needs_quantization(model, f"{path}.weight")]


def quantised_layer(name: str, linear: nn.Linear) -> nn.Module:
    """One plain layer as it is in a model of this form; in `int8` without exact columns."""
    form = FORMS[name]
    if name == "int8":
        return Int8Linear.from_linear(linear, bits=int8_kernels.weight_bits())
    layer: nn.Module = linear
    if form.settings is not None:
        settings = form.settings(linear.weight.dtype, None)
        layer = _by_torchao(linear, settings) if form.package == "torchao" else _by_bits_and_bytes(linear, settings)
    return layer if form.layer is None else form.layer(layer)


def _by_torchao(linear: nn.Linear, settings: Any) -> nn.Module:
    from torchao.quantization import quantize_

    holder = nn.Sequential(linear)
    quantize_(holder, settings.quant_type)
    return holder[0]


def _by_bits_and_bytes(linear: nn.Linear, settings: Any) -> nn.Module:
    import bitsandbytes as bnb

    size = (linear.in_features, linear.out_features, linear.bias is not None)
    layer: nn.Module
    if settings.load_in_8bit:
        layer = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=settings.llm_int8_threshold)
    else:
        layer = bnb.nn.Linear4bit(
            *size,
            compute_dtype=settings.bnb_4bit_compute_dtype,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_type=settings.bnb_4bit_quant_type,
        )
    layer.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return layer.requires_grad_(False).to(linear.weight.device)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Readies a quantised model of transformers for adapters, as `peft` does.

    Everything is frozen. Where bitsandbytes or nothing has quantised the model, what it keeps in a 16-bit type (norms,
    embeddings, the head) becomes float32; models of other packages compute in their own type throughout. A quantised
    model gets gradient checkpointing, and its embedded input asks for a gradient, without which the reentrant kind has
    nothing to differentiate.

    Args:
        model: The model; changed in place.
        use_gradient_checkpointing: Recompute activations in the backward pass.
        gradient_checkpointing_kwargs: Of `torch.utils.checkpoint.checkpoint`, such as `{"use_reentrant": False}`.
        auto_clear_cache: Give memory that the 16-bit weights leave back to the accelerator.

    Returns:
        The model.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    stores = {type(store).__name__ for module in model.modules() if (store := quantised_store(module)) is not None}
    if stores <= {"BitsAndBytesStore", "Nf4Int8Store"}:
        held = {id(module.weight) for module in model.modules() if quantised_store(module) is not None}
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in held:
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    if stores and use_gradient_checkpointing:
        how = gradient_checkpointing_kwargs or {}
        if how.get("use_reentrant", True):
            model.enable_input_require_grads()  # type: ignore[operator]
        enable: Any = getattr(model, "activation_checkpointing_enable", None)
        if enable is None:  # transformers before 5.23
            enable = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs)
    return model


def dequantise(root: nn.Module) -> None:
    """Makes every quantised layer of a model, with or without adapters on it, a plain one that holds the same weight.

    Args:
        root: The model; changed in place.
    """
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            store = quantised_store(child)
            if store is None:
                continue
            parent._modules[name] = plain = store.plain(child)
            if isinstance(parent, Adapted):
                parent.site = site_of(plain)
                for adapter in parent.adapters.values():
                    adapter.site = parent.site  # type: ignore[assignment]
    # transformers goes by these where it saves a model.
    for holder, names in (
        (getattr(root, "config", None), ("quantization_config",)),
        (root, ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")),
    ):
        for name in names:
            if name in vars(holder or nn.Module()):
                delattr(holder, name)
