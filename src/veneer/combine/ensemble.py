"""Ensembles: several adapters on one frozen model answer together, in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import ConfigError, UnsupportedError
from veneer.structure import is_encoder_decoder

if TYPE_CHECKING:
    from veneer.model import PeftModel

WAYS = ("probabilities", "logits", "votes")
"""How members are put together: the mean of probabilities or of logits, or the share that puts a class first."""

# Settings of `generate` by which members would go on with different texts.
_PARTING = ("do_sample", "num_beams", "num_return_sequences", "assistant_model", "penalty_alpha")


def ensemble(model: PeftModel, adapters: Sequence[str], *, combine: str = "probabilities", **inputs: Any) -> Tensor:
    """What several adapters say of the same rows.

    Every row is run once for each adapter, all in one batch: one pass over the frozen weights. With prompts of one task
    this is the prompt ensembling of Lester et al. 2021 (arXiv:2104.08691, section 6), whose votes are
    `combine="votes"`; any adapters that can be mixed in a batch will do.

    Args:
        model: A classifier or language model with the adapters.
        adapters: Their names.
        combine: `probabilities` or `logits` for means of these, or `votes` for the share of adapters that puts a class
            first.
        inputs: What the model is called with, by name, without labels.

    Returns:
        (rows, classes), or (rows, length, classes) of the tokens of the text as it was given, in float32 or wider.

    Raises:
        ConfigError: There is no adapter, no such way to combine them, or there are labels.
        StateError, UnsupportedError: An adapter is not there, or cannot be mixed.
    """
    check_way(combine)
    return together(members(model, adapters, **inputs), combine)


def members(model: PeftModel, adapters: Sequence[str], **inputs: Any) -> Tensor:
    """Logits of each adapter, (rows, adapters, ..., classes); otherwise as `ensemble`."""
    if inputs.get("labels") is not None:
        raise ConfigError("An ensemble gives no loss. Leave out labels, and compare them with what it gives.")
    root = model.get_base_model()
    rows, repeated = _repeated(adapters, inputs)
    output = model(**repeated, adapter_names=list(adapters) * rows)
    logits: Tensor = output["logits"] if isinstance(output, Mapping) else output[0]
    if logits.dim() > 2 and not is_encoder_decoder(root):  # the text stands behind all virtual tokens
        logits = logits[:, -_text(inputs).shape[1] :]
    return logits.view(rows, len(adapters), *logits.shape[1:])


def ensemble_generate(
    model: PeftModel,
    adapters: Sequence[str],
    *,
    combine: str = "probabilities",
    temperature: float = 0.0,
    **inputs: Any,
) -> Any:
    """Text that several adapters write together: they agree on every token before the next.

    Args:
        model: A language model with the adapters.
        adapters: Their names.
        combine: As for `ensemble`.
        temperature: 0 takes the best token each time; otherwise one is drawn from softmax(log p / temperature), with p
            the mean that `combine` asks for.
        inputs: Those of `generate`. Beams, and other ways to sample, are refused: members would part.

    Returns:
        What `generate` gives, a row for each row.

    Raises:
        ConfigError, StateError, UnsupportedError: As for `ensemble`; or a setting does not go with it.
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    check_way(combine)
    if combine == "votes" and temperature > 0:
        raise ConfigError(f"temperature={temperature}: votes are counted, not drawn. Combine probabilities or logits.")
    for name in _PARTING:
        if inputs.get(name) not in (None, False, 1):
            raise UnsupportedError(
                f"{name}={inputs[name]!r}: the members of an ensemble must go on with the same text. Leave it out; "
                "temperature samples for all of them."
            )
        inputs.pop(name, None)
    rows, repeated = _repeated(adapters, inputs)
    size = len(adapters)

    class Together(LogitsProcessor):
        """Gives all members of a row one set of scores."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            whole = together(scores.view(rows, size, -1), combine)
            if combine == "probabilities":
                whole = whole.log()
            if temperature > 0:  # the largest after Gumbel noise is a draw, and the same one for every member
                whole = whole / temperature - torch.empty_like(whole).exponential_().log()
            return whole.repeat_interleave(size, 0).to(scores.dtype)

    processors = LogitsProcessorList([*(repeated.pop("logits_processor", None) or ()), Together()])
    plain: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(**{**plain, **repeated}, logits_processor=processors, adapter_names=list(adapters) * rows)
    if isinstance(output, Tensor):
        return output[::size]
    output.sequences = output.sequences[::size]
    return output


def together(logits: Tensor, combine: str) -> Tensor:
    """Members' logits, (rows, members, ..., classes), as one.

    >>> logits = torch.tensor([[[0.0, 2.0], [1.0, 0.0], [1.0, 0.0]]])
    >>> together(logits, "votes")
    tensor([[0.6667, 0.3333]])
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if combine == "votes":
        return F.one_hot(wide.argmax(-1), wide.shape[-1]).to(wide.dtype).mean(1)
    return (wide if combine == "logits" else wide.softmax(-1)).mean(1)


def check_way(combine: str) -> None:
    """Refuses a way to combine members that is not known.

    Raises:
        ConfigError: So.
    """
    if combine not in WAYS:
        raise ConfigError(f"combine={combine!r}; one of {', '.join(WAYS)} was expected.")


def _text(inputs: Mapping[str, Any]) -> Tensor:
    """The rows that are read.

    Raises:
        ConfigError: There are none.
    """
    names = ("input_ids", "inputs", "inputs_embeds")
    found = next((inputs[name] for name in names if inputs.get(name) is not None), None)
    if found is None:
        raise ConfigError(
            f"An ensemble was called without input_ids or inputs_embeds (given: {', '.join(inputs) or 'nothing'}). "
            "Pass one of them by name."
        )
    return found


def _repeated(adapters: Sequence[str], inputs: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The number of rows, and the inputs with each row as often as there are adapters, next to each other."""
    if not adapters or isinstance(adapters, str):
        raise ConfigError(f"adapters={adapters!r}; a list of one or more names was expected.")
    rows = len(_text(inputs))

    def repeat(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() and len(value) == rows
        return value.repeat_interleave(len(adapters), 0) if whole else value

    return rows, {name: repeat(value) for name, value in inputs.items()}
