"""How a frozen weight is kept in memory.

A store reads a layer's tensor as a plain floating-point one and writes one back in the layer's own form. Sites use
stores and know nothing about quantisation; a store knows nothing about what the tensor means.
"""

import importlib
import sys

from torch import nn

from veneer.stores.dense import DenseStore, check_dense, is_offloaded, owner_of
from veneer.stores.packed import PackedStore
from veneer.stores.store import Store

_DENSE = DenseStore()
_PACKED = PackedStore()  # needs no package: it goes by the layout
_FOUND: dict[str, Store] = {}
# Module that the layers of a store are from -> the store. Before the module is imported there can be no such layer.
_HOMES = {
    "veneer.stores.int8": "veneer.stores.int8.Int8Store",
    "veneer.evaluation.outlines": "veneer.evaluation.outlines.OutlineStore",
    "veneer.stores.nf4_int8": "veneer.stores.nf4_int8.Nf4Int8Store",  # before that of the class that its layers extend
    "bitsandbytes.nn": "veneer.stores.bitsandbytes.BitsAndBytesStore",
    "torchao.utils": "veneer.stores.torchao.TorchAoStore",
    "hqq.core.quantize": "veneer.stores.hqq.HqqStore",
}

__all__ = ["DenseStore", "Store", "is_offloaded", "owner_of", "quantised_store", "rounds_inputs", "store_of"]


def quantised_store(module: nn.Module) -> Store | None:
    """The store of a layer whose weight is kept in another form than it is used in; none where it is kept plain."""
    for home, path in _HOMES.items():
        if home in sys.modules:
            store = _FOUND.get(home) or _found(home, path)
            if store.holds(module):
                return store
    return _PACKED if _PACKED.holds(module) else None


def _found(home: str, path: str) -> Store:
    where, _, name = path.rpartition(".")
    _FOUND[home] = getattr(importlib.import_module(where), name)()
    return _FOUND[home]


def rounds_inputs(model: nn.Module) -> bool:
    """Whether layers of the model round their inputs: equal up to rounding then means less."""
    stores = (quantised_store(module) for module in model.modules())
    return any(store is not None and store.rounds_inputs for store in stores)


def store_of(module: nn.Module) -> Store:
    """The store that understands how `module` keeps its tensors.

    Raises:
        TargetError: None does.
    """
    store = quantised_store(module)
    if store is None:
        check_dense(module)
        return _DENSE
    return store
