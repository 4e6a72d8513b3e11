"""LT-SFT: the weights that full fine-tuning moves most, trained once more from the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from veneer.config import check_positive
from veneer.errors import ConfigError
from veneer.methods.full import Full, FullConfig
from veneer.methods.sparse import Chosen, SparseConfig
from veneer.registry import register

if TYPE_CHECKING:
    from veneer.preparation import Run


class LtSft(Chosen):
    r"""Trains all weights first, keeps the entries that have moved most, and trains these again from where they were.

        phase 1:  W1 = full fine-tuning of W, for `steps` steps
        phase 2:  W'_i = W_i + v_i     for the k entries i of the largest |W1_i - W_i|;   W' = W elsewhere

    Phase 1 is `veneer.prepare`; phase 2 is the training, with an optimiser and a schedule of its own.

    Trains: values (k,), zero at the start. Frozen: indices (k,).
    Cost: in phase 1 that of full fine-tuning of the adapted layers with AdamW, in evaluation mode and with the model's
    head as it is; then k parameters and k positions.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if no entry is left.
    Source: Ansell et al. 2022, arXiv:2110.07560, section 3, the lottery ticket of Frankle and Carbin 2019.
    """

    @classmethod
    def needs_data(cls, config: SparseConfig) -> bool:
        return True

    @classmethod
    def prepare(cls, adapters: dict[str, Self], config: LtSftConfig, run: Run) -> None:  # type: ignore[override]
        whole = {path: Full(adapter.site, FullConfig()) for path, adapter in adapters.items()}
        for path, full in whole.items():
            like = adapters[path].values
            full.to(like.device, like.dtype)
            full.reset()
        trained = [full.held.weight for full in whole.values()]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)

        def step() -> None:
            optimizer.step()
            for full in whole.values():
                full.zero_grad()

        run.train(whole, step, config.steps)
        with torch.no_grad():
            found = {path: cls.moved(full) for path, full in whole.items()}
        cls.settle(adapters, config, found)

    @staticmethod
    def moved(full: Full) -> Tensor:
        """How far every entry of a weight has moved; in main memory."""
        weight = full.site.view(full.held.weight)
        return (weight - full.site.read().to(weight.dtype)).abs().float().cpu()


@register("lt_sft")
@dataclass
class LtSftConfig(SparseConfig):
    """Configuration of `LtSft`.

    Args:
        criterion: Always `"change"`.
        steps: Steps of phase 1.
        learning_rate: Its learning rate.

    Raises:
        ConfigError: As for `SparseConfig`, or steps or a rate that are not positive.
    """

    adapter = LtSft
    peft_name = "LT_SFT"

    criterion: Literal["change"] = "change"  # type: ignore[assignment]
    scope: Literal["neuron", "layer", "model"] = "model"
    steps: int = 100
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps", "learning_rate")
        if self.scores is not None:
            raise ConfigError(
                f"LtSftConfig: scores={self.scores!r}, but its score is how far phase 1 moves the weights. Leave "
                "scores out, or use the method sparse."
            )
