"""The base model and its tokenizer, loaded as the run's options say."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from veneer import gguf_files, machine, quantised_bases
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, VeneerWarning
from veneer.model import PeftModel
from veneer.options import ModelOptions, Task
from veneer.prompting.positions import positions_in
from veneer.samples import resolve_model
from veneer.trained_copy import TrainedCopy


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with something to pad with.

    Raises:
        ConfigError: There is none under that name.
    """
    name, file = gguf_files.source(resolve_model(options.name), options.gguf_file)
    with _said_by_us(options, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=options.revision, trust_remote_code=options.trust_remote_code, **file
        )
        if file:
            path = cached_file(name, file["gguf_file"], revision=options.revision)
            gguf_files.mend_tokenizer(tokenizer, Path(str(path)))
    if tokenizer.pad_token is None:
        # GPT-2, Llama and others have none. Padding has no label and is not attended to, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_config(options: ModelOptions) -> Any:
    """The model's configuration.

    Raises:
        ConfigError: There is none under that name.
    """
    name, file = gguf_files.source(resolve_model(options.name), options.gguf_file)
    with _said_by_us(options, "configuration"):
        config = AutoConfig.from_pretrained(
            name, revision=options.revision, trust_remote_code=options.trust_remote_code, **file
        )
    if file and hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights are dequantised in loading
    return config


def load_model(
    options: ModelOptions, task: Task, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] = ()
) -> tuple[PreTrainedModel, list[str]]:
    """The base model for the task.

    Args:
        options: The model section.
        task: Decides the class of the model.
        tokenizer: Its tokenizer.
        labels: Class names, in the order of the logits.

    Returns:
        The model, and the names of weights that were not in its files and are random: a classifier's new head.

    Raises:
        ConfigError: There is no such model, or its settings contradict each other.
    """
    if options.max_memory is not None and options.device_map is None:
        raise ConfigError('model.max_memory only has a meaning with model.device_map. Set it, for example to "auto".')
    afterwards = options.quantize is not None and quantised_bases.FORMS[options.quantize].settings is None
    if afterwards and options.device_map is not None:
        raise ConfigError(
            f"model.quantize is {options.quantize!r} and model.device_map {options.device_map!r}: layers that are "
            "quantised after loading would leave the devices that they were loaded to. Remove one of the two."
        )
    settings: dict[str, Any] = {
        "revision": options.revision,
        "dtype": options.dtype if options.dtype != "measured" else machine.choose(load_config(options)).dtype,
        "device_map": options.device_map,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.max_memory is not None:
        # Devices are numbers to accelerate, but keys of a YAML mapping or of a flag are often text.
        settings["max_memory"] = {int(k) if str(k).isdigit() else k: v for k, v in options.max_memory.items()}
    if options.attn_implementation is not None:
        settings["attn_implementation"] = options.attn_implementation
    kind: Any = AutoModelForCausalLM
    if task == "classification":
        kind = AutoModelForSequenceClassification
        settings |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            # A head for other classes in the model's files gives way to a new one.
            "ignore_mismatched_sizes": True,
        }
    name, file = gguf_files.source(resolve_model(options.name), options.gguf_file)
    if options.quantize is not None:
        if file and not afterwards:
            raise ConfigError(
                f"model.quantize is {options.quantize!r}, which transformers makes while reading a model, but not from "
                "a GGUF file. Choose int8, hqq-8 or hqq-4, or name the model in full precision."
            )
        settings |= quantised_bases.loading_settings(
            options.quantize, settings["dtype"], task == "classification", load_config(options)
        )
    with _said_by_us(options, "model"):
        model, found = kind.from_pretrained(name, output_loading_info=True, **file, **settings)
    if file:
        gguf_files.mend_config(model)
    quantised_bases.convert(model, options.quantize)
    new = sorted({*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])})
    if task == "classification":
        model.config.problem_type = "single_label_classification"
        # Decoders read the class off the last token that is not padding: it must be what batches are padded with.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"model.name: the tokenizer of {options.name!r} has {len(tokenizer)} tokens, but the model embeds {rows}. "
            "Tokens were added to one and not to the other; resize the model's embeddings and save it again."
        )
    return model, new


def warn_untrained(new: Sequence[str], model: PeftModel, name: str) -> None:
    """Warns about weights that are neither in the model's files nor trained: they would stay random.

    Args:
        new: Names from `load_model`.
        model: The adapted model, some of whose modules are trained whole.
        name: The base model.
    """
    adapters = adapters_of(model.get_base_model(), model.active_adapter)
    copied = tuple(f"{wrapper.path}." for wrapper, adapter in adapters if isinstance(adapter, TrainedCopy))
    left = [key for key in new if not key.startswith(copied)]
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        warnings.warn(
            f"model.name: the files of {name!r} lack {len(left)} weights that are not trained either: {shown}. They "
            "stay random, and another random when the adapter is loaded. Train them (method modules_to_save), or "
            "start from a model that has them.",
            VeneerWarning,
            stacklevel=2,
        )


def room(model: PeftModel) -> int | None:
    """How many tokens a text may have beside what the active adapters add; none where the model does not say."""
    most = positions_in(model.get_base_model())
    return None if most is None else most - sum(model.added())


def check_room(model: PeftModel, *parts: Any) -> None:
    """Refuses examples that are too long for the model with what the active adapters add.

    Args:
        model: The adapted model.
        parts: Data sets; none is passed over.

    Raises:
        ConfigError: So.
    """
    longest = max((len(ids) for part in parts if part is not None for ids in part["input_ids"]), default=0)
    added, most = sum(model.added()), room(model)
    if added and most is not None and longest > most:
        raise ConfigError(
            f"data.max_length: the longest example has {longest} tokens, the method adds {added}, and "
            f"{type(model.get_base_model()).__name__} has positions for {most + added}. "
            + (f"Set data.max_length to {most} or less." if most > 0 else "Set fewer num_virtual_tokens.")
        )


@contextmanager
def _said_by_us(options: ModelOptions, what: str) -> Iterator[None]:
    """Keeps transformers from printing what Veneer says in its own words, and names the setting in errors."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"model.name: the {what} of {options.name!r} could not be loaded: {error} Expected a folder, the name of "
            "a sample model (`veneer samples` lists them) or a hub id."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
