"""What networks that run beside a model's blocks have in common: where the blocks are, and a cache of their own.

Layers of a side network's cache lie behind those of the model, in the model's own cache object. So beams are reordered,
rows repeated and tokens taken back in both alike, whatever generates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from veneer.adapted import Switch
from veneer.adapter import Base
from veneer.errors import StateError, TargetError, UnsupportedError
from veneer.structure import blocks


def stack_of(modules: Mapping[str, nn.Module], what: str) -> tuple[str, list[str]]:
    """Path of the module whose call goes through all transformer blocks, and those of the blocks, in order.

    Args:
        modules: All modules of the model by path.
        what: The method, for messages.

    Raises:
        TargetError: There is no single stack of blocks, or nothing around it.
    """
    paths = blocks(modules)
    lists = {path.rpartition(".")[0] for path in paths}
    if len(lists) != 1 or len(modules[next(iter(lists))]) != len(paths):  # type: ignore[arg-type]
        raise TargetError(
            f"{what} runs beside one stack of transformer blocks; this model has {len(lists)} (found {sorted(lists)}). "
            "Encoder-decoders and models whose blocks are not all alike cannot have it."
        )
    owner = lists.pop().rpartition(".")[0]
    if not owner:
        raise TargetError(
            f"{what} needs a module around the transformer blocks, and they are in the model itself. Load the model "
            "with a head, for example with AutoModelForCausalLM."
        )
    return owner, paths


def cache_of(base: Base) -> Cache | None:
    """The cache that a stack of blocks is called with; made and passed on where it would make one itself.

    Raises:
        UnsupportedError: A kind of cache that takes no further layers.
    """
    cache, config = base.kwargs.get("past_key_values"), getattr(base.layer, "config", None)
    wanted = base.kwargs.get("use_cache")
    if wanted is None:
        wanted = getattr(config, "use_cache", False) and not base.layer.training
    if cache is None and wanted:
        cache = DynamicCache(config=config)
        base.kwargs = {**base.kwargs, "past_key_values": cache}
    return cache


def beside(cache: Cache | None, owner: object, blocks: int, first: int = 0, layers: int | None = None) -> Cache | None:
    """The layers in a cache that belong to a side network, as a cache of their own.

    Args:
        cache: The model's; none where nothing is cached.
        owner: Whose layers they are.
        blocks: How many blocks the model has.
        first: The first block that there is something beside.
        layers: How many layers the side network has, each like the model's; as many as blocks if none.

    Raises:
        UnsupportedError: A kind of cache that takes no further layers.
        StateError: The cache was filled without the side network.
    """
    if cache is None:
        return None
    count = blocks if layers is None else layers
    places: dict[int, int] = vars(cache).setdefault("_veneer_beside", {})
    if id(owner) not in places:
        present = getattr(cache, "layers", None)
        kind = getattr(cache, "layer_class_to_replicate", None)
        while present is not None and kind is not None and len(present) < blocks:
            present.append(kind())
        if present is None or any(not isinstance(layer, DynamicLayer) for layer in present):
            raise UnsupportedError(
                f"A {type(cache).__name__} has a fixed number of layers or fixed lengths, so a side network has no "
                "place in it. Generate with the default cache (leave out cache_implementation)."
            )
        if any(layer.get_seq_length() for layer in present[first:blocks]):
            raise StateError(
                "The cache was filled while another adapter was active, so the side network has not seen those tokens. "
                "Begin with an empty cache."
            )
        places[id(owner)] = len(present)
        present.extend([_like(present[min(i, blocks - 1)]) for i in range(count)])
    start = places[id(owner)]
    view = DynamicCache()
    view.layers = cache.layers[start : start + count]
    return view


def _like(layer: Any) -> Any:
    """An empty layer of the same kind."""
    made = copy.copy(layer)
    made.reset()
    return made


@contextmanager
def alone(switch: Switch) -> Iterator[None]:
    """Within it the model runs without any adapter."""
    before = switch.enabled, switch.rows
    switch.enabled, switch.rows = False, None
    try:
        yield
    finally:
        switch.enabled, switch.rows = before
