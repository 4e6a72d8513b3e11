"""Adapters that change what a module gives, be it a projection, a feed-forward part or a whole block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Base
from veneer.errors import ConfigError, StateError
from veneer.sites import Site
from veneer.structure import output_width


class OutputAdapter(Adapter):
    """Changes the output of a module, place by place of the batch: h' = change(h, x), h = base(x).

    In a mixed batch the module runs once for all rows, so that it may take any further arguments.

    Args:
        module: The module.
        site: The module as a matrix, where it is one.
        config: The method's configuration.

    Raises:
        ConfigError: It cannot be seen how wide the module's output is.
    """

    kinds = frozenset({"linear", "module"})
    splits_rows = False

    def __init__(self, module: nn.Module, site: Site | None, config: Any) -> None:
        super().__init__(site, config)
        self.on = [] if site is not None else [module]  # in a list, so that it is no submodule
        width = site.shape[0] if site is not None else output_width(module)
        if width is None:
            raise ConfigError(
                f"a {type(module).__name__} has no layer from which the width of its output is seen. Name a projection "
                "or a module that ends in one."
            )
        self.width = width

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Adapter:
        return cls(module, site, config)

    @property
    def device(self) -> torch.device | None:
        like = next((parameter for module in self.on for parameter in module.parameters()), None)
        return super().device if like is None else like.device

    def change(self, h: Tensor, x: Tensor) -> Tensor:
        """The new output `(batch, ..., width)`, for the module's output and its input `(batch, ..., in)`."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h = self.output(x, base)
        if base.rows is None:
            return self.change(h, x)
        own = base.rows.nonzero()[:, 0]
        return h.index_copy(0, own, self.change(h[own], x[own]))

    def output(self, x: Tensor, base: Base) -> Tensor:
        """What lies below gives.

        Raises:
            StateError: It is no tensor of the width that was expected.
        """
        h = base(x)
        if not isinstance(h, Tensor) or h.shape[-1] != self.width:
            given = f"of shape {tuple(h.shape)}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
            raise StateError(
                f"A {type(self).__name__} adapter expected its module ({type(base.layer).__name__}) to give a tensor "
                f"(..., {self.width}); what came is {given}. Target the projection that the output comes from."
            )
        return h
