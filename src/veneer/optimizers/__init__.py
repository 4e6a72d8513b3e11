"""Optimisers of the LoRA family, one a file. In a run: `training.lora_optimizer`."""

from veneer.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from veneer.optimizers.loraplus import create_loraplus_optimizer
from veneer.optimizers.riemannian import create_riemannian_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
