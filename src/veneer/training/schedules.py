"""Methods with a schedule in training: they move their budget after every step, and checkpoints keep where they are."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.model import PeftModel

SCHEDULE = "veneer_schedule.safetensors"


class Allocation(TrainerCallback):
    """Tells active methods how long the training is, and lets them allocate after each step of the optimiser."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if isinstance(model, PeftModel):
            for name in model.active_adapters:
                model.peft_config[name].begin(state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if isinstance(model, PeftModel):
            optimizer = kwargs["optimizer"]
            model.update_and_allocate(state.global_step, getattr(optimizer, "optimizer", optimizer))  # accelerate's own


def save(model: PeftModel, folder: Path) -> None:
    """Writes what schedules go by into a checkpoint; nothing where no method has any."""
    tensors = {
        f"{name}:{key}": tensor.detach().cpu().contiguous()
        for name, kept in model.kept_schedules().items()
        for key, tensor in kept.items()
    }
    if tensors:
        save_file(tensors, folder / SCHEDULE)


def load(model: PeftModel, folder: Path) -> None:
    """Goes on from what `save` wrote; to be called before the adapters' files are read."""
    if not (folder / SCHEDULE).is_file():
        return
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / SCHEDULE).items():
        name, _, inner = key.partition(":")
        kept.setdefault(name, {})[inner] = tensor
    for name, tensors in kept.items():
        model.resume_schedule(name, tensors)
