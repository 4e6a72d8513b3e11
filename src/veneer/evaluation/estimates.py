"""What a training run will need, before it is started: peak memory and time of a step, part by part.

No weights are loaded. The model is built from its configuration, and a step of it is run on tensors without numbers
(`simulation`), so that every method, attention and way of checkpointing is as in the run itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from veneer import machine, quantised_bases, units
from veneer.data import TaskData, load_task
from veneer.data.batches import IGNORED
from veneer.errors import ConfigError
from veneer.evaluation import outlines, simulation
from veneer.method_strings import parse_method
from veneer.model import PeftModel, get_peft_model
from veneer.optimizers.lorafa import freeze_down
from veneer.options import RunOptions
from veneer.training import arguments, recompute, samplers
from veneer.training.labelled import total_loss
from veneer.training.models import load_config, load_tokenizer, room
from veneer.training.run import TASK_TYPES
from veneer.training.trainer import Trainer

# Larger tensors of an optimiser are measured by a part of this many elements.
_MEASURED = 2**22


@dataclass(frozen=True)
class Batch:
    """The batches of a run.

    Args:
        rows: Examples of a batch.
        longest: Length of the batch that needs most.
        usual: Length that takes as long as the batches do on average.
        labelled: Share of the positions that carry a label.
        real: Share of the positions that are not padding.
        steps: How many the run takes; none if the data is not known.
    """

    rows: int
    longest: int
    usual: int
    labelled: float = 1.0
    real: float = 1.0
    steps: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Args:
        parts: Bytes at the worst moment, by what they are for.
        seconds: Time of an optimiser's step.
        flops: Floating-point operations of it.
        limit: Operations per second that this machine reaches in large products.
        trained: Number of trained parameters.
        total: Number of all parameters.
        batch: The batches.
        passes: Forward and backward passes of a step.
        device: Where.
        dtype: Of the frozen weights.
        threads: Of torch.
    """

    parts: dict[str, int]
    seconds: float
    flops: int
    limit: float
    trained: int
    total: int
    batch: Batch
    passes: int
    device: str
    dtype: str
    threads: int

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}

    def __rich__(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("memory")
        table.add_column("", justify="right")
        for name, size in self.parts.items():
            if size:
                table.add_row(name, units.size(size))
        table.add_row(Text("peak", "bold"), Text(units.size(self.peak), "bold"))
        batch = self.batch
        tokens = batch.rows * batch.usual * self.passes
        lines = [
            f"{units.count(self.trained)} of {units.count(self.total)} parameters are trained "
            f"({units.share(self.trained, self.total)}), {self.dtype} on {self.device}, {self.threads} threads.",
            f"Batches of {batch.rows} x {batch.longest} tokens at most, {batch.usual} on average; "
            f"{batch.real:.0%} are not padding"
            + (f", {batch.labelled:.0%} carry a label." if batch.labelled < 1 else "."),
        ]
        pace = f"A step: {units.duration(self.seconds)}, {tokens / self.seconds:,.0f} tokens/s, "
        pace += (
            f"{self.flops / self.seconds / self.limit:.0%} of the {self.limit / 1e9:,.0f} GFLOP/s of large products."
        )
        if batch.steps is not None:
            pace += (
                f" {units.count(batch.steps)} steps: {units.duration(batch.steps * self.seconds)} without evaluations."
            )
        return Group(*lines, "", table, "", pace)


def estimate(options: RunOptions, length: int | None = None) -> Estimate:
    """What a run will need, from its options.

    Args:
        options: The run; the data is read for the lengths of its examples, unless `length` is given.
        length: Tokens of every example, in place of data.

    Raises:
        ConfigError: An option cannot be used, or the model or optimiser cannot be estimated; with the reason.
        DataError: The data cannot be read.
    """
    config = parse_method(options.method)
    config.task_type = TASK_TYPES[options.task]
    args = arguments.build(
        arguments.resolve(_without_evaluation(options), config.learning_rates[options.task], evaluates=False),
        options.output.folder or ".",
    )
    shape = load_config(options.model)
    if options.model.quantize is None and getattr(shape, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.name: the files of {options.model.name!r} are quantised already, in a form that is known once they "
            "are read. Estimate the model in full precision, with the model.quantize that is nearest."
        )
    options, threads = _settled(options, shape, args)
    data = None
    if length is None:
        data = load_task(options.data, options.task, load_tokenizer(options.model), int(args.seed))
    batch = _batch(args, length, data)
    device = machine.main_device(args.use_cpu)
    form = options.model.quantize
    loading: dict[str, Any] = {}
    if form is not None:
        loading = quantised_bases.loading_settings(form, options.model.dtype, options.task == "classification", shape)
        outlines.load(form, device)  # its libraries too take memory
    libraries = resident_memory() if device.type == "cpu" else 0
    with torch.device("meta"):
        base = _build(options, shape, len(data.labels) if data is not None and data.labels else 2)
    if form is not None:
        outlines.replace(base, quantised_bases.quantised_paths(base, form, loading), form, device)
    with torch.device("meta"):
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
        if getattr(args, "lora_optimizer", None) == "lorafa":
            freeze_down(model)
    _check_length(model, batch, options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _estimate(options, model, args, batch, device, libraries)
    finally:
        torch.set_num_threads(before)


def _estimate(
    options: RunOptions, model: PeftModel, args: Any, batch: Batch, device: torch.device, libraries: int
) -> Estimate:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept, seconds = _optimizer(args, model, trained, device)
    frozen = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad}
    passes = args.gradient_accumulation_steps
    with _no_numbers(model, device, args):
        model(**_inputs(options, batch.rows, 2, device))  # some of what is called learns how it is called
        worst = simulation.step(model, _loss(options, model, batch, batch.longest, device), min(passes, 2))
        usual = worst
        if (batch.usual, passes) != (batch.longest, 1):
            usual = simulation.step(model, _loss(options, model, batch, batch.usual, device))
    width = machine.widths(model.config)
    dtype = getattr(torch, options.model.dtype)
    parts = {
        "libraries": libraries,
        "frozen weights": sum(t.numel() * t.element_size() for t in frozen.values()),
        "trained parameters": sum(t.numel() * t.element_size() for t in trained),
        "optimiser state": kept,
        **{name: worst.peak[name] for name in ("gradients", "activations", "logits", "temporaries")},
    }
    rows = max(64, min(1024, batch.rows * batch.usual))
    limit = machine.matmul_limit(dtype, (rows, min(width[0], 2048), min(width[1], 2048)), device)
    count, total = model.get_nb_trainable_parameters()
    total += outlines.hidden(model)
    return Estimate(
        parts=parts,
        seconds=seconds + passes * usual.seconds(device),
        flops=passes * usual.flops,
        limit=limit,
        trained=count,
        total=total,
        batch=batch,
        passes=passes,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def resident_memory() -> int:
    """Bytes of this process that are in memory now: once the libraries are imported, what they take by themselves."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    from veneer.training.clock import peak_memory

    return peak_memory()


def _without_evaluation(options: RunOptions) -> RunOptions:
    """The run without what is about evaluations: they need less memory than training."""
    about = ("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model")
    training = {name: value for name, value in options.training.items() if name not in about}
    return replace(options, training=training, output=replace(options.output, early_stopping_patience=None))


def _settled(options: RunOptions, shape: PretrainedConfig, args: Any) -> tuple[RunOptions, int]:
    """The dtype and the threads that the run would choose."""
    threads: Any = args.threads
    dtype: Any = options.model.dtype
    if threads is None or dtype == "measured":
        choice = machine.choose(shape, use_cpu=args.use_cpu)
        threads = choice.threads if threads is None else threads
        dtype = choice.dtype if dtype == "measured" else dtype
    if dtype == "auto":
        dtype = str(getattr(shape, "dtype", None) or "float32").removeprefix("torch.")
    return replace(options, model=replace(options.model, dtype=dtype)), threads


def _build(options: RunOptions, shape: PretrainedConfig, labels: int) -> nn.Module:
    """The base model without weights."""
    kind: Any = AutoModelForCausalLM
    if options.task == "classification":
        kind = AutoModelForSequenceClassification
        shape.num_labels, shape.problem_type = labels, "single_label_classification"
        text = shape.get_text_config()
        text.pad_token_id = 0 if text.pad_token_id is None else text.pad_token_id
    settings: dict[str, Any] = {"dtype": getattr(torch, options.model.dtype)}
    if options.model.attn_implementation is not None:
        settings["attn_implementation"] = options.model.attn_implementation
    try:
        return kind.from_config(shape, trust_remote_code=options.model.trust_remote_code, **settings)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"model.name: {options.model.name!r} cannot be built from its configuration alone "
            f"({error}). Try a short training run and look at peak_memory_bytes in its results.json."
        ) from error


@contextmanager
def _no_numbers(model: PeftModel, device: torch.device, args: Any) -> Iterator[None]:
    """The model as it trains, on tensors without numbers."""
    if args.activation_checkpointing if hasattr(args, "activation_checkpointing") else args.gradient_checkpointing:
        given = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
        # The generator's state cannot be kept where there are no numbers, and need not be.
        model.gradient_checkpointing_enable({"use_reentrant": False, **given, "preserve_rng_state": False})
    model.train()
    try:
        less = recompute.Recompute(tried=False) if recompute.suits(args) else nullcontext
        with simulation.shadows(model, device), less():
            yield
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"{type(model.get_base_model()).__name__} with this method looks at its numbers while it computes, so it "
            f"cannot be estimated without weights ({type(error).__name__}: {error}). Try a short training run and look "
            "at peak_memory_bytes in its results.json."
        ) from error


def _inputs(options: RunOptions, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    # Without an attention mask models take all for real, as they find out of a mask of ones with their numbers.
    return {"input_ids": torch.ones((rows, length), dtype=torch.long, device=device)}


def _loss(
    options: RunOptions, model: PeftModel, batch: Batch, length: int, device: torch.device
) -> Callable[[simulation.Recorder], Tensor]:
    """The loss as the trainer computes it."""
    base: Any = model.get_base_model()
    head: Any = base.get_output_embeddings() if options.task == "causal-lm" else None

    def usual(recorder: simulation.Recorder) -> Tensor:
        labels = torch.ones((batch.rows,) if head is None else (batch.rows, length), dtype=torch.long, device=device)
        return model(**_inputs(options, batch.rows, length, device), labels=labels).loss

    def labelled(recorder: simulation.Recorder) -> Tensor:
        base.set_output_embeddings(nn.Identity())
        try:
            hidden = model(**_inputs(options, batch.rows, length, device)).logits
        finally:
            base.set_output_embeddings(head)
        recorder.phase = "logits"
        flat = hidden.reshape(-1, hidden.shape[-1])
        count = max(1, round(batch.labelled * batch.rows * length))
        x = flat.index_select(0, torch.zeros(count, dtype=torch.long, device=device))
        y = torch.zeros(count, dtype=torch.long, device=device)
        return total_loss(head, getattr(base.config.get_text_config(), "final_logit_softcapping", None), x, y)

    return labelled if head is not None and base.loss_function is ForCausalLMLoss else usual


def _optimizer(args: Any, model: Any, trained: list[nn.Parameter], device: torch.device) -> tuple[int, float]:
    """Bytes that the optimiser keeps and seconds that it and the clipping take, from steps of the true one."""
    name = "adamw_torch" if getattr(args, "lora_optimizer", None) == "lorafa" else args.optim
    try:
        cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, model if name == args.optim else None)
        size, seconds = 0, 0.0
        shapes: dict[tuple[int, ...], int] = {}
        for parameter in trained:
            shapes[tuple(parameter.shape)] = shapes.get(tuple(parameter.shape), 0) + 1
        for shape, count in shapes.items():
            first = shape[0] if shape else 1
            # Rows that are left out are counted as those that are there.
            rows = max(1, min(first, _MEASURED * first // max(1, math.prod(shape))))
            sample = nn.Parameter(torch.zeros((rows, *shape[1:]) if shape else (), device=device))
            sample.grad = torch.zeros_like(sample)
            optimizer = cls([sample], **settings)

            def update(sample: Any = sample, optimizer: Any = optimizer) -> None:
                if args.max_grad_norm:
                    nn.utils.clip_grad_norm_([sample], args.max_grad_norm)
                optimizer.step()

            time = machine.best_seconds(update, device)
            state = sum(t.numel() * t.element_size() for t in optimizer.state[sample].values() if isinstance(t, Tensor))
            size += round(count * state * first / rows)
            seconds += count * time * first / rows
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        named = str(getattr(args.optim, "value", args.optim))
        raise ConfigError(
            f"training.optim is {named!r}, which cannot be tried on single tensors here ({error}). Estimate with "
            "adamw_torch, which keeps two numbers for each trained one."
        ) from error
    return size, seconds


def _batch(args: Any, length: int | None, data: TaskData | None) -> Batch:
    """What the trainer's batches look like."""
    rows, budget = args.per_device_train_batch_size, args.tokens_per_batch
    if data is None:
        length = max(1, length or 0)
        return Batch(max(1, budget // length) if budget else rows, length, length)
    lengths = [len(ids) for ids in data.train["input_ids"]]
    alike = (rows if budget is None else 64) * args.gradient_accumulation_steps
    order = list(samplers.GroupedByLength(lengths, alike, int(args.seed)))
    batches: list[list[int]] = []
    for number in order:
        last = batches[-1] if batches else []
        full = len(last) >= rows if budget is None else sum(last) + lengths[number] > budget
        if full or not batches:
            batches.append([])
        batches[-1].append(lengths[number])
    sizes = [sum(batch) if args.packing != "off" else max(batch) * len(batch) for batch in batches]
    rows = max(1, round(statistics.fmean(map(len, batches))))
    share = 1.0
    if not data.labels:
        share = sum(label != IGNORED for labels in data.train["labels"] for label in labels) / sum(sizes)
    steps = math.ceil(len(batches) / args.gradient_accumulation_steps * args.num_train_epochs)
    return Batch(
        rows=rows,
        longest=math.ceil(max(sizes) / rows),
        usual=max(1, round(statistics.fmean(sizes) / rows)),
        labelled=share,
        real=sum(lengths) / sum(sizes),
        steps=args.max_steps if args.max_steps > 0 else steps,
    )


def _check_length(model: PeftModel, batch: Batch, options: RunOptions) -> None:
    limit, added = room(model), sum(model.added())
    if batch.longest < 1 or (limit is not None and batch.longest > limit):
        raise ConfigError(
            f"Examples of {batch.longest} tokens were asked for, and {options.model.name!r} takes 1 to "
            f"{'any' if limit is None else limit}"
            + (f" beside the {added} that the method adds. " if added else ". ")
            + "Give another --length, or another data.max_length."
        )
