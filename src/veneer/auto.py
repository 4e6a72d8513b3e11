"""Base model and adapter in one call, from the adapter's folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from veneer.config import PeftConfig, TaskType
from veneer.errors import ConfigError
from veneer.model import PeftModel

_AUTO_CLASS = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


class AutoPeftModel:
    """Loads the base model that an adapter names, and the adapter on it."""

    task: ClassVar[TaskType | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **base: Any,
    ) -> PeftModel:
        """The adapted model.

        Args:
            pretrained_model_name_or_path: Folder or hub id of the adapter.
            adapter_name: Name to load it under.
            is_trainable: Leave it trainable.
            config: Use this configuration instead of the saved one.
            revision: Revision of the adapter on the hub.
            base: Passed on to the `from_pretrained` of the base model, for example `dtype` or `num_labels`.

        Raises:
            ConfigError: The adapter does not say what its base model or task is, or is for another task.
            CheckpointError: As in `PeftModel.from_pretrained`.
        """
        import transformers

        hub: dict[str, Any] = {} if revision is None else {"revision": revision}
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if cls.task is not None and config.task_type not in (None, cls.task):
            raise ConfigError(
                f"The adapter {pretrained_model_name_or_path} is for task_type={str(config.task_type)!r}; "
                f"{cls.__name__} loads {str(cls.task)!r}. Use AutoPeftModel, which reads the task from the adapter."
            )
        task = cls.task or config.task_type
        if config.base_model_name_or_path is None or task is None:
            missing = "task_type" if task is None else "base_model_name_or_path"
            raise ConfigError(
                f"The adapter {pretrained_model_name_or_path} does not say its {missing}. Load the base model yourself "
                "and call PeftModel.from_pretrained(model, folder)."
            )
        auto = getattr(transformers, _AUTO_CLASS[TaskType(task)])
        model = auto.from_pretrained(config.base_model_name_or_path, revision=config.revision or "main", **base)
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, config=config, **hub
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    task = TaskType.CAUSAL_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task = TaskType.SEQ_CLS


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task = TaskType.FEATURE_EXTRACTION
