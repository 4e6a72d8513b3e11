"""LoRA-FA: the first factor frozen, and the second moved as comes closest to full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import ConfigError, UnsupportedError
from veneer.methods.lora import Lora
from veneer.optimizers.places import check_plain, trained_lora

RIDGE = 1e-8  # of the inverse


class LoraFAOptimizer(Optimizer):
    r"""Adam, with the gradient of up divided by what down does to it.

        g = 1/s^2 grad (down down^T)^-1,     s = alpha / r

    s up down moves by s (-lr g) down: the change of the weight that is nearest to the full gradient. With g in place of
    the gradient, up is moved as by AdamW; so is all else that is trained.

    Args:
        params: Parameters or groups of them.
        lora: The adapters whose up is among them; their down is frozen.
        lr: Learning rate.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the latter.
        weight_decay: Share of the parameter that is taken off, times `lr`.
        correct_bias: Make up for running means that start at zero.

    Raises:
        ConfigError: A number is out of range.

    Source: Zhang et al. 2023, arXiv:2308.03303, section 3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lora: Iterable[Lora] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"LoraFAOptimizer: lr={lr}, betas={betas}, eps={eps}; lr, eps >= 0, betas in [0, 1).")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self._lora = {adapter.up: adapter for adapter in lora}
        self._inverses: dict[Tensor, Tensor] = {}  # of up; down is frozen, so they stay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, self._direction(parameter), group)
        return loss

    def _direction(self, parameter: Tensor) -> Tensor:
        """What stands in for the parameter's gradient."""
        grad: Any = parameter.grad
        adapter = self._lora.get(parameter)  # type: ignore[call-overload]
        if adapter is None:
            return grad
        if parameter not in self._inverses:
            down = adapter.down.to(torch.promote_types(adapter.down.dtype, torch.float32))
            gram = down @ down.mT  # (r, r)
            ridge = RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            self._inverses[parameter] = torch.linalg.pinv(gram + ridge, hermitian=True) / adapter.scaling**2
        inverse = self._inverses[parameter]
        return (grad.to(inverse.dtype) @ inverse).to(grad.dtype)

    def _move(self, parameter: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square, size = state["exp_avg"], state["exp_avg_sq"], group["lr"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def freeze_down(model: nn.Module) -> list[Lora]:
    """Freezes the first factor of all LoRA adapters that are trained, and returns them.

    Raises:
        UnsupportedError: There is none, or its factors are not the whole of it.
    """
    lora = trained_lora(model, "LoRA-FA")
    check_plain(lora, "LoRA-FA")
    for adapter in lora:
        if adapter.scaling == 0:
            raise UnsupportedError("LoRA-FA divides by alpha / r, and lora_alpha is 0. Give another lora_alpha.")
        adapter.down.requires_grad_(False)
    return lora


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
    **kwargs: Any,
) -> LoraFAOptimizer:
    """Freezes down in all LoRA adapters that are trained, and returns the optimiser of the rest.

    Args:
        model: The adapted model.
        r: Kept for `peft`: each adapter's own rank and scaling hold. What is given has to be that of the configuration.
        lora_alpha: As `r`.
        lr: Learning rate.
        weight_decay: Weight decay.
        use_rslora: As `r`.
        kwargs: Further arguments of `LoraFAOptimizer`.

    Raises:
        ConfigError: `r`, `lora_alpha` or `use_rslora` is not what the active adapters are configured with.
        UnsupportedError: No LoRA adapter is trained, or it is a variant that the method does not hold for.
    """
    given = {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
    for name in getattr(model, "active_adapters", ()):
        config = model.peft_config[name]  # type: ignore[index]
        for setting, value in given.items():
            if value is not None and getattr(config, setting, value) != value:
                raise ConfigError(
                    f"create_lorafa_optimizer: {setting}={value!r}, but adapter {name!r} has "
                    f"{getattr(config, setting)!r}. Leave {setting} out: the adapters' own settings hold."
                )
    lora = freeze_down(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LoraFAOptimizer(trained, lora, lr=lr, weight_decay=weight_decay, **kwargs)
