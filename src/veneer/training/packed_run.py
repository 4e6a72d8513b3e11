"""Whether a training run packs its rows, and what that saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from veneer.errors import UnsupportedError
from veneer.structure import is_encoder_decoder
from veneer.training import samplers
from veneer.training.packing import PackedRows

if TYPE_CHECKING:
    from veneer.training.trainer import Trainer


class PackedRun:
    """The packing of one run, tried on its model.

    Args:
        trainer: Whose run it is.

    Raises:
        UnsupportedError: `training.packing` is `on`, and rows cannot be packed.
    """

    line: str
    """What is done and why, for people; empty where it is turned off."""

    def __init__(self, trainer: Trainer) -> None:
        self.model = trainer.model
        self._rows: PackedRows | None = None
        self.line = ""
        setting = getattr(trainer.args, "packing", "auto")
        if setting == "off":
            return
        try:
            _check_run(trainer)
            with trainer.accelerator.autocast():
                self._rows = PackedRows(trainer.accelerator.unwrap_model(trainer.model))
        except UnsupportedError as reason:
            if setting == "on":
                raise UnsupportedError(
                    f"training.packing is 'on', but rows cannot be packed: {reason}. Set it to 'auto' or 'off'."
                ) from reason
            self.line = f"Packed rows: off, for {reason}."
            return
        share = _padding(trainer)
        which = "the encoder's" if is_encoder_decoder(self._rows.model) else "training"
        saved = "" if share is None else f" ({share:.0%} of {which} positions)"
        self.line = f"Packed rows: nothing is computed for padding{saved}."

    def __call__(self) -> AbstractContextManager[None]:
        """For a step, forward and backward."""
        return self._rows() if self._rows is not None else nullcontext()


def _check_run(trainer: Trainer) -> None:
    """Refuses runs whose model is not whole in one process, or is compiled.

    Raises:
        UnsupportedError: So.
    """
    args = trainer.args
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.n_gpu > 1:
        raise UnsupportedError("the model is spread over processes or devices")
    model: Any = trainer.model
    if args.torch_compile or any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedError("a compiled model would be compiled again for each number of tokens")
    devices = getattr(trainer.accelerator.unwrap_model(model), "hf_device_map", None) or {}
    if len(set(devices.values())) > 1:
        raise UnsupportedError("the model lies on several devices")


def _padding(trainer: Trainer) -> float | None:
    """The share of padding in the batches of the first epoch; none where that is not known."""
    try:
        lengths = trainer._lengths(trainer.train_dataset)
    except (TypeError, KeyError, IndexError):
        return None
    batches: Iterable[Sequence[int]] | None = trainer.token_batches()
    if batches is None:
        with samplers.generators_kept():
            order = list(trainer._get_train_sampler() or ())
        size = trainer.args.train_batch_size
        batches = (order[i : i + size] for i in range(0, len(order), size))
    real = padded = 0
    for batch in batches:
        inside = [lengths[i] for i in batch]
        real += sum(inside)
        padded += max(inside) * len(inside)
    return 1 - real / padded if padded else None
