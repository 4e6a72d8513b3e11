"""How a frozen weight is kept in memory.

A store reads a layer's tensor as a plain floating-point one and writes one back in the layer's own form. Sites use
stores and know nothing about quantisation; a store knows nothing about what the tensor means.
"""

from torch import nn

from veneer.stores.dense import DenseStore, check_dense, is_offloaded, owner_of
from veneer.stores.store import Store

_DENSE = DenseStore()

__all__ = ["DenseStore", "Store", "is_offloaded", "owner_of", "store_of"]


def store_of(module: nn.Module) -> Store:
    """The store that understands how `module` keeps its tensors.

    Raises:
        TargetError: None does.
    """
    check_dense(module)
    return _DENSE
