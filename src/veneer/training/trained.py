"""A finished run, used again: read back, evaluated, asked."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback

from veneer.combine.ensemble import check_way, ensemble_generate, members, together
from veneer.data import Collator, TaskData, encode_prompts, encode_texts, load_evaluation, load_task, read_table
from veneer.data.columns import TEXT_NAMES, is_text, only_column, require_texts, usual_columns
from veneer.errors import ConfigError, DataError
from veneer.evaluation import metrics
from veneer.model import PeftModel
from veneer.options import DataOptions, RunOptions
from veneer.prompting.positions import positions_in
from veneer.quantization import quantize
from veneer.training import arguments, samplers
from veneer.training import folder as run_folder
from veneer.training.models import check_room, load_model, load_tokenizer
from veneer.training.progress import figures_of
from veneer.training.trainer import Trainer

# With more classes than this, `evaluate` leaves the single ones out.
_CLASSES = 20
_BATCH = 32
# The training settings that decide how a model is run, whether or not it is trained.
MEASURING = (
    "per_device_eval_batch_size", "dataloader_num_workers", "dataloader_pin_memory", "bf16", "fp16", "bf16_full_eval",
    "fp16_full_eval", "tf32", "use_cpu",
)  # fmt: skip


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
    options.output.folder = str(Path(folder).expanduser())  # it may have been moved
    labels = run_folder.read_result(folder).labels
    if device_map is not None:
        options.model.device_map = device_map
    own = replace(options.model, name=str(Path(folder).expanduser()), revision=None, gguf_file=None)
    tokenizer = load_tokenizer(own)
    return load_adapted(Path(folder).expanduser(), options, tokenizer, labels), tokenizer, options, labels


def load_adapted(
    adapter: Path, options: RunOptions, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]
) -> PeftModel:
    """A fresh copy of the base model with a saved adapter on it."""
    base, _ = load_model(options.model, options.task, tokenizer, labels)
    if options.model.quantize == "int8":
        quantize(base, options.model.quantize, plan=run_folder.read_quantization(adapter))
    return with_adapter(base, adapter, options)


def with_adapter(base: nn.Module, adapter: Path, options: RunOptions) -> PeftModel:
    """A base model with a saved adapter on it, where it is to be used."""
    model = PeftModel.from_pretrained(base, adapter)
    if options.model.device_map is None and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.eval()


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
        if task.labels != labels:
            raise DataError(
                f"{options.data.train} has the classes {task.labels} now; the run in {folder} was trained with "
                f"{labels}. Restore the data, or name other data to evaluate on."
            )
    else:
        section = data
        if isinstance(section, str):
            # The run's columns and lengths, but all of the rows.
            section = replace(options.data, train=section, validation=None, split=None, limit=None)
        task = load_evaluation(section, options.task, tokenizer, seed, labels)
    return _measure(model, tokenizer, task, options)


def predict(
    folder: str | Path,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    device_map: Any = None,
    others: Sequence[str | Path] = (),
    combine: str = "probabilities",
) -> list[tuple[str, dict[str, float]]] | list[str]:
    """What a trained model makes of texts: (label, probability of each label), or the text that it writes.

    Args:
        folder: The run's output folder.
        texts: Texts to classify, or prompts, which are written as in training.
        max_new_tokens: Longest text to write.
        temperature: 0 always takes the most probable token.
        device_map: Where to load the model.
        others: Folders of runs that answer together with it.
        combine: How, as for `veneer.ensemble`.

    Raises:
        DataError: A text is empty.
    """
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "device_map": device_map}
    answers = predictor(folder, **how, others=others, combine=combine)(texts)
    if answers and "label" in answers[0]:
        return [(answer["label"], answer["probabilities"]) for answer in answers]
    return [answer["generated"] for answer in answers]


def predictor(
    folder: str | Path,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    device_map: Any = None,
    others: Sequence[str | Path] = (),
    combine: str = "probabilities",
) -> Callable[[Sequence[str]], list[dict[str, Any]]]:
    """Loads a trained model once and returns a function that answers texts.

    Args:
        folder: The run's output folder.
        max_new_tokens: Longest text to write.
        temperature: 0 always takes the most probable token.
        device_map: Where to load the model.
        others: Folders of runs of the same task on the same base model, whose adapters answer together with it: an
            ensemble, all in one batch.
        combine: How they are put together, as for `veneer.ensemble`. With votes, `probabilities` are shares of them,
            and the mean probability decides a tie.

    Returns:
        A function from texts to one dictionary each: `label` and `probabilities` (of each label, the most probable
        first), or `generated`.

    Raises:
        ConfigError: A setting is out of range, or a run is another kind of run.
        BaseMismatchError: Another one was trained on another base model.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens} and temperature {temperature}. Expected at least 1, and at least 0."
        )
    check_way(combine)
    model, tokenizer, options, labels = load_trained(folder, device_map)
    names = [model.active_adapter, *(_join(model, Path(folder), Path(other)) for other in others)]
    if options.task == "classification":
        lengths = [options.data.max_length, int(tokenizer.model_max_length), _room(model, names)]
        length = min(length for length in lengths if length is not None)
        return lambda texts: _classify(model, tokenizer, texts, labels, length, names, combine)
    prompting = run_folder.read_prompting(folder)
    if not prompting["template"]:
        tokenizer.chat_template = None  # the run did without, so the prompts do

    def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
        ids = encode_prompts(texts, tokenizer, prompting["separator"])
        written = generate(model, tokenizer, ids, max_new_tokens, temperature, names, combine)
        return [{"generated": text} for text in written]

    return answer


def _join(model: PeftModel, first: Path, other: Path) -> str:
    """Loads the adapter of another run beside that of the first; its name.

    Raises:
        ConfigError: It cannot answer the same questions.
        CheckpointError, BaseMismatchError: As for `load_trained`.
    """

    def answers(folder: Path) -> dict[str, Any]:
        options, labels = run_folder.read_options(folder), run_folder.read_result(folder).labels
        found: dict[str, Any] = {
            "task": options.task,
            "model.dtype": options.model.dtype,
            "model.quantize": options.model.quantize,
        }
        if options.model.quantize == "int8":
            found["layers in int8"] = run_folder.read_quantization(folder).layers
        if options.task == "classification":
            return {**found, "classes": labels, "data.max_length": options.data.max_length}
        return {**found, **run_folder.read_prompting(folder)}

    mine, theirs = answers(first.expanduser()), answers(other.expanduser())
    for what in mine.keys() | theirs.keys():
        if mine.get(what) != theirs.get(what):
            raise ConfigError(
                f"An ensemble of {first} and {other}: their {what} differ ({mine.get(what)!r} and "
                f"{theirs.get(what)!r}). Name runs of one task on one base model, trained alike."
            )
    name = f"member_{len(model.peft_config)}"
    model.load_adapter(other.expanduser(), name)
    return name


def _room(model: PeftModel, names: Sequence[str]) -> int | None:
    """How long texts may be for all of the named adapters in one batch."""
    most, active = positions_in(model.get_base_model()), model.active_adapters
    added = []
    for name in names:
        model.set_adapter(name, inference_mode=True)
        added.append(model.added())
    model.set_adapter(active, inference_mode=True)
    # Rows have as many columns as the longest prompt asks for, and some are moved on top of that.
    return None if most is None else most - sum(max(each) for each in zip(*added, strict=True))


def read_texts(folder: str | Path, file: str) -> list[str]:
    """The texts in a file to predict: its lines, or the column that the run was trained on.

    Raises:
        DataError: There is no such file, no such column, or a row has no text.
    """
    table = read_table(file)
    column = run_folder.read_options(folder).data.text_column
    if column not in table.columns:
        usual = usual_columns(table.columns, (*TEXT_NAMES, "prompt", "instruction", "question"))
        column = only_column(usual or [c for c in table.columns if is_text(table.values(c))], "text", table)
    if column is None:
        raise DataError(f"{file}: no column looks like the text. Its columns are: {', '.join(table.columns)}.")
    texts = table.values(column)
    require_texts(table, column, texts)
    return texts


def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    names: Sequence[str] = (),
    combine: str = "probabilities",
) -> list[str]:
    """What the model writes after each prompt, without the prompt.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Longest answer.
        temperature: 0 always takes the most probable token.
        names: Adapters that write together, where they are several.
        combine: How.
    """
    collate = replace(Collator.of(tokenizer), side="left")  # every prompt ends where its answer begins
    config = getattr(model.get_base_model(), "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    # Settings for sampling would only be warned about where nothing is sampled.
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    write: Any = model.generate
    if len(names) > 1:
        sampling = {"temperature": temperature, "combine": combine}
        write = functools.partial(ensemble_generate, model, names)
    answers: dict[int, str] = {}
    training = model.training
    model.eval()
    size = max(1, 8 // max(1, len(names)))
    for chosen, batch in _batches([{"input_ids": list(ids)} for ids in prompts], collate, size):
        inputs: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            written = write(
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
    with torch.no_grad():  # what an adapter keeps of it may be needed in training
        output = model(**inputs)
    return metrics.first(output["logits"] if isinstance(output, dict) else output).float().cpu()


def _classify(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[str],
    length: int,
    names: Sequence[str],
    combine: str,
) -> list[dict[str, Any]]:
    if not texts:
        return []
    examples, _ = encode_texts(texts, tokenizer, length)
    answers: dict[int, dict[str, Any]] = {}
    for chosen, batch in _batches(examples, Collator.of(tokenizer), max(1, _BATCH // len(names))):
        for place, (row, rank) in zip(chosen, zip(*_shares(model, batch, names, combine), strict=True), strict=True):
            order = rank.argsort(descending=True).tolist()
            answers[place] = {
                "label": labels[order[0]],
                "probabilities": {labels[number]: float(row[number]) for number in order},
            }
    return [answers[i] for i in range(len(examples))]


def _shares(model: PeftModel, batch: dict[str, Tensor], names: Sequence[str], combine: str) -> tuple[Tensor, Tensor]:
    """What the classes get, (rows, classes), and by what they are ranked."""
    if len(names) == 1:
        shares = logits_of(model, batch).softmax(dim=-1)
        return shares, shares
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = members(model, names, **inputs).cpu()
    shares = together(logits, combine)
    if combine == "votes":
        # What two shares differ by is 1 / members at least, and mean probabilities are below 1.
        return shares, shares + together(logits, "probabilities") / (2 * len(names))
    shares = shares.softmax(-1) if combine == "logits" else shares
    return shares, shares


def _measure(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: TaskData, options: RunOptions
) -> dict[str, float]:
    """Figures of a model on the held-out examples of a task, got as in training."""
    check_room(model, task.evaluation)
    settings = {name: options.training[name] for name in MEASURING if name in options.training}
    args = arguments.build({**settings, "report_to": "none", "save_strategy": "no"}, options.output.folder)
    trainer = Trainer(
        model, args, data_collator=task.collate, processing_class=tokenizer, **metrics.functions(options.task)
    )
    trainer.remove_callback(PrinterCallback)
    assert task.evaluation is not None
    order = samplers.LongestFirst([len(ids) for ids in task.evaluation["input_ids"]])
    found = trainer.predict(task.evaluation.select(list(order)), metric_key_prefix="eval")
    figures = figures_of(found.metrics) | {"examples": float(len(found.label_ids))}
    if options.task == "classification":
        guesses = metrics.first(found.predictions).argmax(axis=-1)
        report = metrics.classification_report(found.label_ids, guesses, len(task.labels))
        figures["majority"] = metrics.majority(found.label_ids)
        if len(task.labels) <= _CLASSES:
            for name, precision, recall in zip(task.labels, report.precision, report.recall, strict=True):
                figures |= {f"precision ({name})": precision, f"recall ({name})": recall}
    return figures


def _batches(
    examples: Sequence[dict[str, Any]], collate: Callable[[Any], dict[str, Tensor]], size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Places and padded batches of examples of similar length."""
    order = list(samplers.LongestFirst([len(example["input_ids"]) for example in examples]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, collate([examples[i] for i in chosen])
