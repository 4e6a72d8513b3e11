"""`generate` with virtual tokens: the model sees the lengthened text, everybody else the text as it was given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.prompting.prompts import Lengthened
from veneer.structure import is_encoder_decoder


class Generation:
    """One call of `generate` on a lengthened text.

    Args:
        text: The batch, lengthened.
    """

    def __init__(self, text: Lengthened) -> None:
        self.text = text
        self.continues = not is_encoder_decoder(text.model)  # what is generated stands behind the text

    def seen(self, ids: Tensor) -> Tensor:
        """Generated rows as they would be without virtual tokens; rows of a beam are next to each other."""
        if not self.continues or self.text.text.dim() != 2:
            return ids
        given = self.text.text.to(ids.device).repeat_interleave(len(ids) // self.text.rows, 0)
        return torch.cat([given, ids[:, self.text.how.most + self.text.length :]], 1)

    def settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate`, with lengths that count what is added."""
        kwargs = dict(kwargs)
        if not self.continues:
            return kwargs
        if kwargs.get("max_length") is not None:
            kwargs["max_length"] += self.text.how.most
        config = kwargs.get("generation_config") or getattr(self.text.model, "generation_config", None)
        if config is not None and config.max_length is not None and kwargs.get("max_length") is None:
            config = copy.deepcopy(config)
            config.max_length += self.text.how.most
            kwargs["generation_config"] = config
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _Streamer(kwargs["streamer"], self)
        return kwargs

    @contextmanager
    def running(self, assistant: nn.Module | None) -> Iterator[None]:
        """Lets processors of scores, criteria and an assistant see texts without virtual tokens."""
        model: Any = self.text.model
        make_processors, make_criteria = model._get_logits_processor, model._get_stopping_criteria

        def as_given(config: Any) -> Any:
            """Settings of lengths that do not count what is added."""
            config = copy.copy(config)
            if self.continues and config.max_length is not None:
                config.max_length -= self.text.how.most
            return config

        def processors(generation_config: Any, input_ids_seq_length: Any = None, **how: Any) -> Any:
            if self.continues:
                input_ids_seq_length -= self.text.how.most
            if how.get("encoder_input_ids") is not None:
                how["encoder_input_ids"] = self.text.text
            return _seeing(make_processors(as_given(generation_config), input_ids_seq_length, **how), self)

        def criteria(generation_config: Any, *args: Any, **how: Any) -> Any:
            return _seeing(make_criteria(as_given(generation_config), *args, **how), self)

        def known(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            (ids,) = args or kwargs.values()
            return (ids.masked_fill(ids >= module.weight.shape[0], 0),), {}

        model._get_logits_processor, model._get_stopping_criteria = processors, criteria
        table = None if assistant is None else assistant.get_input_embeddings()  # type: ignore[operator]
        handle = None if table is None else table.register_forward_pre_hook(known, with_kwargs=True)
        try:
            yield
        finally:
            del model._get_logits_processor, model._get_stopping_criteria
            if handle is not None:
                handle.remove()

    def finish(self, output: Any) -> Any:
        """What `generate` returns, without virtual tokens."""
        if isinstance(output, Tensor):
            return self.seen(output)
        output.sequences = self.seen(output.sequences)
        return output


def _seeing(judges: Any, generation: Generation) -> Any:
    """A list of processors or criteria that are given texts without virtual tokens."""

    class Seeing(type(judges)):  # type: ignore[misc]
        @property
        def max_length(self) -> int | None:
            """Of criteria: read by the loop, which counts what is added."""
            longest: int | None = super().max_length
            return longest if longest is None or not generation.continues else longest + generation.text.how.most

        def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(generation.seen(input_ids), *args, **kwargs)

    return Seeing(judges)


class _Streamer:
    """Gives a streamer the text as it was, where it is given the lengthened one."""

    def __init__(self, streamer: Any, generation: Generation) -> None:
        self.streamer, self.generation, self.begun = streamer, generation, False

    def put(self, value: Tensor) -> None:
        whole = not self.begun and value.dim() == 2
        self.begun = True
        self.streamer.put(self.generation.seen(value) if whole else value)

    def end(self) -> None:
        self.streamer.end()
