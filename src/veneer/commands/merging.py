"""From an adapter's folder to a plain model's: merged, written, read back and compared before it gets its name."""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from veneer.auto import AutoPeftModel
from veneer.checkpoint import read
from veneer.config import PeftConfig
from veneer.errors import ConfigError, UnsupportedError, VeneerError
from veneer.model import PeftModel
from veneer.quantised_bases import dequantise
from veneer.samples import resolve_model
from veneer.structure import is_encoder_decoder
from veneer.training import checkpoints, folder
from veneer.training.models import load_tokenizer
from veneer.training.trained import load_adapted

# Largest difference of the outputs, relative to the largest of them. A merged weight is rounded to the type that it is
# kept in, which the sum of a frozen weight and an adapter never was.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_PROBES, _LENGTH = 2, 16


@dataclass(frozen=True)
class Merged:
    """What merging came to.

    Args:
        folder: The plain model.
        difference: Largest difference between its outputs and the adapted model's, relative to the largest output.
        allowed: What the difference may be for this type of weights.
    """

    folder: str
    difference: float
    allowed: float


def merge_folder(adapter: str, output: str, base: str | None = None) -> Merged:
    """Write a plain model with an adapter merged into its weights, and its tokenizer.

    Args:
        adapter: A run's output folder, or any adapter's folder.
        output: A new or empty folder.
        base: The base model, if it is not where the adapter says.

    Raises:
        ConfigError: The output folder is taken, or the base model is not named or found.
        CheckpointError: The adapter's files are missing, damaged, or do not fit the base model; or the disk is full.
        UnsupportedError: The method cannot be merged.
        VeneerError: The written model gives other outputs than the adapted one; nothing is left of it.
    """
    target = Path(output).expanduser().absolute()
    require_free(target)
    model, tokenizer = load_folder(Path(adapter).expanduser(), base)
    probe = _probe(model)
    dequantise(model)  # what 4 bits have made of the weights is what was trained on, and is merged into unrounded
    adapted = _outputs(model, probe)
    kind: Any = type(model.get_base_model())
    dtype = model.dtype
    plain: Any = model.merge_and_unload(safe_merge=True)
    allowed = TOLERANCES.get(dtype, max(TOLERANCES.values()))
    with checkpoints.aside(target) as partial:
        plain.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        # What was written is what counts; the model in memory gives way to it.
        del model, plain
        difference = _difference(adapted, _outputs(kind.from_pretrained(partial, dtype=dtype), probe))
        if not difference <= allowed:  # also true where it is not a number
            raise VeneerError(
                f"The merged model does not give the outputs of {adapter}: they differ by {difference:.2g} of the "
                f"largest, {allowed:.2g} is allowed for {dtype}. Nothing was written. Merge in a wider type "
                "(model.dtype: float32 in the run), or use the adapter without merging."
            )
        _open_to_others(partial)
        checkpoints.sync(partial)
        partial.rename(target)
    return Merged(str(output), difference, allowed)


def require_free(target: Path) -> None:
    """Refuses a folder that something is in.

    Raises:
        ConfigError: So.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output: {target} is not empty, and nothing is overwritten. Name a new or empty folder.")


def _open_to_others(written: Path) -> None:
    """Safetensors makes its files private; the others have the mode that the user's umask asks for."""
    mode = (written / "config.json").stat().st_mode
    for path in written.iterdir():
        path.chmod(mode)


def load_folder(adapter: Path, base: str | None) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    """The base model with the adapter in a folder, and its tokenizer, where it has one.

    Raises:
        ConfigError: The base model is not named or found.
        CheckpointError: The adapter's files are missing, damaged, or do not fit the base model.
    """
    if (adapter / folder.RUN).is_file():
        options = folder.read_options(adapter)
        labels = folder.read_result(adapter).labels
        if options.model.quantize == "int8":
            options.model.quantize = None  # its rounding is slight: the weights are merged into as they were
        if base is not None:
            options.model.name = base
        tokenizer = load_tokenizer(replace(options.model, name=str(adapter), revision=None, gguf_file=None))
        return load_adapted(adapter, options, tokenizer, labels), tokenizer
    return _load_without_run(adapter, base)


def _load_without_run(adapter: Path, base: str | None) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    """An adapter that a script or another library wrote."""
    config = PeftConfig.from_pretrained(adapter)
    name = base or config.base_model_name_or_path
    if name is None:
        raise ConfigError(f"{adapter} does not say which base model it was trained on. Name it with --base.")
    config = dataclasses.replace(config, base_model_name_or_path=resolve_model(name))
    if base is not None:
        config.revision = None  # it was the other one's
    settings: dict[str, Any] = {}
    if config.task_type == "SEQ_CLS" and (classes := _classes(adapter)) is not None:
        settings = {"num_labels": classes, "ignore_mismatched_sizes": True}
    try:
        model = AutoPeftModel.from_pretrained(adapter, config=config, **settings)
    except OSError as error:
        raise ConfigError(
            f"The base model {name!r} of {adapter} could not be loaded: {error} Name where it is with --base."
        ) from error
    return model.eval(), _tokenizer(adapter, resolve_model(name))


def _classes(adapter: Path) -> int | None:
    """How many classes the trained head in an adapter tells apart."""
    tensors, _ = read(adapter)
    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(heads)), None)


def _tokenizer(*places: str | Path) -> PreTrainedTokenizerBase | None:
    """The first that is there; not every model has one."""
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError):
            continue
    return None


def _probe(model: PeftModel) -> dict[str, Tensor]:
    """Some input, the same each time."""
    if model.get_base_model().main_input_name != "input_ids":
        raise UnsupportedError(
            f"{type(model.get_base_model()).__name__} does not read text, so its merged outputs cannot be compared "
            "here. Use PeftModel.from_pretrained(...).merge_and_unload() and compare them yourself."
        )
    words = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (_PROBES, _LENGTH), generator=generator).to(model.device)
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(model):
        probe["decoder_input_ids"] = ids
    return probe


def _outputs(model: Any, probe: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        output = model.eval()(**{name: tensor.to(model.device) for name, tensor in probe.items()})
    return output[0].float().cpu()


def _difference(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-6))
