"""The tokens of the vocabulary that the virtual tokens of a prompt are nearest to.

Of the base model one tensor is read, its embedding, and only where it lies on this machine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.config import PeftConfig
from veneer.errors import CheckpointError, VeneerError

SHOWN = 3
"""How many tokens are shown for each virtual one."""

Nearest = list[list[tuple[str, float]]]
"""For each virtual token the nearest ones, as text, with the cosine of the angle between the two."""


def nearest_tokens(file: Path, config: PeftConfig, base: str) -> Mapping[str, Nearest] | str:
    """What the prompt in an adapter's file says, as far as words can; empty for other methods.

    Args:
        file: The adapter's tensors.
        config: Its configuration.
        base: Name of the base model, whose tokenizer is used.

    Returns:
        By a name for each sequence of virtual tokens; or why it cannot be said.
    """
    if not config.is_prompt_learning:
        return {}
    from safetensors.torch import load_file

    from veneer.prompting.prompts import VirtualTokensConfig

    if not isinstance(config, VirtualTokensConfig):
        return {}
    try:
        prompts = config.method().shares.tokens_in(load_file(file), config)  # type: ignore[union-attr]
        words, tokenizer = _vocabulary(base)
        return {name: _nearest(prompt, words, tokenizer) for name, prompt in prompts.items()}
    except (OSError, ValueError, KeyError, VeneerError) as error:
        reason = " ".join(str(error).split())
        return f"{base} cannot be read on this machine, so words nearest to the prompt are not known ({reason})"


def _vocabulary(base: str) -> tuple[Any, Any]:
    """Embedding, (vocabulary, d), and tokenizer of a model."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    from veneer import samples, targets
    from veneer.commands.model_tree import build
    from veneer.starting import Weights

    if samples.is_sample(base) and not samples.is_present(base):
        raise CheckpointError(f"veneer samples fetch {base} makes it ready")
    found = cached_file(samples.resolve_model(base), "config.json", local_files_only=True)
    folder = Path(str(found)).parent
    model = build(str(folder), None)
    path = targets.input_embedding(model, dict(targets.walk(model)))
    words = Weights(folder, getattr(model, "base_model_prefix", "")).read(f"{path}.weight")
    return words, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _nearest(prompt: Any, words: Any, tokenizer: Any) -> Nearest:
    import torch.nn.functional as F

    if prompt.shape[1] != words.shape[1]:
        raise CheckpointError(f"its embeddings have width {words.shape[1]}, the prompt has {prompt.shape[1]}")
    cosines = F.normalize(prompt.float(), dim=1) @ F.normalize(words.float(), dim=1).T  # (n, vocabulary)
    best, ids = cosines.topk(min(SHOWN, len(words)), dim=1)
    return [
        [(_said(tokenizer, token), round(cosine, 3)) for token, cosine in zip(row, values, strict=True)]
        for row, values in zip(ids.tolist(), best.tolist(), strict=True)
    ]


def _said(tokenizer: Any, token: int) -> str:
    """A token as text, or by its name where it is nothing but space or half a letter."""
    text: str = tokenizer.decode([token])
    plain = bool(text.strip()) and "\ufffd" not in text
    return text.replace(" ", "\u2423") if plain else str(tokenizer.convert_ids_to_tokens(token))
