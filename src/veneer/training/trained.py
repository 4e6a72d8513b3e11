"""A finished run, used again: read back, evaluated, asked."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from veneer.data import Collator, TaskData, encode_prompts, encode_texts, load_evaluation, load_task, read_table
from veneer.errors import ConfigError, DataError
from veneer.evaluation import metrics
from veneer.model import PeftModel
from veneer.options import DataOptions, RunOptions
from veneer.training import folder as run_folder
from veneer.training import samplers
from veneer.training.models import load_model, load_tokenizer

# Above so many classes, single ones are left out of `evaluate`.
_CLASSES = 20
_BATCH = 32


def load_trained(
    folder: str | Path, device_map: Any = None
) -> tuple[PeftModel, PreTrainedTokenizerBase, RunOptions, list[str]]:
    """The model that a finished run has trained, ready to be used.

    Args:
        folder: The run's output folder.
        device_map: Where to load the model, instead of where it was trained.

    Returns:
        Model, tokenizer, the run's options, and the class names (none for language models).

    Raises:
        CheckpointError: The folder holds no finished run, or its files are damaged.
        BaseMismatchError: The base model is not the one that was trained on.
    """
    options = run_folder.read_options(folder)
    labels = run_folder.read_result(folder).labels
    if device_map is not None:
        options.model.device_map = device_map
    tokenizer = load_tokenizer(replace(options.model, name=str(Path(folder).expanduser()), revision=None))
    return load_adapted(Path(folder).expanduser(), options, tokenizer, labels), tokenizer, options, labels


def load_adapted(
    adapter: Path, options: RunOptions, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]
) -> PeftModel:
    """A fresh copy of the base model with a saved adapter on it."""
    base, _ = load_model(options.model, options.task, tokenizer, labels)
    if options.model.device_map is None and torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())
    return PeftModel.from_pretrained(base, adapter).eval()


def evaluate(folder: str | Path, data: DataOptions | str | None = None) -> dict[str, float]:
    """How good a trained model is on held-out data.

    Args:
        folder: The run's output folder.
        data: Other data: a file, a folder, a sample or a hub id, all of which is evaluated on; or a whole data
            section. None takes what the run held out.

    Returns:
        Loss and further figures by name, `examples` being their number.

    Raises:
        CheckpointError, DataError: As for `load_trained` and `load_evaluation`.
    """
    model, tokenizer, options, labels = load_trained(folder)
    seed = int(options.training.get("seed", 42))
    if data is None:
        task = load_task(options.data, options.task, tokenizer, seed)
        if task.evaluation is None:
            raise DataError(f"The run in {folder} held nothing out. Name other data to evaluate on.")
    else:
        section = data
        if isinstance(section, str):
            # The run's columns and lengths, but all of the rows.
            section = replace(options.data, train=section, validation=None, split=None, limit=None)
        task = load_evaluation(section, options.task, tokenizer, seed, labels)
    batch = int(options.training.get("per_device_eval_batch_size", 8))
    return _measure(model, task, batch)


def predict(
    folder: str | Path,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    device_map: Any = None,
) -> list[tuple[str, dict[str, float]]] | list[str]:
    """What a trained model makes of texts: (label, probability of each label), or the text that it writes.

    Args:
        folder: The run's output folder.
        texts: Texts to classify, or prompts, which are written as in training.
        max_new_tokens: Longest text to write.
        temperature: 0 always takes the most probable token.
        device_map: Where to load the model.

    Raises:
        DataError: A text is empty.
    """
    answers = predictor(folder, max_new_tokens=max_new_tokens, temperature=temperature, device_map=device_map)(texts)
    if answers and "label" in answers[0]:
        return [(answer["label"], answer["probabilities"]) for answer in answers]
    return [answer["generated"] for answer in answers]


def predictor(
    folder: str | Path, *, max_new_tokens: int = 64, temperature: float = 0.0, device_map: Any = None
) -> Callable[[Sequence[str]], list[dict[str, Any]]]:
    """Loads a trained model once and returns a function that answers texts.

    Args:
        folder: The run's output folder.
        max_new_tokens: Longest text to write.
        temperature: 0 always takes the most probable token.
        device_map: Where to load the model.

    Returns:
        A function from texts to one dictionary each: `label` and `probabilities` (of each label, the most probable
        first), or `generated`.

    Raises:
        ConfigError: A setting is out of range.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens} and temperature {temperature}. Expected at least 1, and at least 0."
        )
    model, tokenizer, options, labels = load_trained(folder, device_map)
    if options.task == "classification":
        length = min(options.data.max_length, int(tokenizer.model_max_length))
        return lambda texts: _classify(model, tokenizer, texts, labels, length)
    prompting = run_folder.read_prompting(folder)

    def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
        ids = encode_prompts(texts, tokenizer, prompting["separator"], prompting["template"])
        return [{"generated": text} for text in generate(model, tokenizer, ids, max_new_tokens, temperature)]

    return answer


def read_texts(folder: str | Path, file: str) -> list[str]:
    """The texts in a file to predict: lines of a txt file, else the column that the run was trained on.

    Raises:
        DataError: There is no such file or column, or a row has no text.
    """
    path = Path(file).expanduser()
    if path.suffix == ".txt":
        try:
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as UTF-8 text ({error}).") from error
    options = run_folder.read_options(folder)
    table = read_table(str(path))
    return text_values(table, options)


def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """What the model writes after each prompt, without the prompt.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Longest answer.
        temperature: 0 always takes the most probable token.
    """
    collate = replace(Collator.of(tokenizer), side="left")  # every prompt ends where its answer begins
    config = getattr(model.get_base_model(), "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    # Settings for sampling would only be warned about where nothing is sampled.
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    answers: dict[int, str] = {}
    training = model.training
    model.eval()
    for chosen, batch in _batches([{"input_ids": list(ids)} for ids in prompts], collate, size=8):
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            written = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=collate.pad_token_id,
                eos_token_id=sorted(stops) or None,
                use_cache=True,
                **sampling,
            )
        new = written[:, inputs["input_ids"].shape[1] :]
        answers |= dict(zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))
    model.train(training)
    return [answers[i].strip() for i in range(len(prompts))]


def logits_of(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """The logits of a batch, in float32 on the CPU."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with torch.inference_mode():
        output = model(**inputs)
    return metrics.first(output["logits"] if isinstance(output, dict) else output).float().cpu()


def _classify(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], labels: Sequence[str], length: int
) -> list[dict[str, Any]]:
    if not texts:
        return []
    examples, _ = encode_texts(texts, tokenizer, length)
    answers: dict[int, dict[str, Any]] = {}
    for chosen, batch in _batches(examples, Collator.of(tokenizer), _BATCH):
        for place, row in zip(chosen, logits_of(model, batch).softmax(dim=-1), strict=True):
            order = row.argsort(descending=True).tolist()
            answers[place] = {
                "label": labels[order[0]],
                "probabilities": {labels[number]: float(row[number]) for number in order},
            }
    return [answers[i] for i in range(len(examples))]


def _measure(model: PeftModel, task: TaskData, size: int) -> dict[str, float]:
    """Figures of a model on the held-out examples of a task."""
    from transformers import EvalPrediction

    assert task.evaluation is not None
    rows = list(task.evaluation)
    predictions: dict[int, Any] = {}
    for chosen, batch in _batches(rows, task.collate, size):
        logits = logits_of(model, batch)
        reduced = logits if task.labels else metrics.token_scores(logits, batch["labels"])
        for place, row in zip(chosen, reduced, strict=True):
            predictions[place] = row.numpy()
    if task.labels:
        labels = np.array([row["labels"] for row in rows])
        stacked = np.stack([predictions[i] for i in range(len(rows))])
        figures = metrics.classification(EvalPrediction(stacked, labels))
        figures |= {"majority": metrics.majority(labels), "examples": float(len(rows))}
        report = metrics.classification_report(labels, stacked.argmax(axis=-1), len(task.labels))
        if len(task.labels) <= _CLASSES:
            for name, precision, recall in zip(task.labels, report.precision, report.recall, strict=True):
                figures |= {f"precision ({name})": precision, f"recall ({name})": recall}
        return figures
    # One long row: rows of all lengths need not be padded to be averaged.
    flat = np.concatenate([predictions[i][: len(row["labels"])] for i, row in enumerate(rows)])
    return metrics.language(EvalPrediction(flat[None], _flat_labels(rows)[None])) | {"examples": float(len(rows))}


def _flat_labels(rows: Sequence[dict[str, Any]]) -> Any:
    """Labels one after the other; the first of each row, which nothing predicts, is left out."""
    return np.concatenate([np.array([metrics.IGNORED, *row["labels"][1:]]) for row in rows])


def _batches(
    examples: Sequence[dict[str, Any]], collate: Callable[[Any], dict[str, Tensor]], size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Places and padded batches of examples of similar length."""
    order = list(samplers.LongestFirst([len(example["input_ids"]) for example in examples]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, collate([examples[i] for i in chosen])
