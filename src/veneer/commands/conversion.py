"""From an adapter's folder to that of another adapter which does the same: as LoRA, or in today's file layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from veneer import checkpoint, legacy
from veneer.combine.convert import save_as_lora
from veneer.commands.merging import load_folder, require_free
from veneer.training import checkpoints


def rewrite_folder(adapter: str, output: str, allow_pickle: bool = False) -> str:
    """Write an adapter of an older version or of another library in today's layout, by its files alone.

    Args:
        adapter: Its folder.
        output: A new or empty folder.
        allow_pickle: Also read pickles.

    Returns:
        The method, as files name it.

    Raises:
        ConfigError: The output folder is taken.
        CheckpointError: The files are missing, damaged, of no layout that is known, or have no exact counterpart here.
    """
    target = Path(output).expanduser().absolute()
    require_free(target)
    source = Path(adapter).expanduser()
    config, tensors, header = legacy.load(source, allow_pickle=allow_pickle)
    with checkpoints.aside(target) as partial:
        checkpoint.write(tensors, replace(config, inference_mode=True), partial, header.get("base") or {})
        checkpoints.sync(partial)
        partial.rename(target)
    return str(config.peft_type)


@dataclass(frozen=True)
class Converted:
    """What a conversion came to.

    Args:
        folder: The new adapter.
        method: Its method.
        ranks: Lowest and highest rank, of LoRA.
        error: What part of the change of the weights is lost, in Frobenius norm.
        worst: The place where most is lost, and how much.
    """

    folder: str
    method: str
    ranks: tuple[int, int]
    error: float
    worst: tuple[str, float]


def convert_folder(
    adapter: str, output: str, rank: float, max_rank: int | None = None, base: str | None = None
) -> Converted:
    """Write an adapter of any weight method as a LoRA adapter.

    Args:
        adapter: A run's output folder, or any adapter's folder.
        output: A new or empty folder.
        rank: The rank of every place, a whole number; or the share of the change's energy to keep, up to 1.0.
        max_rank: No place gets a higher rank than this.
        base: The base model, if it is not where the adapter says.

    Raises:
        ConfigError: The output folder is taken, the base model is not found, or the rank is none.
        CheckpointError: The adapter's files are missing, damaged, or do not fit the base model; or the disk is full.
        UnsupportedError: The method cannot be written as LoRA.
    """
    target = Path(output).expanduser().absolute()
    require_free(target)
    model, _ = load_folder(Path(adapter).expanduser(), base)
    with checkpoints.aside(target) as partial:
        converted = save_as_lora(partial, model, rank, max_rank=max_rank)
        checkpoints.sync(partial)
        partial.rename(target)
    ranks = converted.ranks.values()
    worst = max(converted.errors, key=lambda place: converted.errors[place])
    return Converted(str(output), "LORA", (min(ranks), max(ranks)), converted.error, (worst, converted.errors[worst]))
