"""Veneer: parameter-efficient fine-tuning on one small engine.

Names are imported when they are first used, so that `import veneer` costs little.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_CONFIG = ["PeftConfig", "get_peft_config", "TaskType", "parse_method", "register", "method_names"]
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
    **dict.fromkeys(_MODEL, "veneer.model"),
    **dict.fromkeys(_FUNCTIONAL, "veneer.functional"),
    **dict.fromkeys(_AUTO, "veneer.auto"),
    "Adapter": "veneer.adapter",
    "WeightAdapter": "veneer.adapter",
    "BitFitConfig": "veneer.methods.bitfit",
    "BottleneckConfig": "veneer.methods.bottleneck",
    "LoraConfig": "veneer.methods.lora",
    "PeftType": "veneer.config",
    "Trainer": "veneer.training.trainer",
    "get_layer_status": "veneer.status",
    "get_model_status": "veneer.status",
    "prepare": "veneer.preparation",
}

__all__ = ["__version__", *_HOME]  # names of the table above


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
