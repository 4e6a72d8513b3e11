"""Sums and differences of sparse adapters, entry by entry: task arithmetic without loss.

    v_i = sum over adapters of w_a v_a,i     for every entry i that any of them trains

Nothing is cut to a rank and nothing dense is formed; an entry of one adapter alone keeps its value times the weight,
and entries that cancel out are dropped. Source: Ansell et al. 2022, arXiv:2110.07560, section 3.3; the arithmetic is
that of Ilharco et al. 2023, arXiv:2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.adapted import adapters_of
from veneer.attach import detach
from veneer.errors import ConfigError, UnsupportedError
from veneer.methods.sparse import Sparse, SparseConfig, index_type
from veneer.targets import exactly, walk

if TYPE_CHECKING:
    from veneer.model import PeftModel


def is_sparse(model: PeftModel, adapters: Sequence[str]) -> bool:
    """Whether all of these adapters are sparse."""
    return all(issubclass(model.peft_config[name].method(), Sparse) for name in adapters)


def combine(model: PeftModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Adds the sparse adapter that is the weighted sum of others; a weight of -1 takes one away.

    Args:
        model: Holds the adapters.
        adapters: Their names; any methods that train single entries of weights.
        weights: One weight each.
        adapter_name: Name of the new adapter.

    Raises:
        ConfigError: There is not one weight for each adapter.
        UnsupportedError: An adapter trains more than entries, or has not been pruned yet.
    """
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights were given; one weight each is needed.")
    places: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, weight in zip(adapters, weights, strict=True):
        for wrapper, adapter in adapters_of(model.get_base_model(), name):
            indices, values = _entries(name, adapter)
            places.setdefault(wrapper.place, []).append((indices, weight * values))
    found = {path: _sum(parts) for path, parts in places.items()}
    root = model.get_base_model()
    modules = dict(walk(root))
    bare = [path for path in found if path not in modules]
    config = SparseConfig(
        task_type=None,
        target_modules=exactly([path for path in found if path in modules], modules),
        target_parameters=bare or None,
    )
    model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
    try:
        for wrapper, adapter in adapters_of(root, adapter_name):
            assert isinstance(adapter, Sparse)
            indices, values = found[wrapper.place]
            adapter.put("indices", indices.to(index_type(adapter.site)))
            adapter.put("values", values)
    except Exception:
        detach(root, adapter_name)
        del model.peft_config[adapter_name]
        raise
    model.peft_config[adapter_name].task_type = model.peft_config[adapters[0]].task_type


@torch.no_grad()
def _entries(name: str, adapter: object) -> tuple[Tensor, Tensor]:
    """Positions and values of an adapter at one place, rising.

    Raises:
        UnsupportedError: There is more to it.
    """
    if not isinstance(adapter, Sparse):
        raise UnsupportedError(
            f"Adapter {name!r} trains whole modules or tokens beside its entries ({type(adapter).__name__}), and those "
            "have no sum. Combine adapters that were trained without modules_to_save."
        )
    if getattr(adapter, "delta", None) is not None:
        raise UnsupportedError(
            f"Adapter {name!r} has a dense delta, which diff pruning prunes in training. Save it and load it again."
        )
    if getattr(adapter, "low_rank", None) is not None:
        raise UnsupportedError(
            f"Adapter {name!r} has a low-rank part beside its entries. Merge it into the model instead."
        )
    values, indices = adapter.rising()
    return indices.long(), values.detach()


@torch.no_grad()
def _sum(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Positions and values of a sum; what cancels out is left out."""
    entries = torch.cat([indices for indices, _ in parts]).unique()
    wide = parts[0][1].dtype
    for _, values in parts[1:]:
        wide = torch.promote_types(wide, values.dtype)
    total = torch.zeros(entries.shape, dtype=wide, device=entries.device)
    for indices, values in parts:
        total[torch.searchsorted(entries, indices)] += values.to(wide)
    left = total != 0
    return entries[left], total[left]
