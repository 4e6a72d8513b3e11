"""Data sets of the Hugging Face hub, or of its local cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


def load_hub(name: str, split: str | None, prefer: Sequence[str], near: str = "") -> tuple[Dataset, str]:
    """One split of a hub data set, and how to call it in messages.

    Args:
        name: `owner/name`, or `owner/name/configuration` where the data set has several.
        split: As in `datasets.load_dataset`, slices such as `train[:10%]` included.
        prefer: Splits to take, the first that exists, when `split` is none.
        near: Ends the message about a failure, with local names that may have been meant.

    Raises:
        DataError: If it cannot be loaded, or none of the preferred splits exists.
    """
    import datasets

    owner_and_name, configuration = name, None
    if name.count("/") == 2:
        owner_and_name, _, configuration = name.rpartition("/")
    try:
        loaded = datasets.load_dataset(owner_and_name, configuration, split=split)
    # The network, the hub's client and each file format raise errors of their own; all end here.
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise DataError(
            f"{name!r} is no file, folder or sample here, and loading it from the hub failed with "
            f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}{near}\nCheck the spelling and "
            "the network, name a local file or folder, or add what is missing: `owner/name/configuration`, data.split."
        ) from error
    if split is not None:
        return loaded, f"{name} ({split})"
    found = next((wanted for wanted in prefer if wanted in loaded), None)
    if found is None and len(loaded) == 1:
        found = next(iter(loaded))
    if found is None:
        raise DataError(
            f"{name} has the splits {', '.join(loaded)}, but none of {', '.join(prefer)}."
            f"{nearest(prefer[0], loaded)} Name one as in `{name}:{next(iter(loaded))}`."
        )
    return loaded[found], f"{name} ({found})"
