"""CorDA: the factors start as the part of the weight that matters most, or least, to inputs from given data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer import files
from veneer.config import Nested
from veneer.errors import CheckpointError, ConfigError, StateError
from veneer.inits.kaiming import kaiming
from veneer.inits.start import Start, balanced, wide

if TYPE_CHECKING:
    from veneer.preparation import Run


@dataclass(frozen=True)
class CordaConfig(Nested):
    """Settings of CorDA.

    Args:
        cache_file: A safetensors file with the decompositions: read if it is there, otherwise written.
        covariance_file: The same for the covariances, which serve any rank and either mode.
        corda_method: `"ipm"` trains the part of the weight that the data uses most, for new tasks like the data;
            `"kpm"` the part that it uses least, to keep what the data shows the model to know.
        verbose: Print each layer as it is decomposed.
        use_float16_for_covariance: Leave inputs in the model's type instead of float32.
        prune_temporary_fields: Kept for `peft`; nothing is left on the model.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


def corda(start: Start) -> None:
    """up = U sqrt(S / s), down = sqrt(S / s) V^T C^-1, with r of the singular triplets of W C = U S V^T.

    C is the covariance of the layer's inputs. Until data has been seen, the start is the default one.

    Source: Yang et al. 2024, arXiv:2406.05223, eqs. 1 to 4.
    """
    if not start.seen:
        kaiming(start)
        return
    u, s, vh = (start.seen[name].to(start.up.device) for name in ("u", "s", "vh"))
    if s.shape[0] != start.rank:
        raise ConfigError(
            f"corda_config: the decomposition has rank {s.shape[0]}, the adapter {start.rank}. Prepare it with the "
            "configuration that it is used with, or remove cache_file."
        )
    start.fill(*balanced(u, s, vh, start.scaling))


def prepare(adapters: Mapping[str, Any], config: Any, run: Run) -> None:
    """Makes the starting values of all adapters from a run of the data."""
    for path, seen in observe(adapters, config, run):
        adapters[path].begin(seen)


def observe(adapters: Mapping[str, Any], config: Any, run: Run) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The decomposition for every place, as `corda` takes it.

    Raises:
        ConfigError: A place is no linear layer, or r is more than its rank can be.
        StateError: A layer saw no input, or inputs that are not finite.
        CheckpointError: A file is damaged, or of another model.
    """
    settings: CordaConfig = config.corda_config
    for path, adapter in adapters.items():
        if adapter.site.kind != "linear":
            raise ConfigError(
                f"init_lora_weights='corda': {path} is a {adapter.site.kind} place, and covariances are those of "
                "inputs to linear layers. Leave it out of the targets."
            )
    names = [f"{path}.{part}" for path in adapters for part in ("u", "s", "vh")]
    cached = _read(settings.cache_file, names)
    if cached is not None:
        for path in adapters:
            yield path, {part: cached[f"{path}.{part}"] for part in ("u", "s", "vh")}
        return
    covariances = _read(settings.covariance_file, list(adapters))
    if covariances is None:
        covariances = _covariances(list(adapters), settings, run)
        _write(settings.covariance_file, covariances)
    kept: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        if settings.verbose:
            print(f"CorDA: {path}")
        seen = _decompose(adapter, covariances.pop(path), settings.corda_method)
        if settings.cache_file is not None:
            kept |= {f"{path}.{part}": tensor for part, tensor in seen.items()}
        yield path, seen
    if settings.cache_file is not None:
        _write(settings.cache_file, kept)


@torch.no_grad()
def _covariances(paths: list[str], settings: CordaConfig, run: Run) -> dict[str, Tensor]:
    """X^T X of the inputs of every layer, each batch scaled by its largest entry, averaged over the batches."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(paths, 0)

    def see(path: str, x: Tensor) -> None:
        rows = run.rows(x)
        if not settings.use_float16_for_covariance:
            rows = wide(rows)
        rows = rows / rows.max().abs()
        sums[path] = rows.T @ rows + sums.get(path, 0)
        counts[path] += 1

    run.inputs(see)
    for path in paths:
        if path not in sums or not torch.isfinite(sums[path]).all():
            what = "has seen no input" if path not in sums else "has seen inputs that are not finite or all zero"
            raise StateError(f"init_lora_weights='corda': {path} {what}. Use other data, or leave it out.")
    return {path: sums[path] / counts[path] for path in paths}


@torch.no_grad()
def _decompose(adapter: Any, covariance: Tensor, method: str) -> dict[str, Tensor]:
    weight, rank = wide(adapter.site.read().detach()), adapter.down.shape[-2]
    most = min(weight.shape)
    if rank > most:
        raise ConfigError(f"init_lora_weights='corda': r={rank}, but the layer is {tuple(weight.shape)}; lower r.")
    covariance = covariance.to(weight)
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    damping = 0.01
    while True:  # as much damping as the inverse needs
        damped = covariance + damping * covariance.diagonal().mean() * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity).item() < 0.05:
            break
        damping *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    part = slice(None, rank) if method == "ipm" else slice(most - rank, None)
    return {"u": u[:, part].clone(), "s": s[part].clone(), "vh": vh[part] @ inverse}


def _read(path: str | None, names: list[str]) -> dict[str, Tensor] | None:
    if path is None or not Path(path).is_file():
        return None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"corda_config: {path} is no safetensors file ({error}). peft writes pickles, which are not read. Remove "
            "the file to have it made anew, or name another one."
        ) from error
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"corda_config: {path} lacks {missing[0]}: it was made for other layers. Remove it.")
    return tensors


def _write(path: str | None, tensors: dict[str, Tensor]) -> None:
    if path is not None:
        whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        files.write_together({Path(path): lambda partial: save_file(whole, partial)})
