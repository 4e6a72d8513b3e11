"""Base models in GGUF files. transformers dequantises the weights as it reads them: they are plain from there on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError

SUFFIX = ".gguf"


def source(name: str, file: str | None) -> tuple[str, dict[str, str]]:
    """The folder or hub id that a model comes from, and what tells transformers which file of it to read.

    Args:
        name: A folder, a hub id, or a GGUF file.
        file: Name of a GGUF file in the folder or at the hub; none where `name` is one, or where there is none.

    Raises:
        ConfigError: Both name a file, or the package that reads them is missing.
    """
    path = Path(name).expanduser()
    named = path.suffix == SUFFIX and path.is_file()
    if named and file is not None:
        raise ConfigError(f"model.gguf_file is {file!r}, and model.name is a GGUF file itself: {name}. Remove one.")
    if not named and file is None:
        return name, {}
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file or name} needs the package gguf to be read. Install it: pip install 'veneer[gguf]'.")
    return (str(path.parent), {"gguf_file": path.name}) if named else (name, {"gguf_file": str(file)})


def mend_config(model: Any) -> None:
    """Makes a model that was read from GGUF a plain one: its weights are, but transformers takes it for quantised."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def mend_tokenizer(tokenizer: Any, path: Path) -> None:
    """Splits text as the file says, where transformers does not know the way by the name that GGUF has for it.

    Without this, blanks and line breaks before a digit become tokens that the model has rarely seen.
    """
    if _way_of_splitting(path) == "smollm":
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _way_of_splitting(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())
