"""Where the frozen part of a model ends: its blocks, and what is trained in them, beside them and below them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from veneer import structure
from veneer.adapted import Adapted, wrappers
from veneer.errors import UnsupportedError
from veneer.training.row_keys import LOOKING_IN


def stack(base: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the blocks, lowest first.

    Raises:
        UnsupportedError: They are not one stack.
    """
    if structure.is_encoder_decoder(base):
        raise UnsupportedError("an encoder-decoder has two stacks of blocks, of which the lower part is not one piece")
    paths = structure.blocks(modules)
    if not paths:
        raise UnsupportedError(f"{type(base).__name__} has no blocks that are known as such")
    if len({path.rpartition(".")[0] for path in paths}) > 1:
        raise UnsupportedError(f"{type(base).__name__} has several stacks of blocks")
    return sorted(paths, key=lambda path: int(path.rpartition(".")[2]))


def carriers(model: nn.Module) -> Iterator[nn.Module]:
    """Wrappers with an active adapter, and modules outside of wrappers with trained parameters of their own."""
    found = list(wrappers(model))
    within = {id(inner) for wrapper in found for inner in wrapper.adapters.modules()}
    for wrapper in found:
        if any(name in wrapper.adapters for name in wrapper.switch.active):
            yield wrapper
    for module in model.modules():
        if id(module) not in within and any(p is not None and p.requires_grad for p in module._parameters.values()):
            yield module


def is_trained(block: nn.Module) -> bool:
    return next(carriers(block), None) is not None


def refuse(base: nn.Module) -> None:
    """Refuses what makes a row depend on more than itself.

    Raises:
        UnsupportedError: So.
    """
    for wrapper in wrappers(base):
        for name in wrapper.switch.active:
            if name in wrapper.adapters and wrapper.adapters[name].mixes_rows:
                kind = type(wrapper.adapters[name]).__name__
                raise UnsupportedError(f"a {kind} adapter looks at all positions of a batch, padding included")
    config = getattr(base, "config", None)
    for name in LOOKING_IN:
        if getattr(config, name, False):
            raise UnsupportedError(f"the model's config asks for something out of every block ({name})")


def check_trained(model: nn.Module, base: nn.Module, before: Sequence[nn.Module], above: Sequence[nn.Module]) -> None:
    """Refuses a frozen part below which, or beside which, something is trained.

    Args:
        model: With all that is trained.
        base: In it.
        before: The modules that run before the boundary.
        above: The blocks behind it.

    Raises:
        UnsupportedError: So.
    """
    behind = {id(m) for block in above for m in block.modules()}
    ran = {id(m) for m in before}
    inside = {id(m) for m in base.modules()}
    names = {id(m): path for path, m in model.named_modules()}
    found = list(carriers(model))
    for carrier in found:
        if id(carrier) not in behind and (id(carrier) in ran or id(carrier) not in inside):
            name = carrier.path if isinstance(carrier, Adapted) else names[id(carrier)] or type(carrier).__name__
            raise UnsupportedError(f"{name} is trained, which runs before the blocks")
    if not found:
        raise UnsupportedError("nothing is trained")
