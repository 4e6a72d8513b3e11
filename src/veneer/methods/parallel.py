"""Parallel adapters: a bottleneck beside the feed-forward part, from its input to its output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Self

from torch import Tensor, nn

from veneer import structure, targets
from veneer.adapter import Adapter, Base, Shared
from veneer.errors import ConfigError, StateError
from veneer.methods.bottleneck import Bottleneck, BottleneckConfig
from veneer.registry import register
from veneer.sites import Site


class Inputs(Shared):
    """What was read, by the path of the module, until it is used; and which output uses it."""

    def __init__(self, sites: Mapping[str, Site], config: ParallelConfig) -> None:
        super().__init__(sites, config)
        self.read: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.source: dict[str, str] = {}
        inputs = [path for path in sites if config.at(path).input_modules]
        outputs = [path for path in sites if path not in inputs]
        if inputs and len(inputs) != len(outputs):
            raise ConfigError(
                f"ParallelConfig: input_modules={config.input_modules!r} are {len(inputs)} modules and the others "
                f"{len(outputs)}. Name one input for each output."
            )
        for path in inputs:  # an input belongs to the output that it shares most of its path with
            output = max(outputs, key=lambda output, path=path: _in_common(path, output))  # type: ignore[misc]
            if sites[path].shape[1] != sites[output].shape[0]:
                raise ConfigError(
                    f"ParallelConfig: {path} takes {sites[path].shape[1]} numbers and {output} gives "
                    f"{sites[output].shape[0]}; a part of the model with as many outputs as inputs was expected."
                )
            outputs.remove(output)
            self.source[output] = path

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "read": {}}  # copies are made between calls


def _in_common(path: str, other: str) -> int:
    """How many modules lead to both."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Reader(Adapter):
    """Notes what its module is called with, and changes nothing."""

    splits_rows = False
    shared: Inputs

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.path = path

    def forward(self, x: Tensor, base: Base) -> Tensor:
        self.shared.read[self.path] = x, base.entries
        return base(x)


class Parallel(Bottleneck):
    r"""Adds to a part of the model, such as the feed-forward part, what a narrow layer makes of its input.

        h = F(x) + s (up f(down x + b_down) + b_up),     F the part, s = 1, 4 (`scaled_parallel`) or learned

    The part is seen at both its ends, the first projection in it and the last, so that it need not be one module.

    Trains: down (m, d), Kaiming-uniform, up (d, m), zero at the start, and both biases; s where it is learned.
    Cost: 2 m d + m + d parameters a place; m = d / reduction.
    Start: equals the base module exactly. Merge: impossible, f is not linear.
    Raises: ConfigError where inputs and outputs do not pair.
    Source: He et al. 2022, arXiv:2110.04366, table 1 and section 4.6 (the scaled one).
    """

    shares = Inputs
    shared: Inputs

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: ParallelConfig) -> Adapter:
        return Reader(site, config) if config.input_modules else cls(module, site, config)

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.source = self.shared.source.get(path)

    def layers(self, inputs: int, size: int, config: Any) -> tuple[nn.Module, nn.Module]:
        alone = config.input_modules is None and self.site is not None
        return super().layers(self.site.shape[1] if alone else inputs, size, config)  # type: ignore[union-attr]

    def reset(self) -> None:
        super().reset()
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h = self.output(x, base)
        if self.source is None:
            read = x if base.rows is None else x[base.rows]
        else:
            read = self._read(base.entries if base.rows is None else base.rows)
        delta = self.branch(read).to(h.dtype)
        return h + delta if base.rows is None else h.index_add(0, base.rows.nonzero()[:, 0], delta)

    def _read(self, own: Tensor | None) -> Tensor:
        """What the first module of the part was called with; of a mixed batch these entries."""
        if self.source not in self.shared.read:
            raise StateError(f"{self.source} was not called before the module that ends the part of the model.")
        x, entries = self.shared.read.pop(self.source)
        return x if own is None or entries is not None else x[own]


@register("par_bn", non_linearity="relu", scaling=4.0, reduction=2)
@register("scaled_parallel", non_linearity="relu", scaling=4.0)
@register("parallel", non_linearity="relu")
@dataclass
class ParallelConfig(BottleneckConfig):
    """Configuration of `Parallel`.

    `target_modules=None` means the feed-forward parts. A module that is named by hand is a part by itself; or else
    `input_modules` are the first modules of the parts whose last ones are named. `par_bn` is AdapterHub's name.

    Args:
        input_modules: Modules whose input is that of the part, by name or by an expression; one for each of the others.
            They are among the targets, where they are noted.
    """

    adapter = Parallel
    peft_name = "PARALLEL_ADAPTER"
    default_targets = (["ffn-input", "ffn-output"],)
    learning_rates = {"classification": 1e-3, "causal-lm": 5e-4}  # noqa: RUF012  # lower, as s = 4 acts as a rate does

    input_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.around_norm:
            raise ConfigError("ParallelConfig: around_norm=True; a norm is no part that something stands beside.")

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.target_modules is None and self.input_modules is None:
            inputs = structure.place("ffn-input", modules)
            return replace(
                self, target_modules=["ffn-input", "ffn-output"], input_modules=targets.exactly(inputs, modules)
            )
        if self.input_modules is None:
            return self
        named = replace(self, target_modules=self.input_modules, input_modules=None)
        inputs = targets.match(root, named, strict=False, modules=modules)
        chosen = targets.match(root, self, strict=False, modules=modules)
        both = [path for path in modules if path in {*inputs, *chosen}]
        return replace(self, target_modules=targets.exactly(both, modules))

    def at(self, path: str) -> Self:
        here, inputs = super().at(path), self.input_modules
        return here if inputs is None else replace(here, input_modules=[path] if targets.names(inputs, path) else [])
