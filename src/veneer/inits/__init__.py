"""Starting values of low-rank factors, one initialiser a file.

An initialiser fills `down` and `up` in place and never changes the frozen weight. One that `moves` part of the weight
into the factors is made good by the method: it subtracts the starting factors, which it keeps (see `methods.lora`).
One with `observe` needs data, and gives what `Start.seen` then holds for each place.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from veneer.config import Nested, nested
from veneer.errors import ConfigError, VeneerWarning, nearest
from veneer.inits import corda, eva, loftq, lora_ga
from veneer.inits.gaussian import gaussian
from veneer.inits.kaiming import kaiming, kaiming_nonzero
from veneer.inits.mica import mica
from veneer.inits.olora import olora
from veneer.inits.orthogonal import orthogonal
from veneer.inits.pissa import fast_pissa, pissa
from veneer.inits.start import Start

__all__ = ["INITIALISERS", "Initialiser", "Start", "find", "settle"]


@dataclass(frozen=True)
class Initialiser:
    """How factors start.

    Args:
        fill: Fills them.
        moves: Whether they start as part of the frozen weight, which then lacks it.
        repeats: Whether they follow from the frozen weight alone, so that they can be made again.
        drawn: Whether chance has a part in that, so that another program's are not quite the same.
        prepare: Makes them from data; `Adapter.prepare` of the method.
        settings: Field of the configuration with settings of its own, and their class.
    """

    fill: Callable[[Start], Any]
    moves: bool = False
    repeats: bool = False
    drawn: bool = False
    prepare: Callable[[dict[str, Any], Any, Any], Any] | None = None
    settings: tuple[str, type[Nested]] | None = None


INITIALISERS: dict[bool | str, Initialiser] = {
    True: Initialiser(kaiming),
    False: Initialiser(kaiming_nonzero),
    "gaussian": Initialiser(gaussian),
    "orthogonal": Initialiser(orthogonal),
    "pissa": Initialiser(pissa, moves=True, repeats=True),
    "olora": Initialiser(olora, moves=True, repeats=True),
    "mica": Initialiser(mica),
    "loftq": Initialiser(loftq.loftq, settings=("loftq_config", loftq.LoftQConfig)),
    "eva": Initialiser(kaiming, prepare=eva.prepare, settings=("eva_config", eva.EvaConfig)),
    "corda": Initialiser(corda.corda, moves=True, prepare=corda.prepare, settings=("corda_config", corda.CordaConfig)),
    "lora_ga": Initialiser(
        lora_ga.lora_ga, moves=True, prepare=lora_ga.prepare, settings=("lora_ga_config", lora_ga.LoraGAConfig)
    ),
}

_FAST = "pissa_niter_"

_foreseen: WeakKeyDictionary[nn.Module, tuple[bool | str, Mapping[str, Tensor]]] = WeakKeyDictionary()


def foresee(layer: nn.Module, name: str, seen: Mapping[str, Tensor]) -> None:
    """Keeps what was seen of data at a layer until an adapter that starts from it is put on."""
    _foreseen[layer] = (name, seen)


def foreseen(layer: nn.Module, name: bool | str) -> Mapping[str, Tensor]:
    """Hands out what `foresee` has kept for this initialiser."""
    return _foreseen.pop(layer)[1] if layer in _foreseen and _foreseen[layer][0] == name else {}


def find(name: bool | str) -> Initialiser:
    """The initialiser of that name; `pissa_niter_<k>` is one for every number of iterations k.

    Raises:
        ConfigError: There is none.
    """
    if isinstance(name, str) and name.startswith(_FAST) and name.removeprefix(_FAST).isdigit():
        fill = functools.partial(fast_pissa, iterations=int(name.removeprefix(_FAST)))
        return Initialiser(fill, moves=True, repeats=True, drawn=True)
    # True and 1 are the same key, but not the same setting.
    if name not in INITIALISERS or not isinstance(name, bool | str):
        known = [*map(str, INITIALISERS), f"{_FAST}<k>"]
        raise ConfigError(
            f"init_lora_weights={name!r} is not in this version of Veneer; it has {', '.join(known)}."
            f"{nearest(str(name), known)}"
        )
    return INITIALISERS[name]


def settle(config: Any) -> None:
    """Checks the initialiser that a configuration names, and makes its settings what its class says.

    Raises:
        ConfigError: There is none of that name, or a setting is not known.
    """
    chosen = find(config.init_lora_weights)
    for name, other in INITIALISERS.items():
        if other.settings is None:
            continue
        field, cls = other.settings
        given = getattr(config, field)
        if other is chosen:
            setattr(config, field, nested(cls, given or {}, f"LoraConfig: {field}"))
        elif given:
            warnings.warn(
                f"{field} has no effect: init_lora_weights is {config.init_lora_weights!r}, not {name!r}.",
                VeneerWarning,
                stacklevel=4,
            )
            setattr(config, field, {} if cls is loftq.LoftQConfig else None)  # what peft's files say
