"""Checks during training: each stops or warns where a run would otherwise go on and come to nothing."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.data.batches import IGNORED
from veneer.errors import DataError, VeneerError, VeneerWarning

# How many steps a parameter has to receive a gradient. One is not enough: LoRA's `down` has none until the first
# step has moved `up` away from zero, and an expert has none until a token is sent to it.
PATIENCE = 3


def check_labels(inputs: Mapping[str, Any], names: Sequence[str], step: int, shifted: bool) -> None:
    """Refuses a batch in which nothing is learnt.

    Args:
        inputs: The batch.
        names: Which of its keys hold labels.
        step: Optimiser steps done so far.
        shifted: Whether the first label of a row is never predicted, as in causal language models.

    Raises:
        DataError: All labels are -100.
    """
    labels = [inputs[name] for name in names if isinstance(inputs.get(name), Tensor)]
    # Floating-point labels (regression) have no value that means "ignore".
    if not labels or any(label.is_floating_point() for label in labels):
        return
    if shifted:
        labels = [label[..., 1:] for label in labels]
    if all(bool((label == IGNORED).all()) for label in labels):
        raise DataError(
            f"In the batch after step {step} every label is {IGNORED}, so it has no loss to learn from. "
            "The completions were probably cut off (raise data.max_length) or the examples have none; drop them, or "
            "train on all tokens (data.train_on: all)."
        )


def check_loss(loss: Tensor, step: int, learning_rate: float) -> None:
    """Refuses to go on from a loss that is not a number; the weights are still those of the step before.

    Raises:
        VeneerError: The loss is NaN or infinite.
    """
    if not bool(torch.isfinite(loss).all()):
        raise VeneerError(
            f"The loss became {loss.float().mean().item()} at step {step + 1} (learning rate {learning_rate:.2g}); "
            "every weight would be lost with the next step. Lower training.learning_rate, warm up longer "
            "(training.warmup_steps), or compute in float32 (model.dtype: float32, no fp16). "
            "Saved checkpoints are unharmed."
        )


class GradientGuard(TrainerCallback):
    """Warns about trained parameters that receive no gradient within the first steps, then gets out of the way."""

    def __init__(self) -> None:
        self._silent: dict[str, nn.Parameter] = {}
        self._unused: set[str] = set()
        self._steps = 0
        self._started = self._done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._steps = False, 0
        # Engines that shard parameters keep gradients in buffers of their own. A resumed run was looked at when it
        # began, and a method may have let parameters rest since.
        self._done = bool(args.deepspeed or args.fsdp) or state.global_step > 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._done:
            return
        model: nn.Module = kwargs["model"]
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        if not self._started:
            self._started = True
            self._silent = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self._unused = set(self._silent)
        self._unused -= {name for name in self._unused if self._silent[name].grad is not None}
        self._silent = {name: p for name, p in self._silent.items() if p.grad is None or not bool(p.grad.any())}
        # A step with learning rate zero, as a warm-up may begin, moves nothing and so wakes no one up.
        self._steps += any(group["lr"] > 0 for group in optimizer.param_groups)
        if not self._silent or self._steps >= PATIENCE:
            self._report(list(self._silent))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The run was too short to judge zeros, but what never had any gradient takes no part in the loss.
        if self._started and not self._done:
            self._report([name for name in self._silent if name in self._unused])

    def _report(self, names: list[str]) -> None:
        self._done = True
        self._silent = {}
        if not names:
            return
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        reason = (
            "it takes no part in the loss: its module is never called, or runs without gradients"
            if names[0] in self._unused
            else "its gradient is exactly zero: it is multiplied by zero later, or nothing uses what it feeds"
        )
        warnings.warn(
            f"{len(names)} trained parameters got no gradient in the first steps: {shown}. As for the first of them, "
            f"{reason}. It stays as it started. Leave its module out of the method's target_modules or "
            "modules_to_save, or correct the model. With gradient checkpointing, call "
            "model.enable_input_require_grads() first.",
            VeneerWarning,
            stacklevel=2,
        )
