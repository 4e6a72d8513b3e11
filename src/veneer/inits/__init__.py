"""Starting values of low-rank factors, one initialiser a file.

An initialiser fills `down` and `up` in place; it may not change the frozen weight.
"""

from collections.abc import Callable

from torch import Tensor

from veneer.errors import ConfigError, nearest
from veneer.inits.gaussian import gaussian
from veneer.inits.kaiming import kaiming, kaiming_nonzero
from veneer.inits.orthogonal import orthogonal

Initialiser = Callable[[Tensor, Tensor, str], None]

INITIALISERS: dict[bool | str, Initialiser] = {
    True: kaiming,
    False: kaiming_nonzero,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}


def check(name: bool | str) -> None:
    """Refuses a name that is not known.

    Raises:
        ConfigError: So.
    """
    if name not in INITIALISERS:
        known = [str(key) for key in INITIALISERS]
        raise ConfigError(
            f"init_lora_weights={name!r} is not in this version of Veneer; it has {', '.join(known)}."
            f"{nearest(str(name), known)}"
        )


def start(name: bool | str, down: Tensor, up: Tensor, kind: str) -> None:
    """Fills the factors with the named starting values.

    Args:
        name: Key of `INITIALISERS`.
        down: `(r, in)`.
        up: `(out, r)`.
        kind: Kind of the site.
    """
    INITIALISERS[name](down, up, kind)
