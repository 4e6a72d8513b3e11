"""What a run is made of: one typed tree, filled from a YAML file and from flags (`cli.py`), or in Python.

The sections are `model`, `method`, `data`, `training` and `output`. The method section is a method string
(`"lora:r=16"`) or a mapping with a `name` (`{"name": "lora", "r": 16}`); `method_strings.parse_method` checks it.
The training section takes every field of `transformers.TrainingArguments` by its own name.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["classification", "causal-lm"]
Quantize = Literal[
    "int8", "nf4", "fp4", "nf4-int8", "bnb-int8", "torchao-int8", "torchao-int4", "hqq-8", "hqq-4"
]  # fmt: skip


@dataclass
class ModelOptions:
    """The frozen base model.

    Args:
        name: A hub id, a folder, a GGUF file, or the name of a sample model (`veneer.samples`).
        revision: Branch, tag or commit of a hub model.
        dtype: Type of the frozen weights. `measured` takes float32, or bfloat16 where this machine computes clearly
            faster in it; `auto` what the checkpoint was saved in. Adapters stay in float32.
        device_map: As in transformers, e.g. `auto`.
        max_memory: Memory for each device, e.g. `{"cpu": "8GiB", "0": "10GiB"}`; only with `device_map`.
        attn_implementation: `eager`, `sdpa`, a flash variant, or none for the model's default.
        trust_remote_code: Allow a hub model to run its own Python code.
        quantize: `int8` keeps the linear layers of the frozen model in 8 bits and multiplies in 8 bits; what does not
            bear it, seen on a few batches of the training data, stays exact. `nf4` and `fp4` keep them in 4 bits
            (bitsandbytes, scales quantised too), `nf4-int8` computes in 8 bits from there, `bnb-int8`, `torchao-int8`,
            `torchao-int4`, `hqq-8` and `hqq-4` are those of these packages. None keeps all as it is.
        gguf_file: The GGUF file to read, of a hub model or a folder; its weights are dequantised in loading.
    """

    name: str
    revision: str | None = None
    dtype: Literal["measured", "auto", "float32", "bfloat16", "float16"] = "measured"
    device_map: str | dict[str, str | int] | None = None
    max_memory: dict[str, str] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantize: Quantize | None = None
    gguf_file: str | None = None


@dataclass
class DataOptions:
    """Where the examples come from and how they become tokens.

    Args:
        train: A csv, tsv, jsonl, json or parquet file, a folder of them, a sample data set, or a hub id.
        validation: The same for the held-out part; none splits it off `train`.
        validation_share: Share of `train` that is held out when `validation` is none; 0 holds out nothing.
        split: Split to read of a hub data set.
        text_column: Column with the text; found where there is one candidate.
        label_column: Column with the label; found where there is one candidate.
        format: How a language-modelling example is written; `auto` reads it from the columns.
        max_length: Longest sequence in tokens. Longer texts are cut and the number of cut ones is reported.
        train_on: Which tokens of a language-modelling example carry loss.
        limit: Use at most this many training examples.
        validation_limit: Use at most this many held-out examples.
        preparation_batches: Batches of training examples that are shown to the method before training, where it asks
            for data (EVA, CorDA, LoRA-GA, masks by gradient); methods that ask for none are shown none.
    """

    train: str
    validation: str | None = None
    validation_share: float = 0.1
    split: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    format: Literal["auto", "prompt-completion", "chat", "text"] = "auto"
    max_length: int = 512
    train_on: Literal["completions", "all"] = "completions"
    limit: int | None = None
    validation_limit: int | None = None
    preparation_batches: int = 32


@dataclass
class OutputOptions:
    """What a run writes.

    Args:
        folder: Receives the adapter, the resolved configuration, the checkpoints and the results.
        overwrite: Allow a folder that already holds another run.
        resume: Continue from the last complete checkpoint in the folder.
        early_stopping_patience: Stop after this many evaluations without improvement; none never stops early.
    """

    folder: str
    overwrite: bool = False
    resume: bool = False
    early_stopping_patience: int | None = None


@dataclass
class RunOptions:
    """One training run.

    Args:
        task: What is learnt.
        model: The base model.
        method: A method string or a mapping with a `name`.
        data: The examples.
        training: Fields of `transformers.TrainingArguments`.
        output: What is written where.
    """

    task: Task
    model: ModelOptions
    data: DataOptions
    output: OutputOptions
    method: str | dict[str, Any] = "lora"
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class SelectOptions:
    """What `veneer select` is told beside the run whose method it chooses for.

    Args:
        criterion: What makes a weight worth training: magnitude, gradient, snip, fisher, movement, quantization or
            random. None takes the method's own, and snip where it has none.
        examples: How many training examples are looked at.
        level: What gets a score in the file: parameter, neuron or module. None takes what the method needs.
        scores: A file of scores to choose by, instead of scoring.
        keep_layers: Adapt only so many of the best layers.
        keep_modules: Adapt only so many of the best modules.
        min_rank: Lowest rank that a module gets where ranks are chosen; with 0 it may be left out.
        max_rank: Highest rank; four times that of the method if none.
        refine: How often to score, choose, train briefly and evaluate; 0 scores and chooses once.
        round_epochs: How long each of these trains, unless the training section says `max_steps`.
    """

    criterion: str | None = None
    examples: int = 256
    level: Literal["parameter", "neuron", "module"] | None = None
    scores: str | None = None
    keep_layers: int | None = None
    keep_modules: int | None = None
    min_rank: int = 1
    max_rank: int | None = None
    refine: int = 0
    round_epochs: float = 1.0


@dataclass
class SearchOptions:
    """What `veneer search` looks through.

    Args:
        methods: Method strings or mappings. What they set is kept; rank, targets and learning rate are searched where
            they do not set them.
        trials: How many finished trials the study is to have, those of other processes counted.
        ranks: For methods that have a rank.
        densities: For methods that train a share of the entries.
        reductions: For methods with a bottleneck.
        targets: What `target_modules` may be; a method's own default is always one of them.
        rates: Lowest and highest learning rate; from a quarter of the method's own to four times it if none. Where the
            training section sets a learning rate, it is kept.
        storage: A file, or the URL of a database, that several processes or machines share; none keeps the study in
            the output folder.
        study: Its name there.
        prune: Stop trials whose held-out score falls behind that of the others at the same step.
    """

    methods: list[str | dict[str, Any]]
    trials: int = 20
    ranks: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32])
    densities: list[float] = field(default_factory=lambda: [0.001, 0.003, 0.01, 0.03])
    reductions: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    rates: list[float] | None = None
    storage: str | None = None
    study: str = "veneer"
    prune: bool = True


@dataclass
class RunResult:
    """What a finished run reports; written to `results.json` in the output folder.

    Args:
        method: Name of the method.
        config: The method's configuration, as in `adapter_config.json`.
        before: Held-out metrics before training.
        after: Held-out metrics of the trained model.
        majority: Share of the most frequent held-out class; none for language modelling.
        labels: Class names in the order of the logits; empty for language modelling.
        trained_parameters: Number of trained parameters, heads included.
        total_parameters: Number of all parameters.
        adapter_bytes: Size of the adapter's tensor file.
        seconds: Wall-clock time of the training loop, evaluations excluded.
        peak_memory_bytes: High-water mark of the process's resident memory.
        history: The trainer's log: dictionaries with `step`, `epoch` and `loss` or `eval_*` figures.
        examples: Language modelling: prompt, expected, and the text generated before and after training.
        folder: Where the adapter was saved.
    """

    method: str
    config: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]
    majority: float | None
    labels: list[str]
    trained_parameters: int
    total_parameters: int
    adapter_bytes: int
    seconds: float
    peak_memory_bytes: int
    history: list[dict[str, Any]]
    examples: list[dict[str, str]]
    folder: str
