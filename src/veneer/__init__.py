"""Veneer: parameter-efficient fine-tuning on one small engine.

Names are imported when they are first used, so that `import veneer` costs little.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__version__ = "0.1.0"

_CONFIG = ["PeftConfig", "get_peft_config", "TaskType"]
_REGISTRY = ["PeftType", "method_names", "register"]
_MODEL = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "get_peft_model",
]
_FUNCTIONAL = [
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "set_peft_model_state_dict",
]
_AUTO = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

_HOME = {
    **dict.fromkeys(_CONFIG, "veneer.config"),
    **dict.fromkeys(_REGISTRY, "veneer.registry"),
    **dict.fromkeys(_MODEL, "veneer.model"),
    **dict.fromkeys(_FUNCTIONAL, "veneer.functional"),
    **dict.fromkeys(_AUTO, "veneer.auto"),
    "Adapter": "veneer.adapter",
    "WeightAdapter": "veneer.adapter",
    "LoraConfig": "veneer.methods.lora",
    "MultitaskPromptTuningInit": "veneer.methods.multitask_prompt_tuning",
    "PromptEncoderReparameterizationType": "veneer.methods.p_tuning",
    "PromptTuningInit": "veneer.methods.prompt_tuning",
    "keep_freed_memory": "veneer.allocation",
    "packed_rows": "veneer.training.packing",
    "recomputed_activations": "veneer.training.recompute",
    "parse_method": "veneer.method_strings",
    "Trainer": "veneer.training.trainer",
    "get_layer_status": "veneer.status",
    "get_model_status": "veneer.status",
    "prepare": "veneer.preparation",
    "prepare_model_for_kbit_training": "veneer.quantised_bases",
    "quantize": "veneer.quantization",
    "CordaConfig": "veneer.inits.corda",
    "EvaConfig": "veneer.inits.eva",
    "LoftQConfig": "veneer.inits.loftq",
    "LoraGAConfig": "veneer.inits.lora_ga",
    "compose_cartridge_adapters": "veneer.prompting.contexts",
    "convert_to_lora": "veneer.combine.convert",
    "create_arrow_model": "veneer.combine.route",
    "ensemble": "veneer.combine.ensemble",
    "ensemble_generate": "veneer.combine.ensemble",
    "fuse": "veneer.combine.fuse",
    "save_as_lora": "veneer.combine.convert",
    "get_eva_state_dict": "veneer.starting",
    "initialize_kv_prefix_from_past_key_values": "veneer.prompting.contexts",
    "initialize_kv_prefix_from_text": "veneer.prompting.contexts",
    "initialize_lora_eva_weights": "veneer.starting",
    "preprocess_corda": "veneer.starting",
    "preprocess_loraga": "veneer.starting",
    "replace_lora_weights_loftq": "veneer.starting",
}

__all__ = ["__version__", *_HOME]  # names of the table above


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name.endswith("Config") and (found := _configuration(name)) is not None:
        value = found
    else:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    globals()[name] = value
    return value


def _configuration(name: str) -> Any:
    """The configuration class of that name in the file of a method or of starting values."""
    from veneer import inits, methods

    for package in (methods, inits):
        for entry in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{entry.name}")
            if name in vars(module):
                return vars(module)[name]
    return None


def __dir__() -> list[str]:
    return sorted(__all__)
