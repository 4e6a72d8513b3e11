"""A run on an int8 base: what it keeps of it, and that whatever uses the run has the same base."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from veneer.commands.merging import merge_folder
from veneer.errors import CheckpointError, ConfigError
from veneer.options import RunOptions
from veneer.stores.int8 import Int8Linear
from veneer.training import folder as run_folder
from veneer.training.run import evaluate, load_trained, train

Options = Callable[..., RunOptions]


def test_the_run_keeps_what_was_quantised_and_others_use_it(classify: Options, tmp_path: Path) -> None:
    options, said = classify(), io.StringIO()
    options.model.quantize = "int8"
    result = train(options, console=Console(file=said, width=300))
    folder = Path(result.folder)
    assert "int8: 13 of 14 linear layers" in said.getvalue()
    assert result.after["loss"] < result.before["loss"]

    kept = run_folder.read_quantization(folder)
    assert kept.layers["classifier"].exact == "a head"
    model, *_ = load_trained(folder)
    held = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(held) == 13
    assert [tuple(layer.outliers.tolist()) for layer in held] == [
        form.columns for form in kept.layers.values() if form.exact is None
    ]
    assert evaluate(folder)["loss"] == pytest.approx(result.after["loss"], rel=1e-4)

    # A merge goes into the weights as they were before.
    merge_folder(str(folder), str(tmp_path / "plain"))
    assert {str(t.dtype) for t in load_file(tmp_path / "plain" / "model.safetensors").values()} == {"torch.float32"}

    (folder / run_folder.QUANTIZATION).unlink()
    with pytest.raises(CheckpointError, match=r"quantization\.json cannot be read .* which layers were quantised"):
        load_trained(folder)


def test_a_map_of_devices_is_refused(classify: Options) -> None:
    options = classify()
    options.model.quantize, options.model.device_map = "int8", "auto"
    with pytest.raises(ConfigError, match=r"model\.quantize is 'int8' and model\.device_map 'auto'.*Remove one"):
        train(options, console=Console(file=io.StringIO()))
