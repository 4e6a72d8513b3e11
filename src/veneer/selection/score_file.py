"""Scores that are kept: by place, summed up as they are asked for, in a file that knows which model they are of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer import checkpoint, files
from veneer.errors import BaseMismatchError, CheckpointError, ConfigError
from veneer.selection import scores
from veneer.selection.scores import Level
from veneer.sites import Site

if TYPE_CHECKING:
    from veneer.preparation import Loss

_NAME = "scored"  # of the adapter that marks the places, while they are scored
_SAID = "scores"  # entry of the file's header


@dataclass(frozen=True)
class Scores:
    """How much the weights of a model matter.

    Attributes:
        criterion: By what; key of `scores.CRITERIA`.
        level: What has a score of its own.
        tensors: The scores by path: `(out, in)` or `(n, out, in)`; of rows, without the last axis; of weights, `()`.
        sizes: How many entries each weight has.
        batches: How many batches were seen; 0 where the criterion needs no data.
        base: Fingerprint of the model.
        quantised: Whether that is of quantised weights.
    """

    criterion: str
    level: Level
    tensors: dict[str, Tensor]
    sizes: dict[str, int]
    batches: int
    base: dict[str, list[float]]
    quantised: bool = False

    def modules(self) -> dict[str, float]:
        """The mean score of an entry of each weight, which weights of any size can be compared by."""
        return {path: float(score.double().sum()) / self.sizes[path] for path, score in self.tensors.items()}

    def neurons(self) -> dict[str, Tensor]:
        """The summed scores of each row, `(out,)`.

        Raises:
            ConfigError: Single rows have none.
        """
        self._fine("neuron")
        return self.tensors if self.level == "neuron" else {path: score.sum(-1) for path, score in self.tensors.items()}

    def layers(self) -> dict[int | None, float]:
        """The mean score of an entry of each layer, by its number; none stands for weights that are in no layer."""
        totals: dict[int | None, list[float]] = {}
        for path, score in self.tensors.items():
            total = totals.setdefault(layer_and_name(path)[0], [0.0, 0.0])
            total[0] += float(score.double().sum())
            total[1] += self.sizes[path]
        return {layer: total / count for layer, (total, count) in totals.items()}

    def of(self, sites: Mapping[str, Site], criterion: str) -> dict[str, Tensor]:
        """The score of every entry of these weights.

        Args:
            sites: The weights by path.
            criterion: What is expected to have been scored.

        Raises:
            ConfigError: It was not that, not every entry has a score, or a weight has none.
            BaseMismatchError: The weights are not those that were scored.
        """
        if criterion != self.criterion:
            raise ConfigError(
                f"The scores are by {self.criterion}, and the method says criterion={criterion!r}. Set criterion to "
                f"{self.criterion!r}, or score the model anew: veneer select --criterion {criterion}"
            )
        self._fine("parameter")
        self.check(sites)
        return {path: self.tensors[path] for path in sites}

    def check(self, sites: Mapping[str, Site]) -> None:
        """Refuses weights that are not those that were scored.

        Raises:
            ConfigError: A weight has no score.
            BaseMismatchError: A weight is another one.
        """
        missing = [path for path in sites if path not in self.tensors]
        if missing:
            raise ConfigError(
                f"There are no scores for {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}. Score "
                "the model with the targets of the method, or leave these modules out of its targets."
            )
        difference = checkpoint.distance(sites, self.base)
        quantised = self.quantised or any(site.store.quantised for site in sites.values())
        allowed = checkpoint.QUANTISED_TOLERANCE if quantised else checkpoint.TOLERANCE
        other = any(self.sizes[path] != _size(site) for path, site in sites.items())
        if other or difference > allowed:
            how = "in shape" if other else f"by {difference:.0%}"
            raise BaseMismatchError(
                f"The scores are of another model: its weights differ {how} from those that are to be trained. Score "
                "this model: veneer select"
            )

    def _fine(self, level: Level) -> None:
        order = ("module", "neuron", "parameter")
        if order.index(self.level) < order.index(level):
            raise ConfigError(
                f"The scores are one for each {self.level}, and one for each {level} is needed. Score the model anew: "
                f"veneer select --level {level}"
            )

    def save(self, path: str | Path) -> None:
        """Writes the file, completely or not at all: safetensors, the rest in its header.

        Raises:
            CheckpointError: It could not be written.
        """
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        said = {
            "criterion": self.criterion, "level": self.level, "batches": self.batches, "sizes": self.sizes,
        }  # fmt: skip
        own: dict[str, Any] = {"sha256": checkpoint.checksum(tensors, self.base), "base": self.base, _SAID: said}
        if self.quantised:
            own["quantised"] = True
        files.write(Path(path), lambda partial: checkpoint.fill_tensors(partial, tensors, own))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads a file that `save` has written.

        Raises:
            CheckpointError: It is missing, damaged, no file of scores, or has scores that are not numbers.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise CheckpointError(f"scores: there is no file {path}. Name one that `veneer select` has written.")
        tensors, header = checkpoint.read_file(path)
        said = header.get(_SAID)
        if not isinstance(said, dict):
            raise CheckpointError(f"{path} holds no scores. Name a file that `veneer select` has written.")
        for key, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{path}: the score of {key} is not a number everywhere. Score the model anew.")
        tensors = {key: tensors[key] for key in said["sizes"]}  # in the order of the model
        return cls(
            said["criterion"], said["level"], tensors, said["sizes"], said["batches"], header["base"],
            bool(header.get("quantised")),
        )  # fmt: skip


def score(
    model: nn.Module,
    batches: Iterable[Any] = (),
    criterion: str = "fisher",
    *,
    level: Level = "parameter",
    target_modules: Any = "all-linear",
    above: str | None = None,
    loss: Loss | None = None,
    seen: Callable[[], None] = lambda: None,
    **targets: Any,
) -> Scores:
    """Scores the frozen weights of a model.

    Args:
        model: A model, which is frozen by it, or a `PeftModel`, whose adapters take no part unless `above` names one.
        batches: As for `veneer.prepare`.
        criterion: Key of `scores.CRITERIA`.
        level: What has a score of its own; a coarser one takes less memory where the criterion is a sum.
        target_modules: Which weights, as for a method.
        above: An adapter that is in use meanwhile: scored are the weights as it has changed them.
        loss: As for `veneer.prepare`.
        seen: Called after every batch.
        targets: Further settings of `ModuleConfig`, such as `exclude_modules`.

    Raises:
        ConfigError: There is no such criterion or level.
        StateError: There is no batch, no loss, or a score is not a number.
        TargetError: Nothing matches.
    """
    from veneer.methods.sparse import SparseConfig
    from veneer.model import PeftModel, get_peft_model
    from veneer.preparation import Run, places_of

    rule = scores.criterion_of(criterion)
    if level not in ("parameter", "neuron", "module"):
        raise ConfigError(f"level={level!r}; one of parameter, neuron, module was expected.")
    batches = list(batches)
    # An adapter that chooses nothing before it has seen data: it only marks the places.
    mark = SparseConfig(criterion="gradient", target_modules=target_modules, **targets)
    own = not isinstance(model, PeftModel)
    adapted: Any = get_peft_model(model, mark, adapter_name=_NAME) if own else model
    if not own:
        adapted.add_adapter(_NAME, mark)
    try:
        places = places_of(adapted, _NAME)
        sites = {path: wrapper.site for path, wrapper in places.items() if wrapper.site is not None}
        if rule.of_gradient is None:
            tensors = {path: scores.reduced(scores.without_data(site, criterion).float().cpu(), level)
                       for path, site in sites.items()}  # fmt: skip
        else:
            run = Run(adapted, places, batches, loss, below=() if above is None else (above,))
            tensors = scores.from_data(sites, criterion, run, level, seen)
        return Scores(
            criterion,
            level,
            tensors,
            {path: _size(site) for path, site in sites.items()},
            len(batches) if rule.of_gradient is not None else 0,
            checkpoint.samples(sites),
            any(site.store.quantised for site in sites.values()),
        )
    finally:
        if own:
            adapted.unload()
        else:
            adapted.delete_adapter(_NAME)


def _size(site: Site) -> int:
    return torch.Size((*site.batch, *site.shape)).numel()


def layer_and_name(path: str) -> tuple[int | None, str]:
    """The number of the layer that a module is in, and its name without what all layers have in common.

    >>> layer_and_name("bert.encoder.layer.3.attention.self.query"), layer_and_name("lm_head")
    ((3, 'attention.self.query'), (None, 'lm_head'))
    """
    found = re.match(r".*?\.(\d+)\.(.+)", path)
    return (int(found[1]), found[2]) if found else (None, path)
