"""LoRA+: a higher learning rate for the second factor."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from veneer.errors import ConfigError
from veneer.optimizers.places import trained_lora


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    r"""An optimiser that moves up faster than down.

        lr(down) = lr,     lr(up) = ratio lr

    With equal rates, the wider the model, the less of what is learnt comes from down. Vectors (biases, magnitudes) move
    as up does, all else that is trained (a head) as down does, and embeddings have a rate of their own. Biases and
    norms do not decay.

    Args:
        model: The adapted model.
        optimizer_cls: Class of the optimiser, such as `torch.optim.AdamW`.
        lr: Learning rate of down.
        loraplus_lr_ratio: That of up over that of down; the paper suggests 16.
        loraplus_lr_embedding: Learning rate of both factors on embeddings.
        loraplus_weight_decay: Weight decay.
        kwargs: Further arguments of `optimizer_cls`.

    Raises:
        ConfigError: The ratio is not positive.
        UnsupportedError: No LoRA adapter is trained.

    Source: Hayou et al. 2024, arXiv:2402.12354, section 4.
    """
    if loraplus_lr_ratio <= 0:
        raise ConfigError(f"loraplus_lr_ratio={loraplus_lr_ratio!r}; a positive number, mostly above 1, was expected.")
    lora = trained_lora(model, "LoRA+")
    on_embeddings = {id(p) for adapter in lora if adapter.site.kind == "embedding" for p in adapter.parameters()}
    ups = {id(adapter.up) for adapter in lora}
    groups: dict[str, list[nn.Parameter]] = {"down": [], "embedding": [], "up": [], "up without decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if id(parameter) in on_embeddings:
            group = "embedding"
        elif "bias" in leaf or (type(owner).__name__.endswith("Norm") and parameter.dim() == 1):
            group = "up without decay"
        elif id(parameter) in ups or parameter.dim() == 1:
            group = "up"
        else:
            group = "down"
        groups[group].append(parameter)
    rates = {"down": lr, "embedding": loraplus_lr_embedding}
    return optimizer_cls(
        [
            {
                "params": parameters,
                "lr": rates.get(group, lr * loraplus_lr_ratio),
                "weight_decay": 0.0 if group == "up without decay" else loraplus_weight_decay,
            }
            for group, parameters in groups.items()
        ],
        lr=lr,  # type: ignore[call-arg]
        **kwargs,
    )
