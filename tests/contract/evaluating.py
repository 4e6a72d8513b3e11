"""The contract for methods that are random in training: what they promise holds in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract.places import Spot


def hold(
    name: str,
    settings: dict[str, Any],
    spot: Spot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    further: tuple[str, ...],
) -> None:
    """Runs the promises that all such methods make, and further ones, on models in evaluation mode.

    Args:
        name: The method.
        settings: Its settings.
        spot: Where it is tried.
        tmp_path: For files.
        monkeypatch: Of the test that calls this.
        further: Names of more tests of the contract.
    """
    from contract import test_contract, test_torch  # they read the method's own test module

    make = test_contract.adapted
    for module in (test_contract, test_torch):
        monkeypatch.setattr(module, "adapted", lambda *args: make(*args).eval())
    promises: list[Callable[..., None]] = [
        test_contract.test_the_adapter_has_an_effect_that_disabling_removes,
        test_contract.test_merging_is_forward_and_unmerging_is_bit_exact,
        test_contract.test_low_precision_layers_merge_to_rounding,
        test_contract.test_copies_and_pickles_are_independent,
        test_contract.test_a_second_adapter_leaves_the_first_alone,
        test_torch.test_it_computes_under_autocast,
        *(getattr(test_contract, one, None) or getattr(test_torch, one) for one in further),
    ]
    for promise in promises:
        promise(name, settings, spot)
    test_contract.test_saved_and_loaded_is_the_same(name, settings, spot, tmp_path)
