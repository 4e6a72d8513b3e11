"""Ladder side network: small blocks beside the model's, so that no gradient passes through the model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from veneer.adapter import Adapter, Base, Shared
from veneer.attention import configs_of
from veneer.config import ModuleConfig, check_positive
from veneer.errors import ConfigError, TargetError
from veneer.registry import register
from veneer.side_networks import beside, stack_of
from veneer.sites import Site
from veneer.targets import walk

_TEMPERATURE = 0.1  # of the gates, as in the paper
_INNER = ("intermediate_size", "ffn_dim", "n_inner")  # names of the feed-forward width


class Side(Shared):
    """The state that goes from one side block to the next, and what all were pruned by."""

    def __init__(self, sites: Mapping[str, Site], config: LadderConfig) -> None:
        super().__init__(sites, config)
        self.rungs: list[Any] = []  # adapters, first block first; in a list, so that they are no submodules
        self.channels: Tensor | None = None
        self.state: Tensor | None = None

    def reset(self) -> None:
        """Chooses the channels of the model's hidden state that the side network begins with: those of most weight."""
        width, narrow = self.rungs[0].width, self.rungs[0].narrow
        scores = torch.zeros(width)
        for rung in self.rungs:
            for tensor in _tensors(rung.block[0]).values():
                for dim in range(tensor.dim()):
                    if tensor.dim() > 1 and tensor.shape[dim] == width:
                        scores += (
                            tensor.detach().float().square().sum([d for d in range(tensor.dim()) if d != dim]).cpu()
                        )
        self.channels = scores.topk(narrow).indices.sort().values


class Ladder(Adapter):
    r"""Runs a narrow copy of every block beside it, and adds what the last one gives to the last block's output.

        s_i = Block_i(mu_i s_(i-1) + (1 - mu_i) D_i h_i),     s_0 = D_0 h_0,     h_N' = h_N + U s_N

    h_0 is the first block's input and h_i the output of block i, both without gradient: no graph is built through the
    model, so memory does not grow with its width. mu_i = sigmoid(gate_i / 0.1). The side blocks are of the model's own
    class, `reduction` times narrower (heads keep their width where positions are rotary), and start as the model's own
    weights at the channels of most weight; D_i picks these channels. In the paper U s_N replaces h_N; here it is added,
    so that a new one changes nothing.

    Side blocks have keys and values of their own, in the model's cache behind its own: cached decoding gives the same
    logits. In a mixed batch it is run for all rows and added to its own.

    Trains: the side blocks; D_i (d / reduction, d), gates, U (d, d / reduction), zero at the start.
    Start: equals the base model exactly. Merge: impossible. For decoders and encoders; not encoder-decoders.
    Raises: TargetError where there are no blocks; ConfigError where blocks of that width cannot be made.
    Source: Sung, Cho and Bansal 2022, arXiv:2206.06522, section 3.
    """

    shares = Side
    shared: Side
    splits_rows = False

    kinds = frozenset({"module"})

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Adapter:
        return cls(module, config)

    def __init__(self, module: nn.Module, config: LadderConfig) -> None:
        super().__init__(None, config)
        self.block: list[nn.Module] = [module]  # until it has been pruned; in a list, so that it is no submodule
        found = configs_of(module)
        attends = any("Attention" in type(part).__name__ for part in module.children())
        if not found or not attends or "config" not in inspect.signature(type(module).__init__).parameters:
            raise TargetError(
                f"{type(module).__name__} is no transformer block that a narrow copy can be made of. Leave "
                "target_modules out to have all blocks."
            )
        self.index = next((m.layer_idx for m in module.modules() if getattr(m, "layer_idx", None) is not None), 0)
        self.width, self.blocks = int(found[0].hidden_size), int(found[0].num_hidden_layers)
        settings = narrowed(found[0], config.reduction)
        self.narrow, self.rotary = int(settings.hidden_size), is_rotary(found[0])
        place = {"layer_idx": self.index} if "layer_idx" in inspect.signature(type(module).__init__).parameters else {}
        try:
            self.side = type(module)(settings, **place)
        except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"reduction={config.reduction}: no {type(module).__name__} of width {self.narrow} can be made "
                f"({error}). Choose another reduction."
            ) from error
        self.side.train()
        self.down = nn.Parameter(torch.empty(self.narrow, self.width))
        self.gate = nn.Parameter(torch.empty(()))
        self.first: nn.Parameter | None = None
        self.up: nn.Parameter | None = None

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        rungs = self.shared.rungs
        if rungs:
            rungs[-1].up = None
        else:
            self.first = nn.Parameter(torch.empty(self.narrow, self.width))
        self.up = nn.Parameter(torch.empty(self.width, self.narrow))  # of the last one so far
        rungs.append(self)

    def reset(self) -> None:
        assert self.shared.channels is not None
        channels = self.shared.channels.to(self.down.device)
        with torch.no_grad():
            for down in filter(lambda tensor: tensor is not None, (self.down, self.first)):
                down.zero_()  # type: ignore[union-attr]
                down[torch.arange(self.narrow), channels] = 1.0  # type: ignore[index]
        nn.init.zeros_(self.gate)
        if self.up is not None:
            nn.init.zeros_(self.up)
        prune(self.block[0], self.side, self.shared.channels, self.width, self.rotary)
        self.block.clear()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        args, kwargs = self._own_cache(base)
        if self.first is not None:
            self.shared.state = F.linear(x.detach().to(self.first.dtype), self.first)
        y = base(x)
        mu = torch.sigmoid(self.gate / _TEMPERATURE)
        assert self.shared.state is not None
        mixed = mu * self.shared.state + (1 - mu) * F.linear(y.detach().to(self.down.dtype), self.down)
        state = self.side(mixed, *args, **kwargs)
        state = state[0] if isinstance(state, tuple) else state
        self.shared.state = state
        if self.up is None:
            return y
        self.shared.state = None
        delta = F.linear(state, self.up)
        if base.rows is not None:
            delta = delta * base.rows[:, None, None]
        return y + delta.to(y.dtype)

    def _own_cache(self, base: Base) -> tuple[list[Any], dict[str, Any]]:
        """The block's further arguments, with the side network's part of a cache in the cache's place."""

        def own(given: Any) -> Any:
            first = self.shared.rungs[0].index
            return beside(given, self.shared, self.blocks, first) if isinstance(given, Cache) else given

        return [own(given) for given in base.args], {name: own(given) for name, given in base.kwargs.items()}

    def to_file(self) -> dict[str, Tensor]:
        return {f"ladder_{name}": tensor for name, tensor in super().to_file().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file({name.removeprefix("ladder_"): tensor for name, tensor in tensors.items()})
        self.block.clear()


def is_rotary(config: Any) -> bool:
    """Whether heads have a width of their own, which positions are turned in."""
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "head_dim", None))


def narrowed(given: Any, reduction: int) -> Any:
    """A model's configuration for blocks that are `reduction` times narrower."""
    config = copy.deepcopy(given)
    heads, width = config.num_attention_heads, config.hidden_size
    narrow = max(1, width // reduction)
    fewer = max(1, heads // reduction)
    if is_rotary(given):  # blocks are handed the rotations of the model's heads
        config.head_dim = getattr(given, "head_dim", None) or width // heads
        pairs = getattr(config, "num_key_value_heads", None)
        if pairs is not None:
            config.num_key_value_heads = next(k for k in range(max(1, pairs // reduction), 0, -1) if fewer % k == 0)
    else:
        fewer = next(h for h in range(min(fewer, narrow), 0, -1) if narrow % h == 0)
    config.hidden_size, config.num_attention_heads = narrow, fewer
    for name in _INNER:
        if getattr(config, name, None):
            setattr(config, name, max(1, getattr(given, name) // reduction))
    return config


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """A block's own tensors by path, whatever adapters are on it; those that are kept quantised left out."""
    modules = {"": block, **dict(walk(block))}
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    }


@torch.no_grad()
def prune(block: nn.Module, side: nn.Module, channels: Tensor, width: int, heads: bool) -> None:
    """Gives the side block those of the block's weights that fall on chosen channels.

    Hidden channels are those given; of the feed-forward width, those of most weight. What has no counterpart keeps its
    random start.

    Args:
        block: The model's block.
        side: The narrow one.
        channels: The hidden channels.
        width: How many the model has.
        heads: Whether heads are kept whole: then they are the first ones.
    """
    whole, narrow = _tensors(block), dict(side.named_parameters())
    pairs = {name: (whole[name], small) for name, small in narrow.items() if name in whole}
    chosen: dict[tuple[int, int], Tensor] = {(width, len(channels)): channels}
    chosen[3 * width, 3 * len(channels)] = torch.cat([channels + i * width for i in range(3)])  # fused projections
    named = {name.rpartition(".")[0]: None for name, (large, _) in pairs.items() if "att" in name and large.dim() > 1}
    attention = list(named) if heads else []  # projections; the last one leads back

    def is_heads(name: str, dim: int) -> bool:
        path = name.rpartition(".")[0]
        return path in attention and dim == (1 if path == attention[-1] else 0)

    scores: dict[tuple[int, int], Tensor] = {}
    for name, (large, small) in pairs.items():
        for dim in range(large.dim()) if large.dim() == small.dim() else ():
            size = (large.shape[dim], small.shape[dim])
            if size not in chosen and size[0] != size[1] and not is_heads(name, dim):
                others = [d for d in range(large.dim()) if d != dim]
                weight = large.float().square().sum(others).cpu() if others else large.float().square().cpu()
                scores[size] = scores.get(size, 0) + weight
    chosen |= {size: score.topk(size[1]).indices.sort().values for size, score in scores.items() if size not in chosen}
    for name, (large, small) in pairs.items():
        if large.dim() == small.dim():
            part = large
            for dim in range(large.dim()):
                if large.shape[dim] != small.shape[dim]:
                    size = (large.shape[dim], small.shape[dim])
                    index = torch.arange(size[1]) if is_heads(name, dim) else chosen[size]
                    part = part.index_select(dim, index.to(part.device))
            small.copy_(part)


@register("ladder")
@dataclass
class LadderConfig(ModuleConfig):
    """Configuration of `Ladder`.

    Args:
        reduction: Width of the model over that of the side network.

    Raises:
        ConfigError: A reduction that is not positive.
    """

    adapter = Ladder
    peft_name = "LADDER"
    learning_rates = {"classification": 4e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only

    reduction: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "reduction")
        if self.layers_to_transform is not None:
            raise ConfigError("LadderConfig: layers_to_transform has no meaning; name blocks in target_modules.")

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        _, paths = stack_of(modules, "A ladder side network")
        return self if self.target_modules is not None else replace(self, target_modules=paths)
